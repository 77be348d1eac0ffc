"""Assignments are mmdet's, to the bit."""

import pytest
import torch

import densekit.ops  # noqa: F401

# isort: split
from mmdet.models.task_modules.assigners import MaxIoUAssigner
from mmengine.structures import InstanceData

from densekit.models import WholeMaxIoUAssigner

RPN = dict(pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3, ignore_iof_thr=-1)
ROI = dict(pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5, ignore_iof_thr=-1)


def boxes(count, seed, step=8.0):
    """On a coarse grid, so that many have the same IoU with an object, and some objects are there twice."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 12, (count, 2), generator=generator) * step
    return torch.cat([corner, corner + torch.randint(1, 6, (count, 2), generator=generator) * step], dim=1)


def assigned(cls, options, objects, candidates, device='cpu'):
    truth = InstanceData(bboxes=boxes(objects, 1).to(device), labels=torch.arange(objects, device=device) + 10)
    ignored = InstanceData(bboxes=boxes(3, 3).to(device))
    priors = InstanceData(priors=boxes(candidates, 2).to(device))
    result = cls(**options).assign(priors, truth, ignored)
    return result.gt_inds, result.max_overlaps, result.labels


@pytest.mark.parametrize('objects', [0, 1, 12, 60])
@pytest.mark.parametrize('candidates', [0, 1, 400])
@pytest.mark.parametrize(
    'options',
    [
        RPN,
        ROI,
        RPN | dict(neg_iou_thr=(0.1, 0.3)),
        RPN | dict(match_low_quality=False),
        RPN | dict(gt_max_assign_all=False),
        RPN | dict(ignore_iof_thr=0.5),
        RPN | dict(min_pos_iou=0.0),
    ],
    ids=str,
)
def test_as_mmdets(options, candidates, objects):
    ours = assigned(WholeMaxIoUAssigner, options, objects, candidates)
    theirs = assigned(MaxIoUAssigner, options, objects, candidates)
    for own, reference in zip(ours, theirs, strict=True):
        assert own.dtype == reference.dtype
        assert torch.equal(own, reference)


def test_the_data_above_has_what_is_to_be_told_apart():
    """Boxes with an object, without and left out, and boxes that go to another object for the last claim's sake."""
    found, _, _ = assigned(WholeMaxIoUAssigner, RPN, 12, 400)
    without, _, _ = assigned(WholeMaxIoUAssigner, RPN | dict(match_low_quality=False), 12, 400)
    assert {-1, 0, 1} <= set(found.sign().tolist())
    assert not torch.equal(found, without)
    assert len(boxes(60, 1).unique(dim=0)) < 60


@pytest.mark.parametrize('name', ['assign', 'assign_wrt_overlaps'])
def test_a_subclass_that_assigns_in_its_own_way_is_not_plain(name):
    def own(self, *args, **kwargs):
        return getattr(super(cls, self), name)(*args, **kwargs)

    cls = type('Own', (WholeMaxIoUAssigner,), {name: own})
    assert WholeMaxIoUAssigner(**RPN).plain and not cls(**RPN).plain
    ours, theirs = (assigned(one, RPN, 12, 400) for one in (cls, MaxIoUAssigner))
    assert all(torch.equal(own, reference) for own, reference in zip(ours, theirs, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_nothing_waits_for_the_device():
    expected = assigned(MaxIoUAssigner, RPN, 12, 400, 'cuda')
    overlaps = torch.rand(12, 400, device='cuda')
    labels = torch.arange(12, device='cuda')
    torch.cuda.set_sync_debug_mode('error')
    try:
        WholeMaxIoUAssigner(**RPN).assign_wrt_overlaps(overlaps, labels)
        with pytest.raises(RuntimeError, match='synchroniz'):
            MaxIoUAssigner(**RPN).assign_wrt_overlaps(overlaps, labels)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    ours = assigned(WholeMaxIoUAssigner, RPN, 12, 400, 'cuda')
    assert all(torch.equal(own, reference) for own, reference in zip(ours, expected, strict=True))
