"""How a checkpoint is quantised, in a line that is the same for two that are quantised alike.

Reads config.json only; what a server quantises while it loads is not seen.
Called by: cli/tasks.py.
"""

from collections.abc import Mapping
from typing import Any

UNQUANTISED = "none"


def describe_quantisation(config: Mapping[str, Any]) -> str:
    """`none`, or method, numbers and KV cache, such as `activations int 8, compressed-tensors, weights int 8`.

    `config`: what config.json holds.
    """
    settings = config.get("quantization_config")
    if not settings:
        return UNQUANTISED
    words = {str(settings.get("quant_method", "unknown"))}
    for group in (settings.get("config_groups") or {}).values():
        for part, key in (("weights", "weights"), ("activations", "input_activations")):
            words.add(_describe_numbers(part, group.get(key)))
    words.add(_describe_numbers("KV cache", settings.get("kv_cache_scheme")))
    bits = settings.get("bits")
    words.add("" if bits is None else f"{bits} bits")
    return ", ".join(sorted(words - {""}))


def _describe_numbers(part: str, scheme: Mapping[str, Any] | None) -> str:
    return "" if not scheme else f"{part} {scheme.get('type')} {scheme.get('num_bits')}"
