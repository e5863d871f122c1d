"""What a replica runs on: what it takes from Ray, and by arithmetic what its devices' memory holds.

Arithmetic on the model's config and the engine's settings; looks at no device. Imports neither ray nor vllm.
Called by: serving/config.py, serving/pools.py, serving/checks.py, serving/placement.py. Calls: spec.py.
"""

from collections.abc import Mapping
from typing import Any

from swiftkv.engine.settings import DEFAULT_KV_CACHE_GIB, EngineSettings
from swiftkv.spec import SwiftKVSpec

CPU = "cpu"
"""The kind of hardware that is no GPU."""

GPU_BYTES = {
    "H100": 80e9,
    "H200": 141e9,
    "B200": 180e9,
    "A100-40G": 40e9,
    "A100-80G": 80e9,
    "L40S": 48e9,
    "L4": 24e9,
}
"""Memory of one GPU as its maker documents it, by Ray's name. Of others nothing is computed, and so nothing refused."""

OTHER_BYTES = 3e9
"""On each GPU, beside weights and KV cache: CUDA context, graphs, activations of a step. Assumed, not measured."""

Bundle = dict[str, float]
"""Ray's resources that are taken together on one node."""


def check_engine(hardware: str, engine: EngineSettings) -> None:
    """Raises: ValueError for a setting of the engine that its hardware does not have."""
    if hardware == CPU and engine.gpu_memory_utilization is not None:
        raise ValueError('hardware is "cpu", which has no gpu_memory_utilization; give engine.kv_cache_gib')
    if hardware != CPU and engine.cpu_cores is not None:
        raise ValueError(f"hardware is {hardware}, so the engine does not compute on cpu_cores; leave it out")
    if hardware != CPU and engine.gpu_memory_utilization is None and engine.kv_cache_gib is None:
        raise ValueError(f"hardware is {hardware}: give engine.gpu_memory_utilization (0.9 is usual) or kv_cache_gib")


def build_bundles(hardware: str, num_cpus: float, num_devices: int) -> list[Bundle]:
    """What one replica takes: on CPUs one bundle for all of it, on GPUs one for each, the first with its CPUs."""
    if hardware == CPU:
        return [{"CPU": num_cpus}]
    return [{"CPU": num_cpus, "GPU": 1.0}] + [{"GPU": 1.0} for _ in range(num_devices - 1)]


def compute_kv_token_bytes(config: Mapping[str, Any], engine: EngineSettings) -> float:
    """Bytes of KV cache that a token takes on each device of a replica; `config` is the model's config.json."""
    spec = SwiftKVSpec.from_hf_config(config)
    value_bytes = 1 if engine.kv_cache_dtype == "fp8" else _value_bytes(engine)
    # Devices share the KV heads; where there are more devices than heads, several hold the same.
    shares = min(engine.tensor_parallel_size, spec.shape.num_key_value_heads)
    return spec.compute_kv_bytes_per_token(value_bytes) / shares


def compute_device_weight_bytes(config: Mapping[str, Any], engine: EngineSettings) -> float:
    """Bytes of weights on each device of a replica; of quantised checkpoints a lower bound (half a byte each)."""
    spec = SwiftKVSpec.from_hf_config(config)
    quantised = config.get("quantization_config") or config.get("quantization")
    parameter_bytes = 0.5 if quantised else _value_bytes(engine)
    compute = spec.compute_prefill_weight_bytes if engine.role == "prefill" else spec.compute_weight_bytes
    return compute(parameter_bytes) / engine.tensor_parallel_size


def compute_kv_cache_bytes(config: Mapping[str, Any], engine: EngineSettings, hardware: str) -> float | None:
    """Bytes of KV cache on each device; 0 or less if its memory does not hold the rest. None: a GPU of unknown size."""
    if engine.gpu_memory_utilization is None:
        return (engine.kv_cache_gib or DEFAULT_KV_CACHE_GIB) * 2**30
    if hardware not in GPU_BYTES:
        return None
    usable = engine.gpu_memory_utilization * GPU_BYTES[hardware]
    return usable - compute_device_weight_bytes(config, engine) - OTHER_BYTES


def count_kv_tokens(config: Mapping[str, Any], engine: EngineSettings, hardware: str) -> float | None:
    """Tokens whose KV one replica holds. None: a GPU of unknown size."""
    kv_bytes = compute_kv_cache_bytes(config, engine, hardware)
    return None if kv_bytes is None else max(0.0, kv_bytes) / compute_kv_token_bytes(config, engine)


def _value_bytes(engine: EngineSettings) -> int:
    # auto is never float32: vLLM takes 16 bits for a checkpoint in float32 (vLLM 0.29, config/model.py).
    return 4 if engine.dtype == "float32" else 2
