"""How often the host waits for the device, counted on a pretended one."""

import densekit.ops  # noqa: F401

# isort: split
from collections import Counter

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from small_detectors import small
from torch import nn

from densekit.benchmark.steps import Step, StepCase
from densekit.benchmark.stock import stock_form
from densekit.benchmark.waits import DEVICE, pretended_cuda, waits_of_step
from densekit.engine import guards
from densekit.models import DeviceDetDataPreprocessor

IMAGES = (2, 64, 96)
CPU = torch.device('cpu')


@pytest.fixture
def det(tiny, quick_mmengine):
    return tiny.det


def mask():
    return torch.tensor([True, False, True, True]).to(DEVICE)


def numbers():
    return torch.arange(4.0).to(DEVICE)


WAITING = {
    'item': lambda x, m: x[0].item(),
    'bool': lambda x, m: bool((x > 0).any()),
    'float': lambda x, m: float(x.sum()),
    'tolist': lambda x, m: x.tolist(),
    'cpu': lambda x, m: x.cpu(),
    'to the host': lambda x, m: x.to('cpu', non_blocking=True),
    'to the device': lambda x, m: torch.ones(3).to(DEVICE),
    'to the device, pinned': lambda x, m: torch.ones(3).pin_memory().to(DEVICE),
    'much to the device, unpinned': lambda x, m: torch.ones(16385).to(DEVICE, non_blocking=True),
    'much into what is there, unpinned': lambda x, m: torch.ones(16385, device=DEVICE).copy_(torch.ones(16385), True),
    'to where another is': lambda x, m: torch.ones(3).to(x),
    'into what is on the device': lambda x, m: x.copy_(torch.ones(4)),
    'tensor': lambda x, m: torch.tensor([1.0, 2.0], device=DEVICE),
    'as_tensor': lambda x, m: torch.as_tensor(1.0, device=x.device),
    'new_tensor': lambda x, m: x.new_tensor([1.0, 2.0]),
    'nonzero': lambda x, m: m.nonzero(),
    'where of one': lambda x, m: torch.where(m),
    'selection': lambda x, m: x[m],
    'masked_select': lambda x, m: x.masked_select(m),
    'several put by a mask': lambda x, m: x.__setitem__(m, torch.ones(3, device=DEVICE)),
    'a number put at places': lambda x, m: x.__setitem__(torch.arange(2, device=DEVICE), 5.0),
    'places on the host': lambda x, m: x[[2, 0, 1]],
    'unique': lambda x, m: x.unique(),
    'repeats': lambda x, m: x.repeat_interleave(torch.ones(4, dtype=torch.long, device=DEVICE)),
    'suppression': lambda x, m: torch.ops.torchvision.nms(torch.ones(2, 4, device=DEVICE), x[:2], 0.5),
}
NOT_WAITING = {
    'filling': lambda x, m: x.new_full((3,), 2.0),
    'a device from the start': lambda x, m: torch.arange(3, device='cuda'),
    'pinned': lambda x, m: torch.ones(40000).pin_memory().to(DEVICE, non_blocking=True),
    'part of what is pinned': lambda x, m: torch.ones(40000).pin_memory()[:30000].to(DEVICE, non_blocking=True),
    'little, unpinned': lambda x, m: torch.ones(16384).to(DEVICE, non_blocking=True),
    'on the device already': lambda x, m: x.to(DEVICE).to(x),
    'places': lambda x, m: x[torch.arange(2, device=DEVICE)],
    'a number put by a mask': lambda x, m: x.__setitem__(m, 5.0),
    'a number put in a slice': lambda x, m: x[1:].__setitem__(slice(None), 5.0),
    'where of three': lambda x, m: torch.where(m, x, 0),
    'sorting': lambda x, m: x.argsort(stable=True).sort(),
    'splitting': lambda x, m: [part.sum() for part in x.split([1, 3])],
    'on the host': lambda x, m: torch.ones(3).nonzero().tolist(),
    'shapes': lambda x, m: len(x) + x.numel(),
}


@pytest.mark.parametrize('kind', WAITING)
def test_what_waits(kind):
    with pretended_cuda() as waits:
        x, m = numbers(), mask()
        waits.clear()
        WAITING[kind](x, m)
    assert waits.total() == 1, waits
    ((asked_by, _),) = waits
    assert asked_by.startswith('tests/densekit/test_waits.py:')


@pytest.mark.parametrize('kind', NOT_WAITING)
def test_what_does_not(kind):
    with pretended_cuda() as waits:
        x, m = numbers(), mask()
        waits.clear()
        NOT_WAITING[kind](x, m)
    assert waits.total() == 0, waits


def test_what_is_pinned():
    with pretended_cuda():
        host = torch.ones(3)
        pinned = host.pin_memory()
        assert pinned.is_pinned() and pinned[1:].is_pinned() and pinned.pin_memory() is pinned
        assert not host.is_pinned() and not pinned.clone().is_pinned()


@pytest.mark.parametrize('pinned', [True, False])
def test_images_go_to_the_device_while_the_host_goes_on(pinned):
    """If a loader pins them; boxes and labels, which it does not pin, are small."""
    with pretended_cuda() as waits:
        preprocessor = DeviceDetDataPreprocessor([1.0] * 3, [2.0] * 3, bgr_to_rgb=True, boxtype2tensor=False).to(DEVICE)
        images = [torch.zeros(3, 160, 160, dtype=torch.uint8) for _ in range(2)]
        truth = InstanceData(bboxes=torch.ones(300, 4), labels=torch.ones(300).long())
        samples = [DetDataSample(gt_instances=truth, metainfo=dict(img_shape=(160, 160))) for _ in range(2)]
        batch = {'inputs': [image.pin_memory() for image in images] if pinned else images, 'data_samples': samples}
        waits.clear()
        assert preprocessor(batch)['data_samples'][0].gt_instances.bboxes.is_cuda
    assert waits.total() == (0 if pinned else 2), waits


def test_waits_of_the_backward_pass():
    with pretended_cuda() as waits:
        x, m = numbers().requires_grad_(), mask()
        loss = x[m].sum()
        waits.clear()
        loss.backward()
        assert x.grad.is_cuda and waits.total() == 1
        assert x.grad.tolist() == [1.0, 0.0, 1.0, 1.0]


def test_a_module_goes_there():
    layer = nn.Linear(3, 2)
    expected = layer(torch.ones(1, 3)).tolist()
    with pretended_cuda():
        layer.to('cuda')
        assert layer.weight.device == DEVICE
        assert layer(torch.ones(1, 3, device='cuda')).tolist() == expected


def asked(waits):
    """The functions that asked, and how often, without their lines."""
    found = Counter()
    for (line, _), number in waits.items():
        found[line.rpartition(' ')[2]] += number
    return dict(found)


# With two images. What is left has its reason: how many boxes there are of a kind decides how the host goes on.
TRAINING = {
    'sample_all': 2,  # boxes with an object and without, of anchors and of proposals
    'predict_by_feat': 1,  # proposals that are large enough
    'nms': 2,  # proposals that stay, of each image
    'forward': 2,  # boxes on each level of the pyramid, of the box head and of the mask head
    'agree': 1,  # whether losses and gradients are finite, with the losses to write down
}
INFERENCE = {
    'predict_by_feat': 1,
    'nms': 4,  # proposals and objects, of each image
    'forward': 2,
    '_predict_by_feat_single': 2,  # boxes with a score, of each image
    'paste': 2,  # masks, of each image
}


@pytest.mark.parametrize(
    ('training', 'expected'), [(True, TRAINING), (False, INFERENCE)], ids=['training', 'inference']
)
def test_waits_of_a_step(det, training, expected):
    case = StepCase(det, IMAGES, 'fp32', training, options=('optim_wrapper.clip_grad=None',))
    assert asked(waits_of_step(case, case.ours(), ours=True)) == expected


def test_waits_of_a_cascade():
    """Each stage draws anew and has boxes and masks of its own on the levels."""
    cfg = small('cascade')
    for stage in cfg.model.train_cfg.rcnn:
        stage.sampler.num = 32
    cfg.model.test_cfg.rpn.max_per_img = 30
    training, inference = (
        asked(waits_of_step(StepCase('', IMAGES, 'fp32', training), cfg, ours=True)) for training in (True, False)
    )
    assert training == TRAINING | {'sample_all': 4, 'forward': 6}
    assert inference == INFERENCE | {'forward': 6}


def test_waits_of_the_stock_form(det):
    """The negative control; each of these would be seen if it came back."""
    case = StepCase(det, IMAGES, 'fp32', options=('optim_wrapper.clip_grad=None',))
    waits = waits_of_step(case, stock_form(case.ours())[0], ours=False)
    assert waits.total() == 167
    found = asked(waits)
    assert {
        '_sample_pos': 4,
        '_sample_neg': 4,
        'unmap': 8,
        'bbox_overlaps': 4,
        '_get_valid_value': 7,
    }.items() <= found.items()


def test_norms_of_gradients_come_with_the_losses(det):
    case = StepCase(det, IMAGES, 'fp32')
    assert asked(waits_of_step(case, case.ours(), ours=True)) == TRAINING
    assert asked(waits_of_step(case, case.ours(), ours=False))['_clip_grad'] == 1  # mmengine's own


def test_the_result_is_that_of_the_cpu(det, one_thread):
    """What is computed in the ways of CUDA, such as places of a mask by sorting, is the same."""
    case = StepCase(det, IMAGES, 'fp32', options=('model.train_cfg.rcnn.sampler.num=512',))
    found = []
    plain = case.build(CPU)
    torch.manual_seed(3)
    found.append(plain())
    with pretended_cuda():
        step = Step(case, case.ours(), 'nchw', DEVICE)
        torch.manual_seed(3)
        found.append(step())
    assert found[0].keys() == found[1].keys() and 'loss_mask' in found[0]
    for name, value in found[0].items():
        assert found[1][name].device == CPU  # came with the guard's flags
        # Features lie in memory in another order, which may change the last bit of a convolution.
        torch.testing.assert_close(found[1][name], value.detach(), rtol=1e-6, atol=0.0)


def test_losses_come_with_the_flags():
    with pretended_cuda() as waits:
        numbers_ = {'loss': torch.full((), 0.1, device=DEVICE), 'acc': torch.full((1,), 50.0, device=DEVICE), 'lr': 0.3}
        flags = [torch.zeros((), dtype=torch.bool, device=DEVICE), True, False]
        waits.clear()
        assert guards.agree(flags, DEVICE, numbers_) == [False, True, False]
        assert waits.total() == 1
        assert numbers_ == {'loss': torch.tensor(0.1), 'acc': torch.tensor([50.0]), 'lr': 0.3}
        waits.clear()
        assert guards.agree(flags, DEVICE) == [False, True, False]
        assert waits.total() == 1


def test_a_guard_leaves_no_trace(det):
    step = StepCase(det, IMAGES, 'fp32').build(CPU)
    assert 'parse_losses' in vars(step.model)
    for _ in range(2):
        step.guard.after_run(step.runner)
        assert 'parse_losses' not in vars(step.model)


def test_a_report(tool, det, capsys):
    options = ('--cfg-options', 'model.train_cfg.rpn_proposal.max_per_img=16')
    assert tool('benchmark', '--waits', det, '--images', '1x64x64', *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('training step of 1 x 64 x 64: ') and lines[0].endswith(' ours')
    assert any('densekit' in line and 'tolist' in line and 'densekit/models/sampler.py:' in line for line in lines)
    assert sum(line.startswith('inference') for line in lines) == 1
