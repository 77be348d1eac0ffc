"""Weights in channels_last compute the same; two processes exchange gradients in the layout in which they come.

Run as a script, this file is the two processes.
"""

import copy
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import start_processes

import densekit.ops  # noqa: F401

# isort: split
from mmdet.models.necks import FPN
from mmengine.optim import build_optim_wrapper
from mmseg.models.segmentors import SegTTAModel

from backbones import ConvNeXt
from densekit.benchmark.steps import Step, StepCase
from densekit.engine.memory_format import lay_out_weights

ROOT = Path(__file__).parents[2]
PROCESSES = 2
MASK_HEAD = [f'roi_head.mask_head.{name}' for name in ('convs.0.conv', 'convs.1.conv', 'upsample', 'conv_logits')]
POOLED = [f'decode_head.{name}' for name in ('bottleneck.conv', 'fpn_bottleneck.conv', 'conv_seg')]
# Convolutions behind the backbone that meet features in NCHW, as they are and with the weights in channels_last. Pooled
# maps of 1 x 1 and of boxes are in NCHW; the first convolution behind them leaves it.
MODELS = {'det': (MASK_HEAD, MASK_HEAD[:1]), 'seg': ([], []), 'seg with the stock head': (POOLED, POOLED[:1])}


@pytest.fixture(params=MODELS)
def step(request, tiny, quick_mmengine):
    """Makes training steps of a model, with its weights laid out or not."""

    def make(channels_last):
        case = StepCase(tiny.det if request.param == 'det' else tiny.seg, (2, 96, 96), 'fp32', True)
        cfg = case.ours()
        if request.param == 'seg with the stock head':
            cfg.model.decode_head.type = 'UPerHead'
            del cfg.model.decode_head['channels_last']
        made = Step(case, cfg, 'nchw', torch.device('cpu'))
        if channels_last is not None:
            lay_out_weights(dict(channels_last=channels_last), made.model)
        return made

    make.in_nchw = MODELS[request.param]
    return make


@pytest.mark.parametrize('channels_last', [False, True])
def test_which_convolutions_meet_nchw(step, channels_last):
    made, found = step(channels_last), set()

    def watch(name, module):
        def note(_, args):
            found.update([] if args[0].is_contiguous(memory_format=torch.channels_last) else [name])

        module.register_forward_pre_hook(note)

    for name, module in made.model.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and not name.startswith('backbone.'):
            watch(name, module)
    emitted = []
    made.model.backbone.register_forward_hook(lambda _, args, maps: emitted.extend(maps))
    made()
    assert len(emitted) == 4 and all(x.is_contiguous(memory_format=torch.channels_last) for x in emitted)
    assert found == set(step.in_nchw[channels_last])


def results(step, seed=0):
    """Losses of a step, and gradients by name."""
    gradients = {}
    for name, parameter in step.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: gradients.update({name: p.grad.clone()}))
    torch.manual_seed(seed)
    return step(), gradients


def close(found, expected, rtol):
    for name, value in expected.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(found[name], value, rtol=0, atol=rtol * scale + 1e-7, msg=lambda text, n=name: n)


def test_losses_and_gradients_are_the_same(step):
    (plain, gradients), (default, by_default), (ours, of_ours) = (results(step(how)) for how in (None, False, True))
    assert all(torch.equal(default[name], plain[name]) for name in plain)
    assert all(torch.equal(by_default[name], gradients[name]) for name in gradients)
    close(ours, plain, 1e-5)
    close(of_ours, gradients, 1e-3)
    with torch.no_grad():
        other = step(True)
        other.model.backbone.norm3.weight.mul_(1.1)
    with pytest.raises(AssertionError):
        close(results(other)[0], plain, 1e-5)


def test_checkpoints_of_both_layouts_load(step, tmp_path):
    plain, ours = step(None).model, step(True).model
    weights = {name: value.clone() for name, value in plain.state_dict().items()}
    assert list(ours.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in ours.state_dict().items())
    rearranged = [n for n, p in ours.named_parameters() if not p.is_contiguous()]
    assert rearranged and not any(name.startswith('backbone.') for name in rearranged)
    for source, target in ((plain, ours), (ours, plain)):
        torch.save(source.state_dict(), tmp_path / 'weights.pth')
        with torch.no_grad():
            for parameter in target.parameters():
                parameter.zero_()
        strides = [parameter.stride() for parameter in target.parameters()]
        target.load_state_dict(torch.load(tmp_path / 'weights.pth', weights_only=True))
        assert all(torch.equal(value, weights[name]) for name, value in target.state_dict().items())
        assert [parameter.stride() for parameter in target.parameters()] == strides


class Detector(nn.Module):
    """A backbone and a pyramid whose maps have 1 x 1 and 3 x 3 convolutions."""

    def __init__(self, kernels='auto'):
        super().__init__()
        channels = (8, 16, 24, 32)
        self.backbone = ConvNeXt(dict(depths=(1, 1, 1, 1), channels=channels), kernels=kernels)
        self.neck = FPN(in_channels=list(channels), out_channels=16, num_outs=4)

    def forward(self, x):
        return sum(maps.square().mean() for maps in self.neck(self.backbone(x)))


def detector(channels_last, kernels='auto'):
    torch.manual_seed(0)
    model = Detector(kernels)
    if channels_last is not None:
        lay_out_weights(dict(channels_last=channels_last), model)
    return model


def after_steps(channels_last, fused, before=None):
    """Weights and state of the optimizer after three steps, perhaps behind others."""
    model = detector(channels_last)
    optimizer = dict(type='AdamW', lr=1e-2, weight_decay=0.05, fused=fused)
    constructor = dict(constructor='LayerDecayOptimWrapperConstructor', paramwise_cfg=dict(decay_rate=0.9))
    wrapper = build_optim_wrapper(model, dict(type='OptimWrapper', optimizer=optimizer, **constructor))
    if before is not None:
        weights, state = copy.deepcopy(before)
        model.load_state_dict(weights)
        wrapper.load_state_dict(state)
    for number in range(3):
        torch.manual_seed(number)
        wrapper.update_params(model(torch.randn(2, 3, 64, 64)))
    return model.state_dict(), wrapper.state_dict()


@pytest.mark.usefixtures('one_thread')
@pytest.mark.parametrize(('first', 'second'), [(True, True), (True, False), (False, True)])
def test_fused_steps_across_a_change_of_layout(first, second):
    expected, _ = after_steps(None, None, after_steps(None, None))
    found, _ = after_steps(second, True, after_steps(first, True))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ('cfg', 'model', 'said'),
    [
        (dict(channels_last='yes'), Detector, "channels_last='yes': give True or False"),
        (dict(channels_last=True, sharding={}), Detector, 'FSDP cuts weights in NCHW only'),
        (dict(channels_last=True), lambda: nn.Conv2d(1, 1, 1), 'Conv2d has none'),
    ],
)
def test_mistakes_are_explained(cfg, model, said):
    with pytest.raises(ValueError, match=said):
        lay_out_weights(cfg, model())


def test_what_augments_a_test_is_passed_over():
    inner = Detector()
    inner.test_step = None
    lay_out_weights(dict(channels_last=True), SegTTAModel(module=inner))
    assert not inner.neck.fpn_convs[0].conv.weight.is_contiguous()
    assert inner.backbone.downsample_layers[1][1].weight.is_contiguous()


def one_process(rank, out, port):
    """Notes losses, gradients, strides and warnings of a step of two processes."""
    torch.set_num_threads(1)
    torch.set_warn_always(True)  # torch would say it once
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=PROCESSES)
    noted = {}
    for kernels in ('auto', 'eager'):
        for channels_last in (None, False, True):
            model = detector(channels_last, kernels)
            wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter('always')
                torch.manual_seed(rank)
                wrapped(torch.randn(2, 3, 64, 64)).backward()
            noted[f'{kernels} {channels_last}'] = (
                {name: parameter.grad for name, parameter in model.named_parameters()},
                [n for n, p in model.named_parameters() if p.grad.stride() != p.stride()],
                [str(warning.message) for warning in said],
            )
    if rank == 0:
        torch.save(noted, out)
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def noted(tmp_path_factory):
    path = tmp_path_factory.mktemp('two') / 'noted.pth'
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    done = subprocess.run(
        [sys.executable, __file__, str(path)], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize('kernels', ['auto', 'eager'])
def test_two_processes_exchange_gradients_as_they_come(noted, kernels):
    expected, strides, said = noted[f'{kernels} None']
    assert strides and all(name.endswith('dwconv.weight') for name in strides)
    assert any('Grad strides do not match bucket view strides' in text for text in said)
    for channels_last in (False, True):
        gradients, strides, said = noted[f'{kernels} {channels_last}']
        assert strides == [] and not any('strides' in text for text in said)
        close(gradients, expected, 1e-4 if channels_last else 0)


if __name__ == '__main__':
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    start_processes(one_process, (sys.argv[1], port), PROCESSES, start_method='fork')
