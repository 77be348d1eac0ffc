"""tools/train.py --dry-run: what it shows, and what it finds wrong."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, DefaultScope

import densekit.ops  # noqa: F401  (before what needs mmcv.ops)

# isort: split
from mmdet.models import MaskRCNN

from densekit.engine.config import load_config

pytestmark = pytest.mark.usefixtures('quick_mmengine')

ROOT = Path(__file__).parents[2]
WHOLE = 'train_cfg.max_iters=500'  # as long as the schedule of the demo, which the tiny configs cut
IN_ORDER = 'Model, weights and data are in order'


@MODELS.register_module()
class OddDetector(MaskRCNN):
    """A detector with a defect: ``odd`` is 'frozen', 'unused' or 'real'."""

    def __init__(self, *args, odd, **kwargs):
        super().__init__(*args, **kwargs)
        self.odd = odd
        if odd == 'frozen':
            self.requires_grad_(False)
        elif odd == 'unused':
            self.neck.spare = torch.nn.Linear(3, 3)

    def extract_feat(self, images):
        if self.odd == 'real':
            assert float(images.sum()) is not None  # reads a value, which needs a real tensor
        return super().extract_feat(images)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ForgetfulConstructor(DefaultOptimWrapperConstructor):
    """Leaves the biases out."""

    def add_params(self, params, module, **kwargs):
        values = [value for name, value in module.named_parameters() if not name.endswith('neck.fpn_convs.0.conv.bias')]
        params.append({'params': values})


@pytest.fixture
def rehearsal(tiny, tool, tmp_path):
    """Runs the detector, or what follows ``config=``, dry: exit status and log."""

    def run(*options, config=None, more=()):
        given = ['--work-dir', tmp_path / 'run', '--dry-run', *more]
        status = tool('train', config or tiny.det, *given, '--cfg-options', *(options or [WHOLE]))
        return status, '\n'.join(path.read_text() for path in (tmp_path / 'run').glob('*/*.log'))

    return run


@pytest.fixture
def changed(tiny, tmp_path):
    """Writes a config that changes the detector's."""

    def write(text):
        (tmp_path / 'changed.py').write_text(f"_base_ = '{tiny.det}'\n{text}\n")
        return tmp_path / 'changed.py'

    return write


def tables(log):
    """The log without what mmengine and the constructor say, and without their prefixes."""
    return log[log.index('Model: ') :]


def row(log, start):
    """The cells of the line of a table that starts so."""
    found = [line for line in log.splitlines() if re.match(rf'{re.escape(start)}( |$)', line)]
    assert len(found) == 1, (start, found)
    return re.split(r' {2,}', found[0])


def test_a_detector(rehearsal, tmp_path):
    status, log = rehearsal()
    assert status == 0
    assert IN_ORDER in log
    assert 'Iter(train)' not in log
    assert 'inconsistent' not in log
    shown = tables(log)
    assert max(len(line) for line in shown.splitlines() if 'mmengine' not in line) <= 120
    assert row(shown, 'roi_head.bbox_head')[1:3] == ['WholeShared2FCBBoxHead', '875,546']
    assert 'precision: float32\nbatch norms: none\nstarting weights: at random\n' in shown
    assert row(shown, 'layer_0_no_decay') == ['layer_0_no_decay', '0', '1.00000', '0.003', '0', '3', '72']
    assert row(shown, 'training') == ['training', '500', '125.0']
    assert row(shown, 'epoch') == ['epoch', '4', '1']
    assert row(shown, 'validation, every') == ['validation, every', '4', '1.0']
    assert row(shown, 'checkpoint, every') == ['checkpoint, every', '2', '0.5']
    assert row(shown, 'LinearLR, warm-up')[1:] == ['0', '0.0', '50', '12.5', '3e-05', '0.003']
    assert row(shown, 'CosineAnnealingLR')[1:] == ['50', '12.5', '500', '125.0', '0.003', '3e-05']
    assert 'kept for backward by backbone, neck, rpn_head: 2 x 3 x 64 x 64, float32' in shown
    assert row(shown, 'train') == ['train', 'ShapesDetDataset', '8', '5', 'circle, square, triangle, star, cross']
    assert row(shown, 'val')[2] == '3'
    assert re.search(r'\ntrain: \S+/coco/train/\n', shown)
    assert not list(tmp_path.rglob('*.pth'))
    assert sorted(path.suffix for path in (tmp_path / 'run').iterdir()) == ['', '.py']  # the log folder, the config


def test_parameters_and_memory_add_up(rehearsal):
    _, log = rehearsal()
    parts = ('backbone', 'neck', 'rpn_head', 'roi_head.bbox_head', 'roi_head.mask_head')
    values = [int(row(log, part)[2].replace(',', '')) for part in parts]
    (whole,) = re.findall(r'in all +([\d,]{5,}) ', log)
    assert sum(values) == int(whole.replace(',', ''))
    grouped = re.findall(r'\nlayer_\d\w+ +\d .* ([\d,]+)$', tables(log), re.MULTILINE)
    assert sum(int(count.replace(',', '')) for count in grouped) == sum(values)
    sizes = {name: float(row(log, name)[1]) for name in ('weights', 'gradients', 'optimizer state', 'activations')}
    assert sizes['weights'] == pytest.approx(sum(values) * 4 / 2**20, abs=0.1)
    assert sizes['optimizer state'] == pytest.approx(2 * sizes['weights'], abs=0.2)
    assert float(re.findall(r'in all +([\d.]+) +at least', log)[0]) == pytest.approx(sum(sizes.values()), abs=0.3)


def test_a_segmentor_in_bf16(rehearsal, tiny):
    status, log = rehearsal('train_cfg.max_iters=400', config=tiny.seg, more=['--amp', 'bf16'])
    assert status == 0
    assert 'precision: bf16 autocast (AutocastOptimWrapper)' in log
    assert 'batch norms: 13 BN; the config has SyncBN, which needs several processes with CUDA' in log
    assert 'kept for backward by backbone, decode_head, auxiliary_head: 2 x 3 x 96 x 96, bf16' in log
    assert row(tables(log), 'train')[3:] == ['6', 'background, circle, square, triangle, star, cross']


@pytest.mark.parametrize(
    ('enabled', 'line', 'lr'),
    [
        (False, 'as in the config; the linear rule multiplies it by 0.25 (--cfg-options auto_scale_lr.enable', '0.003'),
        (True, 'multiplied by 0.25 (auto_scale_lr)', '0.00075'),
    ],
)
def test_the_global_batch(rehearsal, enabled, line, lr):
    status, log = rehearsal(WHOLE, f'auto_scale_lr.enable={enabled}')
    assert status == 0  # an unscaled rate may be meant so
    assert re.search(r'\n +2 +1 +1 +2 +8\n', log)
    assert f'learning rate: {line}' in log
    assert row(tables(log), 'layer_7_decay')[2:4] == ['1.00000', lr]
    assert row(log, 'LinearLR, warm-up')[-1] == lr


def test_accumulated_batches(rehearsal):
    _, log = rehearsal(WHOLE, 'optim_wrapper.accumulative_counts=4')
    assert re.search(r'\n +2 +1 +4 +8 +8\nlearning rate: as in the config\n', log)
    assert '2 x 3 x 64 x 64' in log
    assert row(log, 'epoch')[1] == '4'


def test_any_optimizer(rehearsal, changed):
    """mmengine makes a group for each parameter; those that agree are one line."""
    config = changed(
        "optim_wrapper = dict(_delete_=True, type='OptimWrapper', optimizer=dict(type='SGD', lr=0.02, momentum=0.9, "
        "weight_decay=1e-4), paramwise_cfg=dict(norm_decay_mult=0., custom_keys={'backbone': dict(lr_mult=0.1)}))"
    )
    status, log = rehearsal(config=config)
    assert status == 0
    assert 'Optimizer: SGD' in log
    lines = log[log.index('Optimizer: SGD') :].splitlines()[3:6]
    assert [re.split(r' {2,}', line)[1:5] for line in lines[:2]] == [
        ['-', '0.10000', '0.002', '0.0001'],
        ['-', '1.00000', '0.02', '0.0001'],
    ]
    assert lines[0].startswith('backbone.downsample_layers.0.0.weight, ...')


def test_weights_that_are_named(rehearsal, tiny, tmp_path):
    torch.manual_seed(0)
    cfg = load_config(tiny.det)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        torch.save({'state_dict': MODELS.build(cfg.model).state_dict()}, tmp_path / 'all.pth')
    status, log = rehearsal(more=['--load-from', tmp_path / 'all.pth'])
    assert status == 0
    assert f'starting weights: {tmp_path}/all.pth (load_from: the whole model)' in log


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (['train_cfg.max_iters=40'], 'LinearLR ends at iteration 50, and training at 40'),
        (['train_cfg.max_iters=40'], 'CosineAnnealingLR begins at iteration 50, and training ends at 40'),
        (['train_cfg.max_iters=600'], 'CosineAnnealingLR ends at iteration 500, and training goes on to 600'),
        ([WHOLE, 'param_scheduler.0.by_epoch=True'], 'LinearLR counts epochs and training counts iterations'),
        ([WHOLE, 'train_cfg.val_begin=501'], 'validation begins at 501, and training ends at 500'),
        ([WHOLE, 'default_hooks.checkpoint.by_epoch=True'], 'checkpoints are counted in epochs'),
        (
            [WHOLE, 'val_dataloader.dataset.metainfo.classes=(square,circle,triangle,star,cross)'],
            'the classes of the train and val data sets differ, first circle and square',
        ),
    ],
)
def test_an_inconsistency(rehearsal, options, said):
    status, log = rehearsal(*options)
    assert status == 1
    assert f'inconsistent: {said}' in log
    assert IN_ORDER not in log


EPOCHS = "train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=3)\nparam_scheduler = []\n"
ODD = (
    "model = dict(type='OddDetector', odd='{}')\noptim_wrapper = dict(_delete_=True, optimizer=dict(type='SGD', lr=1.))"
)


@pytest.mark.parametrize(
    ('text', 'said'),
    [
        (EPOCHS, 'training counts epochs and draws from an endless sampler: its first epoch never ends'),
        (
            EPOCHS + "train_dataloader = dict(batch_size=9, drop_last=True, sampler=dict(type='DefaultSampler'))",
            'an epoch has no iteration: the train data set has fewer images than a batch',
        ),
        (
            "param_scheduler = [dict(type='MultiStepLR', by_epoch=False, milestones=[200, 500])]",
            'the milestone of MultiStepLR at iteration 500 is not reached before 500',
        ),
        (ODD.format('frozen'), 'no parameter of the model is trainable'),
        (ODD.format('unused'), '2 trainable parameters get no gradient: neck.spare.weight, neck.spare.bias'),
        (
            "optim_wrapper = dict(constructor='ForgetfulConstructor', "
            'paramwise_cfg=dict(_delete_=True, bypass_duplicate=True))',
            '1 trainable parameters are in no group of the optimizer: neck.fpn_convs.0.conv.bias',
        ),
    ],
)
def test_an_inconsistency_of_a_config(rehearsal, changed, text, said):
    options = ['work_dir=unused'] if text.startswith(EPOCHS) else [WHOLE]
    status, log = rehearsal(*options, config=changed(text))
    assert status == 1
    assert f'inconsistent: {said}' in log


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (['val_evaluator=None'], 'val_evaluator'),
        (['model.roi_head.bbox_head.num_classes=7'], 'a head of the model has another number of classes'),
        (['train_dataloader.dataset.filter_cfg.min_size=65'], 'nothing-left'),
        (['model.backbone.arch.channels=(8,8,8,8)'], 'but the backbone emits [8, 8, 8, 8]'),
        (['auto_scale_lr.enable=True', 'auto_scale_lr.base_batch_size=None'], 'auto_scale_lr needs base_batch_size'),
    ],
)
def test_what_cannot_start_is_an_error_as_in_training(rehearsal, capsys, options, said):
    status, _ = rehearsal(WHOLE, *options)
    assert status == 2
    error = capsys.readouterr().err
    assert error.count('error: ') == 1
    assert said in error


def test_without_the_data(rehearsal, capsys, tmp_path, monkeypatch):
    """What needs none is shown before the message, in epochs."""
    monkeypatch.chdir(tmp_path)
    config = ROOT / 'configs/detection/mask_rcnn_convnext_t_coco.py'
    status, log = rehearsal('model.backbone.init_cfg=None', config=config)
    assert status == 2
    assert 'error: Data that the config names is not there' in capsys.readouterr().err
    assert row(tables(log), 'training') == ['training', '-', '36']
    assert row(tables(log), 'LinearLR, warm-up') == ['LinearLR, warm-up', '0', '-', '1,000', '-', '1e-07', '0.0001']
    steps = re.findall(r'MultiStepLR x 0\.1 +- +(\d+) +(\S+) +(\S+)\n', log)
    assert steps == [('27', '0.0001', '1e-05'), ('33', '1e-05', '1e-06')]
    assert 'kept for backward by backbone, neck, rpn_head: 2 x 3 x 800 x 1344, bf16' in log
    assert 'inconsistent' not in log


def test_without_the_data_what_is_inconsistent_is_said_too(rehearsal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ROOT / 'configs/segmentation/upernet_convnext_t_ade20k.py'
    status, log = rehearsal('model.backbone.init_cfg=None', 'train_cfg.max_iters=80000', config=config)
    assert status == 2
    assert 'inconsistent: PolyLR ends at iteration 160,000, and training at 80,000' in log


def test_a_model_that_cannot_be_run_without_tensors(rehearsal, changed):
    """The estimate is left out, with the reason; nothing else is."""
    status, log = rehearsal(config=changed(ODD.format('real')))
    assert status == 0
    assert re.search(r'activations +- +not estimated: \w+: \w+', log)
    assert 'in all' in log
    assert IN_ORDER in log
