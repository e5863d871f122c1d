"""Which dtype matrix products are computed in right now, and which the processor is good at. Sets nothing.

Called by: model/states.py, distill/losses.py, distill/loop.py, bench/pairs.py, examples.
"""

import torch
from torch import Tensor


def find_product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to which autocast brings this tensor for a product, or the tensor's own without autocast."""
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def has_bfloat16_instructions() -> bool:
    """Whether this CPU multiplies bfloat16 itself (AVX512-BF16 or AMX); emulated, it is slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
