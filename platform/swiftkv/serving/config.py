"""What can be set about serving one model from one pool. Holds no defaults of the engine that users need not know.

Imports neither ray nor vllm. Does not read the registry: a model is named here and fetched in `source`.
Called by: serving/app.py (as the typed arguments of a Serve config file), serving/deploy.py, cli/serve.py.
"""

from typing import Literal

from pydantic import Field, model_validator

from swiftkv.config import StrictModel


class PoolSettings(StrictModel):
    """One model behind one pool of identical replicas."""

    model: str = Field(min_length=1)
    """NAME, NAME@VERSION or NAME@ALIAS in the registry, or the path of a checkpoint folder."""

    model_id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")
    """What clients put into `model`. None: the registry's name, or the folder's."""

    store: str | None = None
    """Registry: a folder or an object store's URL. None: the registry folder of the local state."""

    max_model_len: int | None = Field(default=None, ge=1)
    """Prompt and completion tokens of one request together. None: what the checkpoint's config allows."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and activations. auto: the checkpoint's own (float32 becomes float16 or bfloat16 in vLLM)."""

    kv_cache_gib: float = Field(default=0.5, gt=0)
    """GiB of KV cache per replica, allocated at start. 0.5 fits beside everything else into 8 GB."""

    max_num_seqs: int = Field(default=16, ge=1)
    """Sequences decoded together in one replica. More does not help two cores, and each costs latency."""

    max_num_batched_tokens: int = Field(default=2048, ge=1)
    """Tokens in one engine step: longer prompts are prefilled in chunks, so that others' decoding goes on."""

    num_threads: int | None = Field(default=None, ge=1)
    """Compute threads per replica. None: the machine's cores, divided among the replicas."""

    num_cpus: float = Field(default=1, ge=0)
    """CPUs a replica takes from Ray's count. Scheduling only; `num_threads` is what it really uses."""

    enforce_eager: bool | None = None
    """True: no compilation, faster start, slower tokens. None: eager only where no C++ compiler works."""

    num_replicas: int = Field(default=1, ge=1)
    """Engines, each with its own weights and KV cache."""

    max_ongoing_requests: int = Field(default=32, ge=1)
    """Requests one replica holds, running and waiting; more wait in the ingress, where another replica can take
    them. Ray's own default for LLMs (a billion) would put every request into the first queue."""

    @model_validator(mode="after")
    def _check_queue(self) -> "PoolSettings":
        if self.max_ongoing_requests < self.max_num_seqs:
            raise ValueError(
                f"max_ongoing_requests ({self.max_ongoing_requests}) is less than max_num_seqs "
                f"({self.max_num_seqs}), so the engine could never be full; raise it or lower max_num_seqs"
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
