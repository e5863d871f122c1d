"""What can be set about serving a model from one pool or two. The engine's own settings are in engine/settings.py.

Imports neither ray nor vllm. Does not read the registry: a model is named here and fetched in `source`.
Called by: serving/app.py (as the typed arguments of a Serve config file), serving/deploy.py, cli/serve.py.
Calls: engine/settings.py, serving/hardware.py.
"""

import math

from pydantic import Field, field_validator, model_validator

from swiftkv.cluster import is_loopback
from swiftkv.config import StrictModel
from swiftkv.engine.settings import EngineSettings
from swiftkv.serving.hardware import CPU, check_engine


class PublishedVersion(StrictModel):
    """A version of a registry: the same one on every node and at any time, however its aliases move."""

    store: str
    """Registry: a folder's absolute path, or an object store's URL."""

    reference: str
    """NAME@VERSION."""

    digest: str
    """Of its files (registry/manifest.py)."""

    needs_base: bool = False
    """Whether the store lacks those of its files that are a teacher's: a node takes them from the hub or a folder."""


class ModelSettings(StrictModel):
    """What is served, and where it comes from."""

    model: str = Field(min_length=1)
    """NAME, NAME@VERSION or NAME@ALIAS in the registry, or the path of a checkpoint folder."""

    model_id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")
    """What clients put into `model`. None: the registry's name, or the folder's."""

    store: str | None = None
    """Registry: a folder or an object store's URL. None: the registry folder of the local state."""

    published: PublishedVersion | None = None
    """What `model` was when it was resolved; each replica has it on its own node before its engine starts. None: not
    resolved yet, or `model` is a folder."""

    stream: bool = False
    """Take the tensors straight from the store into the engine, verified, without a copy on the node's disk. For one
    engine per node: several share a copy, and each streams by itself."""

    tool_call_parser: str | None = None
    """How this model writes tool calls, by vLLM's name of it (llama3_json, hermes, …), so that it can call one of
    `tools` where it likes. None: only with `tool_choice` "required" or a function, which needs no parser."""


class PoolSettings(ModelSettings):
    """One model behind one pool of identical replicas."""

    engine: EngineSettings = EngineSettings(kv_cache_gib=0.5, max_num_seqs=16)
    """Of each replica's engine. The defaults fit beside everything else into two cores and 8 GB."""

    hardware: str = CPU
    """"cpu", or a GPU's type as Ray names it (H100). A replica takes `engine.tensor_parallel_size` GPUs of one node."""

    num_cpus: float = Field(default=1, ge=0)
    """CPUs a replica takes from Ray's count. Scheduling only; `engine.cpu_cores` says what it really uses."""

    num_replicas: int = Field(default=1, ge=1)
    """Engines, each with its own weights and KV cache."""

    max_ongoing_requests: int = Field(default=32, ge=1)
    """Requests one replica holds, running and waiting; more wait in the ingress, where another replica can take
    them. Ray's own default for LLMs (a billion) would put every request into the first queue."""

    @model_validator(mode="after")
    def _check_queue(self) -> "PoolSettings":
        check_engine(self.hardware, self.engine)
        if self.max_ongoing_requests < self.engine.max_num_seqs:
            raise ValueError(
                f"max_ongoing_requests ({self.max_ongoing_requests}) is less than engine.max_num_seqs "
                f"({self.engine.max_num_seqs}), so the engine could never be full; raise it or lower the other"
            )
        return self


class ServeSettings(PoolSettings):
    """A pool, and where its HTTP endpoint listens."""

    host: str = "127.0.0.1"
    """Address to bind; of loopback, because a pool asks nobody for a key."""

    port: int = Field(default=8000, ge=1, le=65535)
    """Port of the OpenAI-compatible endpoint."""

    @field_validator("host")
    @classmethod
    def _check_host(cls, host: str) -> str:
        if not is_loopback(host):
            raise ValueError(f"{host} is an address that others reach, and a pool asks nobody for a key")
        return host

    @property
    def base_url(self) -> str:
        """What an OpenAI client is given."""
        return f"http://{self.host}:{self.port}/v1"

    def pool(self) -> PoolSettings:
        """These settings without the endpoint's."""
        return PoolSettings.model_validate(self.model_dump(include=set(PoolSettings.model_fields)))


class HopSettings(StrictModel):
    """When a decode replica sends a prompt to the prefill pool, and what it does if that fails."""

    min_tokens: int | None = Field(default=None, ge=0)
    """Uncached prompt tokens from which on prompts are sent; None: where it is cheaper by what was measured."""

    min_tokens_unmeasured: int = Field(default=256, ge=0)
    """The same until both ways were measured."""

    timeout_s: float = Field(default=20.0, gt=0)
    """Seconds for the prefill pool's answer; then the decode replica prefills the prompt itself."""

    transfer_timeout_s: float = Field(default=20.0, gt=0)
    """Seconds from there to the first token, in which the prompt's KV comes and its turn in the decode engine; then
    the decode replica prefills the prompt itself. NIXL has no bound for a replica that is there and does not answer."""

    retry_s: float = Field(default=5.0, gt=0)
    """Seconds for which a prefill pool that failed is not asked again."""

    remeasure_s: float = Field(default=60.0, gt=0)
    """Seconds after which a pool that seemed too slow to ask is asked again, with one prompt of at least
    `min_tokens_unmeasured` tokens."""

    remembered_characters: int = Field(default=1 << 20, ge=0)
    """Of texts whose KV this replica may still have, so that they need no hop. About four a token of its cache."""


_CPU_BLOCK_TOKENS = 128
"""vLLM's own on CPUs (vLLM 0.29, platforms/cpu.py). On GPUs its attention kernel decides."""


class PairedPool(StrictModel):
    """One of the two pools."""

    engine: EngineSettings = EngineSettings(kv_cache_gib=0.5, max_num_seqs=16)
    """Of each replica's engine; its role and KV transfer are set by the pool."""

    hardware: str = CPU
    """"cpu", or a GPU's type as Ray names it (H100). A replica takes `engine.tensor_parallel_size` GPUs of one node."""

    num_cpus: float = Field(default=1, ge=0)
    """CPUs a replica takes from Ray's count. Scheduling only; `engine.cpu_cores` says what it really uses."""

    min_replicas: int = Field(default=1, ge=0)
    """Engines at least."""

    max_replicas: int = Field(default=1, ge=1)
    """Engines at most; more than `min_replicas` lets the policy choose."""

    max_ongoing_requests: int = Field(default=32, ge=1)
    """Requests one replica holds, running and waiting."""

    @model_validator(mode="after")
    def _check(self) -> "PairedPool":
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas ({self.max_replicas}) is less than min_replicas ({self.min_replicas}); raise it or "
                "lower the other"
            )
        if (self.engine.role, self.engine.kv_transfer) != ("full", "none"):
            raise ValueError("engine.role and engine.kv_transfer are set by the pool; leave them out")
        check_engine(self.hardware, self.engine)
        return self


class PairSettings(ModelSettings):
    """One model behind a prefill pool and a decode pool, between which KV moves by NIXL."""

    prefill: PairedPool = PairedPool()
    """Replicas with the first half of the model."""

    decode: PairedPool = PairedPool()
    """Replicas with the whole model, which answer."""

    hop: HopSettings = HopSettings()
    """When prompts go to the prefill pool."""

    kv_lease_s: int = Field(default=30, ge=3)
    """Seconds for which a prefill replica keeps KV that nobody has come for."""

    @model_validator(mode="after")
    def _check_agreement(self) -> "PairSettings":
        for name in ("dtype", "kv_cache_dtype", "tensor_parallel_size"):
            values = [getattr(pool.engine, name) for pool in (self.prefill, self.decode)]
            if values[0] != values[1]:
                raise ValueError(
                    f"prefill.engine.{name} is {values[0]} and decode.engine.{name} is {values[1]}: KV cannot move "
                    "between them; give both the same"
                )
        if (self.prefill.hardware == CPU) != (self.decode.hardware == CPU):
            raise ValueError("one pool is on CPUs and the other on GPUs: KV cannot move between them; give both GPUs")
        check_blocks(self.prefill, self.decode)
        check_lengths(self.prefill, self.decode)
        if self.decode.min_replicas == 0 and self.prefill.min_replicas > 0:
            raise ValueError("decode.min_replicas is 0 and prefill.min_replicas is not: nobody would take the KV")
        return self


def check_blocks(prefill: PairedPool, decode: PairedPool) -> None:
    """Raises: ValueError if a decode engine's block is not a whole number of a prefill engine's: NIXL copies those."""
    source, target = (
        pool.engine.block_size or (_CPU_BLOCK_TOKENS if pool.hardware == CPU else None) for pool in (prefill, decode)
    )
    if source is None or target is None:
        if source != target:
            raise ValueError("engine.block_size of one pool is left to vLLM; set it in prefill and decode, or in none")
    elif target % source:
        raise ValueError(
            f"prefill.engine.block_size is {source}, which does not divide decode.engine.block_size, {target}: KV "
            f"cannot move between them; the nearest that works is {math.gcd(source, target)} in prefill, or {target} "
            "in both"
        )


def check_lengths(prefill: PairedPool, decode: PairedPool) -> None:
    """Raises: ValueError if a prefill engine refuses prompts that a decode engine takes."""
    shorter, longer = prefill.engine.max_model_len, decode.engine.max_model_len
    if shorter is not None and (longer is None or longer > shorter):
        raise ValueError(
            f"prefill.engine.max_model_len is {shorter} and decode.engine.max_model_len is "
            f"{longer or 'what the model and its KV cache allow'}: longer prompts would be refused by one and taken "
            f"by the other; give both {longer or shorter}"
        )
