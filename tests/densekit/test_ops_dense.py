"""CARAFE, masked convolution and point-wise spatial attention, called through mmcv.ops, against plain references."""

import densekit.ops  # noqa: F401  mmcv.ops can be imported after it only

# isort: split
import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import CARAFEPack, MaskedConv2d, PSAMask, carafe

HALF = [torch.float16, torch.bfloat16]


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------ CARAFE


def naive_carafe(features, masks, kernel_size, groups, scale):
    n, c, h, w = features.shape
    seen = F.unfold(features, kernel_size, padding=kernel_size // 2)
    seen = F.interpolate(seen.view(n, c * kernel_size**2, h, w), scale_factor=scale, mode='nearest')
    seen = seen.view(n, groups, c // groups, kernel_size**2, h * scale, w * scale)
    kernels = masks.view(n, groups, 1, kernel_size**2, h * scale, w * scale)
    return (seen * kernels).sum(dim=3).view(n, c, h * scale, w * scale)


# Kernel size, groups, scale factor.
CARAFES = [(5, 1, 2), (3, 2, 3), (1, 4, 1), (3, 1, 2)]


def carafe_inputs(kernel_size, groups, scale, n=2):
    masks = seeded(n, groups * kernel_size**2, 3 * scale, 5 * scale, seed=1)
    return seeded(n, 4, 3, 5).requires_grad_(), masks.requires_grad_()


@pytest.mark.parametrize('n', [2, 0])
@pytest.mark.parametrize('settings', CARAFES, ids=str)
def test_carafe_equals_the_reference(settings, n):
    inputs = carafe_inputs(*settings, n=n)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    # Channels last, as it may come from a layer.
    out = carafe(inputs[0].contiguous(memory_format=torch.channels_last), inputs[1], *settings)
    expected = naive_carafe(*exact, *settings) if n else torch.zeros(0, 4, 3 * settings[2], 5 * settings[2])
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5)
    weights = seeded(*out.shape, seed=2)
    grads = torch.autograd.grad((out * weights).sum(), inputs)
    if n:
        for got, wanted in zip(grads, torch.autograd.grad((expected * weights).sum(), exact), strict=True):
            torch.testing.assert_close(got, wanted.float(), rtol=1e-5, atol=1e-5)


def test_carafe_alternatives_differ():
    # A negative control: the reference can tell the elements of a kernel, the groups and the pixels apart.
    features, masks = carafe_inputs(3, 2, 2)
    out = carafe(features, masks, 3, 2, 2)
    others = [
        carafe(features, masks.flip(1), 3, 2, 2),
        carafe(features, masks.roll(9, 1), 3, 2, 2),
        carafe(features, masks.flip(3), 3, 2, 2),
    ]
    assert all((out - other).abs().max() > 0.1 for other in others)


def test_carafe_gradient_in_float64():
    features, masks = (t.detach().double().requires_grad_() for t in carafe_inputs(3, 2, 2))
    expected = naive_carafe(features, masks, 3, 2, 2)
    torch.testing.assert_close(carafe(features, masks, 3, 2, 2), expected, rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(lambda f, m: carafe(f, m, 3, 2, 2), (features[:1, :2], masks[:1]))


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('dtype', HALF)
def test_carafe_in_half_precision(dtype, amp):
    inputs = [t.detach().to(dtype).requires_grad_() for t in carafe_inputs(5, 2, 2)]
    exact = [t.detach().float().requires_grad_() for t in inputs]
    with torch.autocast('cpu', dtype, enabled=amp):
        out = carafe(*inputs, 5, 2, 2)
    expected = carafe(*exact, 5, 2, 2)
    weights = seeded(*out.shape, seed=2).to(dtype)
    out.backward(weights)
    expected.backward(weights.float())
    assert out.dtype == dtype and torch.equal(out, expected.to(dtype))
    for got, wanted in zip(inputs, exact, strict=True):
        assert torch.equal(got.grad, wanted.grad.to(dtype))


def test_carafe_pack_trains():
    torch.manual_seed(0)
    layer = CARAFEPack(4, 2, compressed_channels=8)
    out = layer(seeded(2, 4, 6, 7))
    assert out.shape == (2, 4, 12, 14)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


# ------------------------------------------------------------------------------------------------ masked convolution


@pytest.mark.filterwarnings('ignore:This overload of addmm is deprecated')
@pytest.mark.parametrize(('kernel', 'padding'), [(3, 1), (1, 0), ((3, 5), (1, 2))])
def test_masked_convolution_is_a_convolution_at_some_pixels(kernel, padding):
    torch.manual_seed(0)
    layer = MaskedConv2d(3, 4, kernel, padding=padding).eval()
    image = seeded(1, 3, 6, 7)
    mask = seeded(1, 6, 7, seed=1) > 0.5
    assert 0 < mask.sum() < 42
    with torch.no_grad():
        torch.testing.assert_close(layer(image, mask), layer(image) * mask, rtol=1e-5, atol=1e-6)
        assert not layer(image, mask & False).any()
        for dtype in HALF:
            half = layer.to(dtype)
            out = half(image.to(dtype), mask)
            assert out.dtype == dtype
            torch.testing.assert_close(out, half(image.to(dtype)) * mask, rtol=0.05, atol=0.05)
            # In autocast mmcv computes the pixels in half precision and puts them into a float32 map.
            with torch.autocast('cpu', dtype):
                mixed = half.float()(image, mask)
            assert mixed.dtype == torch.float32
            torch.testing.assert_close(mixed, half(image) * mask, rtol=0.05, atol=0.05)


# --------------------------------------------------------------------------------- point-wise spatial attention masks


def naive_psa(masks, psa_type, size):
    n, _, h, w = masks.shape
    out = masks.new_zeros(n, h * w, h, w)
    for y in range(h):
        for x in range(w):
            for row in range(size[0]):
                for column in range(size[1]):
                    to_y, to_x = y + row - (size[0] - 1) // 2, x + column - (size[1] - 1) // 2
                    if not (0 <= to_y < h and 0 <= to_x < w):
                        continue
                    value = masks[:, row * size[1] + column, y, x]
                    if psa_type == 'collect':
                        out[:, to_y * w + to_x, y, x] = value
                    else:
                        out[:, y * w + x, to_y, to_x] = value
    return out


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize('n', [2, 0])
@pytest.mark.parametrize('size', [(3, 3), (7, 9), (5, 1)])
@pytest.mark.parametrize('psa_type', ['collect', 'distribute'])
def test_psa_mask_equals_the_reference(psa_type, size, n, dtype):
    masks = seeded(n, size[0] * size[1], 4, 5).to(dtype).requires_grad_()
    with torch.autocast('cpu', dtype if dtype in HALF else torch.bfloat16, enabled=dtype in HALF):
        out = PSAMask(psa_type, size)(masks)
    expected = naive_psa(masks, psa_type, size)
    assert out.dtype == dtype and torch.equal(out, expected)
    weights = seeded(*out.shape, seed=1).to(dtype)
    (grad,) = torch.autograd.grad((out * weights).sum(), masks)
    if n:
        (wanted,) = torch.autograd.grad((expected * weights).sum(), masks)
        assert grad.any() and torch.equal(grad, wanted)


def test_psa_types_differ():
    masks = seeded(1, 9, 4, 5)
    assert (PSAMask('collect', (3, 3))(masks) - PSAMask('distribute', (3, 3))(masks)).abs().max() > 0.1
