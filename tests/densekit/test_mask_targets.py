"""The targets of a mask head are those of mmdet, to the bit."""

import numpy as np
import pytest
import torch

import densekit.ops  # noqa: F401

# isort: split
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.structures.mask import BitmapMasks, PolygonMasks, mask_target
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData

from densekit.models import RleMaskHead, mask_targets

HEIGHT, WIDTH = 120, 150


def bitmaps(count, seed=0, height=HEIGHT, width=WIDTH):
    """Filled ellipses, one in each mask."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    masks = np.zeros((count, height, width), np.uint8)
    for mask in masks:
        (cx, rx), (cy, ry) = ((side * rng.uniform(0.3, 0.7), side * rng.uniform(0.2, 0.5)) for side in (width, height))
        mask[:] = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1
    return BitmapMasks(masks, height, width)


def polygons(count, seed=0):
    rng = np.random.default_rng(seed)
    return PolygonMasks([[rng.uniform(0, HEIGHT, 12)] for _ in range(count)], HEIGHT, WIDTH)


def positives(boxes, count, seed=0):
    """Boxes within the image and around its border, and which mask each belongs to."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(boxes, 2, generator=generator) * 120 - 15
    size = 2 * 60 ** torch.rand(boxes, 2, generator=generator)
    indices = torch.randint(count, (boxes,), generator=generator) if boxes else torch.zeros(0, dtype=torch.long)
    return torch.cat([corner, corner + size], dim=1), indices


def both(boxes, indices, masks, **cfg):
    cfg = ConfigDict({'mask_size': 28, **cfg})
    stock = mask_target([part.clone() for part in boxes], indices, masks, cfg)  # it changes boxes on a CPU
    return mask_targets.mask_targets(boxes, indices, masks, cfg), stock


@pytest.mark.parametrize('cfg', [{}, {'soft_mask_target': True}, {'mask_size': (14, 56)}], ids=str)
def test_bitmaps_give_mmdets_targets(cfg):
    boxes, indices = zip(positives(40, 6), positives(0, 3), positives(9, 1, seed=1), strict=True)
    ours, stock = both(boxes, indices, [bitmaps(6), bitmaps(3), bitmaps(1)], **cfg)
    assert ours.dtype == stock.dtype == torch.float32
    assert torch.equal(ours, stock)
    assert 0.1 < ours.mean() < 0.9


@pytest.mark.parametrize('at_once', [1, 2, 4])
def test_masks_in_several_parts_give_the_same(monkeypatch, at_once):
    monkeypatch.setattr(mask_targets, 'PIXELS_AT_ONCE', at_once * HEIGHT * WIDTH)
    boxes, indices = positives(40, 7)
    assert set(indices.tolist()) == set(range(7))
    ours, stock = both([boxes], [indices], [bitmaps(7)])
    assert torch.equal(ours, stock)


def test_the_mask_of_a_box_counts():
    """The test above can fail: another mask gives other targets."""
    boxes, indices = positives(40, 6)
    ours, _ = both([boxes], [indices], [bitmaps(6)])
    _, stock = both([boxes], [(indices + 1) % 6], [bitmaps(6)])
    assert not torch.equal(ours, stock)


def test_polygons_are_left_to_mmdet():
    boxes, indices = positives(12, 3)
    ours, stock = both([boxes], [indices], [polygons(3)])
    assert torch.equal(ours, stock)
    assert 0 < ours.mean() < 1


def test_boxes_are_not_changed():
    boxes, indices = positives(12, 3)
    before = boxes.clone()
    both([boxes], [indices], [bitmaps(3)])
    assert torch.equal(boxes, before)
    mask_target([boxes], [indices], [bitmaps(3)], ConfigDict(mask_size=28))
    assert not torch.equal(boxes, before), 'mmdet no longer changes them: the docstring is to say so'


def test_masks_go_to_the_device_once(monkeypatch):
    uploads = []
    monkeypatch.setattr(torch, 'from_numpy', lambda array, of=torch.from_numpy: uploads.append(array) or of(array))
    masks, (boxes, indices) = bitmaps(3), positives(12, 3)
    for _ in range(3):  # the stages of a cascade
        mask_targets.mask_targets([boxes], [indices], [masks], {'mask_size': 28})
    assert len(uploads) == 1
    masks.masks = bitmaps(3, seed=1).masks
    changed = mask_targets.mask_targets([boxes], [indices], [masks], {'mask_size': 28})
    assert len(uploads) == 2
    assert torch.equal(changed, both([boxes], [indices], [bitmaps(3, seed=1)])[0])


def sampled(boxes, indices):
    return type('Result', (), {'pos_priors': boxes, 'pos_assigned_gt_inds': indices})()


def test_the_heads_agree():
    images = [positives(20, 4), positives(5, 2, seed=3)]
    results = [sampled(*image) for image in images]
    truth = [InstanceData(masks=bitmaps(4)), InstanceData(masks=bitmaps(2, seed=5))]
    for instances, count in zip(truth, (4, 2), strict=True):
        assert len(instances.masks) == count
    ours, stock = (
        cls.get_targets(None, results, truth, ConfigDict(mask_size=28)) for cls in (RleMaskHead, FCNMaskHead)
    )
    assert torch.equal(ours, stock)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_nothing_waits_for_the_device():
    boxes, indices = (part.cuda() for part in positives(40, 6))
    cfg = ConfigDict(mask_size=28)
    expected = mask_target([boxes], [indices], [bitmaps(6)], cfg)
    masks = bitmaps(6)
    torch.cuda.set_sync_debug_mode('error')
    try:
        ours = mask_targets.mask_targets([boxes], [indices], [masks], cfg)
        with pytest.raises(RuntimeError, match='synchroniz'):
            mask_target([boxes], [indices], [bitmaps(6)], cfg)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert torch.equal(ours, expected)
