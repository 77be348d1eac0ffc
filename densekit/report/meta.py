"""Models on the meta device: built from a config and run in seconds at any size, without weights, data or memory."""

import copy
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


def build_on_meta(cfg: Config) -> nn.Module:
    """Builds the model of a config in evaluation mode; weights that the config names are not read.

    Args:
        cfg: as ``load_config`` gives it.
    """
    scope = DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine'))
    with scope, torch.device('meta'), _RatesWithValues():
        model = MODELS.build(copy.deepcopy(cfg.model))  # some models write into their config
    model.eval()
    return model


class _RatesWithValues(TorchFunctionMode):
    """Keeps linspace off the meta device: mmdet's and mmseg's backbones read drop path rates from its result."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function."""
        kwargs = kwargs or {}
        return func(*args, **({'device': 'cpu', **kwargs} if func is torch.linspace else kwargs))


class SizesWithValues(TorchDispatchMode):
    """Within this context, models can run on the meta device that read sizes of feature maps from tensors.

    Deformable attention does. Whole numbers stay on the CPU when they are sent to the meta device, so that they can be
    read; an operation on them and a tensor of the meta device sees them without their values.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation."""
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten._to_copy.default and args[0].is_cpu and not args[0].is_floating_point():
            kwargs.pop('device', None)
        elif any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs))):
            args, kwargs = tree_map_only(Tensor, _without_values, (args, kwargs))
        return func(*args, **kwargs)


def _without_values(tensor: Tensor) -> Tensor:
    """The same on the meta device; single values may stay on the CPU beside it."""
    return tensor if tensor.is_meta or tensor.dim() == 0 else torch.empty_like(tensor, device='meta')
