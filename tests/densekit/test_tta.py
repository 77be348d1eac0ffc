"""Detections over several views of an image are those of the plain test wherever the two can be compared."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope

import densekit.ops

# isort: split
from mmdet.models.test_time_augs import DetTTAModel
from mmdet.structures import DetDataSample

import backbones  # noqa: F401
import densekit.models  # noqa: F401
from densekit.engine.config import load_config
from densekit.engine.launch import _use_tta
from densekit.models import mask_head, tta
from densekit.models.tta import MaskTTAModel

pytestmark = pytest.mark.usefixtures('quick_mmengine')

ROOT = Path(__file__).parents[2]
BASES = ROOT / 'configs/_base_/models'
SIZE = 64


def small(name):
    """The model of a base, narrow, for three classes; every proposal becomes a detection."""
    cfg = Config.fromfile(BASES / f'{name}.py').model
    cfg.backbone.update(arch=dict(depths=(1, 1, 1, 1), channels=(16, 24, 32, 48)), drop_path_rate=0.0, init_cfg=None)
    cfg.neck.update(in_channels=[16, 24, 32, 48], out_channels=16)
    cfg.rpn_head.update(in_channels=16, feat_channels=16)
    narrow = dict(in_channels=16, conv_out_channels=16, num_classes=3)
    head = cfg.roi_head
    for box_head in head.bbox_head if isinstance(head.bbox_head, list) else [head.bbox_head]:
        box_head.update(in_channels=16, fc_out_channels=32, num_classes=3)
        if 'conv_out_channels' in box_head:
            box_head.update(conv_out_channels=16)
    head.mask_head.update(**narrow)
    head.bbox_roi_extractor.update(out_channels=16, finest_scale=14)
    head.mask_roi_extractor.update(out_channels=16, finest_scale=14)
    cfg.test_cfg.rpn.update(max_per_img=40)
    cfg.test_cfg.rcnn.update(score_thr=0.3, max_per_img=30)
    return cfg


@pytest.fixture(scope='module', params=['mask_rcnn', 'cascade_mask_rcnn'])
def detector(request):
    torch.manual_seed(1)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(small(request.param)).eval()
    for name, parameter in model.named_parameters():  # masks and boxes that depend on what is seen
        if 'conv_logits' in name or 'fc_reg' in name or 'fc_cls' in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope='module')
def image():
    pixels = np.random.default_rng(3).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
    return cv2.GaussianBlur(pixels, (0, 0), 4) * 3


def view(image, scale=1.0, flip=None, **meta):
    """An image as TestTimeAug leaves it; flip is None or a direction."""
    height, width = image.shape[:2]
    seen = cv2.resize(image, (round(width * scale), round(height * scale)))
    if flip is not None:
        seen = np.flip(seen, {'horizontal': 1, 'vertical': 0, 'diagonal': (0, 1)}[flip])
    sample = DetDataSample(
        metainfo={
            'img_id': 1,
            'ori_shape': (height, width),
            'img_shape': seen.shape[:2],
            'scale_factor': (seen.shape[1] / width, seen.shape[0] / height),
            'flip': flip is not None,
            'flip_direction': flip,
            **meta,
        }
    )
    return torch.from_numpy(seen.transpose(2, 0, 1).copy()), sample


@torch.no_grad()
def plain(detector, *images):
    inputs, samples = zip(*images, strict=True)
    return [sample.pred_instances for sample in detector.test_step({'inputs': list(inputs), 'data_samples': samples})]


@torch.no_grad()
def augmented(detector, *views, **tta_cfg):
    """Views are lists over images, as the collate function makes them."""
    data = {
        'inputs': [[inputs for inputs, _ in images] for images in views],
        'data_samples': [[sample for _, sample in images] for images in views],
    }
    return [sample.pred_instances for sample in MaskTTAModel(detector, tta_cfg).test_step(data)]


def assert_equal(found, expected):
    assert len(found) == len(expected) > 4
    for key in ('bboxes', 'scores', 'labels', 'masks'):
        assert torch.equal(found[key], expected[key]), key


@pytest.mark.parametrize('scale', [0.5, 1.0, 2.0])
def test_one_view_is_the_plain_test_to_the_bit(detector, image, scale):
    """These scales are powers of two, which no box feels."""
    (found,) = augmented(detector, [view(image, scale)])
    (expected,) = plain(detector, view(image, scale))
    assert_equal(found, expected)
    share = expected.masks.float().mean()
    assert 0.01 < share < 0.9


def test_one_view_at_any_scale_is_the_plain_test_but_for_rounding(detector, image):
    (found,) = augmented(detector, [view(image, 1.3)])
    (expected,) = plain(detector, view(image, 1.3))
    assert torch.equal(found.bboxes, expected.bboxes)
    assert torch.equal(found.scores, expected.scores)
    assert (found.masks != expected.masks).float().mean() < 1e-4


def test_the_same_view_twice_is_the_plain_test(detector, image):
    (found,) = augmented(detector, [view(image)], [view(image)])
    (expected,) = plain(detector, view(image))
    assert_equal(found, expected)


def test_without_suppression_the_same_view_twice_is_not(detector, image):
    (found,) = augmented(detector, [view(image)], [view(image)], nms=dict(type='nms', iou_threshold=1.0))
    (expected,) = plain(detector, view(image))
    assert len(found) > len(expected) or not torch.equal(found.bboxes, expected.bboxes)


def test_boxes_are_those_of_mmdets_own_merging(detector, image):
    views = [view(image)], [view(image, 1.3)], [view(image, flip='horizontal')], [view(image, 2.0, 'vertical')]
    (found,) = augmented(detector, *views)
    samples = []
    for ((inputs, sample),) in views:
        flip = {key: sample.get(key) for key in ('flip', 'flip_direction')}
        sample.set_metainfo({'flip': False, 'flip_direction': None})  # mmdet 3.3.0 cannot flip masks of a cascade
        with torch.no_grad():
            samples += detector.test_step({'inputs': [inputs], 'data_samples': [sample]})
        del samples[-1].pred_instances.masks
        samples[-1].set_metainfo(flip)
    cfg = ConfigDict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=30)
    (merged,) = DetTTAModel(module=detector, tta_cfg=cfg).merge_preds([samples])
    assert len(found) == len(merged.pred_instances) > 4
    for key in ('bboxes', 'scores', 'labels'):
        assert torch.equal(found[key], merged.pred_instances[key])


def test_one_view_is_the_plain_test_under_bf16(detector, image):
    with torch.autocast('cpu', torch.bfloat16):
        (found,) = augmented(detector, [view(image)])
        (expected,) = plain(detector, view(image))
    assert_equal(found, expected)


def test_a_batch_is_its_images(detector, image):
    other = np.ascontiguousarray(image[::-1, :, ::-1])
    blank = np.zeros_like(image)
    both = [other, image, blank]
    found = augmented(detector, [view(one) for one in both], [view(one, flip='horizontal') for one in both])
    for one, batched in zip(both, found, strict=True):
        (alone,) = augmented(detector, [view(one)], [view(one, flip='horizontal')])
        assert len(batched) == len(alone)
        assert torch.allclose(batched.bboxes, alone.bboxes, atol=1e-3)
        assert (batched.masks != alone.masks).float().mean() < 1e-3


@pytest.mark.parametrize(('direction', 'dims'), [('horizontal', (-1,)), ('vertical', (-2,)), ('diagonal', (-2, -1))])
def test_a_flipped_view_is_the_plain_test_of_the_flipped_image(detector, image, direction, dims):
    (found,) = augmented(detector, [view(image, flip=direction)])
    flipped = np.ascontiguousarray(np.flip(image, [dim + 2 for dim in dims]))
    (expected,) = plain(detector, view(flipped))
    assert len(found) == len(expected) > 4
    left, top, right, bottom = expected.bboxes.unbind(1)
    if -1 in dims:
        left, right = SIZE - right, SIZE - left
    if -2 in dims:
        top, bottom = SIZE - bottom, SIZE - top
    assert torch.allclose(found.bboxes, torch.stack([left, top, right, bottom], 1), atol=1e-4)
    assert torch.equal(found.scores, expected.scores)
    assert (found.masks != expected.masks.flip(dims)).float().mean() < 1e-3


def asymmetry(found):
    """How far the detections are from those of the mirror image: share of pixels; 1 where a box has no partner."""
    mirrored = found.bboxes[:, [2, 1, 0, 3]].clone()
    mirrored[:, [0, 2]] = SIZE - mirrored[:, [0, 2]]
    distance = (found.bboxes[:, None] - mirrored[None]).abs().amax(-1)
    distance += 1000.0 * (found.labels[:, None] != found.labels[None])
    nearest, partner = distance.min(1)
    if nearest.max() > 1e-3:
        return 1.0
    return (found.masks != found.masks[partner].flip(-1)).float().mean().item()


ALL = dict(nms=dict(type='nms', iou_threshold=1.0), max_per_img=-1)  # a box and its mirror image may overlap


def test_a_symmetric_image_has_symmetric_detections(detector, image, monkeypatch):
    half = image[:, : SIZE // 2]
    symmetric = np.concatenate([half, half[:, ::-1]], axis=1)
    views = [view(symmetric)], [view(symmetric, flip='horizontal')]
    (found,) = augmented(detector, *views, **ALL)
    assert len(found) > 4
    assert asymmetry(found) < 1e-4
    assert asymmetry(plain(detector, view(symmetric))[0]) > 0.01
    monkeypatch.setattr(tta, '_upright', lambda masks, meta: masks)
    (wrong,) = augmented(detector, *views, **ALL)
    assert asymmetry(wrong) > 0.003


def test_masks_are_the_mean_of_what_the_views_have_at_the_merged_boxes(detector, image):
    """Two scales, against roi_head.predict_mask of each alone, at the boxes of the merged detections."""
    views = [view(image)], [view(image, 2.0)]
    grey = detector.roi_head.test_cfg.mask_thr_binary
    detector.roi_head.test_cfg.mask_thr_binary = -1  # shades of grey, linear in the probabilities
    try:
        (found,) = augmented(detector, *views)
        alone = []
        for (inputs, sample), scale in zip((views[0][0], views[1][0]), (1.0, 2.0), strict=True):
            data = detector.data_preprocessor({'inputs': [inputs], 'data_samples': [sample]})
            copy = found.clone()
            copy.bboxes = found.bboxes * scale
            with torch.no_grad():
                features = detector.extract_feat(data['inputs'])
                (masked,) = detector.roi_head.predict_mask(features, [sample.metainfo], [copy], rescale=True)
            alone.append(masked.masks.float())
    finally:
        detector.roi_head.test_cfg.mask_thr_binary = grey
    assert len(found) > 4
    assert (found.masks.float() - (alone[0] + alone[1]) / 2).abs().max() <= 1  # grey is cut off to whole numbers
    assert (alone[0] - alone[1]).abs().max() > 5


def test_nothing_found(detector, image):
    head = detector.roi_head
    threshold = head.test_cfg.score_thr
    head.test_cfg.score_thr = 1.1
    try:
        (found,) = augmented(detector, [view(image)], [view(image, flip='horizontal')])
    finally:
        head.test_cfg.score_thr = threshold
    assert len(found) == 0
    assert found.masks.shape == (0, SIZE, SIZE)


def test_merging_can_be_soft(detector, image):
    views = [view(image)], [view(image, 2.0)]
    (hard,) = augmented(detector, *views)
    (soft,) = augmented(detector, *views, nms=dict(type='soft_nms', iou_threshold=0.5, min_score=1e-3), max_per_img=200)
    assert len(soft) > len(hard)
    assert torch.equal(soft.scores[0], hard.scores[0])
    assert (soft.scores.diff() <= 0).all()
    kept = (soft.bboxes[:, None] - hard.bboxes[None]).abs().amax(-1).min(0).values
    assert kept.max() < 1e-3  # what hard suppression keeps, soft does not lose


def test_merging_is_by_default_that_of_the_detector(detector):
    model = MaskTTAModel(detector, dict(max_per_img=7))
    assert model.tta_cfg == ConfigDict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=7)
    with pytest.raises(ValueError, match="tta_cfg of MaskTTAModel has 'score_thr'; there are nms and max_per_img"):
        MaskTTAModel(detector, dict(score_thr=0.1))


def test_a_view_that_does_not_say_how_it_was_made_is_refused(detector, image):
    inputs, sample = view(image)
    del sample.flip
    with pytest.raises(ValueError, match='cannot undo a view without flip: '):
        augmented(detector, [(inputs, sample)])


def test_other_detectors_are_refused():
    with DefaultScope.overwrite_default_scope('mmdet'):
        cfg = small('mask_rcnn')
        del cfg.roi_head['mask_head'], cfg.roi_head['mask_roi_extractor']
        with pytest.raises(ValueError, match='cannot test a MaskRCNN with WholeRoIHead'):
            MaskTTAModel(cfg)


@pytest.mark.parametrize(
    'name', ['mask_rcnn_convnext_t_coco', 'cascade_convnext_t_coco', 'mask_rcnn_convnextv2_b_coco']
)
def test_the_recipes_have_it(name):
    cfg = load_config(str(ROOT / f'configs/detection/{name}.py'))
    _use_tta(cfg)
    with DefaultScope.overwrite_default_scope('mmdet'):
        assert MODELS.get(cfg.model.type) is MaskTTAModel
    scales, flips = cfg.test_dataloader.dataset.pipeline[1].transforms[:2]
    assert scales[0].scale == cfg.test_pipeline[1].scale
    assert [flip.prob for flip in flips] == [0.0, 1.0]


@pytest.mark.parametrize('name', ['dino_convnext_t_12e_coco', 'mask2former_convnext_t_coco'])
def test_recipes_without_it_say_who_has(name):
    cfg = load_config(str(ROOT / f'configs/detection/{name}.py'))
    with pytest.raises(ValueError, match=r'no tta_model and tta_pipeline.* recipes of Mask R-CNN, Cascade Mask R-CNN'):
        _use_tta(cfg)


def test_a_detector_is_scored_with_augmentation(tiny, tool, tmp_path, monkeypatch):
    """And alike with run lengths, which a hook turns on, and with masks that are drawn."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(Config.fromfile(tiny.det).model)
        model.init_weights()
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'det.pth')

    def test(name, *options):
        given = tiny.det, tmp_path / 'det.pth', '--work-dir', tmp_path / 'run', '--results', tmp_path / name
        assert tool('test', *given, *options) == 0
        return json.loads((tmp_path / name / 'results.segm.json').read_text())

    plain, encoded = test('plain'), test('encoded', '--tta')
    monkeypatch.setattr(mask_head, '_all_coco', lambda evaluator: False)
    drawn = test('drawn', '--tta')
    assert encoded == drawn != plain
    assert {found['image_id'] for found in encoded} == {found['image_id'] for found in plain}


def test_soft_suppression_by_one_option(tiny):
    """As in the README. The box heads are those of one seed, so all that differs is the suppression."""
    results = []
    for options in ([], ['model.test_cfg.rcnn.nms.type=soft_nms']):
        cfg = load_config(tiny.det, options)
        torch.manual_seed(0)
        with DefaultScope.overwrite_default_scope('mmdet'):
            model = MODELS.build(cfg.model).eval()
        pixels = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
        model.roi_head.test_cfg.update(max_per_img=-1)
        results.append(plain(model, view(pixels))[0])
    hard, soft = results
    assert len(soft) > len(hard) > 0
    assert soft.scores.max() == hard.scores.max()
