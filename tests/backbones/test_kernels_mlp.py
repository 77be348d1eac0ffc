import pytest
import torch
import torch.nn.functional as F
from kernel_helpers import SHAPES, TOLERANCE, assert_close, check, noise, poisoned_memory, results
from torch import nn

from backbones.kernels import mlp as kernels
from backbones.layers import GRN


def ours(x, w1, b1, w2, grn_weight=None, grn_bias=None, **options):
    return kernels.mlp(x, w1, b1, w2, grn_weight=grn_weight, grn_bias=grn_bias, **options)


def eager(x, w1, b1, w2, grn_weight=None, grn_bias=None):
    hidden = F.gelu(F.linear(x, w1, b1))
    if grn_weight is not None:
        layer = GRN(w1.shape[0]).to(x)
        parameters = dict(gamma=grn_weight.view(1, 1, 1, -1), beta=grn_bias.view(1, 1, 1, -1))
        hidden = torch.func.functional_call(layer, parameters, (hidden,))
    return F.linear(hidden, w2)


def inputs(shape, device, dtype=torch.float32, grn=False):
    channels = shape[-1]
    x = noise(*shape, dtype=dtype, device=device)
    w1 = noise(4 * channels, channels, seed=1) / channels**0.5
    w2 = noise(channels, 4 * channels, seed=3) / (4 * channels) ** 0.5
    linear = [t.to(device, dtype) for t in (w1, noise(4 * channels, seed=2), w2)]
    return [x, *linear, *(noise(4 * channels, seed=i, device=device) for i in (4, 5) if grn)]


@pytest.mark.parametrize('dtype', list(TOLERANCE))
@pytest.mark.parametrize('grn', [False, True])
@pytest.mark.parametrize('shape', SHAPES[:-1])
def test_result_and_gradients(shape, grn, dtype, device):
    check(ours, eager, *inputs(shape, device, dtype, grn), tolerance=3 * TOLERANCE[dtype])


@pytest.mark.parametrize('grn', [False, True])
def test_recomputing_gives_the_same_bits(grn, device):
    tensors = inputs((2, 5, 7, 24), device, grn=grn)
    kept = results(ours, *tensors)
    again = results(lambda *tensors: ours(*tensors, recompute=True), *tensors)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize(('recompute', 'kept'), [(False, 24 + 96), (True, 24)])
def test_numbers_kept_for_the_backward_pass(recompute, kept, device):
    """Per pixel: the input, and GELU's input unless it is recomputed; autograd alone keeps GELU's result as well."""
    x, *weights = (t.requires_grad_() for t in inputs((1, 8, 8, 24), device))
    sizes: dict[int, int] = {}

    def pack(tensor):
        if tensor.numel() and tensor.untyped_storage().data_ptr() not in {w.data_ptr() for w in weights}:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = ours(x, *weights, recompute=recompute)
    assert sum(sizes.values()) == kept * 64
    assert out.grad_fn is not None


def test_last_bias(device):
    tensors = inputs((1, 3, 3, 8), device)
    bias = noise(8, seed=6, device=device)
    check(lambda x, w1, b1, w2, b2: kernels.mlp(x, w1, b1, w2, b2), lambda *t: eager(*t[:4]) + t[4], *tensors, bias)


def test_any_memory_layout(device):
    x, *weights = inputs((2, 3, 5, 24), device)
    x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    check(ours, eager, x, *weights, tolerance=3e-6)


def test_second_derivatives_are_refused(device):
    x, *weights = inputs((1, 2, 2, 8), device)
    out = ours(x.requires_grad_(), *weights)
    (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='no autograd formula'):
        dx.sum().backward()


@pytest.mark.parametrize('grn', [False, True])
def test_gradients_by_finite_differences(grn, device):
    tensors = inputs((2, 1, 2, 2), device, torch.float64, grn)
    tensors = [t.double().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(ours, tensors, fast_mode=True)


@pytest.mark.parametrize('keep', [False, True])
@pytest.mark.parametrize('grn', [False, True])
def test_operator_keeps_torchs_rules(grn, keep, device):
    tensors = [t.requires_grad_() for t in inputs((1, 2, 3, 8), device, grn=grn)]
    tensors += [] if grn else [None, None]
    torch.library.opcheck(torch.ops.densekit.mlp.default, (*tensors, 1e-6, keep))


@pytest.mark.parametrize('keep', [False, True])
@pytest.mark.parametrize('grn', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_backward_operator_keeps_torchs_rules(grn, keep, dtype, device):
    tensors = inputs((1, 2, 3, 8), device, dtype, grn)
    tensors += [] if grn else [None, None]
    y, h, energy = torch.ops.densekit.mlp(*tensors, 1e-6, keep)
    arguments = (y, *tensors, h if keep else None, energy, 1e-6)
    torch.library.opcheck(torch.ops.densekit.mlp_backward.default, arguments)


def check_products(rows, channels, dtype, device):
    from backbones.kernels import mlp_triton

    h = noise(rows, 4 * channels, dtype=dtype, device=device)
    weight = (noise(channels, 4 * channels, seed=1) / channels**0.5).to(device, dtype)
    grad = noise(rows, channels, seed=2, dtype=dtype, device=device)
    with poisoned_memory():
        dh, sums = mlp_triton.input_gradient(grad, weight, h)
        got = [mlp_triton.linear(h, weight), dh, sums, mlp_triton.weight_gradient(grad, h)]

    h, weight = h.double().requires_grad_(), weight.double().requires_grad_()
    out = F.gelu(h) @ weight.t()
    dh, dw = torch.autograd.grad(out, (h, weight), grad.double())
    assert_close(got, [out, dh, dh.sum(0), dw], 2 * TOLERANCE[dtype])


def test_torchs_switches_for_tf32_are_not_asked(device):
    """Reading the older one is an error once the newer one was set."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = 'tf32'
    try:
        check_products(130, 24, torch.float16, device)
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize(
    ('rows', 'channels', 'dtype'),
    [
        *((1, 8, torch.float32), (130, 24, torch.float32), (257, 96, torch.float32)),
        *((130, 24, torch.float16), (300, 40, torch.float16), (70, 200, torch.float16)),
    ],
)
def test_gelu_inside_the_products(rows, channels, dtype, device):
    check_products(rows, channels, dtype, device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('channels', [96, 128, 192, 256])
def test_gelu_inside_the_products_of_bfloat16(channels):
    """Which Triton's interpreter multiplies as if it were whole numbers."""
    check_products(10_000, channels, torch.bfloat16, 'cuda')


def test_products_of_many_rows_are_summed_in_parts(device):
    from backbones.kernels import mlp_triton

    h, grad = noise(2500, 32, device=device), noise(2500, 8, seed=1, device=device)
    first, second = (mlp_triton.weight_gradient(grad, h) for _ in range(2))
    assert torch.equal(first, second)
    assert_close([first], [grad.double().t() @ F.gelu(h.double())], 2e-6)


def test_fused_products_are_the_same_operator(device, monkeypatch):
    """The choice between cuBLAS and the products above changes rounding alone."""
    tensors = inputs((2, 5, 7, 24), device, torch.float16)
    monkeypatch.setattr(kernels, '_fused', lambda x: True)
    check(ours, eager, *tensors, tolerance=6e-3)


def test_no_fused_product_is_chosen_before_it_is_measured():
    assert not kernels.FUSED_PRODUCTS
    assert not kernels._fused(torch.empty(1, 1, 1, 96, dtype=torch.float16))


def test_linear_layers_of_a_block(device):
    """The same as nn.Linear and nn.GELU have it, in the order of their rounding."""
    layers = nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 24)).to(device)
    x = noise(1, 4, 4, 24, device=device)
    out = kernels.mlp(x, layers[0].weight, layers[0].bias, layers[2].weight, layers[2].bias)
    torch.testing.assert_close(out, layers(x))
