"""Every file of configs/, found by name, so that a new one is covered at once."""

import ast
import functools
import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, HOOKS, PARAM_SCHEDULERS, VISUALIZERS
from recipes import (
    BASES,
    CONFIGS,
    RECIPES,
    build_model,
    build_wrapper,
    config_of,
    losses_of,
    make_batch,
    meta_model,
    recipe,
    scope_of,
    shrink,
)
from torch import nn

from backbones import ARCHS, ISOTROPIC_ARCHS, ZOO, ConvNeXt, ConvNeXtIsotropic
from densekit.engine.config import load_config
from densekit.engine.config_check import check_types
from densekit.engine.consistency import check_channels, check_classes
from densekit.report.meta import build_on_meta

SCOPES = {'detection': 'mmdet', 'segmentation': 'mmseg'}
SIZES = dict(a='atto', f='femto', p='pico', n='nano', t='tiny', s='small', b='base', l='large', xl='xlarge', h='huge')
# <method>_convnext[v2|_iso]_<size>[_<pretraining>][_<schedule>]_<dataset>; mini is no size of a paper, roadmap has T's.
# In the place of convnext_<size> stands what it is compared with.
GRAMMAR = re.compile(
    r'(?P<method>[a-z0-9_]+?)_'
    r'(convnext(?P<version>v2|_iso)?_(?P<size>mini|[a-z]{1,2})|roadmap|(?P<other>swin_[tsb]|vit_[sb]|r50|x101))'
    r'(_[a-z0-9]+)*_(?P<data>coco|ade20k|shapes)'
)
OTHERS = {  # stages and channels
    'swin_t': ((2, 2, 6, 2), (96, 192, 384, 768)),
    'swin_s': ((2, 2, 18, 2), (96, 192, 384, 768)),
    'swin_b': ((2, 2, 18, 2), (128, 256, 512, 1024)),
    'vit_s': ((12,), (384, 384, 384, 384)),
    'vit_b': ((12,), (768, 768, 768, 768)),
    'r50': ((3, 4, 6, 3), (256, 512, 1024, 2048)),
    'x101': ((3, 4, 23, 3), (256, 512, 1024, 2048)),
}
# Gradients that may be zero. Cascade's RPN passes over anchors that leave the image, and at strides of 16 and more none
# fits into the test's 96 pixels. Deformable attention starts with weights of zero on its queries, hence on levels.
MAY_BE_ZERO = ('neck.fpn_convs.2.', 'neck.fpn_convs.3.')
MAY_BE_ZERO += ('level_embed', 'panoptic_head.pixel_decoder.level_encoding', 'decode_head.pixel_decoder.level_encoding')


def stem(path: Path) -> str:
    return path.relative_to(CONFIGS).with_suffix('').as_posix()


every_recipe = pytest.mark.parametrize('path', RECIPES, ids=stem)


def match_of(path: Path) -> re.Match[str]:
    match = GRAMMAR.fullmatch(path.stem)
    assert match, f'{path.name} is no <method>_convnext[v2|_iso]_<size>[_<pretraining>][_<schedule>]_<dataset>.py'
    return match


def bases_of(path: Path) -> list[Path]:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == '_base_':
            bases = ast.literal_eval(node.value)
            return [(path.parent / base).resolve() for base in ([bases] if isinstance(bases, str) else bases)]
    return []


def depth(path: Path) -> int:
    return max((1 + depth(base) for base in bases_of(path)), default=0)


def ancestors(path: Path) -> set[Path]:
    return {path}.union(*(ancestors(base) for base in bases_of(path)))


@functools.cache
def shapes_of(backbone: nn.Module) -> list[tuple[int, int]]:
    """Channels and stride of each output, as the backbone on the meta device puts them out."""
    return [(out.shape[1], 256 // out.shape[2]) for out in backbone(torch.empty(1, 3, 256, 256, device='meta'))]


def assert_channels_fit(model: nn.Module) -> None:
    channels, strides = map(list, zip(*shapes_of(model.backbone), strict=True))
    if hasattr(model, 'auxiliary_head'):
        if hasattr(model, 'neck'):  # of a ViT, whose outputs have one resolution
            assert model.neck.in_channels == channels
            channels, strides = [model.neck.out_channels] * len(model.neck.scales), scaled(strides, model.neck.scales)
        assert strides == [4, 8, 16, 32]
        assert list(model.decode_head.in_channels) == [channels[i] for i in model.decode_head.in_index]
        assert model.auxiliary_head.in_channels == channels[model.auxiliary_head.in_index]
        return
    queries = getattr(model, 'panoptic_head', getattr(model, 'decode_head', None))
    if queries is not None:  # of Mask2Former
        decoder = queries.pixel_decoder
        assert [conv.conv.in_channels for conv in decoder.input_convs] == channels[:0:-1]
        assert decoder.lateral_convs[0].conv.in_channels == channels[0] and decoder.strides == strides
        return
    assert in_channels(model.neck) == channels
    head = getattr(model, 'rpn_head', model.bbox_head if not hasattr(model, 'roi_head') else None)
    if hasattr(head, 'prior_generator'):
        assert [stride[0] for stride in head.prior_generator.strides][: len(strides)] == strides
    extractors = [module for module in model.modules() if hasattr(module, 'featmap_strides')]
    assert bool(extractors) == hasattr(model, 'roi_head')
    assert all(list(extractor.featmap_strides) == strides for extractor in extractors)


def scaled(strides: list[int], scales: list[float]) -> list[float]:
    return [stride / scale for stride, scale in zip(strides, scales, strict=True)]


def in_channels(neck: nn.Module) -> list[int]:
    convs = getattr(neck, 'convs', None)
    return [conv.conv.in_channels for conv in convs] if convs is not None else list(neck.in_channels)


def lazy_datasets(cfg: Config) -> list[Any]:
    loaders = [cfg[f'{loop}_dataloader'] for loop in ('train', 'val', 'test') if f'{loop}_dataloader' in cfg]
    with scope_of(cfg):
        return [DATASETS.build(lazy(loader.dataset)) for loader in loaders]


def lazy(dataset: Any) -> dict[str, Any]:
    # mmdet's panoptic transforms need panopticapi, which no package index has.
    without = dict(pipeline=[]) if dataset.type == 'CocoPanopticDataset' else {}
    return {**dataset, 'lazy_init': True, **without}


def test_there_are_recipes():
    assert {stem(path) for path in RECIPES} >= {
        'detection/mask_rcnn_convnext_t_coco',
        'detection/cascade_convnext_t_coco',
        'segmentation/upernet_convnext_t_ade20k',
        'detection/mask_rcnn_convnext_mini_shapes',
        'segmentation/upernet_convnext_mini_shapes',
    }


@every_recipe
def test_docstring_says_what_whence_how_good_and_how_to_run(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert re.search(r'Table \d|Not from a paper', text)
    assert 'Expected' in text
    assert f'tools/train.py {path.relative_to(CONFIGS.parent)}\n' in text + '\n'


@pytest.mark.parametrize('path', BASES, ids=stem)
def test_base_has_a_docstring_and_a_user(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
    assert any(path in ancestors(leaf) for leaf in RECIPES)


@every_recipe
def test_inheritance_is_shallow(path):
    assert 1 <= depth(path) <= 2


@every_recipe
def test_name_follows_the_grammar_and_tells_the_truth(path):
    match = match_of(path)
    backbone = meta_model(path).backbone
    assert recipe(path).default_scope == SCOPES[path.parent.name]
    if match['other']:
        blocks, channels = OTHERS[match['other']]
        assert tuple(blocks_of(backbone)) == blocks
        assert tuple(channel for channel, _ in shapes_of(backbone)) == channels
        return
    if match['version'] == '_iso':
        assert isinstance(backbone, ConvNeXtIsotropic)
        assert (len(backbone.blocks), backbone.stem.out_channels) == ISOTROPIC_ARCHS[SIZES[match['size']]]
        return
    assert isinstance(backbone, ConvNeXt)
    if match['size'] == 'mini':
        assert (backbone.depths, backbone.channels) not in ARCHS.values()
    else:
        blocks, channels = ARCHS[SIZES[match['size'] or 't']]
        assert backbone.depths == blocks
        assert backbone.channels == tuple(channels[i] for i in backbone.out_indices)
    assert (backbone.stages[0][0].grn is not None) == bool(match['version'])


def blocks_of(backbone: nn.Module) -> list[int]:
    if hasattr(backbone, 'layers'):  # a ViT's
        return [len(backbone.layers)]
    stages = getattr(backbone, 'stages', None) or [getattr(backbone, name) for name in backbone.res_layers]
    return [len(getattr(stage, 'blocks', stage)) for stage in stages]


@every_recipe
def test_every_key_is_accepted_and_a_misspelt_one_refused(path):
    model = load_config(str(path)).model  # with every key accepted by the class that its type names
    part = next(part for part in ('neck', 'panoptic_head', 'decode_head') if part in model)
    with pytest.raises(ValueError, match='in_channels'):
        load_config(str(path), [f'model.{part}.in_channelz=[96,192,384,768]'])


@every_recipe
def test_weights_to_start_from_are_published_and_of_the_backbone(path):
    backbone = config_of(path).model.backbone
    start = (backbone.init_cfg or {}).get('checkpoint')
    if backbone.type in ('ConvNeXt', 'ConvNeXtIsotropic') and 'shapes' not in path.stem:
        (weights,) = [weights for weights in ZOO.values() if start in (weights.name, weights.address)]
        assert weights.model == backbone.type
        assert (weights.arch, weights.use_grn) == (backbone.arch, backbone.get('use_grn', False))
    else:  # ours begin at random; DeiT's published weights are renamed first, test_comparison.py
        others = ('torchvision://', 'https://github.com/SwinTransformer/storage/', 'pretrain/deit_')
        assert start.startswith(others) if match_of(path)['other'] else start is None


@pytest.mark.parametrize('path', BASES, ids=stem)
def test_base_is_valid_by_itself(path, tmp_path):
    leaf = next(leaf for leaf in RECIPES if path in ancestors(leaf))
    cfg = Config.fromfile(path)
    cfg.default_scope = config_of(leaf).default_scope
    check_types(cfg)
    if 'model' in cfg:
        assert_channels_fit(build_on_meta(cfg))
    lazy_datasets(cfg)
    with scope_of(cfg):
        if 'visualizer' in cfg:  # the hooks ask for it
            VISUALIZERS.build({**cfg.visualizer, 'name': f'{stem(path)} {tmp_path}', 'save_dir': str(tmp_path)})
        for hook in cfg.get('default_hooks', {}).values():
            HOOKS.build(hook)
        if 'optim_wrapper' in cfg:
            optimizer = build_wrapper(cfg, meta_model(leaf), 'off').optimizer
            for scheduler in cfg.param_scheduler:
                scheduler.pop('convert_to_iter_based', None)  # the runner's
                PARAM_SCHEDULERS.build({**scheduler, 'optimizer': optimizer})


@every_recipe
def test_channels_fit(path):
    assert_channels_fit(meta_model(path))


@every_recipe
def test_heads_know_the_classes_of_the_data(path):
    counts = {len(dataset.metainfo['classes']) for dataset in lazy_datasets(recipe(path))}
    modules = dict(meta_model(path).named_modules())
    modules.pop('rpn_head', None)  # it tells objects from background only
    heads = {name: module.num_classes for name, module in modules.items() if hasattr(module, 'num_classes')}
    assert heads and len(counts) == 1
    assert set(heads.values()) == counts, heads


@every_recipe
def test_a_run_finds_that_parts_and_data_fit(path):
    check_channels(meta_model(path))
    for dataset in lazy_datasets(recipe(path)):
        check_classes(meta_model(path), dataset.metainfo['classes'], 'training')


@every_recipe
def test_training_ends_with_its_schedule_a_checkpoint_and_a_validation(path):
    cfg = config_of(path)
    by_epoch = 'max_epochs' in cfg.train_cfg
    end = cfg.train_cfg.max_epochs if by_epoch else cfg.train_cfg.max_iters
    same_unit = [scheduler for scheduler in cfg.param_scheduler if scheduler.by_epoch == by_epoch]
    assert max(scheduler.end for scheduler in same_unit) == end
    assert max(milestone for s in same_unit for milestone in s.get('milestones', [0])) < end
    for before, after in itertools.pairwise(same_unit):
        assert before.end == after.begin
    checkpoint = cfg.default_hooks.checkpoint
    assert checkpoint.get('by_epoch', True) == by_epoch
    assert end % checkpoint.interval == 0 and end % cfg.train_cfg.val_interval == 0


# Of each method and data one is stepped in every run of the suite, the smallest, and all others by `make test-slow`.
BY_SIZE = sorted(RECIPES, key=lambda path: ('mini t s b l xl h'.find(match_of(path)['size'] or 'xl'), path))
FIRST = {(match_of(path)['method'], match_of(path)['data']): path for path in reversed(BY_SIZE)}
STEPPED = [
    pytest.param(path, id=stem(path), marks=[pytest.mark.slow] * (path not in FIRST.values())) for path in BY_SIZE
]


@pytest.mark.parametrize('amp', ['off', 'bf16'])
@pytest.mark.parametrize('path', STEPPED)
def test_one_step_reaches_every_parameter(path, amp):
    torch.manual_seed(0)  # of some random RTMDets no box is assigned to anything
    cfg = shrink(recipe(path))
    model = build_model(cfg, 'cpu')
    wrapper = build_wrapper(cfg, model, amp)
    losses = losses_of(model, wrapper, make_batch(cfg))
    assert all(math.isfinite(value) for value in losses.values()), losses
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not [name for name, parameter in trainable.items() if parameter.grad is None]
    sums = {name: float(parameter.grad.abs().sum()) for name, parameter in trainable.items()}
    assert all(math.isfinite(total) for total in sums.values())
    assert not [name for name, total in sums.items() if total == 0 and not name.startswith(MAY_BE_ZERO)]
