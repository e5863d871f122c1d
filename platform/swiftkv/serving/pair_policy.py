"""The policy's settings of a prefill and a decode pool: limits from the pools, costs from the model's spec and the
achieved rates of the pools' hardware.

Whoever deploys a pair so writes only targets and what is special; what replicas measure corrects the costs later. Reads
the model's sizes and nothing else; decides nothing.
Called by: serving/autoscaling.py, serving/policy_check.py, bench/serve/shapes.py.
Calls: serving/source.py, serving/hardware.py, serving/policy.
"""

from typing import Any, NamedTuple

from swiftkv.config import parse_settings
from swiftkv.errors import ConfigError
from swiftkv.serving.config import PairedPool, PairSettings
from swiftkv.serving.hardware import CPU, count_kv_tokens
from swiftkv.serving.policy.costs import Costs, Hardware, build_costs
from swiftkv.serving.policy.settings import POOLS, PolicySettings, Pool
from swiftkv.serving.source import read_shape
from swiftkv.spec import SwiftKVSpec


class Rates(NamedTuple):
    """What one device (a GPU, a core) achieves."""

    flops_per_s: float
    """FLOPs per second in large matrix products."""
    memory_bytes_per_s: float
    """Bytes per second from its memory."""


ASSUMED_FLOPS_FRAC = 0.5
"""Of a GPU's peak in prefill. Assumed, not measured; what replicas report corrects it."""
ASSUMED_MEMORY_FRAC = 0.7
"""Of a GPU's memory rate in decode. Assumed, not measured."""


def _assume(peak_flops_per_s: float, peak_bytes_per_s: float) -> Rates:
    return Rates(ASSUMED_FLOPS_FRAC * peak_flops_per_s, ASSUMED_MEMORY_FRAC * peak_bytes_per_s)


RATES = {
    # Half of what two cores did: 294 GFLOP/s in prefill, and 1.5 GB of weights in each decode step of 62 ms (float32;
    # `swiftkv bench engine --rows prefill,tpot`, reports/engine).
    CPU: Rates(1.47e11, 1.2e10),
    # Dense 16-bit peaks and memory rates as the maker documents them, of the SXM form where there is one.
    "H100": _assume(989e12, 3.35e12),
    "H200": _assume(989e12, 4.8e12),
    "B200": _assume(2250e12, 8e12),
    "A100-40G": _assume(312e12, 1.555e12),
    "A100-80G": _assume(312e12, 2.039e12),
    "L40S": _assume(362e12, 0.864e12),
    "L4": _assume(121e12, 0.3e12),
}
"""By the names of a pool's `hardware`."""


def build_policy_settings(pair: PairSettings, settings: dict[str, Any], place: str) -> PolicySettings:
    """The policy's settings: those given, the rest from the pair.

    Raises: ConfigError naming `place` and the setting that is wrong, or says otherwise than the pool; what `read_shape`
    raises.
    """
    filled = {"costs": settings.get("costs") or build_pair_costs(pair).model_dump(), "drain": "waits"} | settings
    for pool in POOLS:
        limits, given = _describe_limits(pair, pool), settings.get(pool) or {}
        for name in limits.keys() & given:
            if given[name] != limits[name]:
                raise ConfigError(
                    f"{place}.{pool}.{name} is {given[name]}, and the pool's own settings say {limits[name]}. "
                    "Leave it out here: the pool's is taken."
                )
        filled[pool] = limits | given
    return parse_settings(filled, PolicySettings, place)


def build_pair_costs(pair: PairSettings) -> Costs:
    """The costs of a pair's model on its pools' hardware. Raises: ConfigError for hardware of unknown rates."""
    shape = read_shape(pair)
    spec, engine = SwiftKVSpec.from_hf_config(shape), pair.decode.engine
    value_bytes = 4 if engine.dtype == "float32" else 2
    kv_value_bytes = 1 if engine.kv_cache_dtype == "fp8" else value_bytes
    kv_tokens = count_kv_tokens(shape, engine, pair.decode.hardware) or 0
    prefill, decode = (
        Hardware(
            flops_per_s=rates.flops_per_s * devices,
            memory_bytes_per_s=rates.memory_bytes_per_s * devices,
            kv_bytes=kv_tokens * spec.compute_kv_bytes_per_token(kv_value_bytes),
        )
        for rates, devices in ((_find_rates(pool), _count_devices(pool)) for pool in (pair.prefill, pair.decode))
    )
    return build_costs(
        spec,
        prefill,
        decode,
        bytes_per_parameter=value_bytes,
        bytes_per_kv_value=kv_value_bytes,
        max_num_seqs=engine.max_num_seqs,
    )


def _describe_limits(pair: PairSettings, pool: Pool) -> dict[str, int]:
    settings = pair.prefill if pool == "prefill" else pair.decode
    return {
        "min_replicas": settings.min_replicas,
        "max_replicas": settings.max_replicas,
        "devices_per_replica": _count_devices(settings),
    }


def _find_rates(pool: PairedPool) -> Rates:
    if pool.hardware not in RATES:
        raise ConfigError(
            f"hardware is {pool.hardware}, whose rates are unknown; give policy_kwargs.settings.costs, or one of "
            f"{', '.join(RATES)}."
        )
    return RATES[pool.hardware]


def _count_devices(pool: PairedPool) -> int:
    """GPUs of a replica; on CPUs a replica is one device, taken as one core."""
    return 1 if pool.hardware == CPU else pool.engine.tensor_parallel_size
