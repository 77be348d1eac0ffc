"""An inference copy of a model: every ConvNeXt block with its LayerNorm's affine map and its layer scale folded away.

``Linear(w * x + b)`` and ``gamma * Linear(x)`` are linear layers themselves, so the same numbers come out, within
float32 rounding, of fewer passes over memory.
"""

import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.convnext import ConvNeXtBlock, Linear
from backbones.kernels import cpu

Model = TypeVar('Model', bound=nn.Module)


def fold(model: Model) -> Model:
    """Copies a model for inference, with its ConvNeXt blocks folded.

    The given model, its weights and its checkpoints stay as they are; what is loaded or trained there later does not
    reach the copy. Folded weights go by other names than the official ones and are not part of the copy's
    ``state_dict``, so that no checkpoint of it is mistaken for the model's.

    Args:
        model: a backbone, or a detector or segmentor with one.

    Returns:
        The copy, in evaluation mode, without gradients.

    Raises:
        ValueError: if the model holds no ConvNeXt block, is in float16, or has other layers in the place of the
            linear ones, as adapters put them there.
    """
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    blocks = [(m, name) for m in folded.modules() for name, child in m.named_children() if type(child) is ConvNeXtBlock]
    if not blocks:
        raise ValueError(f'{type(model).__name__} holds no ConvNeXt block; there is nothing to fold')
    for parent, name in blocks:
        parent.add_module(name, FoldedBlock(getattr(parent, name)))
    return folded


class FoldedBlock(nn.Module):
    """A ConvNeXt block for inference only.

    Args:
        block: whose parameters are taken, as they are now.
    """

    def __init__(self, block: ConvNeXtBlock) -> None:
        super().__init__()
        self.dwconv, self.act, self.grn, self.eps = block.dwconv, block.act, block.grn, block.norm.eps
        w1, b1, w2, b2 = _folded_weights(block)
        for name, value in dict(w1=w1, b1=b1, w2=w2, b2=b2).items():
            self.register_buffer(name, value, persistent=False)
        self.fuses = block.kernels == 'auto' and isinstance(block.act, nn.GELU) and block.act.approximate == 'none'
        self._packed: tuple[Tensor, Tensor] | None = None
        self.eval()

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(N, C, H, W)`` to ``(N, C, H, W)``."""
        if self.training:
            raise RuntimeError('a folded model is for inference; train the one that it was folded from')
        x_nhwc = x.permute(0, 2, 3, 1)
        branch = F.layer_norm(self.dwconv(x).permute(0, 2, 3, 1), x_nhwc.shape[-1:], eps=self.eps)
        if self._fuses(x, branch):
            w1, w2 = self._pack(branch)
            branch = cpu.linear_gelu(branch, w1, self.b1)
            branch = branch if self.grn is None else self.grn(branch)
            return cpu.linear_add(branch, w2, self.b2, x_nhwc).permute(0, 3, 1, 2)
        branch = self.act(F.linear(branch, self.w1, self.b1))
        branch = branch if self.grn is None else self.grn(branch)
        return x + F.linear(branch, self.w2, self.b2).permute(0, 3, 1, 2)

    def _fuses(self, x: Tensor, branch: Tensor) -> bool:
        plain = self.fuses and not torch.is_autocast_enabled('cpu') and cpu.is_plain(x, self.w1)
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        return plain and not needs_gradient and x.dtype == self.w1.dtype and cpu.can_fuse_linear(branch)

    def _pack(self, branch: Tensor) -> tuple[Tensor, Tensor]:
        if self._packed is None:
            rows = branch.shape[:-1].numel()
            self._packed = cpu.packed(self.w1, rows), cpu.packed(self.w2, rows)
        return self._packed

    def _apply(self, fn: Any, recurse: bool = True) -> 'FoldedBlock':
        """Moves or casts; what is packed is packed anew."""
        self._packed = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_packed': None}  # which cannot be copied


@torch.no_grad()
def _folded_weights(block: ConvNeXtBlock) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights and biases of the two linear layers, computed in float64 and rounded once."""
    others = {type(layer).__name__ for layer in (block.pwconv1, block.pwconv2) if type(layer) is not Linear}
    if others:
        raise ValueError(f'a block has {", ".join(sorted(others))} in the place of a linear layer; merge it first')
    dtype = block.pwconv1.weight.dtype
    if dtype == torch.float16:
        # A layer scale of 1e-6 times a weight is zero there.
        raise ValueError('a float16 model cannot be folded without loss; fold it in float32 or bfloat16')
    names = (block.norm.weight, block.norm.bias, block.pwconv1.weight, block.pwconv1.bias)
    scale, shift, w1, b1 = (p.double() for p in names)
    w2, b2 = block.pwconv2.weight.double(), block.pwconv2.bias.double()
    w1, b1 = w1 * scale, b1 + w1 @ shift
    if block.gamma is not None:
        w2, b2 = w2 * block.gamma.double()[:, None], b2 * block.gamma.double()
    w1, b1, w2, b2 = (w.to(dtype) for w in (w1, b1, w2, b2))
    return w1, b1, w2, b2
