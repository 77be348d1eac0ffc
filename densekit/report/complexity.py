"""Parameters and multiply-adds by the counting rule of the papers: convolutions and linear layers, nothing else.

Published "FLOPs" are multiply-adds. Biases, norms, activations and pooling are not counted; with them left out,
ConvNeXt-T to XL come to within 0.05 % of OpenMMLab's counts, and to the figures that the paper prints.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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
    total = 0

    def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal total
        total += _multiply_adds(module, args[0], output)

    layers = (module for module in model.modules() if isinstance(module, (*_CONVS, *_TRANSPOSED_CONVS, nn.Linear)))
    handles = [layer.register_forward_hook(add) for layer in layers]
    try:
        with _evaluation_mode(model), torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return total


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
