import pytest
import torch
from kernel_helpers import SHAPES, TOLERANCE, check, noise, results

from backbones.kernels import grn
from backbones.layers import GRN


def ours(x, weight, bias):
    return grn.grn(x, weight, bias, 1e-6)


def eager(x, weight, bias):
    layer = GRN(x.shape[-1]).to(x)
    return torch.func.functional_call(layer, dict(gamma=weight, beta=bias), (x,))


def parameters(channels, device, dtype=torch.float32):
    return [noise(1, 1, 1, channels, seed=i, dtype=dtype, device=device) for i in (1, 2)]


@pytest.mark.parametrize('dtype', list(TOLERANCE))
@pytest.mark.parametrize('shape', SHAPES)
def test_result_and_gradients(shape, dtype, device):
    x = noise(*shape, dtype=dtype, device=device)
    check(ours, eager, x, *parameters(shape[-1], device), tolerance=2 * TOLERANCE[dtype])


def test_parts_of_an_image_are_summed(device, monkeypatch):
    """A large map, of which each program takes several tiles, the last one not full."""
    from backbones.kernels import grn_triton

    monkeypatch.setattr(grn_triton, 'steps', lambda *_: 8)
    check(ours, eager, noise(2, 30, 31, 72, device=device), *parameters(72, device), tolerance=2e-6)


def test_sum_of_squares_beyond_float16(device):
    x = (noise(1, 8, 8, 24) + 100).to(device, torch.float16)
    check(ours, eager, x, *parameters(24, device))


def test_any_memory_layout(device):
    x = noise(2, 24, 3, 5, device=device).permute(0, 2, 3, 1)
    check(ours, eager, x, *parameters(24, device), tolerance=2e-6)


def test_zero_channels_have_a_gradient_of_zero_through_the_norm(device):
    """As in the eager form; V2's GRN meets them where GELU has rounded a channel away."""
    x = noise(1, 3, 3, 8, device=device)
    x[..., 2] = 0
    check(ours, eager, x, *parameters(8, device), tolerance=2e-6)
    assert torch.isfinite(results(ours, torch.zeros_like(x), *parameters(8, device))[1]).all()


def test_same_bits_in_every_run(device):
    tensors = noise(2, 20, 20, 24, device=device), *parameters(24, device)
    first, second = (results(ours, *tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_unwritten_tile_is_seen(device, monkeypatch):
    from backbones.kernels import grn_triton

    launch = grn_triton.launch
    short = lambda kernel, grid, *args, **options: launch(kernel, (grid[0] - 1, *grid[1:]), *args, **options)  # noqa: E731
    monkeypatch.setattr(grn_triton, 'launch', short)
    with pytest.raises(AssertionError, match='differs by nan'):
        check(ours, eager, noise(2, 20, 20, 24, device=device), *parameters(24, device))


def test_gradients_by_finite_differences(device):
    tensors = noise(2, 2, 1, 3, dtype=torch.float64, device=device), *parameters(3, device, torch.float64)
    assert torch.autograd.gradcheck(ours, [t.requires_grad_() for t in tensors], fast_mode=True)


def test_operator_keeps_torchs_rules(device):
    x, weight, bias = (noise(*shape, device=device).requires_grad_() for shape in [(2, 2, 3, 8), (8,), (8,)])
    torch.library.opcheck(torch.ops.densekit.grn.default, (x, weight, bias, 1e-6))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_backward_operator_keeps_torchs_rules(dtype, device):
    x, grad = (noise(2, 2, 3, 8, seed=i, dtype=dtype, device=device) for i in range(2))
    energy, weight = noise(2, 8, seed=2, device=device).abs(), noise(8, seed=3, dtype=dtype, device=device)
    torch.library.opcheck(torch.ops.densekit.grn_backward.default, (grad, x, energy, weight, 1e-6))
