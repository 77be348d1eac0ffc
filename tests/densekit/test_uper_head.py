"""LeanUPerHead is mmseg's UPerHead, and resizing is torch's."""

import copy

import pytest
import torch
from torch.nn import functional

import densekit.ops  # noqa: F401

# isort: split
from mmseg.models.decode_heads import UPerHead

from densekit.models.resize import resized_and_joined
from densekit.models.uper_head import LeanUPerHead

pytestmark = pytest.mark.usefixtures('one_thread')

CHANNELS = [6, 8, 10, 12]
OPTIONS = dict(
    in_channels=CHANNELS,
    in_index=[0, 1, 2, 3],
    pool_scales=(1, 2, 3, 6),
    channels=16,
    dropout_ratio=0.0,
    num_classes=5,
    norm_cfg=dict(type='BN'),
    loss_decode=dict(type='CrossEntropyLoss'),
)


def features(height=50, width=66, memory_format=torch.channels_last):
    """Of a picture whose sides do not halve evenly, as a backbone gives them."""
    generator = torch.Generator().manual_seed(0)
    maps = []
    for i, channels in enumerate(CHANNELS):
        x = torch.randn(2, channels, height >> i, width >> i, generator=generator)
        maps.append(x.contiguous(memory_format=memory_format).requires_grad_())
    return maps


def run(head, inputs, *, bf16=False):
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
        logits = head(inputs)
    logits.float().square().sum().backward()
    return logits.detach(), [x.grad for x in inputs] + [parameter.grad for parameter in head.parameters()]


def heads(align_corners, **options):
    torch.manual_seed(0)
    stock = UPerHead(**OPTIONS, align_corners=align_corners)
    ours = LeanUPerHead(**OPTIONS, align_corners=align_corners, **options)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def close(ours, theirs, rtol):
    for own, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, reference, rtol=0, atol=rtol * float(reference.abs().max()))


@pytest.mark.parametrize('bf16', [False, True])
@pytest.mark.parametrize('align_corners', [False, True])
def test_logits_are_mmsegs_to_the_bit(align_corners, bf16):
    ours, stock = heads(align_corners)
    logits, gradients = run(ours, features(), bf16=bf16)
    reference, reference_gradients = run(stock, features(), bf16=bf16)
    assert logits.dtype == reference.dtype
    assert torch.equal(logits, reference)
    close(gradients, reference_gradients, 0.02 if bf16 else 1e-5)


@pytest.mark.parametrize('memory_format', [torch.channels_last, torch.contiguous_format])
def test_channels_last_gives_the_same_within_rounding(memory_format):
    ours, stock = heads(False, channels_last=True)
    logits, gradients = run(ours, features(memory_format=memory_format))
    reference, reference_gradients = run(stock, features(memory_format=memory_format))
    close([logits], [reference], 1e-5)
    close(gradients, reference_gradients, 1e-4)


def formats_of_convolutions(head):
    """Whether the input of each 3x3 convolution is in channels_last."""
    found = []
    for module in head.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_pre_hook(
                lambda _, args: found.append(args[0].is_contiguous(memory_format=torch.channels_last))
            )
    head(features())
    return found


def test_every_convolution_gets_channels_last_if_asked_to():
    ours, stock = heads(False, channels_last=True)
    assert formats_of_convolutions(ours) == [True] * 5
    assert False in formats_of_convolutions(stock)


def test_other_weights_give_other_logits():
    """The comparisons above can fail."""
    ours, stock = heads(False)
    with torch.no_grad():
        ours.fpn_bottleneck.conv.weight[0, -1, 0, 0] += 1
    with pytest.raises(AssertionError, match='not close'):
        close([run(ours, features())[0]], [run(stock, features())[0]], 1e-5)


@pytest.mark.parametrize('deterministic', [False, True])
@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize(('old', 'new'), [((3, 4), (7, 9)), ((1, 1), (5, 6)), ((8, 9), (3, 5)), ((5, 6), (5, 6))])
def test_the_gradient_of_joining_is_torchs(old, new, align_corners, deterministic):
    first, x = torch.randn(2, 2, *new), torch.randn(2, 3, *old, requires_grad=True)
    weights = torch.randn(2, 5, *new)
    resized = functional.interpolate(x, size=new, mode='bilinear', align_corners=align_corners)
    torch.use_deterministic_algorithms(deterministic)
    try:
        results = []
        for out in (resized_and_joined([first, x], align_corners), torch.cat([first, resized], dim=1)):
            results.append((out, torch.autograd.grad((out * weights).sum(), x)[0]))
    finally:
        torch.use_deterministic_algorithms(False)
    (ours, grad), (stock, reference) = results
    assert torch.equal(ours, stock) and torch.equal(grad, reference)


def test_what_needs_no_gradient_gets_none():
    maps = [x.detach().requires_grad_(i != 1) for i, x in enumerate(features())]
    resized_and_joined(maps).sum().backward()
    assert [x.grad is not None for x in maps] == [True, False, True, True]
    assert torch.equal(maps[0].grad, torch.ones_like(maps[0]))


class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes of new tensors that exist at a time."""

    def __init__(self):
        super().__init__()
        self.alive = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage.data_ptr()] = torch.multiprocessing.reductions.StorageWeakRef(storage), len(storage)
        self.alive = {at: (ref, size) for at, (ref, size) in self.alive.items() if not ref.expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return out


def test_levels_are_not_held_beside_what_joins_them():
    maps = [torch.zeros(1, 8, 64 >> i, 64 >> i) for i in range(4)]
    level = maps[0].numel() * 4
    with torch.no_grad(), Peak() as ours:
        resized_and_joined(maps)
    with torch.no_grad(), Peak() as stock:
        torch.cat([functional.interpolate(x, (64, 64), mode='bilinear') for x in maps], dim=1)
    assert ours.most <= 5 * level
    assert stock.most >= 7 * level


def test_a_copy_of_the_head_computes_the_same():
    ours, _ = heads(False, channels_last=True)
    assert torch.equal(copy.deepcopy(ours)(features()), ours(features()))
