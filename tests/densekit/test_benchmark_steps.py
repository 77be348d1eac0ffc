import densekit.ops  # noqa: F401  before mmdet

# isort: split
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmdet.models.dense_heads import RPNHead
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS
from torch import nn

from densekit.benchmark import breakdown, data_speed, fit, machine, steps
from densekit.benchmark.breakdown import parts_of
from densekit.benchmark.case import Settings
from densekit.benchmark.generated import OBJECTS, jittered_truth, make_batch
from densekit.benchmark.peaks import Peaks
from densekit.benchmark.peers import StageOutputs
from densekit.benchmark.steps import Step, StepCase
from densekit.benchmark.stock import BenchmarkBackbone, stock_form
from densekit.benchmark.table import render
from densekit.engine import guards
from densekit.engine.config import load_config
from densekit.engine.guards import NonFiniteError
from densekit.evaluation.rle import RleMasks
from densekit.models import ExactRPNHead, RleMaskHead

CPU = torch.device('cpu')
CONFIGS = Path(__file__).parents[2] / 'configs/detection'
PEAKS = Peaks(copy=1e10, fp32=1e11, bf16=2e11)
IMAGES = (2, 64, 96)


@pytest.fixture
def det(tiny, quick_mmengine):
    return tiny.det


@pytest.fixture
def seg(tiny, quick_mmengine):
    return tiny.seg


def saved(record):
    return {**record, 'tier': 0, 'date': '', 'command': '', 'revision': ''}


@pytest.mark.parametrize(('dtype', 'training'), [('fp32', True), ('bf16', False)])
def test_a_detector_beside_its_stock_form(det, dtype, training):
    case = StepCase(det, IMAGES, dtype, training, layouts=('nhwc',))
    record = case.measure(Settings(CPU, PEAKS, rounds=1, at_least=0.0))
    assert [(row['who'], row.get('error'), row.get('parts_error')) for row in record['rows']] == [
        ('densekit', None, None),
        ('stock', None, None),
        *([] if training else [('densekit folded', None, None)]),
    ]
    for row in record['rows']:
        common = {'data', 'backbone', 'neck', 'RPN', 'RoI heads', 'other'}
        trained = {'mask targets', 'losses', 'optimizer'}
        assert set(row['parts']) == (common | trained if training else common)
        assert min(row['parts'].values()) >= 0 and row['peak_bytes'] > 0
    assert [('found' in row) for row in record['rows']] == [not training] * (2 if training else 3)
    if not training:
        assert len({row['found'] for row in record['rows']}) == 1 and record['rows'][0]['found'] > 0
        assert '| objects |' in render({**machine.describe(CPU), 'peaks': None, 'cases': {'a': saved(record)}})
    assert 'backbone' in record['text'] and 'RleMaskHead as FCNMaskHead' in record['text']


@pytest.mark.parametrize('training', [True, False])
def test_a_segmentor_beside_its_stock_form(seg, training):
    option = 'model.backbone.kernels=eager'
    case = StepCase(seg, IMAGES, 'bf16', training, layouts=('nchw',), options=(option,))
    record = case.measure(Settings(CPU, PEAKS, 1, 0.0))
    assert record['title'].endswith(f'2 x 64 x 96, bf16, {option}')  # two cases of a results file differ in it alone
    assert [row.get('error') for row in record['rows']] == [None] * (2 if training else 3)
    assert {'data', 'backbone', 'decode head'} <= set(record['rows'][0]['parts'])


def test_nothing_of_ours_is_in_the_stock_form(det):
    case = StepCase(det, IMAGES, 'fp32')
    ours = case.ours()
    stock, done = stock_form(ours)
    models = [Step(case, cfg, 'nchw', CPU).model for cfg in (ours, stock)]
    allowed = (BenchmarkBackbone, StageOutputs)
    found = [
        {type(m) for m in model.modules() if type(m).__module__.partition('.')[0] in ('densekit', 'backbones')}
        for model in models
    ]
    assert {ExactRPNHead, RleMaskHead} <= found[0]
    assert found[1] <= set(allowed)
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert counts[0] == counts[1]
    assert ours.model.rpn_head.type == 'ExactRPNHead' and 'ExactRPNHead as RPNHead' in done  # a copy is changed


def both(case):
    ours = case.ours()
    return [Step(case, cfg, 'nchw', CPU, guarded=cfg is ours) for cfg in (ours, stock_form(ours)[0])]


def test_only_our_step_looks_for_numbers_that_are_none(det):
    for step, stops in zip(both(StepCase(det, IMAGES, 'fp32')), (True, False), strict=True):
        bias = step.model.rpn_head.rpn_cls.bias
        step()
        assert bias.isfinite().all()
        bias.register_hook(lambda gradient: gradient * float('nan'))
        if stops:
            with pytest.raises(NonFiniteError, match='a gradient is NaN'):
                step()
            assert bias.isfinite().all()  # it came before the step
        else:
            step()
            assert bias.isnan().all()


def test_the_guard_counts_for_the_optimizer(det, monkeypatch):
    seen = []
    agree = guards.agree
    monkeypatch.setattr(guards, 'agree', lambda *args: seen.append(clock[0].current) or agree(*args))
    clock = []
    start = breakdown.Clock.start
    monkeypatch.setattr(breakdown.Clock, 'start', lambda self: clock.append(self) or start(self))
    monkeypatch.setattr(breakdown, '_STEPS', 1)
    StepCase(det, IMAGES, 'fp32').build(CPU).parts()
    assert seen == ['optimizer']


@pytest.mark.parametrize('on', [True, False])
def test_both_let_cudnn_choose_as_the_config_says(seg, monkeypatch, on):
    for before in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, 'benchmark', before)
        for step in both(StepCase(seg, IMAGES, training=False, options=(f'env_cfg.cudnn_benchmark={on}',))):
            seen = []
            step.model.backbone.register_forward_hook(lambda *args, s=seen: s.append(torch.backends.cudnn.benchmark))
            step()
            assert seen == [on] and torch.backends.cudnn.benchmark == before


def test_results_have_the_form_that_metrics_need(det, seg):
    ours, stock = both(StepCase(det, IMAGES, 'fp32', training=False))
    assert isinstance(ours()[0].pred_instances.masks, RleMasks)
    assert isinstance(stock()[0].pred_instances.masks, torch.Tensor)
    ours, stock = both(StepCase(seg, IMAGES, 'fp32', training=False))
    assert ['seg_logits' in step()[0] for step in (ours, stock)] == [False, True]


@pytest.mark.parametrize('option', ['default_hooks.label_maps=None', 'test_evaluator.type=CityscapesMetric'])
def test_results_are_whole_where_somebody_needs_them(seg, option):
    ours = StepCase(seg, IMAGES, 'fp32', training=False, options=(option,)).build(CPU)
    assert 'seg_logits' in ours()[0] and 'pred_sem_seg' in ours()[0]


def test_heads_have_the_same_weights(det, monkeypatch):
    seed, seeds = torch.manual_seed, iter((0, 1))
    monkeypatch.setattr(torch, 'manual_seed', lambda same: seed(next(seeds)))
    ours, stock = both(StepCase(det, IMAGES, 'fp32', training=False))

    def unlike():
        theirs = stock.model.state_dict()
        return [
            name
            for name, value in ours.model.state_dict().items()
            if not name.startswith('backbone.') and not torch.equal(value, theirs[name])
        ]

    assert 'rpn_head.rpn_conv.weight' in unlike()
    before = {name: value.clone() for name, value in stock.model.backbone.state_dict().items()}
    stock.take_heads(ours)
    assert unlike() == []
    assert all(torch.equal(value, before[name]) for name, value in stock.model.backbone.state_dict().items())


def test_a_class_of_ours_that_takes_more_loses_it(det, monkeypatch):

    class MoreRPNHead(RPNHead):
        def __init__(self, *args, quick=False, **kwargs):
            super().__init__(*args, **kwargs)

    MoreRPNHead.__module__ = 'densekit.somewhere'
    monkeypatch.setitem(MODELS.module_dict, 'MoreRPNHead', MoreRPNHead)
    cfg = StepCase(det, IMAGES).ours()
    cfg.model.rpn_head.update(type='MoreRPNHead', quick=True)
    cfg.optim_wrapper.optimizer.fused = True
    stock, done = stock_form(cfg)
    assert stock.model.rpn_head.type == 'mmdet.RPNHead' and 'MoreRPNHead as RPNHead without quick' in done
    assert 'quick' not in stock.model.rpn_head and stock.model.rpn_head.in_channels == 64
    assert 'fused' not in stock.optim_wrapper.optimizer and 'AdamW without fused' in done


def test_other_backbones_than_convnext_v1_have_no_stock_form(det):
    cfg = StepCase(det, IMAGES).ours()
    cfg.model.backbone.use_grn = True
    with pytest.raises(ValueError, match='ConvNeXt V1'):
        stock_form(cfg)


def test_timing_the_parts_changes_nothing(det):
    step = StepCase(det, IMAGES, 'fp32', options=('model.backbone.drop_path_rate=0.0',)).build(CPU)
    start = {name: value.clone() for name, value in step.model.state_dict().items()}

    def after(run):
        step.model.load_state_dict(start)
        step.wrapper.optimizer.state.clear()
        torch.manual_seed(0)
        run()
        return {name: value.clone() for name, value in step.model.state_dict().items()}

    plain = after(step)
    breakdown_steps, breakdown._STEPS = breakdown._STEPS, 1
    try:
        timed = after(step.parts)
    finally:
        breakdown._STEPS = breakdown_steps
    assert all(torch.equal(plain[name], timed[name]) for name in plain)
    assert any(not torch.equal(plain[name], start[name]) for name in plain)
    assert 'forward' not in vars(step.model.backbone) and 'step' not in vars(step.wrapper)


@pytest.mark.parametrize('realistic', [True, False])
def test_the_mask_head_of_an_untrained_detector_has_work(det, monkeypatch, realistic):
    if not realistic:
        monkeypatch.setattr(steps, '_make_realistic', lambda model, training: None)
    step = StepCase(det, (1, 128, 128), 'fp32', options=('model.train_cfg.rcnn.sampler.num=256',)).build(CPU)
    head, number = step.model.roi_head.mask_head, []
    original = head.get_targets
    head.get_targets = lambda **kwargs: number.append(len(targets := original(**kwargs))) or targets
    step()
    assert (number[0] == 64) == realistic  # a quarter of the sample, the most there can be


class Ticking(torch.autograd.Function):
    """Takes so many ticks of a clock forward and backward."""

    @staticmethod
    def forward(ctx, x, clock, forward, backward):
        ctx.clock, ctx.ticks = clock, backward
        clock.time += forward
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.clock.time += ctx.ticks
        return gradient, None, None, None


class Part(nn.Module):
    def __init__(self, clock, forward, backward):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.ticks = clock, forward, backward

    def forward(self, x):
        return Ticking.apply(x * self.weight, *self.ticks)


class Head(Part):
    def loss(self, x):
        return self.loss_by_feat(self(x))

    def loss_by_feat(self, x):
        return {'loss': Ticking.apply(x.sum(), self.ticks[0], 7, 11)}


class Toy(nn.Module):
    def __init__(self, clock):
        super().__init__()
        self.clock = clock
        self.backbone, self.neck = Part(clock, 1, 2), Part(clock, 10, 20)
        self.decode_head = Head(clock, 100, 200)
        self.auxiliary_head = Head(clock, 1000, 2000)

    def train_step(self, wrapper):
        features = self.neck(self.backbone(torch.ones(1)))
        losses = [self.decode_head.loss(features)['loss'], self.auxiliary_head.loss(features)['loss']]
        self.clock.time += 5
        wrapper.update_params(sum(losses))


def test_each_part_has_its_own_time_forward_and_backward(monkeypatch):
    clock = SimpleNamespace(time=0)
    monkeypatch.setattr(breakdown.time, 'perf_counter', lambda: clock.time)
    model = Toy(clock)
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    wrapper.optimizer.register_step_pre_hook(lambda *args: setattr(clock, 'time', clock.time + 40))
    parts = parts_of(lambda: model.train_step(wrapper), model, wrapper, CPU)
    assert parts == {
        'backbone': 3,
        'neck': 30,
        'decode head': 300,
        'auxiliary head': 3000,
        'losses': 2 * (7 + 11),
        'optimizer': 40,
        'other': 5,
    }


def test_batches(det, seg):
    cfg = load_config(det)
    boxes, polygons = (make_batch(cfg, IMAGES, polygons=value)['data_samples'] for value in (False, True))
    for sample, again in zip(boxes, polygons, strict=True):
        truth = sample.gt_instances
        assert torch.equal(truth.bboxes, again.gt_instances.bboxes)
        assert (truth.bboxes[:, 2:] > truth.bboxes[:, :2]).all() and int(truth.labels.max()) < 5
        assert isinstance(truth.masks, BitmapMasks) and isinstance(again.gt_instances.masks, PolygonMasks)
        assert truth.masks.masks.reshape(OBJECTS, -1).any(1).all()
    labels = make_batch(load_config(seg), IMAGES)['data_samples'][0].gt_sem_seg.data
    assert labels.shape == (1, 64, 96) and set(labels.unique().tolist()) <= {0, 1, 2, 3, 4, 5, 255}


@pytest.mark.parametrize(
    ('pipeline', 'kind'),
    [
        ([dict(type='LoadAnnotations', with_bbox=True)], None),
        ([dict(type='mmdet.LoadAnnotations', with_bbox=True, with_mask=False)], None),
        ([dict(type='LoadAnnotations', with_mask=True)], BitmapMasks),
        ([dict(type='LoadPanopticAnnotations', with_mask=True)], BitmapMasks),
        ([dict(type='mmdet.LoadAnnotations', with_mask=True, poly2mask=False)], PolygonMasks),
    ],
)
def test_masks_are_those_that_the_pipeline_loads(det, pipeline, kind):
    cfg = load_config(det)
    cfg.train_dataloader.dataset.pipeline = pipeline
    truth = make_batch(cfg, IMAGES)['data_samples'][0].gt_instances
    assert isinstance(truth.masks, kind) if kind else 'masks' not in truth


SMALL = dict(depths=(1, 1, 1, 1), channels=(8, 16, 32, 32))
GROUPS = dict(norm_cfg=dict(num_groups=4))
SMALL_BACKBONE = dict(_delete_=True, type='ConvNeXt', arch=SMALL, out_indices=(1, 2, 3))
LAYERS = dict(num_layers=1, layer_cfg=dict(ffn_cfg=dict(feedforward_channels=16)))
ONE_STAGE = {
    'rtmdet_l_convnext_b_coco': dict(
        neck=dict(in_channels=[16, 32, 32], out_channels=32, num_csp_blocks=1, **GROUPS),
        bbox_head=dict(in_channels=32, feat_channels=32, **GROUPS),
    ),
    'dino_convnext_t_12e_coco': dict(
        num_queries=120, neck=dict(in_channels=[16, 32, 32]), encoder=LAYERS, decoder=LAYERS
    ),
}


@pytest.mark.parametrize('recipe', ONE_STAGE)
def test_detectors_without_masks(quick_mmengine, tmp_path, recipe):
    """Both are built from one config: DINO writes into what it is built from."""
    base = CONFIGS / f'{recipe}.py'
    path = tmp_path / 'small.py'
    path.write_text(f'_base_ = {str(base)!r}\nmodel = {dict(backbone=SMALL_BACKBONE, **ONE_STAGE[recipe])}\n')
    case = StepCase(str(path), IMAGES, 'fp32')
    cfg = case.ours()
    before = cfg.pretty_text
    Step(case, cfg, 'nchw', CPU)
    assert cfg.pretty_text == before
    losses = Step(case, cfg, 'nchw', CPU)()
    assert all(torch.isfinite(loss).all() for loss in losses.values())


def test_one_image_is_too_few_for_a_batch_norm(seg):
    step = StepCase(seg, (1, 64, 64), 'fp32').build(CPU)
    with pytest.raises(ValueError, match=r'BatchNorm .* train on 2 images or more'):
        step()


def test_other_errors_of_a_step_stay(seg, monkeypatch):
    step = StepCase(seg, IMAGES, 'fp32').build(CPU)

    def fail(*_):
        raise ValueError('something else')

    monkeypatch.setattr(step.model, 'train_step', fail)
    with pytest.raises(ValueError, match=r'^something else$'):
        step()


def test_proposals_lie_on_the_truth():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 20.0], [50.0, 50.0, 60.0, 60.0]])
    found = jittered_truth(boxes, 5)
    assert found.shape == (5, 4)
    assert ((found - boxes.repeat(3, 1)[:5]).abs() <= torch.tensor([1.0, 2.0, 1.0, 2.0])).all()


@pytest.mark.parametrize(('dtype', 'with_cp'), [('bf16', False), ('fp32', True)])
def test_planned_memory_is_what_a_step_keeps(det, dtype, with_cp):
    need = fit._need(det, (320, 224), dtype, with_cp, CPU, ())
    step = fit._case(det, (3, 320, 224), dtype, with_cp, ()).build(CPU)
    kept = fit.kept_bytes(step)
    assert need.kept + 3 * need.per_image == pytest.approx(kept, rel=0.02)
    assert need.of_batch(3) == pytest.approx(need.fixed + kept, rel=0.02)


def test_what_a_step_keeps(det):
    choices = (False, (0,), (0, 1), True)
    assert fit._choices(load_config(det)) == choices
    kept = [fit.kept_bytes(fit._case(det, (1, 96, 96), 'fp32', with_cp, ()).build(CPU)) for with_cp in choices]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4
    assert kept[-1] < 0.8 * kept[0]


def test_what_a_backbone_can_checkpoint(det):
    cfg = load_config(det)
    cfg.model.backbone = dict(type='ConvNeXtIsotropic')
    assert fit._choices(cfg) == (False, True)
    cfg.model.backbone = dict(type='MobileNetV2')
    assert fit._choices(cfg) == (False, True)
    cfg.model.backbone = dict(type='SSDVGG')
    assert fit._choices(cfg) == (None,)


def test_without_checkpoints_a_config_that_has_them_loses_them(det):
    case = fit._case(det, (1, 96, 96), 'fp32', False, ('model.backbone.with_cp=True',))
    assert case.ours().model.backbone.with_cp is False
    assert fit._case(det, (1, 96, 96), 'fp32', None, ()).options == ()


def test_kept_bytes_are_those_of_autograd():
    size = 1000

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(size))

    model = Model()
    image = torch.ones(size)

    class Step:
        def __init__(self):
            self.model, self.wrapper = model, OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))

        def __call__(self):
            x = image * self.weight_twice()  # keeps the image, and the parameter, which does not count
            self.wrapper.update_params(x.exp().exp().sum())  # each keeps its result

        def weight_twice(self):
            return self.model.weight * self.model.weight

    # image (as what the product multiplies), the product of weights, and two results of exp
    assert fit.kept_bytes(Step()) == 4 * size * 3


def test_batches_that_fit():
    need = fit.Need('bf16', False, fixed=2 * 2**30, kept=0, per_image=2**30)
    assert need.largest_batch(10 * 2**30) == 7  # 9 GiB without the reserve
    assert need.largest_batch(2**30) == 0
    text = fit.report('a.py', 10 * 2**30, (64, 96), [need])
    assert 'python tools/train.py a.py --amp bf16 --cfg-options train_dataloader.batch_size=7' in text
    assert '"model.backbone.with_cp=False"' in text
    stages = fit.Need('fp32', (0, 1), fixed=2 * 2**30, kept=0, per_image=2**30)
    assert 'batch_size=7 "model.backbone.with_cp=[0,1]"' in fit.report('a.py', 10 * 2**30, (64, 96), [stages])
    assert 'Not one image fits' in fit.report('a.py', 2**30, (64, 96), [need])


@pytest.mark.parametrize(('text', 'size'), [('24GiB', 24 * 2**30), ('16 GB', 16e9), ('8192mib', 8 * 2**30)])
def test_sizes_of_memory(text, size):
    assert fit.parse_size(text) == size


@pytest.mark.parametrize('text', ['24', 'much', '1.2.3GiB', '24GiBs', '-1GiB'])
def test_wrong_sizes_of_memory(text):
    with pytest.raises(ValueError, match='--fit'):
        fit.parse_size(text)


def test_data(det):
    text = data_speed.report(load_config(det), [1.0, 1e9], number=12)
    lines = text.splitlines()
    table = {line.split()[0] for line in lines if line}
    assert {'LoadImageFromFile', 'LoadAnnotations', 'PackDetInputs', 'all'} <= table
    assert 'JPEG 1/4' in text
    rows = dict(line.split() for line in lines[-2:])
    assert rows['1'] == '1' and int(rows['1e+09']) > 1000


def test_workers():
    assert [data_speed.workers_for(rate, 25.0) for rate in (1, 25, 26, 400)] == [1, 1, 2, 16]


def test_times_of_transforms(monkeypatch):
    clock = SimpleNamespace(time=0.0)
    monkeypatch.setattr(data_speed.time, 'perf_counter', lambda: clock.time)

    class Wait:
        def __init__(self, seconds, refuses=()):
            self.seconds, self.refuses = seconds, refuses

        def __call__(self, results):
            clock.time += self.seconds
            return None if results in self.refuses else results

    class Data(list):
        pipeline = SimpleNamespace(transforms=[Wait(1.0), Wait(2.0, refuses=(3,)), Wait(4.0)])

        def get_data_info(self, index):
            return self[index]

    assert data_speed.per_transform(Data(range(4)), 4) == {'Wait 1': 1.0, 'Wait 2': 2.0, 'Wait 3': 4.0}
    with pytest.raises(ValueError, match='no images'):
        data_speed.per_transform(Data(), 4)
    with pytest.raises(ValueError, match='list has no pipeline'):
        data_speed.per_transform([1], 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_steps_on_a_gpu(det):
    device = torch.device('cuda', 0)
    record = StepCase(det, IMAGES, 'bf16').measure(Settings(device, PEAKS, rounds=2, at_least=0.01))
    for row in record['rows']:
        assert row.get('error') is None and row.get('parts_error') is None
        assert {'backbone', 'RPN', 'mask targets', 'optimizer'} <= set(row['parts'])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_a_planned_step_on_a_gpu(det):
    device = torch.device('cuda', 0)
    need = fit.plan(det, (256, 256), device)[0]
    assert 'GiB at most' in fit.verify(det, need, 2 * 2**30, (256, 256), device)
