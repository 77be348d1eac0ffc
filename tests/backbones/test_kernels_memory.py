"""What blocks keep for the backward pass, ours and the peers', counted byte by byte as under CUDA's autocast."""

from fractions import Fraction

import pytest
import torch
from kernel_helpers import build, fused, noise
from torch import Tensor, nn

from benchmarks import block_memory
from benchmarks.block_memory import V1, V2, Kept, count, ours, saved

AT_MOST, AT_MOST_RECOMPUTED = 0.6, 0.35  # of what a peer keeps


def of_a_pixel(kept: Kept) -> tuple[int, int]:
    """Bytes: times the channels, and once. As whole numbers, which they are."""
    assert kept.per_channel.denominator == kept.per_pixel.denominator == 1
    return int(kept.per_channel), int(kept.per_pixel)


@pytest.mark.parametrize('peer', ['timm', 'timm, conv_mlp', 'torchvision', 'ours, eager'])
def test_less_than_a_peer(peer):
    """The eager form of ours would not pass."""
    theirs = count(V1[peer]).per_channel
    assert count(ours()).per_channel <= AT_MOST * theirs
    assert AT_MOST_RECOMPUTED * theirs < count(ours()).per_channel
    assert count(ours(recompute=True)).per_channel <= AT_MOST_RECOMPUTED * theirs


def test_less_than_a_peer_with_grn():
    theirs = count(V2['timm']).per_channel
    assert count(ours(use_grn=True)).per_channel <= AT_MOST * theirs
    assert count(ours(use_grn=True, recompute=True)).per_channel <= AT_MOST_RECOMPUTED * theirs


@pytest.mark.parametrize(
    ('form', 'dtype', 'wanted'),
    [
        # The input of convolution 2, of LayerNorm 4, of two linear layers 2 and 8, of GELU 8, the scaled branch 2;
        # mean and deviation.
        ('timm', torch.bfloat16, (26, 8)),
        ('torchvision', torch.bfloat16, (26, 8)),
        # The stream 4, the normalized 2 and, unless it is computed again, GELU's input 8; the deviation.
        ('ours, kernels', torch.bfloat16, (14, 4)),
        ('ours, kernels, with_cp', torch.bfloat16, (6, 4)),
        # And the branch 2, where the layer scale is not folded.
        ('ours, kernels', torch.float16, (16, 4)),
        ('ours, kernels, with_cp', torch.float16, (8, 4)),
    ],
)
def test_each_byte_is_accounted_for(form, dtype, wanted):
    assert of_a_pixel(count(V1[form], dtype)) == wanted


def test_on_a_cpu_a_peer_keeps_less():
    """Whose autocast leaves LayerNorm in bfloat16; so a count on plain CPU tensors would flatter the peers by 2 C."""
    assert count(V1['timm'], device='cpu').per_channel == 24
    assert real_line(block_memory.timm_block(16), 16, 'cpu')[0] == 24


def real_line(block: nn.Module, channels: int, device: str, forward=None) -> tuple[Fraction, Fraction]:
    """The same from tensors that have numbers: of each pixel and channel, and the rest, which is below a channel's."""
    parameters = {p.untyped_storage()._cdata for p in block.parameters()}
    xs = [noise(1, channels, side, 6, device=device).requires_grad_() for side in (5, 9)]
    few, many = (saved(forward or block, x, parameters) for x in xs)
    return divmod(Fraction(many - few, 4 * 6), channels)


@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('use_grn', [False, True])
def test_kernels_keep_what_is_counted_without_running_them(use_grn, recompute, device):
    block = build(use_grn=use_grn, layer_scale=0.0 if use_grn else 1.0).to(device)
    line = real_line(block, 16, device, fused(block, recompute))
    assert of_a_pixel(Kept(*line, Fraction(0))) == of_a_pixel(count(ours(use_grn, recompute)))


def tensors_in(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors_in(item)] if isinstance(value, list | tuple) else []


def test_nothing_is_kept_past_autograd(device):
    """A tensor that hangs on the context by itself would not be counted."""
    block = build().to(device)
    out = fused(block)(noise(1, 16, 3, 3, device=device).requires_grad_())
    kept = vars(out.grad_fn)
    assert kept and not tensors_in(kept)
    kept['extra'] = [out.detach()]
    assert tensors_in(kept)


def test_copies_of_weights_are_the_same_for_all():
    """One of each linear layer's weight in the dtype of the products: autocast's, or with the small maps folded in."""
    copies = {name: round(float(count(V1[name]).copies), 2) for name in ('timm', 'torchvision', 'ours, kernels')}
    assert set(copies.values()) == {2.0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('name', ['timm', 'torchvision', 'ours, kernels', 'ours, kernels, with_cp'])
def test_the_device_holds_what_is_counted(name):
    block, rows = V1[name](64).cuda(), (64, 128)
    held = []
    for height in (*rows, *rows):  # the first two times there is more to set up
        x = noise(2, 64, height, 64, device='cuda').requires_grad_()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with torch.autocast('cuda', torch.bfloat16):
            out = block(x)
        held.append(torch.cuda.memory_allocated() - before - out.numel() * out.element_size())
        if name.startswith('ours'):
            held[-1] += x.numel() * x.element_size()  # which others give up, and it was there before
        del out
    kept = count(V1[name])
    wanted = (64 * kept.per_channel + kept.per_pixel) * 2 * 64 * (rows[1] - rows[0])
    assert held[3] - held[2] == pytest.approx(float(wanted), rel=1e-3)
