"""The stock form of a config: what of ours stands in for a class of mmdet, mmseg or mmengine becomes that class.

Found by inheritance, so a class of ours that extends one of theirs needs no entry here. The backbone becomes
mmpretrain's ConvNeXt, which the stock recipes have, else timm's.
"""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, OPTIM_WRAPPERS, TASK_UTILS
from torch import Tensor, nn

from densekit.benchmark.mmpretrain import convnext_class
from densekit.benchmark.peers import Arch, StageOutputs, builders, sizes
from densekit.engine.config_check import accepted_keys

_OURS = ('densekit', 'backbones')
_THEIRS = ('mmdet', 'mmseg', 'mmcv', 'mmengine')
_READ_BY_BUILDERS = {'type', '_scope_', 'constructor', 'paramwise_cfg', 'optimizer'}
_FASTER = ('fused', 'foreach', 'capturable')  # choices of an optimizer that the stock recipes do not make


class BenchmarkBackbone(nn.Module):
    """timm's ConvNeXt with a LayerNorm at each output, as a backbone of a config.

    Args:
        arch: a name in ``ARCHS``, or depths and channels.
        drop_path_rate: of the last block.
    """

    def __init__(self, arch: Arch, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        model = builders(torch.device('cpu'))[0]['timm'](arch, drop_path_rate)
        assert isinstance(model, StageOutputs)
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps ``(N, 3, H, W)`` to one ``(N, C, H, W)`` per stage."""
        return self.model(x)

    def init_weights(self) -> None:
        """Leaves timm's own."""


def stock_form(cfg: Config) -> tuple[Config, list[str]]:
    """Replaces our types by the stock ones.

    Args:
        cfg: of a recipe; not changed.

    Returns:
        The config, and what was done, one short text for each replacement.

    Raises:
        ValueError: if the backbone is not ConvNeXt V1, for which alone there is a stock form.
    """
    cfg = copy.deepcopy(cfg)
    done: list[str] = []
    scope = cfg.get('default_scope', 'mmengine')
    if inspect.getmodule(class_of(cfg.model.backbone.type, scope, (MODELS,))).__name__.startswith('backbones'):  # type: ignore[union-attr]
        cfg.model.backbone, text = _stock_backbone(cfg.model.backbone)
        done.append(text)
    _replace(cfg.model, scope, (MODELS, TASK_UTILS), done)
    _replace_optimizer(cfg, scope, done)
    return cfg, list(dict.fromkeys(done))


def _stock_backbone(backbone: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    arch = backbone.get('arch', 'tiny')
    if backbone['type'].rpartition('.')[2] != 'ConvNeXt' or backbone.get('use_grn'):
        raise ValueError(
            f'there is a stock form of recipes with ConvNeXt V1; this one has {backbone["type"]} with '
            f'use_grn={backbone.get("use_grn", False)}'
        )
    depths, channels = sizes(arch)
    drop_path = backbone.get('drop_path_rate', 0.0)
    try:
        convnext_class()
    except ImportError as error:
        if 'BenchmarkBackbone' not in MODELS:
            MODELS.register_module(module=BenchmarkBackbone)
        return dict(
            type='mmengine.BenchmarkBackbone', arch=arch, drop_path_rate=drop_path
        ), f"timm's backbone ({error})"
    if 'MmpretrainConvNeXt' not in MODELS:
        MODELS.register_module(name='MmpretrainConvNeXt', module=convnext_class())
    stock = dict(
        type='mmengine.MmpretrainConvNeXt',
        arch=dict(depths=list(depths), channels=list(channels)),
        drop_path_rate=drop_path,
        layer_scale_init_value=backbone.get('layer_scale_init_value', 1e-6),
        out_indices=list(backbone.get('out_indices', (0, 1, 2, 3))),
        gap_before_final_norm=False,
        with_cp=backbone.get('with_cp', False),
    )
    return stock, "mmpretrain's backbone"


def _replace(node: Any, scope: str, registries: tuple, done: list[str]) -> None:
    """Walks a config and replaces types in place."""
    if isinstance(node, Mapping):
        cls = class_of(node.get('type'), scope, registries)
        if inspect.isclass(cls) and cls.__module__.partition('.')[0] in _OURS and cls is not BenchmarkBackbone:
            _replace_type(node, cls, done)
        node = list(node.values())
    if isinstance(node, list | tuple):
        for part in node:
            _replace(part, scope, registries, done)


def _replace_type(node: Any, cls: type, done: list[str]) -> None:
    stock = next((base for base in cls.__mro__ if base.__module__.partition('.')[0] in _THEIRS), None)
    if stock is None or stock.__name__ == 'BaseModule':
        done.append(f'{cls.__name__} is kept: nothing of mmdet or mmseg is beneath it')
        return
    of_stock, of_ours = accepted_keys(stock)[0], accepted_keys(cls)[0]
    dropped = [key for key in node if key in of_ours - of_stock and key not in _READ_BY_BUILDERS]
    for key in dropped:
        del node[key]
    node['type'] = f'{stock.__module__.partition(".")[0]}.{stock.__name__}'
    done.append(f'{cls.__name__} as {stock.__name__}' + (f' without {", ".join(dropped)}' if dropped else ''))


def _replace_optimizer(cfg: Config, scope: str, done: list[str]) -> None:
    wrapper = cfg.optim_wrapper
    cls = class_of(wrapper.get('type', 'OptimWrapper'), scope, (OPTIM_WRAPPERS,))
    if cls.__name__ == 'AutocastOptimWrapper' and torch.cuda.is_available():  # mmengine's refuses a CPU
        wrapper.update(type='AmpOptimWrapper', dtype='bfloat16')
        done.append('AutocastOptimWrapper as AmpOptimWrapper in bfloat16, with its loss scaler')
    for key in _FASTER:
        if wrapper.optimizer.pop(key, None) is not None:
            done.append(f'{wrapper.optimizer.type} without {key}')
    paramwise = wrapper.pop('paramwise_cfg', None)
    if wrapper.pop('constructor', None) == 'LayerDecayOptimWrapperConstructor':
        if 'Mmpretrain' in cfg.model.backbone.type:
            layers = 6 if sum(cfg.model.backbone.arch['depths']) <= 18 else 12
            wrapper.constructor = 'LearningRateDecayOptimizerConstructor'
            wrapper.paramwise_cfg = {**paramwise, 'num_layers': layers}
        else:
            done.append('one group of parameters for the optimizer')


def class_of(kind: Any, scope: str, registries: tuple) -> Any:
    """The class that a type in a config names; None if there is none."""
    if not isinstance(kind, str):
        return kind
    for registry in registries:
        with registry.switch_scope_and_registry(scope) as scoped:
            found = scoped.get(kind)
        if found is not None:
            return found
    return None
