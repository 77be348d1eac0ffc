"""What a dry run computes: image sizes, learning rates, memory, groups."""

import copy
import itertools
from itertools import chain
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from torch import nn

from backbones import ConvNeXt
from densekit.engine.runner import DensekitRunner
from densekit.report.image_size import padded, training_size
from densekit.report.memory import LiveTensors, activations, gradient_bytes, state_bytes, weight_bytes
from densekit.report.model_tables import groups_table, parts_table, ungrouped
from densekit.report.schedule import Schedule, Training, schedule_table

pytestmark = pytest.mark.usefixtures('one_thread')

CONFIGS = Path(__file__).parents[2] / 'configs'
ARCH = dict(depths=(1, 1, 2, 1), channels=(8, 16, 24, 32))

WARM_UP = dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000)
STEPS = dict(type='MultiStepLR', begin=0, end=36, by_epoch=True, milestones=[27, 33], gamma=0.1)
POLY = dict(type='PolyLR', power=1.0, begin=1000, end=8000, eta_min=0.0, by_epoch=False)
COSINE = dict(type='CosineAnnealingLR', T_max=18, begin=18, end=36, by_epoch=True, convert_to_iter_based=True)
EPOCHS = Training(True, 36, 500)
ITERATIONS = Training(False, 8000, 500)


class Model(nn.Module):
    """A backbone and a head on its last output, as a segmentor has them."""

    def __init__(self, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = ConvNeXt(ARCH, drop_path_rate=0.1, **kwargs)
        self.decode_head = Head()
        self.roi_head = nn.ModuleDict({'bbox_head': nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])})

    def extract_feat(self, x):
        return self.backbone(x)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.SyncBatchNorm(32)
        self.classes = nn.Conv2d(32, 5, 1)
        self.spare = nn.Conv2d(32, 5, 1, bias=False)

    def forward(self, features):
        return self.classes(self.norm(features[-1]))


@pytest.mark.parametrize(
    ('name', 'size'),
    [
        ('detection/cascade_convnext_t_coco', (800, 1344)),  # 1333, padded to a multiple of 32
        ('segmentation/upernet_convnext_t_ade20k', (512, 512)),
        ('segmentation/upernet_convnext_mini_shapes', (96, 96)),  # by the preprocessor
        ('detection/mask_rcnn_convnext_mini_shapes', None),  # as large as its images
    ],
)
def test_image_sizes_of_the_recipes(name, size):
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    assert training_size(cfg.train_dataloader.dataset, cfg.model.data_preprocessor) == size


@pytest.mark.parametrize(
    ('pipeline', 'size'),
    [
        ([dict(type='Resize', scale=(300, 200), keep_ratio=False)], (200, 300)),
        ([dict(type='Resize', scale=(200, 300), keep_ratio=False)], (300, 200)),
        ([dict(type='Resize', scale=(200, 300), keep_ratio=True)], (200, 300)),
        ([dict(type='mmseg.RandomResize', scale=(100, 50), ratio_range=(0.5, 2.0), keep_ratio=True)], (100, 200)),
        ([dict(type='RandomChoiceResize', scales=[(100, 50), (80, 70)], keep_ratio=True)], (70, 80)),
        (
            [dict(type='RandomChoiceResize', scales=[256, 512], resize_type='ResizeShortestEdge', max_size=900)],
            (512, 900),
        ),
        ([dict(type='FixShapeResize', width=64, height=32)], (32, 64)),
        ([dict(type='Resize', scale=(300, 200), keep_ratio=True), dict(type='RandomCrop', crop_size=96)], (96, 96)),
        ([dict(type='RandomChoice', transforms=[[dict(type='Resize', scale=(3, 2))], []])], (2, 3)),
        (
            [  # large-scale jitter
                dict(type='RandomResize', scale=(1024, 1024), ratio_range=(0.1, 2.0), keep_ratio=True),
                dict(type='RandomCrop', crop_type='absolute_range', crop_size=(1024, 1024), allow_negative_crop=True),
            ],
            (1024, 1024),
        ),
        ([dict(type='Resize', scale=(30, 20), keep_ratio=True), dict(type='Pad', size=(64, 32))], (32, 64)),
        ([dict(type='RandomFlip', prob=0.5)], None),
    ],
)
def test_image_sizes_of_pipelines(pipeline, size):
    assert training_size(dict(type='CocoDataset', pipeline=pipeline)) == size
    wrapped = dict(type='RepeatDataset', dataset=dict(type='ConcatDataset', datasets=[dict(pipeline=pipeline), {}]))
    assert training_size(wrapped) == size


def test_what_a_preprocessor_pads_to():
    dataset = dict(pipeline=[dict(type='Resize', scale=(300, 200), keep_ratio=True)])
    fixed = dict(batch_augments=[dict(type='BatchFixedSizePad', size=(1024, 1024))], pad_size_divisor=32)
    assert training_size(dataset, fixed) == (1024, 1024)
    assert padded((65, 64), dict(pad_size_divisor=32)) == (96, 64)


def test_learning_rates_of_the_3x_recipe():
    assert [
        (change.what, change.begin, change.end, change.before, change.after)
        for change in Schedule([WARM_UP, STEPS], 2e-4, EPOCHS).changes()
    ] == [
        ('LinearLR, warm-up', 0, 1000, pytest.approx(2e-7), pytest.approx(2e-4)),
        ('MultiStepLR x 0.1', 27, None, pytest.approx(2e-4), pytest.approx(2e-5)),
        ('MultiStepLR x 0.1', 33, None, pytest.approx(2e-5), pytest.approx(2e-6)),
    ]


@pytest.mark.parametrize('configs', [[WARM_UP, STEPS], [COSINE]])
def test_without_the_length_of_an_epoch_the_rates_are_the_same(configs):
    def rates(training):
        return [(change.before, change.after) for change in Schedule(configs, 1.0, training).changes()]

    assert rates(Training(True, 36)) == [pytest.approx(pair, abs=2e-3) for pair in rates(EPOCHS)]


class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.rates = []

    def forward(self, x, mode='tensor'):
        return {'loss': self.linear(torch.stack(x)).square().mean()}

    def train_step(self, data, optim_wrapper):
        self.rates.append(optim_wrapper.param_groups[0]['lr'])
        return super().train_step(data, optim_wrapper)


def rates_of_a_training(tmp_path, configs, **loop):
    """The learning rate of each iteration of a real run, whose epochs have four."""
    model = Toy()
    DensekitRunner(
        model=model,
        work_dir=str(tmp_path),
        train_dataloader=dict(
            batch_size=2,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=[{'x': torch.ones(2)} for _ in range(8)],
        ),
        train_cfg=loop,
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1)),
        param_scheduler=configs,
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=100, save_last=False)),
        experiment_name=f'schedule{next(NUMBER)}',
    ).train()
    return model.rates


NUMBER = itertools.count()


@pytest.mark.parametrize(
    'configs',
    [
        [dict(WARM_UP, end=6), dict(STEPS, end=5, milestones=[2, 4])],
        [dict(STEPS, begin=1, end=5, milestones=[1, 2])],
        [dict(type='PolyLR', begin=1, end=5, power=0.9, by_epoch=True, convert_to_iter_based=True)],
        [dict(type='CosineAnnealingLR', T_max=4, eta_min_ratio=0.1, by_epoch=True)],
    ],
)
def test_learning_rates_are_those_of_a_training(tmp_path, quick_mmengine, configs):
    real = rates_of_a_training(tmp_path, copy.deepcopy(configs), by_epoch=True, max_epochs=5)
    assert len(real) == 20
    training = Training(True, 5, 4)
    changes = Schedule(configs, 0.1, training).changes()
    for change in changes:
        begin = training.iterations(change.begin, change.by_epoch)
        if change.end is None:
            expected = real[begin - 1], real[begin]
        else:
            expected = real[begin], real[min(20, training.iterations(change.end, change.by_epoch)) - 1]
        assert (change.before, change.after) == pytest.approx(expected)
    assert max(change.before for change in changes) > min(change.after for change in changes)


@pytest.mark.parametrize('training', [EPOCHS, Training(True, 36)])
@pytest.mark.parametrize('configs', [[], [WARM_UP, STEPS], [WARM_UP, COSINE], [WARM_UP]])
def test_a_schedule_in_order(configs, training):
    assert Schedule(configs, 1.0, training).problems() == []


def test_a_schedule_in_iterations_in_order():
    assert Schedule([WARM_UP, POLY], 1.0, ITERATIONS).problems() == []
    assert Schedule([WARM_UP, POLY], 1.0, Training(False, 8000)).problems() == []
    default_end = {key: value for key, value in POLY.items() if key != 'end'}
    assert Schedule([default_end], 1.0, ITERATIONS).problems() == []


@pytest.mark.parametrize(
    ('configs', 'training', 'said'),
    [
        ([WARM_UP], Training(True, 2, 400), 'LinearLR ends at iteration 1,000, and training at 800'),
        ([STEPS], Training(True, 40, 500), 'MultiStepLR ends at epoch 36, and training goes on to 40'),
        ([STEPS], Training(True, 40), 'MultiStepLR ends at epoch 36, and training goes on to 40'),
        ([STEPS], Training(True, 30, 500), 'MultiStepLR ends at epoch 36, and training at 30'),
        (
            [dict(STEPS, begin=5)],
            EPOCHS,
            'the milestone of MultiStepLR at epoch 38 is not reached before 36',  # counted from where it begins
        ),
        (
            [dict(STEPS, milestones=[27, 36])],
            EPOCHS,
            'the milestone of MultiStepLR at epoch 36 is not reached before 36',
        ),
        ([dict(POLY, end=7000)], ITERATIONS, 'PolyLR ends at iteration 7,000, and training goes on to 8,000'),
        (
            [dict(POLY, begin=8000, end=9000)],
            ITERATIONS,
            'PolyLR begins at iteration 8,000, and training ends at 8,000',
        ),
        (
            [dict(COSINE, T_max=10)],
            EPOCHS,
            'CosineAnnealingLR ends at iteration 14,000, and training goes on to 18,000',
        ),
        ([dict(COSINE, T_max=30)], EPOCHS, 'CosineAnnealingLR ends at iteration 24,000, and training at 18,000'),
        ([STEPS], ITERATIONS, 'MultiStepLR counts epochs and training counts iterations: it never acts'),
    ],
)
def test_a_schedule_that_contradicts_training(configs, training, said):
    assert Schedule(configs, 1.0, training).problems() == [said] or said in Schedule(configs, 1.0, training).problems()


def test_the_table_of_a_schedule():
    table = schedule_table(Schedule([WARM_UP, STEPS], 2e-4, EPOCHS).changes(), EPOCHS).splitlines()
    assert table[2].split() == ['LinearLR,', 'warm-up', '0', '0.0', '1,000', '2.0', '2e-07', '0.0002']
    assert table[3].split() == ['MultiStepLR', 'x', '0.1', '13,500', '27', '0.0002', '2e-05']


def tensors(model):
    return list(chain(model.parameters(), model.buffers()))


def forward_on_the_cpu(model, dtype, size):
    """Bytes alive after a real forward pass of the backbone, and, independently, what autograd says that it saved."""
    saved: dict[int, tuple[int, torch.Tensor]] = {}
    known = {tensor.untyped_storage()._cdata for tensor in tensors(model)}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage.nbytes(), tensor
        return tensor

    autocast = torch.autocast('cpu', dtype=dtype, enabled=dtype != torch.float32)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with LiveTensors(*tensors(model)) as live, hooks, autocast:
        x = torch.empty(2, 3, *size).zero_()
        outputs = model.extract_feat(x)
    for tensor in (x, *outputs):
        pack(tensor)
    return live.count(), sum(size for size, _ in saved.values())


def backbone_alone(**kwargs):
    model = Model(**kwargs)
    del model.decode_head
    return model.train()


@pytest.mark.parametrize('size', [(64, 96), (96, 128)])
def test_activations_are_those_of_a_real_forward_pass(size):
    model = backbone_alone()
    found = activations(model, 2, size)
    assert (found.size, found.size) == forward_on_the_cpu(model, torch.float32, size)
    assert found.parts == ('backbone',)
    assert found.unreached == ()
    assert found.size != activations(model, 3, size).size


def test_activations_in_bf16():
    model = backbone_alone()
    found = activations(model, 2, (64, 96), torch.bfloat16).size
    live, saved = forward_on_the_cpu(model, torch.bfloat16, (64, 96))
    assert found == pytest.approx(live, rel=0.02)
    assert found == pytest.approx(saved, rel=0.02)
    assert found < 0.8 * activations(model, 2, (64, 96)).size


def test_activation_checkpointing_keeps_less():
    """What autograd keeps then is not all that is kept: the inputs of the blocks are held by functions."""
    model = backbone_alone(with_cp=True)
    found = activations(model, 2, (64, 96))
    live, _ = forward_on_the_cpu(model, torch.float32, (64, 96))
    assert found.size == live
    assert found.size < 0.6 * activations(backbone_alone(), 2, (64, 96)).size
    assert found.unreached == ()


def test_frozen_stages_keep_nothing():
    assert (
        activations(backbone_alone(frozen_stages=4), 2, (64, 96)).size
        < activations(backbone_alone(frozen_stages=2), 2, (64, 96)).size
        < activations(backbone_alone(), 2, (64, 96)).size
    )


def test_parameters_without_a_gradient():
    model = Model()
    found = activations(model, 2, (64, 96))
    assert found.parts == ('backbone', 'decode_head')
    assert found.unreached == ('decode_head.spare.weight',)
    model.decode_head.spare.requires_grad_(False)
    assert activations(model, 2, (64, 96)).unreached == ()


def test_the_model_is_left_as_it_was():
    model = Model().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    activations(model, 2, (64, 96))
    assert not model.decode_head.training
    assert isinstance(model.decode_head.norm, nn.SyncBatchNorm)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    'make',
    [
        lambda params: torch.optim.SGD(params, lr=0.1),
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lambda params: torch.optim.AdamW(params, lr=0.1),
        lambda params: torch.optim.Adam(params, lr=0.1, amsgrad=True),
        lambda params: torch.optim.RMSprop(params, lr=0.1, centered=True),
    ],
    ids=['SGD', 'momentum', 'AdamW', 'amsgrad', 'RMSprop'],
)
def test_memory_of_an_optimizer_is_that_after_a_real_step(make):
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(4, 7), nn.Linear(2, 2).to(torch.bfloat16))
    model[1].bias.requires_grad_(False)
    optimizer = make(model.parameters())
    estimate = state_bytes(optimizer)
    assert not optimizer.state
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    real = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert estimate == sum(value.nbytes for value in real)


def test_bytes_of_weights_and_gradients():
    model = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Linear(7, 7, bias=False).to(torch.bfloat16))
    model[0].bias.requires_grad_(False)
    values = 4 * 28 + 4 * 7 + 2 * 4 * 7 + 2 * 49
    assert weight_bytes(model) == values + 2 * 4 * 7 + 8  # running statistics and a counter
    assert gradient_bytes(model) == values - 4 * 7
    model.append(model[0])
    assert gradient_bytes(model) == values - 4 * 7


def test_the_parts_of_a_model():
    model = Model(frozen_stages=1)
    model.scale = nn.Parameter(torch.ones(3))
    table = [line.split() for line in parts_table(model).splitlines()[2:]]
    assert [row[0] for row in table] == [
        'backbone', 'decode_head', 'roi_head.bbox_head.0', 'roi_head.bbox_head.1', 'elsewhere', 'in',
    ]  # fmt: skip
    assert table[1][1:] == ['Head', '389', '389', '0']
    total, trainable, frozen = (int(row.replace(',', '')) for row in table[0][2:])
    assert total == trainable + frozen
    stem = model.backbone.downsample_layers[0]
    assert frozen == sum(value.numel() for part in (stem, model.backbone.stages[0]) for value in part.parameters())
    assert int(table[-1][2].replace(',', '')) == sum(value.numel() for value in model.parameters())


def test_shared_parameters_count_once():
    model = Model()
    model.roi_head['bbox_head'][1] = model.roi_head['bbox_head'][0]
    model.extra_head = model.decode_head
    assert 'extra_head' not in parts_table(model)  # PyTorch itself names a module once
    model.extra_head = nn.Linear(3, 2)
    model.extra_head.weight = model.roi_head['bbox_head'][0].weight
    row = next(line for line in parts_table(model).splitlines() if line.startswith('extra_head'))
    assert row.split()[2] == '2'


def test_groups_without_names_are_merged():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    groups = [
        {'params': [model[0].weight], 'lr': 0.1},
        {'params': [model[0].bias], 'lr': 0.1, 'weight_decay': 0.0},
        {'params': [model[1].weight], 'lr': 0.1},
        {'params': [model[1].bias], 'lr': 0.01},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.5)
    assert [line.split()[-6:] for line in groups_table(model, optimizer, 0.1).splitlines()[2:]] == [
        ['-', '1.00000', '0.1', '0.5', '2', '10'],
        ['-', '1.00000', '0.1', '0', '1', '2'],
        ['-', '0.10000', '0.01', '0.5', '1', '2'],
    ]
    assert ungrouped(model, optimizer) == ['2.weight', '2.bias']
    model[2].requires_grad_(False)
    assert ungrouped(model, optimizer) == []
