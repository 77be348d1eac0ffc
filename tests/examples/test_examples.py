"""Projects of mmdet's and mmseg's users that plug in ConvNeXt: each trains and validates, with nothing else of ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DET, SEG = ROOT / 'examples/custom_mmdet_project', ROOT / 'examples/custom_mmseg_project'

# Runs the train script of a project on several configs, then tells what was imported of ours.
DRIVER = """
import json, runpy, sys
script, *configs = sys.argv[1:]
for config in configs:
    sys.argv = [script, config, '--work-dir', config + '.work']
    runpy.run_path(script, run_name='__main__')
ours = [name for name in sys.modules if name.split('.')[0] in ('densekit', 'backbones')]
print('IMPORTED', json.dumps(ours))
"""

# What makes a run short: no weights (they would have to be fetched), small images, a few of them.
SHORT_DET = """
_base_ = '{config}'
model = dict({model})
classes = ('circle', 'square', 'triangle', 'star', 'cross')
dataset = dict(data_root='{data}/coco/', metainfo=dict(classes=classes), indices=4)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask={masks}),
    dict(type='Resize', scale=(64, 64), keep_ratio=True),
    dict(type='PackDetInputs'),
]
test_pipeline = _base_.test_dataloader.dataset.pipeline
test_pipeline[1]['scale'] = (64, 64)
quick = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(
    dataset=dict(
        ann_file='annotations/instances_train.json', data_prefix=dict(img='train/'), pipeline=train_pipeline, **dataset
    ),
    **quick,
)
val_dataloader = dict(
    dataset=dict(
        ann_file='annotations/instances_val.json', data_prefix=dict(img='val/'), pipeline=test_pipeline, **dataset
    ),
    **quick,
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='{data}/coco/annotations/instances_val.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1)
optim_wrapper = dict(type='OptimWrapper')  # mmengine's for mixed precision refuses to run without a GPU
default_hooks = dict(logger=dict(interval=1), checkpoint=None)
visualizer = dict(name='{config}')  # else the second run in a process writes into the folder of the first
"""
SHORT_SEG = """
_base_ = '{config}'
model = dict(backbone=dict(init_cfg=None, arch=dict(_delete_=True, depths=(1, 1, 1, 1), channels=(96, 192, 384, 768))))
train_pipeline = _base_.train_pipeline
train_pipeline[2:4] = [dict(type='RandomCrop', crop_size=(64, 64))]
test_pipeline = _base_.test_pipeline
test_pipeline[1]['scale'] = (64, 64)
quick = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(batch_size=2, dataset=dict(data_root='{data}/ade', pipeline=train_pipeline), **quick)
val_dataloader = dict(dataset=dict(data_root='{data}/ade', pipeline=test_pipeline), **quick)
test_dataloader = val_dataloader
crop_size = (64, 64)
data_preprocessor = dict(size=crop_size)
model['data_preprocessor'] = data_preprocessor
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(logger=dict(interval=1), checkpoint=None)
"""


def run(project, configs):
    """Trains with the project's own script; the last lines of its log, and the modules of ours."""
    argv = [sys.executable, '-c', DRIVER, str(project / 'tools/train.py'), *map(str, configs)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE', 'PYTHONPATH': str(ROOT)}
    done = subprocess.run(argv, capture_output=True, text=True, env=env, cwd=configs[0].parent)
    assert done.returncode == 0, done.stderr[-3000:]
    imported = next(line for line in done.stdout.splitlines() if line.startswith('IMPORTED'))
    return done.stdout + done.stderr, json.loads(imported.removeprefix('IMPORTED'))


def scalars(config):
    """What a run logged: training and validation."""
    (path,) = Path(f'{config}.work').glob('*/vis_data/scalars.json')
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if 'loss' in row], [row for row in rows if 'loss' not in row]


def assert_ours_are_few(imported):
    """The ops and the backbones, and nothing of what densekit has beside them."""
    rooms = {'.'.join(name.split('.')[:2]) for name in imported if name.startswith('densekit')}
    assert rooms == {'densekit', 'densekit.ops'}
    assert 'backbones.convnext' in imported


def test_mmdet(tiny, tmp_path):
    # Heads for five classes and few proposals; any score counts, as nothing is learned in two steps.
    shallow = (
        'backbone=dict(init_cfg=None, arch=dict(_delete_=True, depths=(1, 1, 1, 1), channels=(96, 192, 384, 768))), '
    )
    few = """
    backbone=dict(init_cfg=None),
    roi_head=dict(bbox_head=dict(num_classes=5), mask_head=dict(num_classes=5)),
    train_cfg=dict(rpn_proposal=dict(max_per_img=64), rcnn=dict(sampler=dict(num=32))),
    test_cfg=dict(rpn=dict(max_per_img=32), rcnn=dict(score_thr=0.0, max_per_img=5)),
    """
    short = {
        'retinanet_convnext_t_shapes': shallow + 'test_cfg=dict(score_thr=0.0, max_per_img=5)',
        'stock_mask_rcnn_convnext_t': few,
    }
    for name, model in short.items():
        masks = name.startswith('stock')
        text = SHORT_DET.format(config=DET / f'configs/{name}.py', data=tiny.data, model=model, masks=masks)
        (tmp_path / f'{name}.py').write_text(text)
    configs = [tmp_path / f'{name}.py' for name in short]
    log, imported = run(DET, configs)
    assert_ours_are_few(imported)
    for config, keys in zip(configs, (('loss_cls', 'loss_bbox'), ('loss_rpn_cls', 'loss_mask')), strict=True):
        training, validation = scalars(config)
        assert [row['step'] for row in training] == [1, 2]  # four images, two a step
        assert all(0 < row['loss'] < float('inf') and keys[0] in row and keys[1] in row for row in training)
        assert len(validation) == 1
        assert 'coco/bbox_mAP' in validation[0]
    assert 'coco/segm_mAP' in validation[0]
    assert 'LayerDecayOptimWrapperConstructor' in log


def test_mmseg(tiny, tmp_path):
    config = tmp_path / 'fcn.py'
    config.write_text(SHORT_SEG.format(config=SEG / 'configs/fcn_convnext_t_shapes.py', data=tiny.data))
    _, imported = run(SEG, [config])
    assert_ours_are_few(imported)
    training, validation = scalars(config)
    assert [row['iter'] for row in training] == [1, 2]
    assert all(0 < row['loss'] < float('inf') and 'aux.loss_ce' in row for row in training)
    assert 0 <= validation[0]['mIoU'] <= 100


@pytest.mark.parametrize('project', [DET, SEG], ids=['mmdet', 'mmseg'])
def test_configs_name_nothing_else_of_ours(project):
    from mmengine.config import Config

    for path in sorted((project / 'configs').glob('*.py')):
        cfg = Config.fromfile(path, import_custom_modules=False)
        assert cfg.custom_imports.imports[:2] == ['densekit.ops', 'backbones'], path
        assert set(cfg.custom_imports.imports[2:]) <= {'shapes_project'}, path
        assert cfg.model.backbone.type == 'ConvNeXt'
        text = path.read_text()
        assert text.count('densekit') == 1 + text.count('# densekit.ops first'), path
