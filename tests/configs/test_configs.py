"""Every file of configs/, found by name, so that a new one is covered at once."""

import ast
import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, HOOKS, PARAM_SCHEDULERS, VISUALIZERS
from recipes import (
    BASES,
    CONFIGS,
    RECIPES,
    build_model,
    build_wrapper,
    losses_of,
    make_batch,
    recipe,
    scope_of,
    shrink,
)
from torch import nn

from backbones import ARCHS, ConvNeXt
from densekit.engine.config import load_config
from densekit.engine.config_check import check_types

SCOPES = {'detection': 'mmdet', 'segmentation': 'mmseg'}
SIZES = dict(a='atto', f='femto', p='pico', n='nano', t='tiny', s='small', b='base', l='large', xl='xlarge', h='huge')
# <method>_convnext[v2]_<size>[_<pretraining>][_<schedule>]_<dataset>; mini is no size of a paper, roadmap has T's
GRAMMAR = re.compile(
    r'[a-z0-9_]+?_(convnext(?P<version>v2)?_(?P<size>mini|[a-z]{1,2})|roadmap)(_[a-z0-9]+)*_(coco|ade20k|shapes)'
)
# Gradients that may be zero: Cascade's RPN passes over anchors that leave the image, and at strides of 16 and more
# none fits into the test's 96 pixels.
TOO_COARSE = ('neck.fpn_convs.2.', 'neck.fpn_convs.3.')


def stem(path: Path) -> str:
    return path.relative_to(CONFIGS).with_suffix('').as_posix()


every_recipe = pytest.mark.parametrize('path', RECIPES, ids=stem)


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


def assert_channels_fit(model: nn.Module) -> None:
    channels, strides = list(model.backbone.channels), list(model.backbone.strides)
    if hasattr(model, 'neck'):
        assert list(model.neck.in_channels) == channels
        assert [stride[0] for stride in model.rpn_head.prior_generator.strides][: len(strides)] == strides
        extractors = [module for module in model.modules() if hasattr(module, 'featmap_strides')]
        assert extractors and all(list(extractor.featmap_strides) == strides for extractor in extractors)
    else:
        assert list(model.decode_head.in_channels) == [channels[i] for i in model.decode_head.in_index]
        assert model.auxiliary_head.in_channels == channels[model.auxiliary_head.in_index]


def lazy_datasets(cfg: Config) -> list[Any]:
    loaders = [cfg[f'{loop}_dataloader'] for loop in ('train', 'val', 'test') if f'{loop}_dataloader' in cfg]
    with scope_of(cfg):
        return [DATASETS.build({**loader.dataset, 'lazy_init': True}) for loader in loaders]


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
    match = GRAMMAR.fullmatch(path.stem)
    cfg = recipe(path)
    backbone = build_model(cfg, 'meta').backbone
    assert match and isinstance(backbone, ConvNeXt)
    assert cfg.default_scope == SCOPES[path.parent.name]
    if match['size'] == 'mini':
        assert (backbone.depths, backbone.channels) not in ARCHS.values()
    else:
        assert (backbone.depths, backbone.channels) == ARCHS[SIZES[match['size'] or 't']]
    assert (backbone.stages[0][0].grn is not None) == bool(match['version'])


@every_recipe
def test_misspelt_key_is_refused(path):
    part = 'neck' if 'neck' in load_config(str(path)).model else 'decode_head'
    with pytest.raises(ValueError, match='in_channels'):
        load_config(str(path), [f'model.{part}.in_channelz=[96,192,384,768]'])


@pytest.mark.parametrize('path', BASES, ids=stem)
def test_base_is_valid_by_itself(path, tmp_path):
    leaf = next(leaf for leaf in RECIPES if path in ancestors(leaf))
    cfg = Config.fromfile(path)
    cfg.default_scope = load_config(str(leaf)).default_scope
    check_types(cfg)
    if 'model' in cfg:
        assert_channels_fit(build_model(cfg, 'meta'))
    lazy_datasets(cfg)
    with scope_of(cfg):
        if 'visualizer' in cfg:  # the hooks ask for it
            VISUALIZERS.build({**cfg.visualizer, 'name': f'{stem(path)} {tmp_path}', 'save_dir': str(tmp_path)})
        for hook in cfg.get('default_hooks', {}).values():
            HOOKS.build(hook)
        if 'optim_wrapper' in cfg:
            optimizer = build_wrapper(cfg, ConvNeXt('atto'), 'off').optimizer
            for scheduler in cfg.param_scheduler:
                PARAM_SCHEDULERS.build({**scheduler, 'optimizer': optimizer})


@every_recipe
def test_channels_fit(path):
    assert_channels_fit(build_model(recipe(path), 'meta'))


@every_recipe
def test_heads_know_the_classes_of_the_data(path):
    cfg = recipe(path)
    counts = {len(dataset.metainfo['classes']) for dataset in lazy_datasets(cfg)}
    modules = dict(build_model(cfg, 'meta').named_modules())
    modules.pop('rpn_head', None)  # it tells objects from background only
    heads = {name: module.num_classes for name, module in modules.items() if hasattr(module, 'num_classes')}
    assert len(heads) >= 2 and len(counts) == 1
    assert set(heads.values()) == counts, heads


@every_recipe
def test_training_ends_with_its_schedule_a_checkpoint_and_a_validation(path):
    cfg = load_config(str(path))
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


SMALL = [path for path in RECIPES if GRAMMAR.fullmatch(path.stem)['size'] in ('mini', 't', None)]


@pytest.mark.parametrize('amp', ['off', 'bf16'])
@pytest.mark.parametrize('path', SMALL, ids=stem)
def test_one_step_reaches_every_parameter(path, amp):
    cfg = shrink(recipe(path))
    model = build_model(cfg, 'cpu')
    wrapper = build_wrapper(cfg, model, amp)
    losses = losses_of(model, wrapper, make_batch(cfg))
    assert all(math.isfinite(value) for value in losses.values()), losses
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not [name for name, parameter in trainable.items() if parameter.grad is None]
    sums = {name: float(parameter.grad.abs().sum()) for name, parameter in trainable.items()}
    assert all(math.isfinite(total) for total in sums.values())
    assert not [name for name, total in sums.items() if total == 0 and not name.startswith(TOO_COARSE)]
