"""Which dtype matrix products are computed in right now. Sets nothing.

Called by: model/states.py, distill/losses.py.
"""

import torch
from torch import Tensor


def find_product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to which autocast brings this tensor for a product, or the tensor's own without autocast."""
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype
