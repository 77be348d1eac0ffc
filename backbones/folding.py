"""A model for inference: every ConvNeXt block with its LayerNorm's affine map and its layer scale folded away.

``Linear(w * x + b)`` and ``gamma * Linear(x)`` are linear layers themselves, so the same numbers come out, within
float32 rounding, of fewer passes over memory.
"""

import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.convnext import ConvNeXtBlock, Linear, altered
from backbones.kernels import choice, cpu
from backbones.kernels.dtypes import product_dtype

Model = TypeVar('Model', bound=nn.Module)


def fold(model: Model, *, in_place: bool = False) -> Model:
    """Folds the ConvNeXt blocks of a model, for inference.

    Without ``in_place`` the given model, its weights and its checkpoints stay as they are; what is loaded or trained
    there later does not reach the copy. Folded weights go by other names than the official ones and are not part of
    the ``state_dict``, so that no checkpoint of a folded model is mistaken for the model's.

    Args:
        model: a backbone, or a detector or segmentor with one.
        in_place: change the given model, which gives up the weights that were folded, block by block.

    Returns:
        The copy, or the model itself, in evaluation mode, without gradients.

    Raises:
        ValueError: if the model holds no ConvNeXt block, is in float16 or sharded, has other layers in the place of
            the linear ones or of the LayerNorm, as adapters put them there, or has hooks on them or on every module,
            or functions in the place of their own ``forward``. It is unchanged then.
    """
    if reason := why_not(model):
        raise ValueError(f'{type(model).__name__} cannot be folded: {reason}')
    folded = (model if in_place else copy.deepcopy(model)).eval().requires_grad_(False)
    for parent, name in _places(folded):
        parent.add_module(name, FoldedBlock(getattr(parent, name)))
    return folded


def why_not(model: nn.Module) -> str | None:
    """Why :func:`fold` refuses a model, in words; None if it does not."""
    places = _places(model)
    if not places:
        return 'it holds no ConvNeXt block; there is nothing to fold'
    return next((reason for parent, name in places if (reason := _obstacle(getattr(parent, name)))), None)


def runs_on_triton(model: nn.Module, dtype: torch.dtype | None = None) -> bool:
    """Whether blocks of a model run on Triton kernels where it is now; folded ones never do.

    Args:
        model: a backbone, or a detector or segmentor with one.
        dtype: of the products: that of the activations, or autocast's. Not given, any that the kernels take.
    """
    blocks = [getattr(parent, name) for parent, name in _places(model)]
    return any(
        block.kernels == 'triton' or (block.kernels == 'auto' and choice.is_proven(block.pwconv1.weight.device, dtype))
        for block in blocks
    )


def _places(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Modules that have a ConvNeXt block, each with the block's name."""
    return [(m, name) for m in model.modules() for name, child in m.named_children() if type(child) is ConvNeXtBlock]


def _obstacle(block: ConvNeXtBlock) -> str | None:
    linear = (block.pwconv1, block.pwconv2)
    others = {type(layer).__name__ for layer in linear if type(layer) is not Linear}
    others |= {type(block.norm).__name__} if type(block.norm) is not nn.LayerNorm else set()
    if others:
        return f'a block has {", ".join(sorted(others))} in the place of a layer that folds; merge it first'
    weights = [weight for layer in (block.norm, *linear) for weight in layer.parameters()]
    if kinds := {type(weight).__name__ for weight in weights} - {'Parameter'}:
        return f'its weights are {", ".join(sorted(kinds))}, as sharding has them; load them into a whole model'
    if block._forward_hooks or block._forward_pre_hooks or block._backward_hooks or block._backward_pre_hooks:
        return 'a block has a hook, which would no longer be called; remove it first'
    if not {'forward', '_forward'}.isdisjoint(vars(block)):
        return 'a block has another forward function, which would no longer be called; restore its own first'
    if reason := altered(block, ('norm', 'pwconv1', 'pwconv2', 'drop_path')):
        return f'in a block {reason}, which folding would pass over; undo that first'
    if block.pwconv1.weight.dtype == torch.float16:
        # A layer scale of 1e-6 times a weight is zero there.
        return 'it is in float16, which loses small layer scales; fold it in float32 or bfloat16'
    return None


_FLOAT16 = 'small layer scales are lost there. Take bfloat16 or float32, or the model without folding'


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
        self.scaled = block.gamma is not None
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
        if self.scaled and product_dtype(x) == torch.float16:
            raise RuntimeError(f'a folded model cannot run in float16: {_FLOAT16}')
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
        """Moves or casts; what is packed is packed anew.

        Raises:
            RuntimeError: if it would become float16. What lies before this block in the model already is, then.
        """
        if self.scaled and fn(self.w2[:0]).dtype == torch.float16:
            raise RuntimeError(f'a folded model cannot become float16, and was changed in part: {_FLOAT16}')
        self._packed = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_packed': None}  # which cannot be copied


@torch.no_grad()
def _folded_weights(block: ConvNeXtBlock) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights and biases of the two linear layers, computed in float64 and rounded once."""
    dtype = block.pwconv1.weight.dtype
    names = (block.norm.weight, block.norm.bias, block.pwconv1.weight, block.pwconv1.bias)
    scale, shift, w1, b1 = (p.double() for p in names)
    w2, b2 = block.pwconv2.weight.double(), block.pwconv2.bias.double()
    w1, b1 = w1 * scale, b1 + w1 @ shift
    if block.gamma is not None:
        w2, b2 = w2 * block.gamma.double()[:, None], b2 * block.gamma.double()
    w1, b1, w2, b2 = (w.to(dtype) for w in (w1, b1, w2, b2))
    return w1, b1, w2, b2
