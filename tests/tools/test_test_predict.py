import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from pycocotools import mask as rle

from densekit.predictor import Predictor

pytestmark = pytest.mark.usefixtures('quick_mmengine')

SHAPES = ['circle', 'square', 'triangle', 'star', 'cross']


def random_weights(config, path):
    """A checkpoint of the config's model: after a seed, as good as any where only the plumbing is tested."""
    torch.manual_seed(0)
    cfg = Config.fromfile(config)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        model.init_weights()
    torch.save({'state_dict': model.state_dict()}, path)
    return str(path)


@pytest.fixture(scope='module')
def det(tiny, tmp_path_factory):
    return tiny.det, random_weights(tiny.det, tmp_path_factory.mktemp('det') / 'det.pth')


@pytest.fixture(scope='module')
def seg(tiny, tmp_path_factory):
    return tiny.seg, random_weights(tiny.seg, tmp_path_factory.mktemp('seg') / 'seg.pth')


@pytest.fixture
def picture(tmp_path):
    """A PNG that is not as large as the model's input, nor square."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    path = tmp_path / 'picture.png'
    Image.fromarray(cv2.GaussianBlur(pixels, (9, 9), 0)).save(path)
    return path


def test_a_detector_is_scored(det, tool, tmp_path, capsys):
    out = tmp_path / 'made/metrics.json'
    assert tool('test', *det, '--work-dir', tmp_path / 'run', '--out', out) == 0
    metrics = json.loads(out.read_text())
    assert {'coco/bbox_mAP', 'coco/bbox_mAP_50', 'coco/segm_mAP', 'coco/segm_mAP_50'} <= metrics.keys()
    assert all(isinstance(value, float) for value in metrics.values())
    screen = capsys.readouterr().out
    table = screen[screen.index(f'results of {det[1]}') :].splitlines()
    assert table[1].split()[:3] == ['%', 'AP', 'AP50']
    assert [line.split()[0] for line in table[3:5]] == ['box', 'mask']
    assert not list((tmp_path / 'run').glob('*.pth'))


def test_a_segmentor_is_scored_with_and_without_augmentation(seg, tool, tmp_path, capsys):
    metrics = []
    for options in ([], ['--tta']):
        assert tool('test', *seg, '--work-dir', tmp_path, '--out', tmp_path / 'metrics.json', *options) == 0
        metrics.append(json.loads((tmp_path / 'metrics.json').read_text()))
        screen = capsys.readouterr().out
        assert f'Loaded every weight of the model from {seg[1]}' in screen
        assert 'mIoU' in screen[screen.index('results of') :]
    assert {'mIoU', 'mAcc', 'aAcc'} <= metrics[0].keys() == metrics[1].keys()
    assert metrics[0] != metrics[1]


def test_augmentation_is_refused_for_a_detector_with_masks(det, tool, tmp_path, capsys):
    assert tool('test', *det, '--work-dir', tmp_path, '--tta') == 2
    assert 'error: --tta: this config has no tta_model and tta_pipeline' in capsys.readouterr().err


def test_a_detectors_pictures_and_results(det, tool, tiny, tmp_path):
    images = sorted((tiny.data / 'coco/val').glob('*.jpg'))[:2]
    (tmp_path / 'other').mkdir()
    namesake = tmp_path / 'other' / images[0].name
    shutil.copyfile(images[1], namesake)
    given = [images[0], images[1], namesake]
    assert tool('predict', *det, *given, '--out', tmp_path / 'out', '--score-thr', '0.2') == 0

    results = json.loads((tmp_path / 'out/results.json').read_text())
    assert [result['image'] for result in results] == [str(path) for path in given]
    names = [result['picture'] for result in results]
    assert names == [f'{images[0].stem}.png', f'{images[1].stem}.png', f'{images[0].stem}_2.png']
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == sorted([*names, 'results.json'])
    assert results[1]['detections'] == results[2]['detections'] != results[0]['detections']
    for name, image in zip(names, given, strict=True):
        assert Image.open(tmp_path / 'out' / name).size[1] >= Image.open(image).size[1]

    detections = results[0]['detections']
    scores = [detection['score'] for detection in detections]
    assert detections
    assert scores == sorted(scores, reverse=True)
    for detection in detections:
        assert detection['category'] in SHAPES
        x, y, width, height = detection['bbox']
        assert min(x, y) >= 0
        assert max(x + width, y + height) <= 64.01
        mask = rle.decode(detection['segmentation'])
        assert mask.shape == (64, 64)
        rows, columns = np.nonzero(mask)  # the mask lies in its box
        if len(rows):
            assert columns.min() >= x - 1
            assert columns.max() <= x + width + 1
            assert rows.min() >= y - 1
            assert rows.max() <= y + height + 1
    assert any(rle.area(detection['segmentation']) for detection in detections)


def test_a_segmentors_pictures_and_results(seg, tool, picture, tmp_path):
    assert tool('predict', *seg, picture, '--out', tmp_path / 'out') == 0
    (result,) = json.loads((tmp_path / 'out/results.json').read_text())
    assert result['size'] == [40, 56]
    labels = np.full((40, 56), -1)
    classes = ['background', *SHAPES]
    for part in result['label_map_rle']:
        mask = rle.decode(part['segmentation']).astype(bool)
        assert mask.sum() == part['pixels']
        assert (labels[mask] == -1).all()
        labels[mask] = classes.index(part['category'])
    expected = Predictor(*seg)(np.array(Image.open(picture)))
    assert np.array_equal(labels, expected)


def results_of_the_file(predictor, config, given):
    """What the model says of a file that its own test pipeline read."""
    with DefaultScope.overwrite_default_scope(Config.fromfile(config).default_scope):
        data = Compose(Config.fromfile(config).test_dataloader.dataset.pipeline)(given)
    with torch.no_grad():
        return predictor.model.test_step(dict(inputs=[data['inputs']], data_samples=[data['data_samples']]))[0]


def test_a_detectors_predictor_is_its_test_pipeline(det, picture):
    predictor = Predictor(*det)
    assert predictor.classes == SHAPES
    found = predictor(np.array(Image.open(picture)))
    expected = results_of_the_file(
        predictor, det[0], dict(img_path=str(picture), img_id=0, instances=[])
    ).pred_instances
    order = expected.scores.argsort(descending=True)
    assert len(found.scores) == len(expected) > 0
    assert np.array_equal(found.boxes, expected.bboxes[order])
    assert np.array_equal(found.scores, expected.scores[order])
    assert np.array_equal(found.labels, expected.labels[order])
    assert np.array_equal(found.masks, expected.masks[order])
    assert found.masks.shape == (len(found.scores), 40, 56)
    # The order of the channels matters: it would show.
    swapped = predictor(np.array(Image.open(picture))[..., ::-1])
    assert not np.array_equal(found.scores, swapped.scores)


def test_a_segmentors_predictor_is_its_test_pipeline(seg, picture, tmp_path):
    Image.fromarray(np.zeros((40, 56), np.uint8)).save(tmp_path / 'labels.png')
    predictor = Predictor(*seg)
    assert predictor.classes == ['background', *SHAPES]
    given = dict(
        img_path=str(picture), seg_map_path=str(tmp_path / 'labels.png'), reduce_zero_label=True, seg_fields=[]
    )
    expected = results_of_the_file(predictor, seg[0], given).pred_sem_seg.data[0].numpy()
    assert len(np.unique(expected)) > 1
    assert np.array_equal(predictor(np.array(Image.open(picture))), expected)


def test_two_predictors_stand_side_by_side(det, seg, picture):
    """They have different default scopes, which mmengine keeps as a global variable."""
    image = np.array(Image.open(picture))
    detector = Predictor(*det)
    before = detector(image)
    segmentor = Predictor(*seg)
    assert segmentor(image).shape == (40, 56)
    assert np.array_equal(detector(image).scores, before.scores)


def test_names_and_colours_come_from_the_checkpoint(det, tmp_path):
    content = torch.load(det[1], weights_only=True)
    path = tmp_path / 'named.pth'
    meta = dict(dataset_meta=dict(classes=tuple('abcde'), palette=[(1, 2, 3)]))
    torch.save({**content, 'meta': meta}, path)
    predictor = Predictor(det[0], str(path))
    assert predictor.classes == list('abcde')
    assert predictor.palette[0] == (1, 2, 3)
    assert len(predictor.palette) == 5


def test_the_device_is_checked(det):
    with pytest.raises(ValueError, match='device gpu cannot be used'):
        Predictor(*det, device='gpu')
    with pytest.raises(ValueError, match='device cuda:99 cannot be used; this machine has cpu'):
        Predictor(*det, device='cuda:99')
    assert next(Predictor(*det, device='cpu').model.parameters()).device.type == 'cpu'


def test_the_metrics_file_is_checked_before_the_work(det, tool, tmp_path, capsys):
    assert tool('test', *det, '--work-dir', tmp_path / 'run', '--out', tmp_path) == 2
    assert f'--out {tmp_path} is a folder' in capsys.readouterr().err
    assert not Path(tmp_path / 'run').exists()
