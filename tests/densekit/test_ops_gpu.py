"""Every op of densekit.ops on CUDA gives its CPU result."""

import densekit.ops  # noqa: F401  mmcv.ops can be imported after it only

# isort: split
import pytest
import torch
from mmcv.ops import batched_nms, nms, roi_align, soft_nms

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
