"""The substitutes of densekit.ops, called through mmcv.ops, against plain references written here."""

import math

import densekit.ops  # noqa: F401  mmcv.ops can be imported after it only

# isort: split
import numpy as np
import pytest
import torch
from mmcv.ops import RoIAlign, batched_nms, nms, nms_match, roi_align, soft_nms

# The dtype of the tensors and that of autocast; mmcv's own torch.cat refuses fp16 in bf16 autocast and the reverse.
MIXED = [
    (torch.float16, None),
    (torch.float16, torch.float16),
    (torch.bfloat16, None),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
]
METHODS = ['naive', 'linear', 'gaussian']


def autocast(dtype):
    return torch.autocast('cpu', dtype or torch.bfloat16, enabled=dtype is not None)


def random_boxes(n, seed, size=100.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=g) * size
    boxes = torch.cat([corner, corner + torch.rand(n, 2, generator=g) * size / 2], dim=1)
    return boxes.to(dtype), torch.rand(n, generator=g).to(dtype)


# --------------------------------------------------------------------------------------------------------------- NMS


def iou_of(a, b, offset):
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + offset)
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + offset)
    area = sum((c[2] - c[0] + offset) * (c[3] - c[1] + offset) for c in (a, b))
    return w * h / (area - w * h) if w * h > 0 else 0.0


def naive_nms(boxes, scores, threshold, offset=0):
    boxes, scores = boxes.double().tolist(), scores.double().tolist()
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(iou_of(boxes[i], boxes[j], offset) <= threshold for j in kept):
            kept.append(i)
    return kept


def naive_soft_nms(boxes, scores, threshold, sigma, min_score, method, offset):
    boxes, scores = boxes.double().tolist(), scores.double().tolist()
    left, dets, kept = list(range(len(boxes))), [], []
    while left:
        top = max(left, key=lambda i: scores[i])
        left.remove(top)
        kept.append(top)
        dets.append([*boxes[top], scores[top]])
        for i in list(left):
            iou = iou_of(boxes[top], boxes[i], offset)
            if method == 'gaussian':
                scores[i] *= math.exp(-(iou**2) / sigma)
            elif iou >= threshold:
                scores[i] *= 1 - iou if method == 'linear' else 0
            if scores[i] < min_score:
                left.remove(i)
    return np.array(dets).reshape(-1, 5), kept


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [0.1, 0.5, 0.7])
def test_nms_equals_the_reference(threshold, offset, seed):
    # Small boxes, so that the offset matters.
    boxes, scores = random_boxes(150, seed, size=10.0)
    dets, kept = nms(boxes, scores, threshold, offset=offset)
    assert kept.tolist() == naive_nms(boxes, scores, threshold, offset)
    assert 1 < len(kept) < 150
    assert torch.equal(dets, torch.cat([boxes[kept], scores[kept, None]], dim=1))


def test_nms_offset_changes_the_result():
    boxes, scores = random_boxes(80, 0, size=10.0)
    assert nms(boxes, scores, 0.5, offset=0)[1].tolist() != nms(boxes, scores, 0.5, offset=1)[1].tolist()


def test_nms_score_threshold_and_max_num():
    boxes, scores = random_boxes(80, 0)
    all_kept = naive_nms(boxes, scores, 0.5)
    assert nms(boxes, scores, 0.5, score_threshold=0.6)[1].tolist() == [i for i in all_kept if scores[i] > 0.6]
    assert nms(boxes, scores, 0.5, max_num=3)[1].tolist() == all_kept[:3]
    assert nms(boxes, scores, 0.5, score_threshold=2.0)[1].tolist() == []


@pytest.mark.parametrize('offset', [0, 1])
def test_nms_of_few_boxes(offset):
    dets, kept = nms(torch.zeros(0, 4), torch.zeros(0), 0.5, offset=offset)
    assert dets.shape == (0, 5) and kept.shape == (0,) and kept.dtype == torch.int64
    assert nms(torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([0.5]), 0.5, offset=offset)[1].tolist() == [0]


def test_nms_of_points_and_equal_boxes():
    # Boxes without an area overlap nothing, themselves not either; of equal scores the first wins.
    boxes = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 2, 2], [0, 0, 2, 2], [-9, -9, -5, -5]])
    assert sorted(nms(boxes, torch.full((5,), 0.5), 0.5)[1].tolist()) == [0, 1, 2, 4]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_nms_keeps_a_box_at_the_threshold(dtype):
    # The IoU is 3/10. Only a larger one suppresses, and float32's 0.3 lies above the double's.
    boxes = torch.tensor([[0, 0, 10, 1], [0, 0, 3, 1]], dtype=dtype)
    scores = torch.tensor([0.9, 0.8], dtype=dtype)
    assert nms(boxes, scores, 0.3)[1].tolist() == [0, 1]
    assert nms(boxes, scores, 0.2999)[1].tolist() == [0]


def test_nms_of_numpy_arrays():
    boxes, scores = random_boxes(40, 1, dtype=torch.float64)
    dets, kept = nms(boxes.numpy(), scores.numpy(), 0.5)
    assert isinstance(dets, np.ndarray) and dets.dtype == np.float64
    assert kept.tolist() == naive_nms(boxes, scores, 0.5)


@pytest.mark.parametrize(('dtype', 'amp'), MIXED)
def test_nms_in_half_precision(dtype, amp):
    boxes, scores = random_boxes(80, 2, dtype=dtype)
    expected = nms(boxes.float(), scores.float(), 0.5)
    with autocast(amp):
        dets, kept = nms(boxes, scores, 0.5)
        mixed = nms(boxes, scores.float(), 0.5)[1]
    assert kept.tolist() == mixed.tolist() == expected[1].tolist()
    assert dets.dtype == dtype and torch.equal(dets, expected[0].to(dtype))


@pytest.mark.parametrize('split_thr', [10, 10000])
@pytest.mark.parametrize('class_agnostic', [False, True])
def test_batched_nms_equals_nms_per_class(class_agnostic, split_thr):
    boxes, scores = random_boxes(60, 3)
    # Split by group, mmcv does not look at class_agnostic.
    together = class_agnostic and split_thr > 60
    labels = torch.arange(60) % 3
    groups = [torch.arange(60)] if together else [torch.nonzero(labels == c)[:, 0] for c in range(3)]
    expected = [int(g[i]) for g in groups for i in naive_nms(boxes[g], scores[g], 0.4)]
    expected.sort(key=lambda i: -float(scores[i]))
    cfg = dict(type='nms', iou_threshold=0.4, split_thr=split_thr)
    dets, kept = batched_nms(boxes, scores, labels, cfg, class_agnostic=class_agnostic)
    assert kept.tolist() == expected
    assert torch.equal(dets, torch.cat([boxes[kept], scores[kept, None]], dim=1))


def test_batched_nms_limits():
    boxes, scores = random_boxes(60, 3)
    labels = torch.arange(60) % 3
    full = batched_nms(boxes, scores, labels, dict(iou_threshold=0.4))[1]
    for split_thr in (10, 10000):
        cfg = dict(iou_threshold=0.4, max_num=5, split_thr=split_thr)
        assert batched_nms(boxes, scores, labels, cfg)[1].tolist() == full[:5].tolist()
    assert batched_nms(boxes, scores, labels, None)[1].tolist() == scores.argsort(descending=True).tolist()


# --------------------------------------------------------------------------------------------------------- NMS match


def naive_nms_match(boxes, scores, threshold):
    boxes, scores = boxes.double().tolist(), scores.double().tolist()
    groups = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        for group in groups:
            if iou_of(boxes[group[0]], boxes[i], 0) >= threshold:
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('threshold', [0.1, 0.5, 0.7])
def test_nms_match_equals_the_reference(threshold, dtype):
    boxes, scores = random_boxes(200, 0, dtype=dtype)
    groups = nms_match(torch.cat([boxes, scores[:, None]], dim=1), threshold)
    assert [group.tolist() for group in groups] == naive_nms_match(boxes, scores, threshold)
    assert sorted(torch.cat(groups).tolist()) == list(range(200)) and 1 < len(groups) < 200


def test_nms_match_of_few_boxes():
    assert nms_match(torch.zeros(0, 5), 0.5) == []
    # Points match nothing, themselves not either; an IoU at the threshold, 1/2, does match, unlike in NMS.
    dets = np.array([[1, 1, 1, 1, 0.9], [1, 1, 1, 1, 0.8], [0, 0, 2, 2, 0.7], [0, 0, 2, 1, 0.6]], dtype=np.float32)
    assert [group.tolist() for group in nms_match(dets, 0.5)] == [[0], [1], [2, 3]]


# ---------------------------------------------------------------------------------------------------------- soft NMS


@pytest.mark.parametrize('seed', range(2))
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('min_score', [1e-3, 0.3])
@pytest.mark.parametrize('method', METHODS)
def test_soft_nms_equals_the_reference(method, min_score, offset, dtype, seed):
    boxes, scores = random_boxes(50, seed, size=20.0, dtype=dtype)
    args = (0.3, 0.5, min_score, method, offset)
    dets, kept = soft_nms(boxes, scores, *args)
    expected_dets, expected_kept = naive_soft_nms(boxes, scores, *args)
    assert kept.tolist() == expected_kept and kept.dtype == torch.int64
    assert 1 < len(kept) <= 50 and dets.dtype == dtype
    np.testing.assert_allclose(dets.numpy(), expected_dets, rtol=1e-5 if dtype == torch.float32 else 1e-12)


def test_naive_soft_nms_is_nms():
    boxes, scores = random_boxes(50, 5)
    assert soft_nms(boxes, scores, 0.5, method='naive')[1].tolist() == nms(boxes, scores, 0.5)[1].tolist()


def test_soft_nms_of_few_boxes():
    for method in METHODS:
        dets, kept = soft_nms(torch.zeros(0, 4), torch.zeros(0), method=method)
        assert dets.shape == (0, 5) and kept.tolist() == []
        # The first box is not tested against min_score.
        dets, kept = soft_nms(torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([0.01]), min_score=0.5, method=method)
        assert kept.tolist() == [0] and dets.tolist() == [[1, 2, 3, 4, pytest.approx(0.01)]]
        # Points overlap nothing: no score changes, none becomes NaN, ties keep their order.
        dets, kept = soft_nms(torch.ones(3, 4), torch.tensor([0.5, 0.9, 0.5]), method=method)
        assert kept.tolist() == [1, 0, 2] and dets[:, 4].tolist() == torch.tensor([0.9, 0.5, 0.5]).tolist()


def test_soft_nms_leaves_its_inputs_alone():
    boxes, scores = random_boxes(20, 6)
    before = boxes.clone(), scores.clone()
    soft_nms(boxes, scores)
    assert torch.equal(boxes, before[0]) and torch.equal(scores, before[1])


@pytest.mark.parametrize(('dtype', 'amp'), MIXED)
@pytest.mark.parametrize('method', METHODS)
def test_soft_nms_in_half_precision(method, dtype, amp):
    boxes, scores = random_boxes(40, 4, dtype=dtype)
    expected = soft_nms(boxes.float(), scores.float(), method=method)
    with autocast(amp):
        dets, kept = soft_nms(boxes, scores, method=method)
    assert kept.tolist() == expected[1].tolist()
    assert dets.dtype == dtype and torch.equal(dets, expected[0].to(dtype))


# ---------------------------------------------------------------------------------------------------------- RoIAlign


def bilinear(image, y, x):
    """Return (C,) of the image (C, H, W) at one point; 0 farther than one pixel outside; differentiable."""
    height, width = image.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return image.new_zeros(len(image))
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    top = image[:, y0, x0] * (x0 + 1 - x) + image[:, y0, x1] * (x - x0)
    bottom = image[:, y1, x0] * (x0 + 1 - x) + image[:, y1, x1] * (x - x0)
    return top * (y0 + 1 - y) + bottom * (y - y0)


def naive_roi_align(features, rois, size, scale, sampling_ratio, aligned):
    """RoIAlign by the book, in double precision, one sample at a time."""
    features = features.double()
    out = []
    for index, *corners in rois.double().tolist():
        x1, y1, x2, y2 = (c * scale - (0.5 if aligned else 0) for c in corners)
        width, height = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1), max(y2 - y1, 1))
        bin_h, bin_w = height / size[0], width / size[1]
        grid_h, grid_w = (sampling_ratio or math.ceil(bin_h), sampling_ratio or math.ceil(bin_w))
        for row in range(size[0]):
            for col in range(size[1]):
                ys = [y1 + (row + (i + 0.5) / grid_h) * bin_h for i in range(grid_h)]
                xs = [x1 + (col + (i + 0.5) / grid_w) * bin_w for i in range(grid_w)]
                samples = [bilinear(features[int(index)], y, x) for y in ys for x in xs]
                none = features.new_zeros(features.shape[1])
                out.append(torch.stack(samples).mean(0) if samples else none)
    if not out:
        return features.new_zeros(0, features.shape[1], *size) * features.sum()
    return torch.stack(out).view(len(rois), *size, -1).permute(0, 3, 1, 2)


def random_features(dtype=torch.float32, seed=0):
    return torch.randn(2, 3, 10, 14, generator=torch.Generator().manual_seed(seed)).to(dtype)


ROIS = torch.tensor(
    [
        [0, 3.7, 5.1, 21.3, 17.9],
        [1, 0.0, 0.0, 56.0, 40.0],  # the whole image
        [1, 12.0, 8.0, 12.0, 8.0],  # a point
        [0, 12.0, 8.0, 30.0, 8.0],  # a line
        [1, -20.0, -9.0, 10.0, 12.0],  # partly outside
        [0, 40.0, 30.0, 70.0, 55.0],  # partly outside
        [0, 300.0, 300.0, 320.0, 340.0],  # wholly outside
        [1, 17.2, 3.3, 18.1, 4.0],  # smaller than a pixel of the feature map
    ]
)
NO_ROIS = torch.zeros(0, 5)


@pytest.mark.parametrize('rois', [ROIS, NO_ROIS], ids=['rois', 'no rois'])
@pytest.mark.parametrize('size', [(3, 5), (4, 4)])
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('sampling_ratio', [0, 2])
def test_roi_align_equals_the_reference(sampling_ratio, aligned, size, rois):
    features = random_features().requires_grad_()
    out = RoIAlign(size, 0.25, sampling_ratio, aligned=aligned)(features, rois)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad((out * weights).sum(), features)

    expected = naive_roi_align(features, rois, size, 0.25, sampling_ratio, aligned)
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), features)

    assert out.shape == (len(rois), 3, *size) and out.dtype == grad.dtype == torch.float32
    torch.testing.assert_close(out, expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad.float(), rtol=1e-4, atol=1e-5)
    assert (grad.abs().sum() > 0) == (len(rois) > 0)


def test_roi_align_alternatives_differ():
    # A negative control: the reference above could not tell the settings apart if these were equal.
    features = random_features()
    results = [roi_align(features, ROIS[:1], (3, 3), 0.25, s, 'avg', a) for s in (0, 1) for a in (True, False)]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(results) for b in results[:i])


def test_roi_align_gradient_in_float64():
    features = random_features(torch.float64)[:, :1, :6, :6].clone().requires_grad_()
    rois = ROIS[[0, 2, 4]].double()
    for sampling_ratio, aligned in ((0, True), (2, False)):
        function = lambda f, s=sampling_ratio, a=aligned: roi_align(f, rois, (2, 3), 0.25, s, 'avg', a)  # noqa: E731
        assert torch.autograd.gradcheck(function, (features,))
    # And it is computed in float64, not rounded to float32 on the way.
    expected = naive_roi_align(features, rois, (2, 3), 0.25, 2, True)
    torch.testing.assert_close(roi_align(features, rois, (2, 3), 0.25, 2, 'avg', True), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize('roi_dtype', [torch.float32, None], ids=['rois float32', 'rois half'])
@pytest.mark.parametrize(('dtype', 'amp'), MIXED)
def test_roi_align_in_half_precision(dtype, amp, roi_dtype):
    features = random_features(dtype).requires_grad_()
    rois = ROIS.to(roi_dtype or dtype)
    with autocast(amp):
        out = roi_align(features, rois, (3, 5), 0.25, 0, 'avg', True)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        out.backward(weights)

    exact = features.detach().float().requires_grad_()
    expected = roi_align(exact, rois.float(), (3, 5), 0.25, 0, 'avg', True)
    expected.backward(weights.float())
    assert out.dtype == features.grad.dtype == dtype
    assert torch.equal(out, expected.to(dtype))
    assert torch.equal(features.grad, exact.grad.to(dtype))


@pytest.mark.parametrize('bad', [[0, 1, 1, float('nan'), 5], [0, 9, 1, 3, 5]], ids=['nan', 'inverted'])
def test_roi_align_refuses_bad_rois(bad):
    rois = torch.tensor([[0.0, 1, 1, 5, 5], bad])
    with pytest.raises(ValueError, match=r'RoI 1 of 2 is \[0\.0, .*finite'):
        roi_align(random_features(), rois, (2, 2), 1.0, 2, 'avg', True)


def test_max_pooling_is_refused_by_name():
    with pytest.raises(NotImplementedError, match="pool_mode='max'"):
        RoIAlign(2, pool_mode='max')(random_features(), ROIS)
