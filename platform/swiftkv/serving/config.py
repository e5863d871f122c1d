"""What can be set about serving one model from one pool. The engine's own settings are in engine/settings.py.

Imports neither ray nor vllm. Does not read the registry: a model is named here and fetched in `source`.
Called by: serving/app.py (as the typed arguments of a Serve config file), serving/deploy.py, cli/serve.py.
"""

from pydantic import Field, model_validator

from swiftkv.config import StrictModel
from swiftkv.engine.settings import EngineSettings


class PoolSettings(StrictModel):
    """One model behind one pool of identical replicas."""

    model: str = Field(min_length=1)
    """NAME, NAME@VERSION or NAME@ALIAS in the registry, or the path of a checkpoint folder."""

    model_id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")
    """What clients put into `model`. None: the registry's name, or the folder's."""

    store: str | None = None
    """Registry: a folder or an object store's URL. None: the registry folder of the local state."""

    stream: bool = False
    """Take the tensors straight from the store into the engine, verified, without a copy on the node's disk. For one
    engine per node: several share a copy, and each streams by itself."""

    engine: EngineSettings = EngineSettings(kv_cache_gib=0.5, max_num_seqs=16)
    """Of each replica's engine. The defaults fit beside everything else into two cores and 8 GB."""

    num_cpus: float = Field(default=1, ge=0)
    """CPUs a replica takes from Ray's count. Scheduling only; `engine.cpu_cores` says what it really uses."""

    num_replicas: int = Field(default=1, ge=1)
    """Engines, each with its own weights and KV cache."""

    max_ongoing_requests: int = Field(default=32, ge=1)
    """Requests one replica holds, running and waiting; more wait in the ingress, where another replica can take
    them. Ray's own default for LLMs (a billion) would put every request into the first queue."""

    @model_validator(mode="after")
    def _check_queue(self) -> "PoolSettings":
        if self.max_ongoing_requests < self.engine.max_num_seqs:
            raise ValueError(
                f"max_ongoing_requests ({self.max_ongoing_requests}) is less than engine.max_num_seqs "
                f"({self.engine.max_num_seqs}), so the engine could never be full; raise it or lower the other"
            )
        return self


class ServeSettings(PoolSettings):
    """A pool, and where its HTTP endpoint listens."""

    host: str = "127.0.0.1"
    """Address to bind. There is no authentication yet: anything but loopback is open to whoever reaches it."""

    port: int = Field(default=8000, ge=1, le=65535)
    """Port of the OpenAI-compatible endpoint."""

    @property
    def base_url(self) -> str:
        """What an OpenAI client is given."""
        return f"http://{self.host}:{self.port}/v1"

    def pool(self) -> PoolSettings:
        """These settings without the endpoint's."""
        return PoolSettings.model_validate(self.model_dump(include=set(PoolSettings.model_fields)))
