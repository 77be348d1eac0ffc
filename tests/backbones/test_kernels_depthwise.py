import functools
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from kernel_helpers import SHAPES, TOLERANCE, check, noise, poisoned_memory, results
from torch.utils.checkpoint import checkpoint

from backbones.kernels import depthwise, depthwise_plan
from backbones.kernels.depthwise import depthwise_conv2d, depthwise_norm


@pytest.fixture
def narrow(device, monkeypatch):
    """Strips of two columns where the interpreter runs, which takes its time; what the filter is does not matter."""
    if device == 'cpu':
        for table in (depthwise_plan.CONVOLVE_COLUMNS, depthwise_plan.CORRELATE_COLUMNS):
            monkeypatch.setitem(table, 3, 2)
        plans = depthwise_plan.convolve_plan, depthwise_plan.correlate_plan, depthwise_plan.together_plan
        [plan.cache_clear() for plan in plans]
        yield
        [plan.cache_clear() for plan in plans]
    else:
        yield


def tensors(num, height, width, channels, size=7, dtype=torch.float32, device='cpu'):
    """Input, weight and bias; the last two in float32, as under autocast."""
    x = noise(num, height, width, channels, dtype=dtype, device=device).permute(0, 3, 1, 2)
    weight = noise(channels, 1, size, size, seed=1, device=device)
    return x, weight, noise(channels, seed=2, device=device)


def reference(x, weight, bias=None):
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])


def norm_reference(x, weight, bias=None):
    x_nhwc = reference(x, weight, bias).permute(0, 2, 3, 1)
    return F.layer_norm(x_nhwc, x_nhwc.shape[-1:], eps=1e-6)


def norm(x, weight, bias=None):
    return depthwise_norm(x, weight, bias, 1e-6)


def in_two_forms(x, weight, bias, dtype):
    """Normalized map and 1 / standard deviation, from two kernels and from one, in memory that is not theirs alone."""
    from backbones.kernels import depthwise_triton

    def run(together):
        with poisoned_memory():
            return depthwise_triton.forward_and_normalize(x, weight, bias, 1e-6, dtype, together=together)

    return run(False), run(True)


def assert_same_bits(two, one):
    for a, b in zip(two, one, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        assert torch.equal(a, b), f'{(a != b).sum()} of {a.numel()} differ'


@pytest.mark.parametrize('shape', [*SHAPES[:4], (2, 13, 1, 20), (1, 2, 18, 72)])
def test_convolution(shape, device):
    check(depthwise_conv2d, reference, *tensors(*shape, size=3, device=device))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype, device):
    check(depthwise_conv2d, reference, *tensors(1, 5, 4, 24, size=3, dtype=dtype, device=device))


@pytest.mark.parametrize('shape', [(1, 8, 13, 20), (1, 1, 1, 8), (1, 2, 9, 8), (1, 4, 2, 8), (1, 4, 55, 32)])
def test_seven_by_seven(shape, device):
    """On maps larger than the filter, of one pixel, lower and narrower than it, and with strips far from the border."""
    check(depthwise_conv2d, reference, *tensors(*shape, device=device))


@pytest.mark.parametrize('size', [5, 9, 11])
def test_other_filters_at_random_shapes(size, device):
    rng = random.Random(size)
    shape = rng.randint(1, 2), rng.randint(3, 7), rng.randint(1, 14), rng.randint(1, 20)
    check(depthwise_conv2d, reference, *tensors(*shape, size=size, device=device))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('shape', [(2, 3, 4, 24), (1, 1, 1, 8), (0, 4, 3, 16)])
@pytest.mark.usefixtures('narrow')
def test_convolution_and_norm(shape, dtype, device):
    check(norm, norm_reference, *tensors(*shape, size=3, dtype=dtype, device=device), tolerance=4 * TOLERANCE[dtype])


@pytest.mark.parametrize('shape', [*SHAPES[:4], (5, 3, 2, 8), (1, 9, 4, 20), (1, 3, 26, 96), (1, 2, 3, 136)])
@pytest.mark.usefixtures('narrow')
def test_one_kernel_gives_the_bits_of_two(shape, device):
    """Several images in a group of strips, strips beyond the last, segments of rows, tails and blocks of channels."""
    for dtype in (torch.float32, torch.float16):
        assert_same_bits(*in_two_forms(*tensors(*shape, size=3, device=device), dtype))


@pytest.mark.parametrize('shape', [(1, 2, 9, 8), (2, 8, 3, 8), (1, 1, 1, 72)])
def test_one_kernel_of_seven_by_seven(shape, device):
    x, weight, _ = tensors(*shape, dtype=torch.bfloat16, device=device)
    assert_same_bits(*in_two_forms(x, weight, None, torch.bfloat16))


@pytest.mark.usefixtures('narrow')
def test_one_kernel_again_gives_the_same_bits(device):
    arguments = *tensors(2, 4, 5, 40, size=3, device=device), torch.float16
    assert_same_bits(in_two_forms(*arguments)[1], in_two_forms(*arguments)[1])


# (N, H, W, C): more than one group of strips and more than one segment, with narrow strips and with those of a GPU.
SHARED_OUT = {'cpu': (1, 12, 20, 40), 'cuda': (1, 12, 80, 40)}


@pytest.mark.parametrize('processors', [66, 108, 132, 148])
def test_a_gpu_would_share_out_what_is_left_out_below(processors):
    num, height, width, channels = SHARED_OUT['cuda']
    for cache in (4 * 2**20, 50 * 2**20):
        plan = depthwise_plan.together_plan(num, channels, height, width, 3, processors, cache, itemsize=8)
        assert plan.groups > 1 and plan.segments > 1


@pytest.mark.parametrize('short', ['strips', 'rows', 'channels'])
@pytest.mark.usefixtures('narrow')
def test_a_pixel_or_channel_left_out_is_seen(short, device, monkeypatch):
    """That the tests above would notice it: the last program does not run, or the last channels stay as they are."""
    from backbones.kernels import depthwise_triton

    def run(kernel, grid, *args, **options):
        if kernel is depthwise_triton.convolve_normalize:
            if short == 'channels':
                options['B'] //= 2
            grid = grid[0] - (short == 'strips'), grid[1] - (short == 'rows')
            assert 0 not in grid
        launch(kernel, grid, *args, **options)

    launch = depthwise_triton.launch
    monkeypatch.setattr(depthwise_triton, 'launch', run)
    two, one = in_two_forms(*tensors(*SHARED_OUT[device], size=3, device=device), torch.float32)
    with pytest.raises(AssertionError, match='differ'):
        assert_same_bits(two, one)


@pytest.mark.parametrize('together', [False, True])
@pytest.mark.usefixtures('narrow')
def test_the_plan_chooses_between_one_kernel_and_two(together, device, monkeypatch):
    from backbones.kernels import depthwise_triton as kernels

    def count(kernel, *args, **options):
        ran.append(kernel.__name__)
        launch(kernel, *args, **options)

    ran, asked, launch = [], [], kernels.launch
    monkeypatch.setattr(kernels, 'launch', count)
    monkeypatch.setattr(kernels, 'together_pays', lambda *args: asked.append(args) or together)
    x, weight, bias = tensors(2, 3, 4, 8, size=3, device=device)
    kernels.forward_and_normalize(x, weight, bias, 1e-6, torch.float16)
    assert ran == (['convolve_normalize'] if together else ['convolve', '_normalize_kernel'])
    assert asked == [(2, 8, 3, 4, 3, kernels.processors(x.device), kernels.cache_size(x.device), 4, 2)]


@pytest.mark.usefixtures('narrow')
@pytest.mark.parametrize('width', [5, 26])
def test_gradient_of_the_stream_is_added(width, device):
    from backbones.kernels import depthwise_triton

    grad, weight, _ = tensors(2, 3, width, 32, size=3, dtype=torch.float16, device=device)
    more = noise(2, 3, width, 32, seed=5, device=device).permute(0, 3, 1, 2)
    together = depthwise_triton.input_gradient(grad, weight, torch.float32, more)
    assert torch.equal(together, depthwise_triton.input_gradient(grad, weight, torch.float32) + more)


@pytest.mark.usefixtures('narrow')
def test_without_bias(device):
    x, weight, _ = tensors(1, 4, 5, 8, size=3, device=device)
    check(depthwise_conv2d, reference, x, weight)
    check(norm, norm_reference, x, weight, tolerance=4e-6)


@pytest.mark.usefixtures('narrow')
def test_any_memory_layout(device):
    x, weight, bias = tensors(2, 2, 3, 16, size=3, device=device)
    check(depthwise_conv2d, reference, x.contiguous(), weight, bias)
    check(depthwise_conv2d, reference, x[:, ::2, 1:, ::2], weight[::2], bias[::2])
    check(depthwise_conv2d, reference, x, weight.transpose(2, 3), bias)
    taps_first = weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    check(depthwise_conv2d, reference, x, taps_first, bias)
    leaf = taps_first.clone(memory_format=torch.preserve_format).requires_grad_()
    depthwise_conv2d(x, leaf, bias).sum().backward()  # whose gradient is one number, expanded
    assert leaf.grad.stride() == leaf.stride() == (1, 16, 48, 16)
    assert depthwise_conv2d(x.contiguous(), weight, bias).is_contiguous(memory_format=torch.channels_last)
    assert norm(x.contiguous(), weight, bias).is_contiguous()


@pytest.mark.usefixtures('narrow')
def test_the_same_bits_in_every_run(device):
    arguments = tensors(2, 6, 13, 24, size=3, device=device)
    for function in (depthwise_conv2d, norm):
        first, second = (results(function, *arguments) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize('axis', [0, 1])
@pytest.mark.usefixtures('narrow')
def test_an_unwritten_tile_is_seen(axis, device, monkeypatch):
    """That the other tests would notice it: here the last program of a kernel, or of its rows, does not run."""
    from backbones.kernels import depthwise_triton

    def short(kernel, grid, *args, **options):
        grid = tuple(max(n - (i == axis), 1) for i, n in enumerate(grid))
        launch(kernel, grid, *args, **options)

    launch = depthwise_triton.launch
    arguments = tensors(1, 20, 5, 40, size=3, device=device)
    monkeypatch.setattr(depthwise_triton, 'launch', short)
    with pytest.raises(AssertionError, match='differs by nan'):
        check(depthwise_conv2d, reference, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason='float64 is for the interpreter')
@pytest.mark.usefixtures('narrow')
def test_gradients_by_finite_differences(device):
    x, weight, bias = (
        noise(*shape, seed=i, dtype=torch.float64, device=device).requires_grad_()
        for i, shape in enumerate([(1, 3, 2, 4), (3, 1, 3, 3), (3,)])
    )
    assert torch.autograd.gradcheck(depthwise_conv2d, (x, weight, bias), fast_mode=True)
    assert torch.autograd.gradcheck(norm, (x, weight, bias), fast_mode=True)


@pytest.mark.usefixtures('narrow')
def test_float32_stream_under_autocast(device):
    """Results are bfloat16 and gradients float32; the input, the weights and all sums are not rounded before."""
    x, weight, bias = (t.requires_grad_() for t in tensors(2, 5, 6, 16, size=3, device=device))
    with torch.autocast(device, torch.bfloat16):
        out, normed = depthwise_conv2d(x, weight, bias), norm(x, weight, bias)
    assert out.dtype == normed.dtype == torch.bfloat16
    plain = depthwise_conv2d(x, weight, bias).detach()
    assert ((out - plain).abs() <= 2**-7 * plain.abs()).all()
    grad = noise(*out.shape, seed=3, dtype=torch.bfloat16, device=device)
    ours = torch.autograd.grad(out, (x, weight, bias), grad)
    wanted = torch.autograd.grad(reference(x.double(), weight.double(), bias.double()), (x, weight, bias), grad)
    assert all(a.dtype == torch.float32 for a in ours)
    assert all((a - b).norm() < 1e-6 * b.norm() for a, b in zip(ours, wanted, strict=True))


@pytest.mark.usefixtures('narrow')
def test_only_what_is_needed_is_computed(device, monkeypatch):
    from backbones.kernels import depthwise_triton

    def count(kernel, *args, **options):
        ran.append(kernel.__name__)
        launch(kernel, *args, **options)

    ran, launch = [], depthwise_triton.launch
    monkeypatch.setattr(depthwise_triton, 'launch', count)
    x, weight, bias = tensors(1, 3, 3, 8, size=3, device=device)
    depthwise_conv2d(x.requires_grad_(), weight, bias).sum().backward()
    assert ran == ['convolve', 'convolve']
    ran.clear()
    depthwise_conv2d(x.detach(), weight, bias.requires_grad_()).sum().backward()
    assert ran == ['convolve', 'correlate', 'sum_parts'] and weight.grad is None
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 9.0))


@pytest.mark.usefixtures('narrow')
def test_what_is_kept_for_the_backward_pass(device):
    """The input, the normalized result and one number per pixel; not the convolution's own result."""
    x, weight, bias = (t.requires_grad_() for t in tensors(2, 5, 6, 16, size=3, device=device))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        norm(x, weight, bias)
    assert sorted(map(tuple, kept)) == sorted([(2, 16, 5, 6), (16, 1, 3, 3), (2, 5, 6, 16), (2, 5, 6)])


@pytest.mark.usefixtures('narrow')
def test_checkpointing(device):
    arguments = tensors(1, 3, 4, 8, size=3, device=device)
    again = lambda *t: checkpoint(norm, *t, use_reentrant=False)  # noqa: E731
    for ours, plain in zip(results(again, *arguments), results(norm, *arguments), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize('function', [depthwise_conv2d, norm])
@pytest.mark.usefixtures('narrow')
def test_compiled_with_sizes_left_open(function, device):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend('aot_eager')(graph, inputs)

    compiled = torch.compile(function, backend=backend, dynamic=True, fullgraph=True)
    for height, width in ((5, 4), (4, 7)):
        arguments = tensors(2, height, width, 8, size=3, device=device)
        for ours, plain in zip(results(compiled, *arguments), results(function, *arguments), strict=True):
            assert torch.equal(ours, plain)
    assert len(graphs) == 1


@pytest.mark.usefixtures('narrow')
def test_no_second_gradient(device):
    x, weight, bias = (t.requires_grad_() for t in tensors(1, 2, 2, 8, size=3, device=device))
    (grad,) = torch.autograd.grad(depthwise_conv2d(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no gradient of the gradient; build the model with kernels='eager'"):
        grad.sum().backward()


@pytest.mark.parametrize('name', ['conv2d', 'conv2d_input_grad', 'conv2d_weight_grad', 'norm'])
@pytest.mark.usefixtures('narrow')
def test_operators_keep_torchs_rules(name, device):
    x, weight, bias = tensors(1, 2, 3, 8, size=3, device=device)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    arguments = {
        'conv2d': (*leaves, torch.float16),
        'conv2d_input_grad': (x.contiguous(), weight, torch.float16),
        'conv2d_weight_grad': (x, x, weight.transpose(2, 3), True),
        'norm': (*leaves[:2], None, 1e-6, torch.float32),
    }
    torch.library.opcheck(getattr(torch.ops.densekit, f'depthwise_{name}').default, arguments[name])


@pytest.mark.parametrize(
    ('shapes', 'message'),
    [
        (((2, 8, 4), (8, 1, 7, 7), (8,)), r'give \(N, C, H, W\) and \(C, 1, K, K\)'),
        (((2, 8, 4, 4), (8, 8, 7, 7), (8,)), r'weight \(8, 8, 7, 7\)'),
        (((2, 8, 4, 4), (9, 1, 7, 7), (9,)), r'weight \(9, 1, 7, 7\)'),
        (((2, 8, 4, 4), (8, 1, 4, 4), (8,)), r'a filter of \(4, 4\): give K x K with K one of \(3, 5, 7, 9, 11\)'),
        (((2, 8, 4, 4), (8, 1, 3, 5), (8,)), r'a filter of \(3, 5\)'),
        (((2, 8, 4, 4), (8, 1, 7, 7), (1,)), r'bias is \(1,\): give \(8,\)'),
    ],
)
def test_wrong_arguments(shapes, message):
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(*map(torch.zeros, shapes))
    with pytest.raises(ValueError, match=r'torch\.int64: give floating-point numbers'):
        depthwise_conv2d(torch.zeros(1, 8, 2, 2, dtype=torch.int64), torch.zeros(8, 1, 7, 7))


def test_a_plan_covers_everything_once():
    """And has no program without work, but for the rounding of strips to programs."""
    rng = random.Random(0)
    for _ in range(3000):
        num, channels, height, width = (
            rng.randint(1, 16),
            rng.randint(1, 3000),
            rng.randint(1, 400),
            rng.randint(1, 400),
        )
        size, processors = rng.choice(depthwise.SIZES), rng.choice((1, 2, 66, 132))
        together = functools.partial(depthwise_plan.together_plan, cache=rng.choice((2**10, 2**22, 2**26)), itemsize=6)
        makes = (depthwise_plan.convolve_plan, depthwise_plan.correlate_plan, together)
        for make in makes if channels <= depthwise_plan.WIDEST else makes[:2]:
            plan = make(num, channels, height, width, size, processors)
            assert plan.channels * plan.strips == depthwise_plan.THREADS
            assert (plan.blocks - 1) * plan.channels < channels <= plan.blocks * plan.channels
            assert (plan.per_row - 1) * plan.columns < width <= plan.per_row * plan.columns
            assert (plan.groups - 1) * plan.strips < num * plan.per_row <= plan.groups * plan.strips
            assert (plan.segments - 1) * plan.rows < height <= plan.segments * plan.rows
        plan = depthwise_plan.correlate_plan(num, channels, height, width, size, processors)
        assert 1 <= plan.parts <= plan.groups * plan.segments
        assert plan.parts == 1 or plan.parts * plan.blocks <= processors * depthwise_plan.CORRELATE_RESIDENT[size]


H200 = 132, 50 * 2**20
"""Multiprocessors, and bytes of the second-level cache."""


@pytest.mark.parametrize(
    ('map_size', 'read', 'pays'),
    [
        ((2, 128, 200, 334), 2, True),  # too large for the cache, and a program has but 6 columns
        ((2, 128, 200, 334), 4, True),
        ((1, 64, 56, 56), 4, False),  # the cache holds the map
        ((8, 96, 200, 334), 4, False),  # the programs that run at a time have more than the cache holds, or few rows
        ((16, 384, 50, 84), 2, False),
        ((64, 768, 25, 42), 2, False),
        ((64, 2816, 32, 32), 2, False),  # a pixel is wider than a tile
    ],
)
def test_one_kernel_only_where_its_results_stay_in_the_cache(map_size, read, pays):
    assert depthwise_plan.together_pays(*map_size, 7, *H200, read, 2) is pays


def test_one_kernel_never_beside_a_large_enough_or_without_a_cache():
    maps = [(n, c, h, w) for n in (1, 8) for c in (40, 64, 96, 128) for h, w in ((31, 17), (200, 334))]
    for num, channels, height, width in maps:
        large = num * channels * height * width * 6
        for cache in (large, 2**10):
            assert not depthwise_plan.together_pays(num, channels, height, width, 7, 132, cache, 4, 2)


def test_what_runs_at_a_time_stays_in_the_cache():
    met = 0
    for num, channels, height, width in itertools.product((2, 8, 16), (40, 64, 128, 256), (128, 200), (128, 334)):
        if depthwise_plan.together_pays(num, channels, height, width, 7, *H200, 2, 2):
            plan = depthwise_plan.together_plan(num, channels, height, width, 7, *H200, 4)
            at_a_time = min(plan.groups * plan.segments, 3 * H200[0])
            assert at_a_time * plan.rows * plan.strips * plan.columns * channels * 4 <= H200[1]
            met += 1
    assert met > 2


def test_every_width_of_a_strip_is_met_by_the_kernel():
    """What is compiled depends on the filter and the number of channels, not on the size of the image."""
    for size, channels in itertools.product(depthwise.SIZES, (40, 96)):
        together = functools.partial(depthwise_plan.together_plan, cache=50 * 2**20, itemsize=6)
        for make in (depthwise_plan.convolve_plan, depthwise_plan.correlate_plan, together):
            plans = [make(n, channels, h, w, size, 132) for n in (1, 16) for h, w in ((1, 1), (200, 333), (31, 17))]
            assert len({(plan.columns, plan.channels, plan.strips) for plan in plans}) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_more_than_two_to_the_31_elements():
    """The last image of a batch whose offsets do not fit into 32 bits."""
    x, weight, bias = tensors(1, 512, 512, 96, dtype=torch.bfloat16, device='cuda')
    batch = x.expand(86, -1, -1, -1).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert batch.numel() > 2**31
    out = depthwise_conv2d(batch, weight, bias)
    (grad,) = torch.autograd.grad(out, batch, out.detach())
    one = depthwise_conv2d(x.requires_grad_(), weight, bias)
    (one_grad,) = torch.autograd.grad(one, x, one.detach())
    assert torch.equal(out[-1], one[0]) and torch.equal(grad[-1], one_grad[0])
