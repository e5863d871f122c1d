"""How a checkpoint is quantised, in a line that is the same for two that are quantised alike.

All settings count but for which layers they leave out, so that two of an unknown kind are not taken for equal. Reads
what config.json holds; what a server quantises while it loads is not seen.
Called by: cli/tasks.py.
"""

import json
from collections.abc import Mapping
from typing import Any

UNQUANTISED = "none"

_NO_NUMBERS = frozenset(
    "ignore ignored_layers modules_to_not_convert targets format version quantization_status global_compression_ratio "
    "producer dataset tokenizer".split()
)
"""Keys, at any depth, that say which layers, by what tool and how stored, not in what numbers."""


def describe_quantisation(config: Mapping[str, Any]) -> str:
    """`none`, or the method and its settings as JSON. `config`: what config.json holds."""
    settings = config.get("quantization_config")
    if not settings:
        return UNQUANTISED
    kept = _strip(settings)
    method = kept.pop("quant_method", "unknown")
    return f"{method} {json.dumps(kept, sort_keys=True)}"


def _strip(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    kept = {key: _strip(entry) for key, entry in value.items() if key not in _NO_NUMBERS and entry is not None}
    if "config_groups" in kept:  # whose names say nothing
        kept["config_groups"] = sorted(
            kept["config_groups"].values(), key=lambda group: json.dumps(group, sort_keys=True)
        )
    return kept
