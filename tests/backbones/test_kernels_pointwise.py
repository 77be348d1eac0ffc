import pytest
import torch
import torch.nn.functional as F
from kernel_helpers import SHAPES, TOLERANCE, assert_close, check, noise, poisoned_memory, results
from timm.layers import DropPath

from backbones.kernels import pointwise

DTYPES = list(TOLERANCE)


def layer_norm(x, eps=1e-6):
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def normalize(x):
    return pointwise.normalize(x, 1e-6)


def branch(x, y, bias, scale=None, factor=None):
    y = y + bias
    y = y if scale is None else y * scale
    return x + (y if factor is None else y * factor.to(y)[:, None, None, None])


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', SHAPES)
def test_normalization_and_gelu(shape, dtype, device):
    x = (3 * noise(*shape) + 1).to(device, dtype)
    check(normalize, layer_norm, x)
    check(pointwise.gelu, F.gelu, x)


def test_normalization_of_large_means_in_float16(device):
    """The variance is of differences from the mean, not a difference of squares."""
    x = (noise(1, 3, 3, 48) + 200).to(device, torch.float16)
    check(normalize, layer_norm, x)


def test_result_in_another_dtype(device):
    x = noise(1, 3, 4, 24, device=device)
    out = pointwise.normalize(x, 1e-6, torch.float16)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), layer_norm(x), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('scaled', [False, True])
@pytest.mark.parametrize('dropped', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
def test_residual(shape, dropped, scaled, dtype, device):
    x, y = (noise(*shape, seed=i, dtype=dtype, device=device) for i in range(2))
    bias, scale = (noise(shape[-1], seed=i, device=device) for i in range(2, 4))
    factor = torch.arange(shape[0], device=device) / 0.8 if dropped else None
    small = (bias, scale) if scaled else (bias,)
    check(
        lambda x, y, bias, scale=None: pointwise.add_branch(x, y, bias, scale, factor),
        lambda x, y, bias, scale=None: branch(x, y, bias, scale, factor),
        *(x, y, *small),
    )


def test_residual_stream_stays_float32(device):
    x, y, bias = noise(2, 3, 4, 24, device=device), noise(2, 3, 4, 24, seed=1), noise(24, device=device)
    y = y.to(device, torch.float16)
    out, dx, dy, d_bias = results(pointwise.add_branch, x, y, bias)
    assert (out.dtype, dx.dtype, dy.dtype, d_bias.dtype) == (torch.float32,) * 2 + (torch.float16, torch.float32)
    assert torch.equal(out, x + (y.float() + bias))


def test_residual_is_that_of_drop_path(device):
    x, y, bias = noise(6, 2, 2, 8), noise(6, 2, 2, 8, seed=1), noise(8, seed=2)
    drop_path = DropPath(0.4).train()
    torch.manual_seed(3)
    wanted = x + drop_path(y + bias)
    torch.manual_seed(3)
    factor = drop_path(torch.ones(6, 1, 1, 1)).flatten()
    assert 0 in factor and factor.max() > 1
    ours = pointwise.add_branch(*(t.to(device) for t in (x, y, bias)), factor=factor.to(device))
    torch.testing.assert_close(ours.cpu(), wanted)


def test_any_memory_layout(device):
    x, y = (noise(2, 24, 3, 5, seed=i, device=device).permute(0, 2, 3, 1) for i in range(2))
    assert not x.is_contiguous()
    check(normalize, layer_norm, x)
    check(pointwise.gelu, F.gelu, x)
    check(pointwise.add_branch, branch, x, y, noise(24, device=device))


def test_sums_are_the_same_in_every_run(device):
    x, y, bias, scale = noise(2, 40, 40, 24, device=device), noise(2, 40, 40, 24, seed=1), noise(24), noise(24)
    tensors = [t.to(device) for t in (x, y, bias, scale)]
    first, second = (results(pointwise.add_branch, *tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_parts_of_a_large_map_are_summed(device, monkeypatch):
    """Each program takes several tiles, as on a large map, the last one not full."""
    from backbones.kernels import pointwise_triton

    monkeypatch.setattr(pointwise_triton, 'steps', lambda *_: 8)
    x, bias, scale = noise(2, 30, 31, 72, device=device), noise(72, device=device), noise(72, seed=1, device=device)
    check(pointwise.add_branch, branch, x, x, bias, scale)
    h, grad = x.view(-1, 72), noise(1860, 72, seed=2, device=device)
    with poisoned_memory():
        got = pointwise_triton.gelu_backward(h, grad)
    leaf = h.double().requires_grad_()
    (dh,) = torch.autograd.grad(F.gelu(leaf), leaf, grad.double())
    assert_close(got, [F.gelu(leaf), dh, dh.sum(0)], 1e-6)


def test_an_unwritten_tile_is_seen(device, monkeypatch):
    """That the other tests would notice it: here the last program of each kernel does not run."""
    from backbones.kernels import pointwise_triton

    launch = pointwise_triton.launch
    short = lambda kernel, grid, *args, **options: launch(kernel, (grid[0] - 1, *grid[1:]), *args, **options)  # noqa: E731
    monkeypatch.setattr(pointwise_triton, 'launch', short)
    x = noise(2, 20, 20, 24, device=device)
    with pytest.raises(AssertionError, match='differs by nan'):
        check(normalize, layer_norm, x)
    with pytest.raises(AssertionError, match='differs by nan'):
        check(pointwise.add_branch, branch, x, x, noise(24, device=device))


def test_poison_reaches_new_tensors(device):
    with poisoned_memory():
        assert torch.empty(3, device=device).isnan().all()


def test_gradients_by_finite_differences(device):
    x, y, bias, scale = (
        noise(*shape, seed=i, dtype=torch.float64, device=device).requires_grad_()
        for i, shape in enumerate([(2, 1, 2, 3), (2, 1, 2, 3), (3,), (3,)])
    )
    factor = torch.tensor([0, 1.5], device=device)
    assert torch.autograd.gradcheck(normalize, (x,), fast_mode=True)
    assert torch.autograd.gradcheck(pointwise.gelu, (x,), fast_mode=True)
    ours = lambda *tensors: pointwise.add_branch(*tensors, factor)  # noqa: E731
    assert torch.autograd.gradcheck(ours, (x, y, bias, scale), fast_mode=True)


@pytest.mark.parametrize('name', ['normalize', 'gelu', 'add_branch'])
def test_operators_keep_torchs_rules(name, device):
    x, bias = noise(1, 2, 3, 8, device=device).requires_grad_(), noise(8, device=device).requires_grad_()
    arguments = {
        'normalize': (x, 1e-6, torch.float16),
        'gelu': (x,),
        'add_branch': (x, x.detach().half(), bias, bias.detach(), torch.ones(1, device=device), torch.float32),
    }
    torch.library.opcheck(getattr(torch.ops.densekit, name).default, arguments[name])


@pytest.mark.parametrize('scaled', [False, True])
@pytest.mark.parametrize('name', ['normalize', 'gelu', 'add_branch'])
def test_backward_operators_keep_torchs_rules(name, scaled, device):
    half, grad = (noise(1, 2, 3, 8, seed=i, dtype=torch.float16, device=device) for i in range(2))
    bias, rstd = noise(8, device=device), noise(1, 2, 3, device=device).abs()
    arguments = {
        'normalize': (half, rstd, grad, torch.float32 if scaled else torch.float16),
        'gelu': (half, grad),
        'add_branch': (grad.float(), half, bias, bias, rstd[:, 0, 0], torch.float16)
        if scaled
        else (grad, None, bias, None, None, torch.float16),
    }
    torch.library.opcheck(getattr(torch.ops.densekit, f'{name}_backward').default, arguments[name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_more_than_two_to_the_31_elements():
    """The last image of a batch whose offsets do not fit into 32 bits."""
    x = noise(1, 512, 512, 96, dtype=torch.bfloat16, device='cuda')
    batch, bias = x.expand(86, -1, -1, -1).contiguous(), noise(96, device='cuda')
    assert batch.numel() > 2**31
    for function in (normalize, pointwise.gelu, lambda x: pointwise.add_branch(x, x, bias)):
        out, one = function(batch.requires_grad_()), function(x.requires_grad_())
        assert torch.equal(out[-1], one[0])
        (grad,) = torch.autograd.grad(out, batch, out.detach())
        (one_grad,) = torch.autograd.grad(one, x, one.detach())
        assert torch.equal(grad[-1], one_grad[0])
