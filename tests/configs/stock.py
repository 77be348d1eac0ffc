"""Losses and gradient norms of the stock ConvNeXt recipes, whose backbone is mmpretrain's, to compare ours with.

    python tests/configs/stock.py

writes tests/configs/stock.json; it needs mmpretrain 1.2 beside the pinned versions. Both sides take weights that are
made from the names of the parameters, the batch of recipes.py, and one seed; drop path is off, since mmcv and timm draw
it in different ways.
"""

import importlib
import json
import sys
import types
import zlib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import densekit.ops  # noqa: F401  before mmdet

# isort: split
import mmdet
import mmseg
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from recipes import make_batch, scope_of
from torch import nn

GOLDEN = Path(__file__).with_suffix('.json')
STOCK = {
    'detection/mask_rcnn_convnext_t_coco': (mmdet, 'mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py'),
    'detection/cascade_convnext_t_coco': (
        mmdet,
        'cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py',
    ),
    'segmentation/upernet_convnext_t_ade20k': (mmseg, 'convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py'),
}
MMPRETRAIN_NAMES = {
    'depthwise_conv': 'dwconv',
    'pointwise_conv1': 'pwconv1',
    'pointwise_conv2': 'pwconv2',
}


def weights_by_name(parameters: Mapping[str, nn.Parameter]) -> None:
    """Gives each parameter values that follow from its name alone: fan-in weights, scales near 1, shifts near 0."""
    for name, parameter in parameters.items():
        noise = torch.randn(parameter.numel(), generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        noise = noise.reshape(parameter.shape)
        with torch.no_grad():
            if name.endswith('bias'):
                parameter.copy_(0.01 * noise)
            elif parameter.squeeze().ndim <= 1:
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


def step(cfg: Config, model: nn.Module) -> dict[str, float]:
    """Losses of one batch, and the norm of all gradients."""
    model.train()
    torch.manual_seed(0)
    data = model.data_preprocessor(make_batch(cfg), True)
    total, losses = model.parse_losses(model(**data, mode='loss'))
    total.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([gradient.norm() for gradient in gradients]))
    return {**{name: float(value) for name, value in losses.items()}, 'gradient norm': float(norm)}


def fitted(cfg: Config) -> Config:
    """Without weights to download, without drop path, with crops of the batch's size and an eighth of the RoIs."""
    cfg.model.backbone.init_cfg = None
    cfg.model.backbone.drop_path_rate = 0.0
    if 'decode_head' in cfg.model:
        cfg.model.data_preprocessor.size = (96, 96)
        for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
            head.dropout_ratio = 0.0
    else:  # Cascade's box heads take half a minute for all
        stages = cfg.model.train_cfg.rcnn
        for stage in stages if isinstance(stages, list) else [stages]:
            stage.sampler.num //= 8
    return cfg


def register_mmpretrain_convnext() -> None:
    """Registers mmpretrain's ConvNeXt from its files alone: the whole package does not import on current versions."""
    root = Path(next(iter(find_spec('mmpretrain').submodule_search_locations)))
    for name in ('mmpretrain', 'mmpretrain.models', 'mmpretrain.models.backbones', 'mmpretrain.models.utils'):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split('.')[1:]))]
        sys.modules[name] = package
    norm = importlib.import_module('mmpretrain.models.utils.norm')
    sys.modules['mmpretrain.models.utils'].GRN = norm.GRN
    sys.modules['mmpretrain.models.utils'].build_norm_layer = norm.build_norm_layer
    importlib.import_module('mmpretrain.models.backbones.convnext')


def ours_of(name: str) -> str:
    for theirs, ours in MMPRETRAIN_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def stock_step(name: str) -> dict[str, float]:
    package, file = STOCK[name]
    path = Path(package.__file__).parent / '.mim/configs/convnext' / file
    cfg = fitted(Config.fromfile(path, import_custom_modules=False))
    with scope_of(cfg):
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
    weights_by_name({ours_of(key): parameter for key, parameter in model.named_parameters()})
    return step(cfg, model)


def main() -> None:
    register_mmpretrain_convnext()
    GOLDEN.write_text(json.dumps({name: stock_step(name) for name in STOCK}, indent=2) + '\n')


if __name__ == '__main__':
    main()
