"""In which dtype a block is computed."""

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """Of convolutions and matrix products of x: autocast's dtype where it is on, else that of x."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def math_dtype(x: Tensor) -> torch.dtype:
    """Of sums and statistics: float32, and float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)
