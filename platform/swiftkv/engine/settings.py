"""Settings of one vLLM engine, with vLLM's own meaning, and what they are in vLLM's arguments.

Imports no vLLM: configs are checked before anything heavy is loaded.
Called by: engine/llm.py, serving/.
"""

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from swiftkv.config import StrictModel
from swiftkv.engine import compiler

SKIPPING_KEY = "swiftkv_skipping"
"""Key of vLLM's `additional_config` that switches skipping off when it is False; the default is on."""

ROLE_KEY = "swiftkv_role"
"""Key of vLLM's `additional_config`: "full", or "prefill" for the first half alone; the default is full."""

DEFAULT_KV_CACHE_GIB = 1.0

STREAM_FORMAT = "swiftkv_stream"
"""vLLM's `load_format` for tensors that come from a registry (serving/streaming.py)."""


class WeightsSource(StrictModel):
    """A published version whose tensors an engine takes straight from the store."""

    store: str
    """Folder or URL of the registry."""
    reference: str
    """NAME@VERSION."""


class EngineSettings(StrictModel):
    """One engine on one machine."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and KV cache; auto takes the checkpoint's, and for one in float32 what vLLM prefers there."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Longest prompt plus answer in tokens; None takes the model's context, or what of it the KV cache can hold."""
    max_num_seqs: int = Field(default=32, ge=1)
    """Sequences in one engine step."""
    max_num_batched_tokens: int = Field(default=2048, ge=1)
    """Tokens in one engine step; longer prompts are prefilled in chunks of this."""
    long_prefill_token_threshold: int = Field(default=0, ge=0)
    """Tokens of one prompt in one engine step, so that short prompts do not wait until a long one is done; 0 gives a
    prompt what is left of the step."""
    enable_chunked_prefill: bool = True
    """Whether a prompt may be cut over several steps; without it prompts must fit one step."""
    enable_prefix_caching: bool = True
    """Whether a prompt's first tokens take KV that an earlier request left."""
    enforce_eager: bool | None = None
    """True never compiles; None compiles where there is a C++ compiler."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """Memory of the KV cache on each device, in GiB. None: 1, or on GPUs what gpu_memory_utilization leaves."""
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    """On GPUs, in place of kv_cache_gib: fraction of each GPU's memory that weights, activations and KV cache take
    together, so that the KV cache gets the rest. 0.9 is usual. None: kv_cache_gib says what the KV cache gets."""
    block_size: int | None = Field(default=None, ge=1)
    """Tokens in one block of the KV cache; None takes vLLM's (128 on CPUs; on GPUs its attention kernel's)."""
    cpu_cores: str | None = None
    """Cores that the engine computes on, such as "0" or "0-1", or with `tensor_parallel_size` 2 "0|1"; None leaves it
    to vLLM, which keeps one core for its own processes. (With both of two cores a model of 400 M parameters is 1.8
    times faster, one of 5 M decodes slower; jobs/LOG.md.)"""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """Of the KV cache; auto takes that of the weights, or what a quantised checkpoint names."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Processes that share every layer."""
    skipping: bool = True
    """Whether prompt tokens skip the later layers of a SwiftKV model; no effect on other models."""
    role: Literal["full", "prefill"] = "full"
    """What of a SwiftKV model is loaded: all of it, or the first half, which fills KV for a decode engine."""
    kv_transfer: Literal["none", "producer", "consumer"] = "none"
    """Whether KV goes to (prefill) or comes from (decode) another engine, over NIXL."""
    kv_lease_s: int = Field(default=30, ge=3)
    """Seconds for which a producer keeps KV that no engine has come for."""
    num_ngram_tokens: int = Field(default=0, ge=0)
    """Tokens that speculative decoding guesses per step from n-grams of the text so far; 0 guesses none."""
    max_loras: int = Field(default=0, ge=0)
    """LoRA adapters in one batch; 0 takes none. Of a SwiftKV model only the first layers can be adapted."""

    streamed_from: WeightsSource | None = None
    """Where the tensors come from, if not from files in the model's folder."""

    @field_validator("cpu_cores")
    @classmethod
    def _check_cores(cls, cores: str | None) -> str | None:
        if cores is not None and not re.fullmatch(r"\d+(-\d+)?([,|]\d+(-\d+)?)*", cores):
            raise ValueError('cores are numbers, such as "0", "0-1" or "0,2", with | between those of two processes')
        return cores

    @model_validator(mode="after")
    def _check_memory(self) -> "EngineSettings":
        if self.kv_cache_gib is not None and self.gpu_memory_utilization is not None:
            raise ValueError("kv_cache_gib and gpu_memory_utilization both say how large the KV cache is; give one")
        return self

    def lacks_compiler(self) -> bool:
        """Whether the engine runs eager only because this machine has no C++ compiler, which users are told."""
        return self.enforce_eager is None and not compiler.has_cxx_compiler()

    def is_eager(self) -> bool:
        """Whether the engine runs without compiling, on this machine."""
        return bool(self.enforce_eager) or self.lacks_compiler()

    def build_engine_arguments(self) -> dict[str, Any]:
        """The settings as vLLM's engine arguments."""
        names = ("dtype", "max_model_len", "max_num_seqs", "enable_chunked_prefill", "enable_prefix_caching")
        arguments: dict[str, Any] = {name: getattr(self, name) for name in names}
        arguments["max_model_len"] = self.max_model_len or -1  # vLLM: the most that the KV cache can hold
        arguments["max_num_batched_tokens"] = max(self.max_num_batched_tokens, self.max_num_seqs)
        arguments["long_prefill_token_threshold"] = self.long_prefill_token_threshold
        arguments["enforce_eager"] = self.is_eager()
        arguments |= {"load_format": "safetensors", "trust_remote_code": False}  # never a pickle, never its code
        if self.gpu_memory_utilization is None:
            arguments["kv_cache_memory_bytes"] = int((self.kv_cache_gib or DEFAULT_KV_CACHE_GIB) * 2**30)
        else:
            arguments["gpu_memory_utilization"] = self.gpu_memory_utilization
        if self.block_size is not None:
            arguments["block_size"] = self.block_size
        arguments |= {"kv_cache_dtype": self.kv_cache_dtype, "tensor_parallel_size": self.tensor_parallel_size}
        if self.streamed_from is not None:
            arguments |= {"load_format": STREAM_FORMAT, "model_loader_extra_config": self.streamed_from.model_dump()}
        if self.kv_transfer != "none":
            arguments["kv_transfer_config"] = {
                "kv_connector": "NixlConnector",
                "kv_connector_module_path": "swiftkv.engine.nixl",
                "kv_role": f"kv_{self.kv_transfer}",
                "kv_load_failure_policy": "recompute",  # a prompt whose KV was lost on the way is computed here
                "kv_connector_extra_config": {"kv_lease_duration": self.kv_lease_s},
            }
        if self.num_ngram_tokens:
            guess = {"method": "ngram", "num_speculative_tokens": self.num_ngram_tokens, "prompt_lookup_max": 4}
            arguments["speculative_config"] = guess
        if self.max_loras:
            arguments |= {"enable_lora": True, "max_loras": self.max_loras}
        own = ({} if self.skipping else {SKIPPING_KEY: False}) | ({} if self.role == "full" else {ROLE_KEY: self.role})
        return arguments | ({"additional_config": own} if own else {})

    def build_environment(self) -> dict[str, str]:
        """What vLLM's CPU build and torch read from the environment of the engine's process."""
        cores = {} if self.cpu_cores is None else {"VLLM_CPU_OMP_THREADS_BIND": self.cpu_cores}
        return cores | compiler.build_environment()
