"""What can be set about the gateway: models and their versions, limits, capacity, tenants.

Imports neither ray nor vllm. Holds no tenant and no key: the tenants' file does (tenants.py).
Called by: gateway/app.py (as the typed arguments of a Serve config file), gateway/routes.py, gateway/admission.py.
"""

from decimal import Decimal
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from swiftkv.config import StrictModel

ModelId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")]

Price = Annotated[Decimal, Field(ge=0, max_digits=15, decimal_places=6)]
"""Of a million tokens, in the currency's main unit (dollars, not cents)."""


class Route(StrictModel):
    """One version of a model, and its part of the traffic."""

    application: str = Field(min_length=1)
    """Name of the Serve application whose ingress deployment is the version's LLM server. That server must know the
    model by the same id as the gateway: vLLM refuses other names."""

    weight: float = Field(default=1, ge=0, allow_inf_nan=False)
    """Part of the traffic, relative to the model's other routes. 0: none, not even while the others are away."""


class Capacity(StrictModel):
    """What all engines of one model hold together. More waits in the gateway's fair queue, not in an engine's own."""

    max_in_flight_sequences: int = Field(default=32, ge=1)
    """Sequences (a request has `n` for each of its prompts) that engines are given at once."""

    max_in_flight_prompt_tokens: int = Field(default=16384, ge=1)
    """Prompt tokens that engines are given before their first token is out. What an engine holds is in its own
    order, so this is how long one tenant can be made to wait for another: keep it near a second's worth."""

    prompt_tokens_per_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Prompt tokens/s of all engines together, from which TTFT is predicted. None: measured from streamed requests,
    and until there are some nothing is refused for its predicted TTFT."""

    max_queued_requests: int = Field(default=256, ge=1)
    """Requests of one tenant that wait. Per tenant, or one tenant's flood would take the places of all others."""


class Comparison(StrictModel):
    """Asking both versions of a model the same, to see how often they agree."""

    frac: float = Field(gt=0, le=1)
    """Part of the answered requests whose prompt both are asked in the background."""

    tokens: int = Field(ge=1)
    """Greedy tokens that both are asked for."""


class Targets(StrictModel):
    """What an answer must keep to count as good. Nothing is refused or sized by these."""

    ttft_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds to the first token. None: any."""

    tpot_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds per completion token after the first, on the answer's average. None: any."""


class Prices(StrictModel):
    """What a model's tokens cost its tenants."""

    currency: str = Field(pattern=r"^[A-Z]{3}$")
    """ISO 4217 code, such as USD. Charges in two currencies are never added together."""

    prompt: Price
    """Per million prompt tokens that were not cached."""

    cached: Price | None = None
    """Per million prompt tokens that were found in a cache, instead of `prompt`. None: as `prompt`."""

    completion: Price
    """Per million completion tokens."""


class ModelSettings(StrictModel):
    """One model that clients can name."""

    routes: list[Route] = Field(default=[])
    """Its versions. Which one a request goes to depends on its id alone, so a repeated id gets the same version. Empty:
    an application that follows an alias sets them (serving/rollout); until then the model answers 503."""

    comparison: Comparison | None = None
    """While two versions are compared. Set by that application too."""

    capacity: Capacity = Capacity()
    """Of the model, not of each version."""

    targets: Targets = Targets()
    """Of each request: goodput counts whole answers within them."""

    prices: Prices | None = None
    """By which each request is charged, as they were when it came. None: nothing is charged."""

    @model_validator(mode="after")
    def _check_routes(self) -> "ModelSettings":
        names = [route.application for route in self.routes]
        if len(names) != len(set(names)):
            raise ValueError(f"an application is named twice in routes {names}; give each one weight")
        if names and not any(route.weight for route in self.routes):
            raise ValueError("every route has weight 0, so no request could be answered; raise one")
        return self


class Limits(StrictModel):
    """Bounds of every request, whoever sends it."""

    max_body_bytes: int = Field(default=4 << 20, ge=1)
    """Bytes of a request's body; 413 beyond."""

    max_prompt_tokens: int = Field(default=131072, ge=1)
    """Prompt tokens of a request; 400 beyond. Counted where token ids are given, otherwise a token for each 4 bytes;
    the model's own limit is checked exactly, by the engine."""

    max_sequences: int = Field(default=128, ge=1)
    """Sequences of a request (`n` times its prompts); 400 beyond."""

    assumed_output_tokens: int = Field(default=256, ge=1)
    """Output tokens that a request without `max_tokens` is taken for, until it has ended."""

    deadline_s: float = Field(default=600, gt=0, allow_inf_nan=False)
    """Seconds that a request may take in all when it does not say (header `x-request-timeout-s`); 504 after."""

    max_deadline_s: float = Field(default=3600, gt=0, allow_inf_nan=False)
    """Seconds that a request may ask for; 400 beyond."""

    ttft_target_s: float | None = Field(default=30, gt=0, allow_inf_nan=False)
    """Seconds to the first token beyond which a request is refused at once (429), unless nothing is ahead of it.
    None: refused only if its first token would come after its deadline."""


class GatewaySettings(StrictModel):
    """The gateway: one HTTP endpoint before any number of model versions."""

    models: dict[ModelId, ModelSettings] = Field(min_length=1)
    """By the name that clients put into `model`."""

    tenants_file: str | None = None
    """YAML or JSON file of tenants and hashes of their keys, on every node that runs a gateway; read again when it
    changes. None: no keys, everyone is the tenant `anonymous`; for loopback only."""

    usage_store: str | None = None
    """A folder's absolute path or a bucket's URL, to which each request's tenant, model, tokens and charge are written
    every five seconds, for `swiftkv usage`; every node that runs a gateway must reach it. Read at the start. None:
    nothing is written."""

    limits: Limits = Limits()
    """Bounds of every request."""

    shared_prefix_cache: bool = False
    """Let tenants hit each other's cached prefixes. Faster where they share prompts, but response times then tell
    one tenant what another has asked."""

    num_replicas: int = Field(default=1, ge=1)
    """Gateway processes. Limits hold over all of them."""

    max_ongoing_requests: int = Field(default=1000, ge=1)
    """Requests that one gateway process holds, waiting ones included."""

    lease_s: float = Field(default=5, gt=0, allow_inf_nan=False)
    """Seconds without a sign of life after which a gateway's places are given to others."""

    @field_validator("usage_store")
    @classmethod
    def _check_usage_store(cls, given: str | None) -> str | None:
        if given is not None and "://" not in given and not Path(given).expanduser().is_absolute():
            raise ValueError(
                "it is a relative folder, another one for each process; give an absolute path or a bucket's URL"
            )
        return given

    @model_validator(mode="after")
    def _check_deadlines(self) -> "GatewaySettings":
        if self.limits.deadline_s > self.limits.max_deadline_s:
            raise ValueError(
                f"limits.deadline_s ({self.limits.deadline_s}) is more than limits.max_deadline_s "
                f"({self.limits.max_deadline_s}); lower it or raise the other"
            )
        return self
