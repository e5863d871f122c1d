"""Counts FLOPs of what torch computes, attention on CPUs included, which torch's own counter leaves out.

Called by: tests of distill/.
"""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def count_flops() -> FlopCounterMode:
    """A block whose FLOPs `get_total_flops` gives; plainly causal attention is half of all pairs."""
    return FlopCounterMode(display=False, custom_mapping=_ATTENTION)


def _count_attention(
    query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False, *_: Any, **__: Any
) -> int:
    return int(sdpa_flop_count(query, key, value)) // (2 if causal else 1)


def _count_attention_backward(
    upstream: Any, query: Any, key: Any, value: Any, _: Any, __: Any, dropout: float, causal: bool, **___: Any
) -> int:
    return int(sdpa_backward_flop_count(upstream, query, key, value)) // (2 if causal else 1)


_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _count_attention_backward,
}
