"""Parameters and multiply-adds by the counting rule of the papers: convolutions and linear layers, nothing else.

Published "FLOPs" are multiply-adds. Biases, norms, activations and pooling are not counted; with them left out,
ConvNeXt-T to XL come to within 0.05 % of OpenMMLab's counts, and to the figures that the paper prints. What attention
multiplies besides, :class:`ProductCount` finds; ConvNeXt has nothing of the kind.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def count_parameters(model: nn.Module) -> int:
    """Counts the values of all parameters, frozen ones among them; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_multiply_adds(model: nn.Module, *inputs: Any) -> int:
    """Counts the multiply-adds of the convolutions and linear layers in one forward pass in evaluation mode.

    A layer that is called twice counts twice. Seen are layers that are modules: an attention that multiplies by its
    weights itself is not. On the meta device (``with torch.device('meta')``) nothing is computed or stored.

    Args:
        model: on any device; left as it was.
        *inputs: of its forward, on that device; of a batch of N the multiply-adds of all N are counted.
    """
    with count_layers(model) as count, _evaluation_mode(model), torch.no_grad():
        model(*inputs)
    return count.multiply_adds


@dataclass
class LayerCount:
    """The multiply-adds so far."""

    multiply_adds: int = 0


@contextmanager
def count_layers(model: nn.Module) -> Iterator[LayerCount]:
    """Within this context, counts the multiply-adds of a model's convolutions and linear layers whenever they run."""
    count = LayerCount()

    def add(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        count.multiply_adds += _multiply_adds(layer, args[0], output)

    layers = (module for module in model.modules() if isinstance(module, (*_CONVS, *_TRANSPOSED_CONVS, nn.Linear)))
    handles = [layer.register_forward_hook(add) for layer in layers]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


class ProductCount(TorchDispatchMode):
    """Within this context, counts the multiply-adds of all convolutions and matrix products, layers or not.

    PyTorch's own formulas, at half their value: they count a multiplication and an addition as two.

    Attributes:
        multiply_adds: so far.
        unknown: names of operations run that are not PyTorch's own, about which it knows nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds = 0
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.overloadpacket in flop_registry:
            self.multiply_adds += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out) // 2
        elif func.namespace not in ('aten', 'prims'):
            self.unknown.add(func.name().partition('.')[0])
        return out


def _multiply_adds(layer: nn.Module, x: Tensor, y: Tensor) -> int:
    """The number of times that each weight of a layer is used, times the number of weights."""
    assert isinstance(layer.weight, Tensor)
    if isinstance(layer, nn.Linear):
        uses = x.numel() // layer.in_features
    elif isinstance(layer, _TRANSPOSED_CONVS):
        uses = x.numel() // layer.in_channels
    else:
        assert isinstance(layer, _CONVS)
        uses = y.numel() // layer.out_channels
    return uses * layer.weight.numel()


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, so that BatchNorm's statistics stay; then each module is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
