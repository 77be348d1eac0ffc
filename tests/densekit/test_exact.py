import pytest
import torch
from mmdet.models.dense_heads import RPNHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope

from densekit.models import ExactRoIExtractor, ExactRPNHead

STRIDES = [4, 8, 16, 32]


@pytest.fixture(autouse=True)
def _scope():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield
    torch.set_num_threads(threads)


def extractor(cls, strides=STRIDES, channels=3, size=7):
    layer = dict(type='RoIAlign', output_size=size, sampling_ratio=0)
    return cls(roi_layer=layer, out_channels=channels, featmap_strides=strides, finest_scale=14)


def pyramid(height=128, width=160, channels=3, strides=STRIDES, images=2):
    generator = torch.Generator().manual_seed(0)
    shapes = [(images, channels, height // stride, width // stride) for stride in strides]
    return tuple(torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)


def random_rois(count, largest=120.0):
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(count, 2, generator=generator) * 60
    # Sizes from 2 pixels up, evenly in their logarithm, so that every level has some.
    size = 2 * (largest / 2) ** torch.rand(count, 2, generator=generator)
    image = torch.randint(0, 2, (count, 1), generator=generator).float()
    return torch.cat([image, corner, corner + size], dim=1)


def pooled_and_gradients(cls, rois, feats=None, **kwargs):
    feats = feats or pyramid()
    pooled = extractor(cls, STRIDES[: len(feats)])(feats, rois, **kwargs)
    weights = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(2))
    (pooled * weights).sum().backward()
    return [pooled, *(feat.grad for feat in feats)]


def assert_equal_to_mmdets(ours, theirs):
    """The pooled features to the bit, the gradients but for the order of sums."""
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1:], theirs[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('factor', [None, 1.5])
@pytest.mark.parametrize(
    ('count', 'largest'), [(60, 300.0), (5, 12.0), (0, 1.0)], ids=['all levels', 'finest level', 'no boxes']
)
def test_in_float32_pooling_is_mmdets(count, largest, factor):
    rois = random_rois(count, largest)
    levels = set(extractor(ExactRoIExtractor).map_roi_levels(rois, 4).tolist())
    assert levels == {60: {0, 1, 2, 3}, 5: {0}, 0: set()}[count]
    ours = pooled_and_gradients(ExactRoIExtractor, rois, roi_scale_factor=factor)
    theirs = pooled_and_gradients(SingleRoIExtractor, rois, roi_scale_factor=factor)
    assert ours[0].shape == (count, 3, 7, 7)
    assert_equal_to_mmdets(ours, theirs)


def test_a_box_of_nan_is_named():
    rois = random_rois(5)
    rois[2, 1] = float('nan')
    with pytest.raises(ValueError, match='Look for a loss that is NaN'):
        extractor(ExactRoIExtractor)(pyramid(), rois)


def test_one_level_is_mmdets_too():
    rois = random_rois(12)
    ours = pooled_and_gradients(ExactRoIExtractor, rois, pyramid(strides=[4]))
    theirs = pooled_and_gradients(SingleRoIExtractor, rois, pyramid(strides=[4]))
    assert_equal_to_mmdets(ours, theirs)


@pytest.mark.parametrize('count', [0, 5])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_every_level_gets_a_gradient(count, dtype):
    """DDP waits for the gradient of every parameter, and above each level there is a convolution of the neck."""
    feats = tuple(feat.detach().to(dtype).requires_grad_() for feat in pyramid())
    pooled = extractor(ExactRoIExtractor)(feats, random_rois(count, 12.0))  # small boxes: finest level only
    assert pooled.dtype == dtype
    pooled.sum().backward()
    assert [bool(feat.grad.any()) for feat in feats] == [count > 0, False, False, False]


def edge_seen(cls, dtype):
    """Where the extractor sees an edge that lies 4 pixels right of a box's left side, near x = 1333; in pixels."""
    feat = torch.zeros(1, 1, 8, 340, dtype=dtype)
    feat[..., 333:] = 1
    box = torch.tensor([[0.0, 1330.5, 2.0, 1338.5, 26.0]])
    share = extractor(cls, [4], channels=1, size=8)((feat,), box)[0, 0].float().mean()
    return 8 * (1 - float(share))


def test_boxes_keep_their_place_in_bf16():
    exact = edge_seen(ExactRoIExtractor, torch.float32)
    assert edge_seen(SingleRoIExtractor, torch.float32) == exact
    assert edge_seen(ExactRoIExtractor, torch.bfloat16) == pytest.approx(exact, abs=0.03)


def test_mmdet_still_moves_boxes_in_bf16():
    """When this fails upstream has mended it, and ExactRoIExtractor can go."""
    shift = edge_seen(SingleRoIExtractor, torch.bfloat16) - edge_seen(SingleRoIExtractor, torch.float32)
    assert abs(shift) > 1


def rpn(cls):
    torch.manual_seed(0)
    return cls(
        in_channels=4,
        feat_channels=4,
        anchor_generator=dict(type='AnchorGenerator', scales=[8], ratios=[0.5, 1.0], strides=[4]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[1.0] * 4),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True),
        loss_bbox=dict(type='L1Loss'),
        test_cfg=ConfigDict(nms_pre=2000, max_per_img=2000, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0),
    )


def test_in_float32_scores_and_offsets_are_mmdets():
    outputs = []
    for cls in (ExactRPNHead, RPNHead):
        head = rpn(cls)
        feats = pyramid(64, 96, channels=4, strides=[4])
        scores, offsets = head(feats)
        (scores[0].square().sum() + offsets[0].square().sum()).backward()
        outputs.append([scores[0], offsets[0], feats[0].grad, *(value.grad for value in head.parameters())])
    assert len(outputs[0]) == 9
    assert all(torch.equal(own, reference) for own, reference in zip(*outputs, strict=True))


def proposals(cls, *, bf16):
    """Boxes on a picture 1333 pixels wide, from a head that leaves the anchors where they are."""
    head = rpn(cls)
    torch.nn.init.zeros_(head.rpn_reg.weight)
    torch.nn.init.zeros_(head.rpn_reg.bias)
    feats = pyramid(64, 1344, channels=4, strides=[4], images=1)
    metas = [dict(img_shape=(64, 1333), scale_factor=(1.0, 1.0))]
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=bf16):
        scores, offsets = head(feats)
        boxes = head.predict_by_feat(scores, offsets, batch_img_metas=metas, rescale=False)[0].bboxes
    assert len(boxes) > 100
    return scores[0].dtype, boxes


def farthest(boxes):
    """How far a box is from the nearest anchor, at most; in pixels."""
    anchors = rpn(RPNHead).prior_generator.grid_priors([(16, 336)], device='cpu')[0]
    anchors[:, 0::2] = anchors[:, 0::2].clamp(0, 1333)
    anchors[:, 1::2] = anchors[:, 1::2].clamp(0, 64)
    return float(torch.cdist(boxes.float(), anchors, p=float('inf')).min(dim=1).values.max())


def test_proposals_keep_float32_in_bf16():
    dtype, boxes = proposals(ExactRPNHead, bf16=True)
    assert dtype == torch.float32
    assert boxes.dtype == torch.float32
    assert farthest(boxes) < 1e-3
    assert farthest(proposals(RPNHead, bf16=False)[1]) < 1e-3


def test_mmdet_still_moves_proposals_in_bf16():
    """When this fails upstream has mended it, and ExactRPNHead can go."""
    dtype, boxes = proposals(RPNHead, bf16=True)
    assert dtype == torch.bfloat16
    assert farthest(boxes) > 1
