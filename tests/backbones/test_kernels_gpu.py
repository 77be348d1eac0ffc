"""What only a GPU can show: maps as large as in training, CUDA graphs, streams."""

import copy

import pytest
import torch
import torch.nn.functional as F
from kernel_helpers import TOLERANCE, assert_close, build, check, fused, noise, step

from backbones.kernels import depthwise, grn
from backbones.layers import GRN

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]

# Of stage 1 and of stage 4 of a detector, and the last stage of huge.
SHAPES = [(8, 96, 200, 336), (2, 768, 25, 42), (1, 2816, 13, 21)]
SUMS = {torch.float32: 8e-6, torch.bfloat16: TOLERANCE[torch.bfloat16]}


@pytest.fixture(autouse=True)
def _exact(device):
    """Float32 means float32 in what the kernels are compared with."""


def last(*shape, **options):
    return noise(*shape, device='cuda', **options).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('dtype', list(SUMS))
@pytest.mark.parametrize('shape', SHAPES)
def test_depthwise_convolution(shape, dtype):
    channels = shape[1]
    weight, bias = noise(channels, 1, 7, 7, seed=1, device='cuda'), noise(channels, seed=2, device='cuda')
    reference = lambda x, weight, bias: F.conv2d(x, weight, bias, padding=3, groups=channels)  # noqa: E731
    check(depthwise.depthwise_conv2d, reference, last(*shape, dtype=dtype), weight, bias, tolerance=SUMS[dtype])


@pytest.mark.parametrize('dtype', list(SUMS))
@pytest.mark.parametrize('shape', [(4, 100, 168, 384), (2, 13, 21, 11264)])
def test_grn(shape, dtype):
    def eager(x, weight, bias):
        layer = GRN(x.shape[-1]).to(x)
        return torch.func.functional_call(layer, dict(gamma=weight, beta=bias), (x,))

    parameters = (noise(1, 1, 1, shape[-1], seed=i, device='cuda') for i in (1, 2))
    x = noise(*shape, dtype=dtype, device='cuda')
    check(lambda *t: grn.grn(*t, 1e-6), eager, x, *parameters, tolerance=2 * SUMS[dtype])


@pytest.mark.parametrize('use_grn', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
def test_block_is_as_exact_as_the_eager_one(shape, use_grn):
    """Under autocast; errors are those against float64."""
    block, x = build(shape[1], use_grn=use_grn, kernel_size=7, kernels='eager').cuda(), last(*shape)
    ours, eager = (step(forward, block, x, torch.bfloat16) for forward in (fused(block), block))
    exact = step(block.double(), block, x.double())
    for i, (a, b, c) in enumerate(zip(ours, eager, exact, strict=True)):
        error, usual = ((t.double() - c).norm() / c.norm() for t in (a, b))
        assert error <= 2 * usual + 1e-3, f'result {i}: off by {error:.2g}, where eager is by {usual:.2g}'


@pytest.mark.parametrize('use_grn', [False, True])
def test_block_in_a_cuda_graph(use_grn):
    """Forward and backward are captured once and follow what changes in the weights."""
    block = build(96, use_grn=use_grn, kernel_size=7, kernels='triton').cuda()
    x = last(2, 96, 14, 14)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(block), (x.clone().requires_grad_(),))
    for seed in range(2):
        for model in (block, graphed):
            with torch.no_grad():
                model.pwconv1.weight.mul_(1.5)
        x = last(2, 96, 14, 14, seed=seed)
        assert_close(step(graphed, graphed, x), step(fused(block), block, x), 1e-5)


def test_block_on_a_side_stream():
    """Its input is there late; a kernel on any other stream would read what was there before."""
    block, x = build(96, kernel_size=7).cuda(), last(2, 96, 14, 14)
    wanted = step(fused(block), block, x)
    late, stream = torch.zeros_like(x), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # clock cycles
        late.copy_(x)
        got = step(fused(block), block, late)
    torch.cuda.synchronize()
    assert_close(got, wanted, 1e-5)
