"""Operations on boxes are mmdet's, to the bit."""

import densekit.ops  # noqa: F401

# isort: split
import pytest
import torch
from mmcv.ops import batched_nms
from mmdet.models.losses import FocalLoss, GIoULoss, IoULoss, L1Loss, SmoothL1Loss
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from mmdet.structures.bbox import bbox_overlaps, scale_boxes

from densekit.models import DeviceBoxCoder
from densekit.models.boxes import box_loss, constant, overlaps, positions, scaled, suppressed


def boxes(count, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 200
    return torch.cat([corner, corner + torch.rand(count, 2, generator=generator) * 90], dim=1).to(dtype)


def offsets(count, classes=1, seed=0):
    return torch.randn(count, classes * 4, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize('stds', [(1.0, 1.0, 1.0, 1.0), (0.1, 0.1, 0.2, 0.2), (0.033, 0.033, 0.067, 0.067)])
@pytest.mark.parametrize('means', [(0.0, 0.0, 0.0, 0.0), (0.1, -0.2, 0.3, 0.0)])
@pytest.mark.parametrize(('count', 'classes'), [(50, 1), (50, 5), (0, 5)])
def test_boxes_and_offsets(count, classes, means, stds):
    found = []
    for cls in (DeviceBoxCoder, DeltaXYWHBBoxCoder):
        coder = cls(target_means=means, target_stds=stds)
        moves = offsets(count, classes).requires_grad_()
        kept = coder.decode(boxes(count), moves)
        kept.sum().backward()
        cut = coder.decode(boxes(count), offsets(count, classes), max_shape=(150, 210))
        found.append([kept, moves.grad, cut, coder.encode(boxes(count), boxes(count, 1))])
    assert all(torch.equal(own, reference) for own, reference in zip(*found, strict=True))
    assert not count or not torch.equal(found[0][0], found[0][2])


def test_boxes_without_extent_and_wide_moves():
    point = torch.tensor([[5.0, 5.0, 5.0, 9.0]])
    far = torch.tensor([[3.0, -3.0, 90.0, -90.0]])
    ours, theirs = (cls().decode(point, far) for cls in (DeviceBoxCoder, DeltaXYWHBBoxCoder))
    assert torch.equal(ours, theirs)
    ours, theirs = (cls().encode(point, boxes(1)) for cls in (DeviceBoxCoder, DeltaXYWHBBoxCoder))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(('left', 'right'), [(7, 300), (0, 5), (5, 0), (1, 1)])
def test_overlaps(left, right):
    first, second = boxes(left), boxes(right, 1)
    second[: right // 4, 2:] = second[: right // 4, :2]  # without extent
    found = overlaps(first, second)
    assert found.shape == (left, right)
    assert torch.equal(found, bbox_overlaps(first, second))


@pytest.mark.parametrize('loss', [L1Loss(loss_weight=0.3), SmoothL1Loss(beta=1 / 9, loss_weight=3.0)], ids=str)
@pytest.mark.parametrize('share', [1.0, 0.4, 0.0])
def test_losses_of_offsets(loss, share):
    weight = (torch.rand(60, 1, generator=torch.Generator().manual_seed(5)) < share).float().expand(60, 4)
    found = []
    for way in (lambda *args: box_loss(loss, *args, 37), lambda *args: loss(*args, avg_factor=37)):
        moves = offsets(60).requires_grad_()
        value = way(moves, offsets(60, seed=1), weight)
        value.backward()
        found.append([value, moves.grad])
    assert all(torch.equal(own, reference) for own, reference in zip(*found, strict=True))
    assert bool(found[0][0]) == (share > 0)


@pytest.mark.parametrize('loss', [GIoULoss(loss_weight=10.0), IoULoss()], ids=['GIoU', 'left to mmdet'])
def test_losses_of_boxes(loss):
    found = []
    for way in (lambda *args: box_loss(loss, *args, 37), lambda *args: loss(*args, avg_factor=37)):
        moved = boxes(60).requires_grad_()
        value = way(moved, boxes(60, 1), torch.ones(60, 4))
        value.backward()
        found.append([value, moved.grad])
    assert all(torch.equal(own, reference) for own, reference in zip(*found, strict=True))


def test_a_loss_of_another_class_has_its_own_way():
    class Twice(L1Loss):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    args = offsets(9), offsets(9, seed=1), torch.ones(9, 4), 3
    assert box_loss(Twice(), *args) == 2 * box_loss(L1Loss(), *args)
    assert not isinstance(FocalLoss(), L1Loss)


@pytest.mark.parametrize(
    'cfg',
    [
        dict(type='nms', iou_threshold=0.5),
        dict(iou_threshold=0.7),
        dict(type='nms', iou_threshold=0.5, max_num=20),
        dict(type='nms', iou_threshold=0.5, class_agnostic=True),
        dict(type='nms', iou_threshold=0.5, split_thr=100),
        dict(type='soft_nms', iou_threshold=0.5),
        None,
    ],
    ids=str,
)
def test_suppression(cfg):
    generator = torch.Generator().manual_seed(3)
    scores, groups = torch.rand(300, generator=generator), torch.randint(0, 3, (300,), generator=generator)
    args = boxes(300), scores, groups
    for own, reference in zip(suppressed(*args, cfg), batched_nms(*args, cfg), strict=True):
        assert own.dtype == reference.dtype and torch.equal(own, reference)
    drops = cfg is not None and cfg.get('type') != 'soft_nms'
    assert not drops or 0 < len(suppressed(*args, cfg)[1]) < 300


def test_scales_and_constants():
    factors = (1 / 0.7331, 1 / 1.3337)
    assert torch.equal(scaled(boxes(9), factors), scale_boxes(boxes(9), factors))
    for values in ((0.1, 0.1, 0.2, 0.2), (0.3, 0.3), [1e-6]):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            assert torch.equal(constant(values, boxes(1, dtype=dtype)), torch.tensor(values, dtype=dtype))


@pytest.mark.parametrize('share', [0.0, 0.3, 1.0])
def test_positions(share):
    from densekit.benchmark.waits import DEVICE, pretended_cuda

    mask = torch.rand(500, generator=torch.Generator().manual_seed(0)) < share
    expected = mask.nonzero().squeeze(1)
    assert torch.equal(positions(mask, len(expected)), expected)
    with pretended_cuda():  # not the way of a CPU
        found = positions(mask.to(DEVICE), len(expected)).cpu()
    assert found.dtype == expected.dtype and torch.equal(found, expected)
