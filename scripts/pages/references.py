"""The reference of every file that a user writes: recipes, Serve configs with their policy and rollout, tenants, gates.

Called by: write.py. Calls: settings.py; the classes are those that check the files.
"""

from dataclasses import dataclass

from pydantic import BaseModel

from pages.markdown import MADE
from pages.settings import build_sections
from swiftkv.distill.recipe import Recipe
from swiftkv.evaluate.gates import Gate
from swiftkv.serving.config import PairSettings, PoolSettings
from swiftkv.serving.gateway.settings import GatewaySettings
from swiftkv.serving.gateway.tenants import TenantsFile
from swiftkv.serving.policy.settings import PolicySettings
from swiftkv.serving.rollout.settings import RolloutSettings


@dataclass(frozen=True)
class Page:
    """One page of docs/reference."""

    title: str
    intro: str
    roots: tuple[type[BaseModel], ...]
    source: str


_NULL = "`null` (None in the texts) means that a key is as good as left out; what that does stands beside it."
_EVERYWHERE = f"An unknown key is an error that names the keys that are allowed. {_NULL}"

PAGES = {
    "recipe": Page(
        "Recipes",
        f"""\
A recipe is everything that defines a distillation run, as YAML. `swiftkv distill RECIPE --dry-run` prints it resolved,
with what it would take; `--set KEY=VALUE` replaces one value, such as `--set training.steps=20`; every run keeps its
own as `recipe.yaml`. Recipes that work lie in [jobs/recipes](../../jobs/recipes). [Distilling a model of your
own](../distill.md) says which values to choose. {_EVERYWHERE}""",
        (Recipe,),
        "platform/swiftkv/distill/recipe.py",
    ),
    "serving": Page(
        "Serve configs",
        f"""\
A Serve config is Ray Serve's own file; ours are the `args` of its applications, chosen by `import_path`:

| `import_path` | `args` | what it is |
| --- | --- | --- |
| `swiftkv.serving.app:build_app` | [PoolSettings](#poolsettings) | one pool with an endpoint of its own |
| `swiftkv.serving.app:build_pool_version` | [PoolSettings](#poolsettings) | one pool for a gateway to call |
| `swiftkv.serving.app:build_pair_app` | [PairSettings](#pairsettings) | two pools with an endpoint of their own |
| `swiftkv.serving.app:build_pair_version` | [PairSettings](#pairsettings) | two pools for a gateway to call |
| `swiftkv.serving.gateway.app:build_gateway_app` | [GatewaySettings](gateway.md#gatewaysettings) | the gateway |
| `swiftkv.serving.rollout.app:build_rollout_app` | [RolloutSettings](rollout.md#rolloutsettings) | follows an alias |

An application of two pools may have an `autoscaling_policy`, whose settings are on [a page of their own](policy.md).
Configs that work lie in [deployments/serve](../../deployments/serve); `swiftkv serve FILE` checks one, and says what
would work, before anything starts. {_EVERYWHERE}""",
        (PoolSettings, PairSettings),
        "platform/swiftkv/serving/config.py and platform/swiftkv/engine/settings.py",
    ),
    "policy": Page(
        "The policy's settings",
        f"""\
What stands in an application's `autoscaling_policy` beside its name:

```yaml title="Application's policy"
policy_function: swiftkv.serving.autoscaling:PoolPolicy
policy_kwargs:
  settings:
    targets: {{ttft_s: 2.0, tpot_s: 0.05}}
    device_budget: 8
```

In a config, `policy_kwargs` also has `pair: *pair`, with `args: &pair` above it: the limits of both pools and
`costs` are then taken from there and are left out here, and so is `drain`. {_EVERYWHERE}""",
        (PolicySettings,),
        "platform/swiftkv/serving/policy/settings.py and costs.py",
    ),
    "gateway": Page(
        "The gateway's settings and its tenants",
        f"""\
The gateway's `args` in a Serve config ([GatewaySettings](#gatewaysettings)), and the file of tenants that they may name
([TenantsFile](#tenantsfile)). {_EVERYWHERE}""",
        (GatewaySettings, TenantsFile),
        "platform/swiftkv/serving/gateway/settings.py and tenants.py",
    ),
    "rollout": Page(
        "Rollouts",
        f"""\
The `args` of the application that follows a registry's alias. {_EVERYWHERE}""",
        (RolloutSettings,),
        "platform/swiftkv/serving/rollout/settings.py",
    ),
    "gates": Page(
        "Gates",
        f"""\
Limits that the figures of a version must keep before it may be promoted, for `swiftkv evaluate … --gate FILE`. Gates
that work lie in [jobs/gates](../../jobs/gates). A figure that was not measured does not pass. {_EVERYWHERE}""",
        (Gate,),
        "platform/swiftkv/evaluate/gates.py",
    ),
}


def build_pages() -> dict[str, str]:
    """The pages by name."""
    return {name: _build_page(page) for name, page in PAGES.items()}


def _build_page(page: Page) -> str:
    known: set[type[BaseModel]] = set()
    sections = [build_sections(root, known=known) for root in page.roots]
    made = MADE.format(source=page.source)
    return f"{made}\n# {page.title}\n\n{page.intro}\n\n" + "\n".join(sections)
