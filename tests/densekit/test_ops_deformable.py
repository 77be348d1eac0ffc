"""Ops that sample at learnt positions, called through mmcv.ops: deformable attention and deformable convolution."""

import densekit.ops  # noqa: F401  mmcv.ops can be imported after it only

# isort: split
import math

import pytest
import torch
from mmcv.ops import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack, deform_conv2d, modulated_deform_conv2d
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch

HALF = [torch.float16, torch.bfloat16]


def autocast(dtype):
    return torch.autocast('cpu', dtype or torch.bfloat16, enabled=dtype is not None)


def sample(image, y, x):
    """Return (C,) of the image (C, H, W) between its pixels, with zeros around it; differentiable."""
    y0, x0 = (math.floor(at.detach() if isinstance(at, torch.Tensor) else at) for at in (y, x))
    total = image.new_zeros(len(image))
    for row, weight_y in ((y0, y0 + 1 - y), (y0 + 1, y - y0)):
        for column, weight_x in ((x0, x0 + 1 - x), (x0 + 1, x - x0)):
            if 0 <= row < image.shape[1] and 0 <= column < image.shape[2]:
                total = total + image[:, row, column] * weight_y * weight_x
    return total


def check_gradients(function, reference, inputs, tolerance=1e-5):
    """Compare the function in float32 with its reference in float64: results, and gradients of all inputs."""
    exact = [t.detach().double().requires_grad_() for t in inputs]
    inputs = [t.detach().requires_grad_() for t in inputs]
    out, expected = function(*inputs), reference(*exact)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    grads = torch.autograd.grad((out * weights.float()).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * weights).sum(), exact)
    for got, wanted in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted.float(), rtol=tolerance, atol=tolerance)
    return grads


def check_half(function, inputs, amp):
    """Compare results and gradients in half precision with the rounded float32 ones of the same inputs."""
    exact = [t.detach().float().requires_grad_() for t in inputs]
    inputs = [t.detach().requires_grad_() for t in inputs]
    with autocast(amp):
        out = function(*inputs)
    expected = function(*exact)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    grads = torch.autograd.grad((out * weights).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * weights.float()).sum(), exact)
    assert out.dtype == inputs[0].dtype
    for got, wanted in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert torch.equal(got, wanted.to(got.dtype))


# ---------------------------------------- multi-scale deformable attention


def naive_attention(value, shapes, locations, weights):
    queries, heads, levels, points = weights.shape[1:]
    out = []
    for n in range(len(value)):
        for q in range(queries):
            for m in range(heads):
                total, start = value.new_zeros(value.shape[3]), 0
                for level, (h, w) in enumerate(shapes[:levels]):
                    image = value[n, start : start + h * w, m].T.reshape(-1, h, w)
                    start += h * w
                    for p in range(points):
                        x, y = locations[n, q, m, level, p]
                        total = total + sample(image, y * h - 0.5, x * w - 0.5) * weights[n, q, m, level, p]
                out.append(total)
    return torch.stack(out).view(len(value), queries, -1)


def attend(value, shapes, locations, weights, im2col_step=64):
    shapes = torch.tensor(shapes)
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
    return MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, im2col_step)


def attention_inputs(shapes, batch=2, queries=3, heads=2, points=2, dims=3):
    g = torch.Generator().manual_seed(0)
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, dims, generator=g)
    # A third of the positions lies outside of the map, some of them by more than a pixel.
    locations = torch.rand(batch, queries, heads, len(shapes), points, 2, generator=g) * 1.5 - 0.25
    weights = torch.rand(batch, queries, heads, len(shapes), points, generator=g)
    return value, locations, weights


SHAPES = [[(5, 7), (3, 4), (1, 2)], [(4, 3)], [(1, 1), (2, 2)]]


@pytest.mark.parametrize('shapes', SHAPES, ids=['odd sizes', 'one level', 'one pixel'])
def test_attention_equals_the_reference(shapes):
    value, locations, weights = attention_inputs(shapes)
    outside = (locations < 0) | (locations > 1)
    assert 0.2 < outside.float().mean() < 0.5
    check_gradients(
        lambda v, p, w: attend(v, shapes, p, w),
        lambda v, p, w: naive_attention(v, shapes, p, w),
        (value, locations, weights),
    )


def test_attention_on_cuda_and_on_the_cpu_is_the_same():
    # On the CPU mmcv's layer takes a function of its own, on CUDA the one that is tested here.
    value, locations, weights = attention_inputs(SHAPES[0])
    own = multi_scale_deformable_attn_pytorch(value, torch.tensor(SHAPES[0]), locations, weights)
    torch.testing.assert_close(attend(value, SHAPES[0], locations, weights), own, rtol=1e-5, atol=1e-6)


def test_attention_alternatives_differ():
    # A negative control: the reference can tell the axes, the levels and the points apart.
    value, locations, weights = attention_inputs(SHAPES[0])
    out = attend(value, SHAPES[0], locations, weights)
    others = [
        attend(value, SHAPES[0], locations.flip(-1), weights),
        attend(value, SHAPES[0], locations.flip(3), weights),
        attend(value, SHAPES[0], locations, weights.flip(4)),
        attend(value, [(7, 5), (4, 3), (2, 1)], locations, weights),
    ]
    assert all((out - other).abs().max() > 0.1 for other in others)


def test_attention_far_outside_is_zero_and_at_a_pixel_is_that_pixel():
    value, _, weights = attention_inputs([(2, 4)], batch=1, queries=1, points=1)
    far = torch.full((1, 1, 2, 1, 1, 2), 7.0)
    assert torch.equal(attend(value, [(2, 4)], far, weights), torch.zeros(1, 1, 6))
    # Column 2, row 1: the centres are at (2 + 0.5) / 4 and (1 + 0.5) / 2.
    at = torch.tensor([0.625, 0.75]).expand(1, 1, 2, 1, 1, 2)
    expected = value[0, 1 * 4 + 2] * weights.view(2, 1)
    torch.testing.assert_close(attend(value, [(2, 4)], at, weights).view(2, 3), expected)


@pytest.mark.parametrize('empty', ['batch', 'queries', 'points'])
def test_attention_of_nothing(empty):
    value, locations, weights = (t.requires_grad_() for t in attention_inputs(SHAPES[0], **{empty: 0}))
    out = attend(value, SHAPES[0], locations, weights)
    assert out.shape == (len(value), weights.shape[1], 6) and not out.any()
    out.sum().backward()
    assert not value.grad.any() and locations.grad.shape == locations.shape


def test_attention_takes_any_batch():
    # The compiled op refuses a batch that im2col_step does not divide.
    value, locations, weights = attention_inputs(SHAPES[0], batch=3)
    assert torch.equal(attend(value, SHAPES[0], locations, weights, 2), attend(value, SHAPES[0], locations, weights))


def test_attention_gradient_in_float64():
    value, locations, weights = (t.double().requires_grad_() for t in attention_inputs(SHAPES[0], batch=1, queries=2))
    out = attend(value, SHAPES[0], locations, weights)
    torch.testing.assert_close(out, naive_attention(value, SHAPES[0], locations, weights), rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(lambda v, p, w: attend(v, SHAPES[0], p, w), (value, locations, weights))


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('dtype', HALF)
def test_attention_in_half_precision(dtype, amp):
    inputs = [t.to(dtype) for t in attention_inputs(SHAPES[0])]
    check_half(lambda v, p, w: attend(v, SHAPES[0], p, w), inputs, dtype if amp else None)


def test_attention_with_float32_positions():
    # In autocast the features are in half precision and the positions are not; mmcv rounds the positions.
    value, locations, weights = attention_inputs(SHAPES[0])
    locations.requires_grad_()
    out = attend(value.half(), SHAPES[0], locations, weights)
    out.sum().backward()
    assert out.dtype == torch.float16 and locations.grad.dtype == torch.float32
    assert torch.equal(out, attend(value.half(), SHAPES[0], locations.half(), weights.half()))


# ---------------------------------------- deformable convolution


def naive_deform_conv(image, offset, weight, stride, padding, dilation, groups, deform_groups, mask=None, bias=None):
    batch, channels = image.shape[:2]
    rows, columns = weight.shape[2:]
    out = []
    for n in range(batch):
        for i in range(offset.shape[2]):
            for j in range(offset.shape[3]):
                seen = []
                for d, part in enumerate(image[n].chunk(deform_groups)):
                    for k in range(rows * columns):
                        at = (d * rows * columns + k) * 2
                        y = i * stride[0] - padding[0] + k // columns * dilation[0] + offset[n, at, i, j]
                        x = j * stride[1] - padding[1] + k % columns * dilation[1] + offset[n, at + 1, i, j]
                        factor = 1 if mask is None else mask[n, at // 2, i, j]
                        seen.append(sample(part, y, x) * factor)
                # (C, rows * columns), then to the groups of the convolution.
                seen = torch.stack(seen).view(deform_groups, rows * columns, -1).transpose(1, 2).reshape(channels, -1)
                parts = zip(weight.flatten(2).chunk(groups), seen.chunk(groups), strict=True)
                out.append(torch.cat([(w * s).sum(dim=(1, 2)) for w, s in parts]))
    out = torch.stack(out).view(batch, *offset.shape[2:], -1).permute(0, 3, 1, 2)
    return out if bias is None else out + bias[:, None, None]


# Kernel, stride, padding, dilation, groups, deform_groups.
CONVS = {
    'plain': ((3, 3), (1, 1), (1, 1), (1, 1), 1, 1),
    'all unlike': ((3, 2), (2, 1), (1, 2), (1, 2), 2, 2),
    'more deform groups': ((2, 3), (1, 2), (0, 1), (2, 1), 1, 4),
    'depthwise': ((3, 3), (2, 2), (1, 1), (1, 1), 4, 1),
    'one by one': ((1, 1), (1, 1), (0, 0), (1, 1), 1, 1),
}


def conv_inputs(conv, batch=2, seed=0, spread=1.5):
    kernel, stride, padding, dilation, groups, deform_groups = conv
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip((5, 6), padding, dilation, kernel, stride, strict=True)
    ]
    g = torch.Generator().manual_seed(seed)
    samples = deform_groups * kernel[0] * kernel[1]
    image = torch.randn(batch, 4, 5, 6, generator=g)
    offset = torch.randn(batch, samples * 2, *size, generator=g) * spread
    mask = torch.rand(batch, samples, *size, generator=g)
    weight = torch.randn(8, 4 // groups, *kernel, generator=g)
    return image, offset, mask, weight, torch.randn(8, generator=g)


@pytest.mark.parametrize('name', CONVS)
def test_deform_conv_equals_the_reference(name):
    image, offset, _, weight, _ = conv_inputs(CONVS[name])
    settings = CONVS[name][1:]
    grads = check_gradients(
        lambda x, o, w: deform_conv2d(x, o, w, *settings),
        lambda x, o, w: naive_deform_conv(x, o, w, *settings),
        (image, offset, weight),
        tolerance=2e-5,
    )
    assert all(grad.abs().max() > 0.1 for grad in grads)


@pytest.mark.parametrize('with_bias', [True, False])
@pytest.mark.parametrize('name', CONVS)
def test_modulated_deform_conv_equals_the_reference(name, with_bias):
    settings = CONVS[name][1:]
    *inputs, bias = conv_inputs(CONVS[name])
    check_gradients(
        lambda x, o, m, w, b=None: modulated_deform_conv2d(x, o, m, w, b, *settings),
        lambda x, o, m, w, b=None: naive_deform_conv(x, o, w, *settings, mask=m, bias=b),
        [*inputs, bias] if with_bias else inputs,
        tolerance=2e-5,
    )


def test_deform_conv_alternatives_differ():
    # A negative control: the reference can tell the order of the offsets and the groups apart.
    image, offset, mask, weight, _ = conv_inputs(CONVS['all unlike'])
    settings = CONVS['all unlike'][1:]
    out = modulated_deform_conv2d(image, offset, mask, weight, None, *settings)
    axes_swapped = offset.view(2, -1, 2, *offset.shape[2:]).flip(2).reshape(offset.shape)
    others = [
        modulated_deform_conv2d(image, axes_swapped, mask, weight, None, *settings),
        modulated_deform_conv2d(image, offset.roll(offset.shape[1] // 2, 1), mask, weight, None, *settings),
        modulated_deform_conv2d(image, offset, mask.flip(1), weight, None, *settings),
        deform_conv2d(image, offset, weight, *settings),
    ]
    assert all((out - other).abs().max() > 0.1 for other in others)


def test_without_offsets_it_is_a_convolution():
    for name, (_, stride, padding, dilation, groups, deform_groups) in CONVS.items():
        image, offset, mask, weight, bias = conv_inputs(CONVS[name])
        expected = torch.nn.functional.conv2d(image, weight, bias, stride, padding, dilation, groups)
        settings = (stride, padding, dilation, groups, deform_groups)
        out = modulated_deform_conv2d(image, offset * 0, torch.ones_like(mask), weight, bias, *settings)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        out = deform_conv2d(image, offset * 0, weight, *settings)
        torch.testing.assert_close(out, expected - bias[:, None, None], rtol=1e-5, atol=1e-5)


def test_offsets_of_a_larger_map():
    # mmdet's DyHead passes those of another level. The compiled op checks no size: in the memory of each image it takes
    # the first values for a map of the output's size, and the published models were trained with that.
    image, offset, mask, weight, bias = conv_inputs(CONVS['plain'])
    larger = torch.randn(2, 18, 9, 10, generator=torch.Generator().manual_seed(1)).requires_grad_()
    factors = torch.rand(2, 9, 9, 10, generator=torch.Generator().manual_seed(2)).requires_grad_()
    read = [t.detach().reshape(2, -1)[:, : o[0].numel()].view_as(o) for t, o in ((larger, offset), (factors, mask))]
    read = [t.requires_grad_() for t in read]
    out = modulated_deform_conv2d(image, larger, factors, weight, bias, 1, 1)
    expected = naive_deform_conv(image, read[0], weight, *CONVS['plain'][1:], mask=read[1], bias=bias)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-5)

    out.square().sum().backward()
    expected.square().sum().backward()
    for given, as_read in ((larger, read[0]), (factors, read[1])):
        n = as_read[0].numel()
        torch.testing.assert_close(given.grad.flatten(1)[:, :n], as_read.grad.flatten(1), rtol=1e-4, atol=1e-3)
        assert as_read.grad.any() and not given.grad.flatten(1)[:, n:].any()


def test_deform_conv_far_outside_is_zero():
    image, offset, mask, weight, bias = conv_inputs(CONVS['plain'])
    image.requires_grad_()
    out = modulated_deform_conv2d(image, offset * 0 + 99, mask, weight, bias, 1, 1)
    assert torch.equal(out, bias[:, None, None].expand_as(out))
    out.sum().backward()
    assert not image.grad.any()


def test_deform_conv_of_a_part_of_the_inputs():
    # Frozen weights, then a frozen input: mmcv asks for one gradient only.
    image, offset, _, weight, _ = conv_inputs(CONVS['plain'])
    full = [t.clone().requires_grad_() for t in (image, offset, weight)]
    deform_conv2d(*full, 1, 1).square().sum().backward()
    for i in range(3):
        inputs = [image, offset, weight]
        inputs[i] = inputs[i].clone().requires_grad_()
        deform_conv2d(*inputs, 1, 1).square().sum().backward()
        torch.testing.assert_close(inputs[i].grad, full[i].grad)


def test_deform_conv_image_by_image():
    conv = CONVS['all unlike']
    image, offset, _, weight, _ = conv_inputs(conv, batch=6)
    together = deform_conv2d(image, offset, weight, *conv[1:], False, 3)
    alone = [deform_conv2d(i[None], o[None], weight, *conv[1:]) for i, o in zip(image, offset, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_a_kernel_larger_than_the_image():
    # mmcv pads the image and crops the result.
    layer = DeformConv2d(2, 3, 3, padding=1)
    image, offset = torch.randn(1, 2, 2, 5), torch.zeros(1, 18, 2, 5)
    expected = torch.nn.functional.conv2d(image, layer.weight, padding=1)
    torch.testing.assert_close(layer(image, offset), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('dtype', HALF)
def test_deform_conv_in_half_precision(dtype, amp):
    settings = CONVS['all unlike'][1:]
    image, offset, mask, weight, bias = (t.to(dtype) for t in conv_inputs(CONVS['all unlike']))
    amp = dtype if amp else None
    check_half(lambda x, o, w: deform_conv2d(x, o, w, *settings), (image, offset, weight), amp)
    inputs = (image, offset, mask, weight, bias)
    check_half(lambda x, o, m, w, b: modulated_deform_conv2d(x, o, m, w, b, *settings), inputs, amp)


@pytest.mark.parametrize('amp', [None, torch.bfloat16])
@pytest.mark.parametrize('layer', [DeformConv2dPack, ModulatedDeformConv2dPack])
def test_a_layer_learns_where_to_look(layer, amp):
    # The target is the image moved by half a pixel, which no plain 1x1 convolution can give.
    torch.manual_seed(0)
    image = torch.nn.functional.interpolate(torch.randn(2, 3, 5, 5), size=(12, 12), mode='bicubic')
    target = (image[..., :-1] + image[..., 1:]) / 2
    conv = layer(3, 3, 1, **({} if layer is DeformConv2dPack else {'bias': True}))
    optimizer = torch.optim.Adam(conv.parameters(), lr=0.05)
    before = {name: value.detach().clone() for name, value in conv.named_parameters()}
    losses = []
    for _ in range(100):
        with autocast(amp):
            loss = (conv(image)[..., :-1] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert all(not torch.equal(value, before[name]) for name, value in conv.named_parameters())
