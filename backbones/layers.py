"""The normalizations of ConvNeXt: tensors in, tensors out.

Layouts: N images, C channels, H rows, W columns; ``nchw`` and ``nhwc`` in a name say how a tensor is shaped.
"""

import torch
from torch import Tensor, nn


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of an ``(N, C, H, W)`` tensor.

    Mean and variance are taken in float32 whatever the dtype of the input: the official channels-first form squares
    in the input's dtype and overflows in float16 (facebookresearch/ConvNeXt issue 80). The result is shaped
    ``(N, C, H, W)`` and lies in memory as ``channels_last``, which is what the blocks compute in, so that one copy at
    the stem serves the whole network.

    Source: ``LayerNorm(data_format='channels_first')`` in facebookresearch/ConvNeXt models/convnext.py at 048efce.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes ``(N, C, H, W)`` to ``(N, C, H, W)``."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GRN(nn.Module):
    """Global response normalization of ConvNeXt V2, on ``(N, H, W, C)``.

    ``x + x * (gamma * n) + beta`` with ``n`` the spatial L2 norm of each channel over its mean across channels. Norm
    and factor are computed in float32: a sum of squares over a whole map overflows float16, and so does ``x * n``.

    Source: ConvNeXt V2 (arXiv 2301.00808) section 3.2; parameter shapes ``(1, 1, 1, C)`` as in
    facebookresearch/ConvNeXt-V2 models/utils.py.

    Args:
        channels: C.
        eps: added to the mean over channels.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x_nhwc: Tensor) -> Tensor:
        """Normalizes ``(N, H, W, C)`` to ``(N, H, W, C)``, in the dtype of the input."""
        dtype = torch.promote_types(x_nhwc.dtype, torch.float32)
        energy = torch.linalg.vector_norm(x_nhwc, dim=(1, 2), keepdim=True, dtype=dtype)
        scale = self.gamma * (energy / (energy.mean(dim=-1, keepdim=True) + self.eps))
        return torch.addcmul(x_nhwc + self.beta.to(x_nhwc.dtype), x_nhwc, scale.to(x_nhwc.dtype))


NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase, GRN)
"""Module classes whose parameters are scales and shifts of a normalization; weight decay leaves them alone."""
