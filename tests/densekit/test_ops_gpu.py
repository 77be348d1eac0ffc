"""Every op of densekit.ops on CUDA gives its CPU result."""

import densekit.ops  # noqa: F401  mmcv.ops can be imported after it only

# isort: split
import pytest
import torch
from mmcv.ops import (
    MaskedConv2d,
    ModulatedDeformConv2dPack,
    MultiScaleDeformableAttention,
    PSAMask,
    batched_nms,
    carafe,
    deform_conv2d,
    modulated_deform_conv2d,
    nms,
    nms_match,
    roi_align,
    sigmoid_focal_loss,
    soft_nms,
    softmax_focal_loss,
)
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device'),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def autocast(device, dtype, enabled):
    # mmcv's own torch.cat refuses fp16 in bf16 autocast.
    return torch.autocast(device, torch.float16 if dtype == torch.float16 else torch.bfloat16, enabled=enabled)


def random_boxes(n, dtype):
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(n, 2, generator=g) * 100
    boxes = torch.cat([corner, corner + torch.rand(n, 2, generator=g) * 50], dim=1)
    # Distinct scores, so that there are no ties in any dtype.
    scores = (torch.randperm(n, generator=g) + 1) / 256
    return boxes.to(dtype), scores.to(dtype)


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('n', [0, 1, 200])
@pytest.mark.parametrize('dtype', DTYPES)
def test_nms(dtype, n, offset, amp):
    boxes, scores = random_boxes(n, dtype)
    expected = nms(boxes, scores, 0.5, offset=offset)
    with autocast('cuda', dtype, amp):
        dets, kept = nms(boxes.cuda(), scores.cuda(), 0.5, offset=offset)
    assert kept.is_cuda and dets.dtype == dtype
    assert kept.tolist() == expected[1].tolist() and torch.equal(dets.cpu(), expected[0])


def test_nms_keeps_a_box_at_the_threshold():
    boxes = torch.tensor([[0.0, 0, 10, 1], [0, 0, 3, 1]]).cuda()  # IoU 3/10
    assert nms(boxes, torch.tensor([0.9, 0.8]).cuda(), 0.3)[1].tolist() == [0, 1]


@pytest.mark.parametrize('split_thr', [50, 10000])
def test_batched_nms(split_thr):
    boxes, scores = random_boxes(200, torch.float32)
    labels = torch.arange(200) % 4
    cfg = dict(type='nms', iou_threshold=0.5, split_thr=split_thr)
    expected = batched_nms(boxes, scores, labels, cfg)[1]
    assert batched_nms(boxes.cuda(), scores.cuda(), labels.cuda(), cfg)[1].tolist() == expected.tolist()


@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
@pytest.mark.parametrize('dtype', DTYPES)
def test_soft_nms(dtype, method):
    boxes, scores = random_boxes(100, dtype)
    expected = soft_nms(boxes, scores, method=method)
    dets, kept = soft_nms(boxes.cuda(), scores.cuda(), method=method)
    assert dets.is_cuda and kept.is_cuda
    assert kept.tolist() == expected[1].tolist() and torch.equal(dets.cpu(), expected[0])


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('sampling_ratio', [0, 2])
@pytest.mark.parametrize('n', [0, 1, 50])
@pytest.mark.parametrize('dtype', DTYPES)
def test_roi_align(dtype, n, sampling_ratio, aligned, amp):
    g = torch.Generator().manual_seed(1)
    features = torch.randn(2, 4, 30, 40, generator=g).to(dtype)
    boxes, _ = random_boxes(n, torch.float32)
    rois = torch.cat([torch.arange(n)[:, None] % 2, boxes], dim=1)
    weights = torch.randn(n, 4, 3, 5, generator=g).to(dtype)

    results = []
    for device in ('cpu', 'cuda'):
        f = features.to(device).requires_grad_()
        with autocast(device, dtype, amp):
            out = roi_align(f, rois.to(device), (3, 5), 0.25, sampling_ratio, 'avg', aligned)
        out.backward(weights.to(device))
        assert out.dtype == f.grad.dtype == dtype
        results.append((out.detach().cpu(), f.grad.cpu()))
    # The order of the sums differs, by one rounding in half precision.
    eps = torch.finfo(dtype).eps
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=max(2 * eps, 1e-5), atol=1e-5)


def check_on_both(function, inputs, dtype, amp):
    """Compare results and gradients of all floating-point inputs on CUDA with those on the CPU."""
    results = []
    for device in ('cpu', 'cuda'):
        moved = [t.to(device, dtype).requires_grad_() if t.is_floating_point() else t.to(device) for t in inputs]
        with autocast(device, dtype, amp):
            out = function(*moved)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(device, out.dtype)
        leaves = [t for t in moved if t.requires_grad]
        grads = torch.autograd.grad((out * weights).sum(), leaves)
        assert out.device.type == device and out.dtype == dtype
        results.append([t.detach().cpu() for t in (out, *grads)])
    # The order of the sums differs, by one rounding in half precision.
    eps = torch.finfo(dtype).eps
    for cpu, cuda in zip(*results, strict=True):
        assert cuda.dtype == cpu.dtype
        torch.testing.assert_close(cuda, cpu, rtol=max(2 * eps, 1e-4), atol=max(eps, 1e-4))
        assert cpu.any() or not all(t.numel() for t in inputs)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('queries', [0, 50])
@pytest.mark.parametrize('sizes', [[(9, 13), (5, 7), (3, 4), (1, 2)], [(6, 5)]], ids=['four levels', 'one level'])
@pytest.mark.parametrize('dtype', DTYPES)
def test_deformable_attention(dtype, sizes, queries, amp):
    shapes = torch.tensor(sizes)
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
    value = normal(3, int(shapes.prod(1).sum()), 4, 8)
    # The derivative with respect to a position jumps at a pixel; in these fractions no rounding decides on the side.
    locations = (normal(3, queries, 4, len(sizes), 2, 2, seed=1) * 24 + 32).round() / 64
    weights = normal(3, queries, 4, len(sizes), 2, seed=2)

    def attend(value, shapes, starts, locations, weights):
        return MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 2)

    check_on_both(attend, [value, shapes, starts, locations, weights], dtype, amp)


def test_the_attention_layer_takes_the_op_on_cuda_and_its_own_function_on_the_cpu():
    torch.manual_seed(0)
    layer = MultiScaleDeformableAttention(embed_dims=32, num_heads=4, num_levels=2, batch_first=True, dropout=0.0)
    torch.nn.init.normal_(layer.sampling_offsets.weight, std=0.1)
    query, points = normal(2, 63, 32), torch.rand(2, 63, 2, 2, generator=torch.Generator().manual_seed(1))
    shapes, starts = torch.tensor([[6, 8], [3, 5]]), torch.tensor([0, 48])
    results = []
    for device in ('cpu', 'cuda'):
        layer.to(device).zero_grad()
        out = layer(
            query.to(device),
            reference_points=points.to(device),
            spatial_shapes=shapes.to(device),
            level_start_index=starts.to(device),
        )
        out.square().sum().backward()
        results.append([out.detach().cpu(), *(p.grad.cpu() for p in layer.parameters())])
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('settings', [(1, 1, 1, 1, 1), ((2, 1), (1, 2), (1, 2), 2, 2)], ids=['plain', 'all unlike'])
@pytest.mark.parametrize('dtype', DTYPES)
def test_deformable_convolution(dtype, settings, amp):
    groups, deform_groups = settings[3:]
    image, weight, bias = normal(2, 4, 9, 11), normal(6, 4 // groups, 3, 3, seed=1), normal(6, seed=2)
    size = torch.nn.functional.conv2d(image, weight, None, *settings[:3], groups).shape[2:]
    # At quarters of a pixel no position lies where a rounding decides on which side of a pixel it is.
    offset = (normal(2, 18 * deform_groups, *size, seed=3) * 2).round() + 0.25
    mask = normal(2, 9 * deform_groups, *size, seed=4).sigmoid()
    check_on_both(lambda x, o, w: deform_conv2d(x, o, w, *settings), [image, offset, weight], dtype, amp)
    inputs = [image, offset, mask, weight, bias]
    check_on_both(lambda x, o, m, w, b: modulated_deform_conv2d(x, o, m, w, b, *settings), inputs, dtype, amp)


@pytest.mark.parametrize('amp', [False, True])
def test_a_deformable_layer_trains(amp):
    torch.manual_seed(0)
    layer = ModulatedDeformConv2dPack(3, 8, 3, padding=1).cuda()
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):  # the offsets begin at zero
        with torch.autocast('cuda', torch.bfloat16, enabled=amp):
            loss = layer(normal(2, 3, 16, 20).cuda()).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.isfinite() and all(not torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('n', [0, 40])
@pytest.mark.parametrize('dtype', DTYPES)
def test_focal_losses(dtype, n, amp):
    logits, targets = normal(n, 5) * 4, torch.arange(n) % 6
    weight = torch.tensor([0.5, 1.0, 2.0, 0.0, 1.5])
    for class_weight in (None, weight):

        def sigmoid(x, t, class_weight=class_weight):
            w = None if class_weight is None else class_weight.to(x)
            return sigmoid_focal_loss(x, t, 2.0, 0.25, w, 'none')

        check_on_both(sigmoid, [logits, targets], dtype, amp)
    if dtype == torch.float32:  # mmcv takes the softmax itself in the dtype of the logits
        check_on_both(
            lambda x, t: softmax_focal_loss(x, t, 2.0, 0.25, None, 'sum'), [logits, targets.clamp(max=4)], dtype, amp
        )


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('settings', [(5, 1, 2), (3, 2, 3)])
@pytest.mark.parametrize('dtype', DTYPES)
def test_carafe(dtype, settings, amp):
    kernel_size, groups, scale = settings
    masks = normal(2, groups * kernel_size**2, 7 * scale, 9 * scale, seed=1)
    check_on_both(lambda x, m: carafe(x, m, *settings), [normal(2, 4, 7, 9), masks], dtype, amp)


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('psa_type', ['collect', 'distribute'])
@pytest.mark.parametrize('dtype', DTYPES)
def test_psa_mask(dtype, psa_type, amp):
    check_on_both(PSAMask(psa_type, (5, 7)), [normal(2, 35, 6, 5)], dtype, amp)


@pytest.mark.filterwarnings('ignore:This overload of addmm is deprecated')
def test_masked_convolution():
    torch.manual_seed(0)
    layer = MaskedConv2d(3, 4, 3, padding=1).eval()
    image, mask = normal(1, 3, 12, 15), normal(1, 12, 15, seed=1) > 0.5
    with torch.no_grad():
        expected = layer(image, mask)
        torch.testing.assert_close(layer.cuda()(image.cuda(), mask.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)


def test_nms_match():
    boxes, scores = random_boxes(100, torch.float32)
    dets = torch.cat([boxes, scores[:, None]], dim=1)
    groups = nms_match(dets.cuda(), 0.3)
    assert groups[0].is_cuda and [g.tolist() for g in groups] == [g.tolist() for g in nms_match(dets, 0.3)]
