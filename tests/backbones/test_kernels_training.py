"""The demo's segmentor trained with and without kernels: its losses differ by what the order of sums makes of them.

All kernels run, the 7 x 7 convolution too. Without a GPU they are interpreted, so the model is narrower and its images
smaller than the demo's; everything else is the demo's.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import DefaultScope
from torch import Tensor

from backbones.convnext import ConvNeXtBlock
from densekit.engine.config import load_config
from densekit.engine.runner import DensekitRunner

DEMO = Path(__file__).parents[2] / 'configs/segmentation/upernet_convnext_mini_shapes.py'
SMALL = """
_base_ = '{demo}'
data_root = '{folder}/shapes/'
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root, shapes=dict(num_train=20, num_val=1, size=32)))
val_cfg = val_dataloader = val_evaluator = test_cfg = test_dataloader = test_evaluator = None
model = dict(
    data_preprocessor=dict(size=(32, 32)),
    backbone=dict(arch=dict(_delete_=True, depths=(1, 1, 2, 1), channels=(8, 16, 24, 32)), kernels='{kernels}'),
    decode_head=dict(in_channels=[8, 16, 24, 32], channels=32),
    auxiliary_head=dict(in_channels=24, channels=32))
train_cfg = dict(max_iters={steps}, val_interval=1000)
default_hooks = dict(checkpoint=dict(interval=1000, save_last=False))
optim_wrapper = dict(type='{wrapper}')
work_dir = '{folder}/run'
"""

# How often a run may be as far off as the eager ones are from each other. Their losses differ in the last bit for some
# 15 steps and by a tenth after 50; each of 11 of them was as far from the other ten as 2.5 times those were at most.
FACTOR, LAST_BITS = 4, 1e-6


class InOrder(Hook):
    """Notes the losses of a run whose sums are in another order, but the same sums."""

    def __init__(self, turned: bool, shuffled: int | None) -> None:
        self.turned, self.shuffled = turned, shuffled
        self.losses: list[float] = []

    def before_train(self, runner):
        if self.shuffled is None:
            return
        generator = torch.Generator().manual_seed(self.shuffled)
        for block in runner.model.modules():
            if isinstance(block, ConvNeXtBlock):
                order = torch.randperm(block.pwconv1.out_features, generator=generator)
                with torch.no_grad():
                    for tensor in (block.pwconv1.weight, block.pwconv1.bias, block.pwconv2.weight.t()):
                        tensor.copy_(tensor[order])

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if self.turned:
            for values in data_batch.values():
                values.reverse()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(outputs['loss'].item())


@pytest.fixture
def train(tmp_path, quick_mmengine) -> Callable[..., Tensor]:
    """Trains a few steps and returns the losses."""
    names = map('run{}'.format, range(100))  # mmengine's loggers and message hubs go by the name of the config

    def run(steps: int, kernels='eager', amp=False, turned=False, shuffled=None) -> Tensor:
        wrapper = 'AutocastOptimWrapper' if amp else 'OptimWrapper'
        path = tmp_path / f'{next(names)}.py'
        path.write_text(SMALL.format(demo=DEMO, folder=tmp_path, steps=steps, kernels=kernels, wrapper=wrapper))
        runner = DensekitRunner.from_cfg(load_config(str(path)))
        hook = InOrder(turned, shuffled)
        runner.register_hook(hook)
        with DefaultScope.overwrite_default_scope('mmseg'):
            runner.train()
        assert len(hook.losses) == steps
        return torch.tensor(hook.losses, dtype=torch.float64)

    return run


@pytest.fixture
def quick(device, monkeypatch):
    """Large programs where they are interpreted, because each takes its time there, whatever its size."""
    from backbones.kernels import depthwise_plan, depthwise_triton, fold_triton, pointwise_triton

    if device != 'cpu':
        yield
        return
    tile, whole_rows = pointwise_triton.tile, pointwise_triton.whole_rows
    larger = {
        'tile': lambda channels, elements=2048: tile(channels, 32 * elements),
        'whole_rows': lambda channels: {**whole_rows(channels), 'R': 32 * whole_rows(channels)['R']},
    }
    for module in (pointwise_triton, fold_triton, depthwise_triton):
        for name in larger.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, larger[name])
    for table in (depthwise_plan.CONVOLVE_COLUMNS, depthwise_plan.CORRELATE_COLUMNS):
        monkeypatch.setitem(table, 7, 1)
    monkeypatch.setattr(depthwise_plan, 'THREADS', 4096)
    plans = [plan for plan in vars(depthwise_plan).values() if hasattr(plan, 'cache_clear')]
    [plan.cache_clear() for plan in plans]
    yield
    [plan.cache_clear() for plan in plans]


@pytest.fixture
def ran(monkeypatch):
    """Holds something for each block that ran on the kernels."""
    from backbones.kernels import block

    blocks, convnext_block = [], block.convnext_block
    monkeypatch.setattr(block, 'convnext_block', lambda *args, **o: blocks.append(1) or convnext_block(*args, **o))
    return blocks


def farthest(some: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """The largest difference of two curves up to each step."""
    return torch.stack([(a - b).abs().cummax(0).values for a in some for b in others]).amax(0)


def check_within(ours: Tensor, spread: Tensor, reference: Sequence[Tensor], factor: float = FACTOR) -> None:
    away, limit = farthest([ours], reference), factor * spread + LAST_BITS
    [outside] = (~(away <= limit)).nonzero(as_tuple=True)
    if len(outside):
        step = int(outside[0])
        raise AssertionError(f'step {step + 1}: off by {away[step]:.2g}, where {limit[step]:.2g} is allowed')


def eager(train, device: str, steps: int, **options) -> list[Tensor]:
    """Runs with the pictures of a batch turned round, the hidden channels shuffled, or the forms that suit a CPU."""
    orders = [dict(), dict(turned=True), *(dict(shuffled=seed) for seed in range(4))]
    if device == 'cpu':
        orders.append(dict(kernels='auto'))
    curves = [train(steps, **order, **options) for order in orders]
    assert len({tuple(curve.tolist()) for curve in curves}) > 1
    return curves


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_fifty_steps(train, quick, ran, device):
    curves = eager(train, device, 50)
    assert ran == [] and all(curve[-1] < 0.5 * curve[0] for curve in curves)
    check_within(train(50, kernels='triton'), farthest(curves, curves), curves)
    assert len(ran) == 50 * 5


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_fifty_steps_under_autocast(train, quick, ran, device):
    """Rounding to bfloat16 counts here, not the order of sums: eager code is off from float32 as well, by as much."""
    exact, curves = eager(train, device, 50), eager(train, device, 50, amp=True)
    assert ran == []
    check_within(train(50, kernels='triton', amp=True), farthest(curves, exact), exact, factor=3)
    assert len(ran) == 50 * 5


def off_by_two_percent(original):
    def gelu_backward(*args, **options):
        out, grad, sums = original(*args, **options)
        return out, 1.02 * grad, 1.02 * sums

    return gelu_backward


MISTAKES = {
    'gelu_backward': off_by_two_percent,
    'gelu_forward': lambda original: functools.partial(torch.nn.functional.gelu, approximate='tanh'),
}


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_small_mistake_leaves_the_spread(mistake, train, quick, device, monkeypatch):
    """A gradient off by a fiftieth, and the tanh form of GELU."""
    from backbones.kernels import pointwise_triton

    curves = eager(train, device, 14)
    wrong = MISTAKES[mistake](getattr(pointwise_triton, mistake))
    monkeypatch.setattr(pointwise_triton, mistake, wrong)
    with pytest.raises(AssertionError, match='is allowed'):
        check_within(train(14, kernels='triton'), farthest(curves, curves), curves)
