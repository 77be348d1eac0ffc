"""Run lengths are those of the masks that mmdet draws, to the pixel."""

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from pycocotools import mask as coco_mask

import densekit.ops  # noqa: F401

# isort: split
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.structures.mask import encode_mask_results
from mmdet.visualization import DetLocalVisualizer

import densekit.evaluation.rle as rle
from densekit.evaluation.rle import RleMasks, encode, paste
from densekit.models.mask_head import RleMaskHead, sigmoid


@pytest.fixture(autouse=True)
def mmdet_scope():
    with DefaultScope.overwrite_default_scope('mmdet'):  # a run before these tests may have left another one
        yield


def stock(logits, boxes, height, width, threshold=0.5, activated=False):
    """What mmdet draws on a CPU, ``(n, H, W)`` bool, from class-agnostic ``(n, h, w)``."""
    head = FCNMaskHead(num_classes=1, num_convs=0, class_agnostic=True)
    meta = {'scale_factor': (1.0, 1.0), 'ori_shape': (height, width)}
    labels, cfg = torch.zeros(len(boxes), dtype=torch.long), ConfigDict(mask_thr_binary=threshold)
    args = logits[:, None], boxes.clone(), labels, meta, cfg, True
    return head._predict_by_feat_single(*args, activate_map=activated).numpy()


def drawn(rles):
    return np.stack([coco_mask.decode(mask) for mask in rles]).astype(bool)


def random_boxes(rng, n, height, width, size):
    """Centres in the image and some way beyond; whole, half and other coordinates; none wholly outside."""
    centre = rng.uniform(-0.1, 1.1, (n, 2)) * (width, height)
    half = rng.uniform(0, 1, (n, 2)) * size / 2
    boxes = np.concatenate([centre - half, centre + half], axis=1)
    grid = rng.choice([0, 1, 2], (n, 1))
    boxes = np.where(grid == 0, boxes, np.where(grid == 1, np.rint(boxes), np.floor(boxes) + 0.5))
    inside = (boxes[:, 0] < width - 2) & (boxes[:, 1] < height - 2) & (boxes[:, 2] > 1) & (boxes[:, 3] > 1)
    return torch.tensor(boxes[inside], dtype=torch.float32)


def random_logits(rng, n, size, coarse):
    small = torch.tensor(rng.normal(size=(n, 1, coarse, coarse)), dtype=torch.float32)
    return 4 * torch.nn.functional.interpolate(small, size=size, mode='bilinear')[:, 0]


@pytest.mark.parametrize('shape', [(28, 28), (7, 28), (14, 13), (1, 1), (56, 56)], ids=str)
@pytest.mark.parametrize('size', [0.5, 3, 30, 300, 3000])
def test_equal_to_mmdet_on_random_boxes(size, shape):
    rng = np.random.default_rng(int(size) + shape[1])
    for height, width in ((90, 120), (241, 60)):
        boxes = random_boxes(rng, 40, height, width, size)
        logits = random_logits(rng, len(boxes), shape, min(shape[0], 6))
        expected = stock(logits, boxes, height, width)
        found = paste(sigmoid(logits), boxes, height, width)
        assert np.array_equal(drawn(found), expected)
        assert found == encode_mask_results(expected)
        assert encode(expected) == found


@pytest.mark.parametrize('threshold', [0.0, 0.1, 0.3, 0.7, 1.0])
def test_equal_at_other_thresholds(threshold):
    rng = np.random.default_rng(5)
    boxes = random_boxes(rng, 40, 80, 100, 60)
    logits = random_logits(rng, len(boxes), (28, 28), 5) * 5
    expected = stock(logits, boxes, 80, 100, threshold)
    assert paste(sigmoid(logits), boxes, 80, 100, threshold) == encode_mask_results(expected)


def hard_masks(kind, n, rng):
    """Where rounding decides: values on the threshold, beside it, or nearly so."""
    if kind == 'threshold':
        return torch.full((n, 28, 28), 0.5)
    if kind == 'beside':
        near = np.nextafter(np.float32(0.5), rng.choice(np.float32([0, 1]), (n, 28, 28)))
        return torch.from_numpy(near)
    if kind == 'nearly':
        return torch.tensor(0.5 + rng.uniform(-1e-6, 1e-6, (n, 28, 28)), dtype=torch.float32)
    if kind == 'doubt':  # about as far from the threshold as is looked at twice
        return torch.tensor(0.5 + rng.choice([-1, 1], (n, 28, 28)) * rng.uniform(1e-5, 1e-4, (n, 28, 28))).float()
    if kind == 'sure':
        return torch.tensor(rng.integers(0, 2, (n, 28, 28)), dtype=torch.float32)
    return torch.tensor(np.repeat(np.linspace(0, 1, 28), 28).reshape(28, 28)[None].repeat(n, 0), dtype=torch.float32)


@pytest.mark.parametrize('kind', ['threshold', 'beside', 'nearly', 'doubt', 'sure', 'ramp'])
def test_equal_where_rounding_decides(kind):
    rng = np.random.default_rng(7)
    boxes = random_boxes(rng, 80, 100, 130, 90)
    masks = hard_masks(kind, len(boxes), rng)
    expected = stock(masks, boxes, 100, 130, activated=True)
    assert expected.any()
    assert np.array_equal(drawn(paste(masks, boxes, 100, 130)), expected)


def test_rounding_does_decide(monkeypatch):
    """Without the columns that are drawn, some of the masks above are others."""
    rng = np.random.default_rng(7)
    boxes = random_boxes(rng, 80, 100, 130, 90)
    masks = hard_masks('nearly', len(boxes), rng)
    nothing = np.zeros(0, dtype=np.int64)
    monkeypatch.setattr(rle, '_drawn', lambda *_: (nothing, nothing))
    assert not np.array_equal(drawn(paste(masks, boxes, 100, 130)), stock(masks, boxes, 100, 130, activated=True))


@pytest.mark.parametrize(
    'box',
    [
        (10, 10, 10, 30),  # no width
        (10.5, 10, 10.5, 30),  # likewise, and 0 / 0 at the centre of a pixel
        (10, 10.5, 30, 10.5),
        (10.5, 10.5, 10.5, 10.5),
        (10, 10, 10.000001, 10.000001),
        (30, 30, 10, 10),  # the wrong way around
        (-5000, -4000, 9000, 8000),
        (0, 0, 50, 40),
        (49.5, 39.5, 50, 40),
        (-3, -3, 0.2, 0.2),
        (-1e6, 5, 1e6, 30),
    ],
    ids=str,
)
def test_strange_boxes(box):
    rng = np.random.default_rng(1)
    masks = torch.tensor(rng.uniform(0, 1, (3, 28, 28)), dtype=torch.float32)
    masks[1], masks[2] = 1, 0
    boxes = torch.tensor([box] * 3, dtype=torch.float32)
    try:
        expected = stock(masks, boxes, 40, 50, activated=True)
    except RuntimeError:  # mmdet cannot draw what lies outside
        expected = np.zeros((3, 40, 50), dtype=bool)
    assert np.array_equal(drawn(paste(masks, boxes, 40, 50)), expected)


@pytest.mark.parametrize('box', [(60, 5, 90, 30), (5, 50, 30, 70), (-30, 5, -10, 30), (5, -30, 30, -10)], ids=str)
def test_a_box_outside_the_image_has_an_empty_mask(box):
    boxes, masks = torch.tensor([box, (0, 0, 50, 40)]).float(), torch.ones(2, 28, 28)
    found = drawn(paste(masks, boxes, 40, 50))
    assert found.sum(axis=(1, 2)).tolist() == [0, 40 * 50]
    with pytest.raises(RuntimeError):
        stock(masks, boxes, 40, 50, activated=True)


def test_portions_make_no_difference(monkeypatch):
    rng = np.random.default_rng(2)
    boxes = random_boxes(rng, 60, 100, 130, 90)
    masks = sigmoid(random_logits(rng, len(boxes), (28, 28), 8))
    masks[::7] = 0.5
    whole = paste(masks, boxes, 100, 130)
    monkeypatch.setattr(rle, 'COLUMNS_AT_ONCE', 13)
    monkeypatch.setattr(rle, 'POINTS_AT_ONCE', 500)
    assert paste(masks, boxes, 100, 130) == whole


def test_nothing_to_paste():
    assert paste(torch.zeros(0, 28, 28), torch.zeros(0, 4), 40, 50) == []
    assert encode(np.zeros((0, 40, 50), dtype=bool)) == []


@pytest.mark.parametrize('dtype', [bool, np.uint8, np.int64])
def test_drawn_masks_are_encoded_as_pycocotools_does(dtype):
    rng = np.random.default_rng(3)
    for height, width in ((1, 1), (5, 1), (1, 7), (30, 20)):
        masks = (rng.random((12, height, width)) < rng.random((12, 1, 1))).astype(dtype)
        masks[0], masks[1] = 0, 1
        assert encode(masks) == encode_mask_results(masks)


# The sigmoid.


@pytest.mark.parametrize('n', [1, 3, 100])
def test_the_sigmoid_is_that_of_all_classes(n):
    """mmdet takes it of all classes and picks one after."""
    logits = torch.randn(n, 80, 28, 28, generator=torch.Generator().manual_seed(n)) * 3
    labels = torch.arange(n) % 80
    assert torch.equal(sigmoid(logits[range(n), labels]), logits.sigmoid()[range(n), labels])


def test_a_number_alone_has_another_sigmoid():
    """The cause of the above: if torch has one formula for all, the padding can go."""
    logits = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([logit[None].sigmoid() for logit in logits])
    assert not torch.equal(alone, logits.sigmoid())
    assert torch.equal(torch.cat([sigmoid(logit[None]) for logit in logits]), logits.sigmoid())


# The head.


def predictions(head, *, n=30, seed=0, rescale=True, dtype=torch.float32, classes=5, activated=False):
    rng = np.random.default_rng(seed)
    boxes = random_boxes(rng, n, 120, 160, 100)
    results = InstanceData(bboxes=boxes, labels=torch.arange(len(boxes)) % classes, scores=torch.ones(len(boxes)))
    channels = 1 if head.class_agnostic else classes
    logits = random_logits(rng, len(boxes) * channels, (28, 28), 6).reshape(-1, channels, 28, 28).to(dtype)
    meta = {'scale_factor': (2.0, 1.5), 'ori_shape': (80, 80)}
    preds = logits.sigmoid() if activated else logits
    cfg = ConfigDict(mask_thr_binary=0.5)
    return head.predict_by_feat((preds,), [results], [meta], cfg, rescale=rescale, activate_map=activated)[0]


@pytest.mark.parametrize('class_agnostic', [False, True])
@pytest.mark.parametrize('rescale', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_head_gives_what_mmdets_gives(class_agnostic, rescale, dtype):
    theirs = FCNMaskHead(num_classes=5, num_convs=0, class_agnostic=class_agnostic)
    ours = RleMaskHead(num_classes=5, num_convs=0, class_agnostic=class_agnostic)
    expected = predictions(theirs, rescale=rescale, dtype=dtype)
    untouched = predictions(ours, rescale=rescale, dtype=dtype)
    assert torch.equal(untouched.masks, expected.masks)
    ours.run_lengths = True
    found = predictions(ours, rescale=rescale, dtype=dtype)
    assert isinstance(found.masks, RleMasks)
    assert np.array_equal(found.masks.numpy(), expected.masks.numpy())
    assert torch.equal(found.bboxes, expected.bboxes)
    assert expected.masks.any()


@pytest.mark.filterwarnings('ignore:To copy construct')  # mmdet's own
def test_the_head_takes_what_augmentation_averaged():
    theirs, ours = FCNMaskHead(num_classes=5, num_convs=0), RleMaskHead(num_classes=5, num_convs=0)
    ours.run_lengths = True
    expected, found = (predictions(head, activated=True) for head in (theirs, ours))
    assert np.array_equal(found.masks.numpy(), expected.masks.numpy())


# What else reads masks.


def test_instances_can_be_chosen_and_joined():
    head = RleMaskHead(num_classes=5, num_convs=0)
    tensors = predictions(head)
    head.run_lengths = True
    found = predictions(head)
    keep = tensors.labels == 2
    for index in (keep, torch.tensor([3, 0]), slice(1, 4), 2, np.array([1, 2])):
        assert np.array_equal(found[index].masks.numpy(), tensors[index].masks.numpy())
    assert len(found[torch.zeros(len(found), dtype=torch.bool)].masks) == 0
    joined = InstanceData.cat([found[keep], found[~keep]])
    assert np.array_equal(joined.masks.numpy(), torch.cat([tensors.masks[keep], tensors.masks[~keep]]).numpy())


def test_mmdets_visualizer_draws_them():
    head = RleMaskHead(num_classes=5, num_convs=0)
    tensors = predictions(head, n=6)
    head.run_lengths = True
    found = predictions(head, n=6)
    image = np.full((80, 80, 3), 90, dtype=np.uint8)
    classes, palette = list('abcde'), [(i * 50, 20, 200) for i in range(5)]
    pictures = []
    for part in (tensors, found):
        np.random.seed(0)  # mmdet jitters its colours
        chosen = InstanceData(masks=part.masks, labels=part.labels)[part.scores > 0.5]
        pictures.append(DetLocalVisualizer()._draw_instances(image, chosen, classes, palette))
    assert np.array_equal(*pictures)
    assert not np.array_equal(pictures[0], image)
