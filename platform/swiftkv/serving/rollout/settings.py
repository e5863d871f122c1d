"""What can be set about following an alias: which one, what a version's application is, and when a new one is good.

Imports neither ray nor vllm.
Called by: rollout/app.py (as the typed arguments of a Serve config file), serving/deploy.py.
"""

from typing import Any

from pydantic import Field

from swiftkv.config import StrictModel


class VersionTemplate(StrictModel):
    """The Serve application of a version, but for its model, which the rollout fills in. A version that runs stays as
    it was started; changes are for the next."""

    import_path: str = "swiftkv.serving.app:build_pair_version"
    """Its builder; `swiftkv.serving.app:build_pool_version` for one pool."""

    args: dict[str, Any] = {}  # noqa: RUF012  # pydantic copies defaults
    """The builder's settings without `model`, `model_id` and `store`."""

    autoscaling_policy: dict[str, Any] | None = None
    """As in a Serve config. None: as many replicas as `args` say."""

    runtime_env: dict[str, Any] | None = None
    """As in a Serve config."""


class Bounds(StrictModel):
    """How much worse than the stable version a new one may be. None: not looked at."""

    max_error_increase_frac: float | None = Field(default=0.01, ge=0, le=1)
    """Failed requests, as a part of all: the new version's less the stable one's."""

    max_ttft_ratio: float | None = Field(default=1.25, gt=0)
    """TTFT of streamed requests, geometric means: the new version's over the stable one's."""

    max_tpot_ratio: float | None = Field(default=1.25, gt=0)
    """Seconds per token after the first, the same way."""

    min_agreement_frac: float | None = Field(default=0.5, ge=0, le=1)
    """Prompts to which both versions begin their greedy answer with the same tokens, as a part of those compared."""


class RolloutSettings(StrictModel):
    """One model's versions, as an alias names them."""

    model: str = Field(min_length=1, pattern=r"^[^@/]+$")
    """Its name in the registry, without @: `alias` says which version is served."""

    alias: str = "production"
    """The word whose version is served."""

    store: str | None = None
    """Registry: a folder or an object store's URL. None: the registry folder of the local state."""

    model_id: str | None = None
    """What clients put into `model`, as the gateway's settings name it. None: `model`."""

    gateway: str = "gateway"
    """Name of the gateway's application, whose routes for the model are set."""

    version: VersionTemplate = VersionTemplate()
    """What is deployed for each version, as the application MODEL@VERSION."""

    share_frac: float = Field(default=0.1, gt=0, lt=1)
    """Part of the requests that a new version gets while it is watched."""

    min_requests: int = Field(default=100, ge=1)
    """Requests of the new version that must have ended before it is switched to. What is clearly worse is dropped
    before."""

    compared_frac: float = Field(default=0.1, ge=0, le=1)
    """Part of the answered requests whose prompt both versions are asked again; 0: none."""

    compared_tokens: int = Field(default=4, ge=1)
    """Greedy tokens in which both must be the same to agree."""

    min_compared: int = Field(default=20, ge=0)
    """Comparisons that must have been made before it is switched to."""

    bounds: Bounds = Bounds()
    """What it must keep to."""

    patience_s: float = Field(default=1800, gt=0)
    """Seconds after which the new version is judged by what was seen, however little. A version that was not asked
    enough and did nothing wrong is switched to: an idle service must get its new version too."""

    start_timeout_s: float = Field(default=900, gt=0)
    """Seconds in which a new version must run."""

    warm_requests: int = Field(default=4, ge=0)
    """Requests straight to a new version before it gets any of a client."""

    warm_prompt_tokens: int = Field(default=300, ge=1)
    """Tokens of their prompts; enough for the hop to the prefill pool, where there is one."""

    warm_timeout_s: float = Field(default=300, gt=0)
    """Seconds in which they must be answered. A first start compiles."""

    poll_s: float = Field(default=2, gt=0)
    """Seconds between two looks at alias, applications and counts."""

    @property
    def served_id(self) -> str:
        """What clients name."""
        return self.model_id or self.model

    def name_application(self, version: str) -> str:
        """The Serve application of a version."""
        return f"{self.model}@{version}"

    def build_arguments(self, version: str) -> dict[str, Any]:
        """The builder's settings for a version. It is named by its number: the alias may move while it starts."""
        named = {"model": self.name_application(version), "model_id": self.served_id}
        store = {} if self.store is None else {"store": self.store}
        return {**self.version.args, **named, **store}
