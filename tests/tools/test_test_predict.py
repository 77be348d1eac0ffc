import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from PIL import Image, ImageDraw
from pycocotools import mask as rle
from pycocotools.coco import COCO
from untrained import random_weights

import densekit.ops
from densekit.predictor import Predictor
from densekit.report.coco_results import CocoResults, category_ids
from densekit.report.pictures import draw_instances, read_image
from densekit.report.predict_command import Run, readable
from densekit.report.video import VideoReader, VideoWriter

pytestmark = pytest.mark.usefixtures('quick_mmengine')

ROOT = Path(__file__).parents[2]
SHAPES = ['circle', 'square', 'triangle', 'star', 'cross']


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


def test_a_detectors_pictures_and_results(det, tool, tiny, tmp_path):
    images = sorted((tiny.data / 'coco/val').glob('*.jpg'))[:2]
    (tmp_path / 'other').mkdir()
    namesake = tmp_path / 'other' / images[0].name
    shutil.copyfile(images[1], namesake)
    given = [images[0], images[1], namesake]
    assert tool('predict', *det, *given, '--out', tmp_path / 'out', '--score-thr', '0.2') == 0

    results = json.loads((tmp_path / 'out/results.json').read_text())
    assert [image['file_name'] for image in results['images']] == [str(path) for path in given]
    names = [image['picture'] for image in results['images']]
    assert names == [f'{images[0].stem}.png', f'{images[1].stem}.png', f'{images[0].stem}_2.png']
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == sorted([*names, 'results.json'])
    for name, image in zip(names, given, strict=True):
        assert Image.open(tmp_path / 'out' / name).size[1] >= Image.open(image).size[1]
    assert [category['name'] for category in results['categories']] == SHAPES

    found = [detections(results, image_id) for image_id in (1, 2, 3)]
    assert found[1] == found[2] != found[0]
    scores = [detection['score'] for detection in found[0]]
    assert scores
    assert scores == sorted(scores, reverse=True)
    for detection in found[0]:
        x, y, width, height = detection['bbox']
        assert min(x, y) >= 0
        assert max(x + width, y + height) <= 64.01
        mask = rle.decode(detection['segmentation'])
        assert mask.shape == (64, 64)
        assert mask.sum() == detection['area']
        rows, columns = np.nonzero(mask)  # the mask lies in its box
        if len(rows):
            assert columns.min() >= x - 1
            assert columns.max() <= x + width + 1
            assert rows.min() >= y - 1
            assert rows.max() <= y + height + 1
    assert any(detection['area'] for detection in found[0])


def detections(results, image_id):
    """What a file says of an image, without the numbers that differ for the same image given twice."""
    return [
        {key: value for key, value in annotation.items() if key not in ('id', 'image_id')}
        for annotation in results['annotations']
        if annotation['image_id'] == image_id
    ]


def test_boxes_in_the_file_are_those_of_the_image_that_was_given(det, tool, picture, tmp_path):
    """The model sees 96 pixels; the file speaks of the image's own, and pycocotools reads it."""
    assert tool('predict', *det, picture, '--out', tmp_path / 'out') == 0
    found = Predictor(*det)(picture)
    coco = COCO(tmp_path / 'out/results.json')
    (image,) = coco.loadImgs(coco.getImgIds())
    assert (image['height'], image['width']) == (40, 56)
    annotations = coco.loadAnns(coco.getAnnIds())
    assert len(annotations) == len(found.scores) > 0
    corners = np.array([(x, y, x + w, y + h) for x, y, w, h in (a['bbox'] for a in annotations)])
    assert np.allclose(corners, found.boxes, atol=0.011)
    assert np.array_equal([a['category_id'] - 1 for a in annotations], found.labels)
    assert np.array_equal([coco.annToMask(a) for a in annotations], found.masks)
    again = coco.loadRes([{k: a[k] for k in ('image_id', 'category_id', 'bbox', 'score')} for a in annotations])
    assert len(again.getAnnIds()) == len(annotations)


def test_categories_are_counted_as_coco_does():
    from mmdet.datasets import CocoDataset

    ids = category_ids(CocoDataset.METAINFO['classes'])
    named = dict(zip(CocoDataset.METAINFO['classes'], ids, strict=True))
    # From instances_val2017.json.
    assert {name: named[name] for name in ('person', 'stop sign', 'cat', 'bowl', 'toothbrush')} == {
        'person': 1,
        'stop sign': 13,
        'cat': 17,
        'bowl': 51,
        'toothbrush': 90,
    }
    assert category_ids(SHAPES) == [1, 2, 3, 4, 5]


def test_a_segmentors_pictures_and_results(seg, tool, picture, tmp_path):
    assert tool('predict', *seg, picture, '--out', tmp_path / 'out') == 0
    results = json.loads((tmp_path / 'out/results.json').read_text())
    (image,) = results['images']
    assert (image['height'], image['width']) == (40, 56)
    labels = np.full((40, 56), -1)
    assert [category['name'] for category in results['categories']] == ['background', *SHAPES]
    for part in results['annotations']:
        mask = rle.decode(part['segmentation']).astype(bool)
        assert mask.sum() == part['area']
        assert (labels[mask] == -1).all()
        labels[mask] = part['category_id'] - 1
    expected = Predictor(*seg)(np.array(Image.open(picture)))
    assert np.array_equal(labels, expected)


@pytest.mark.parametrize('name', ['det', 'seg'])
def test_a_batch_finds_what_each_image_alone_does(name, request, tiny):
    """Also when images of other sizes are among them: padding to a common size would change results."""
    predictor = Predictor(*request.getfixturevalue(name))
    images = [read_image(path) for path in sorted((tiny.data / 'coco/val').glob('*.jpg'))]
    images.insert(1, images[0][:40])
    calls = []
    step = predictor.model.test_step
    predictor.model.test_step = lambda data: calls.append(len(data['inputs'])) or step(data)
    together = predictor.batch(images)
    assert sorted(calls) == [1, 3]
    for image, found in zip(images, together, strict=True):
        alone = predictor(image)
        if name == 'seg':
            assert (found == alone).mean() > 0.999
        else:
            assert np.allclose(found.scores, alone.scores, atol=1e-5)
            assert np.allclose(found.boxes, alone.boxes, atol=1e-3)
            assert np.array_equal(found.labels, alone.labels)
            assert (found.masks == alone.masks).mean() > 0.999


def test_folders_and_patterns(det, tool, tiny, picture, tmp_path, capsys):
    folder = tmp_path / 'given'
    (folder / 'below').mkdir(parents=True)
    (folder / 'empty').mkdir()
    for name in ('b.png', 'a.PNG', 'below/c.png'):
        shutil.copyfile(picture, folder / name)
    (folder / 'notes.txt').write_text('no picture')
    given = [folder, f'{folder}/**/*.png', folder / 'b.png']
    assert tool('predict', *det, *given, '--out', tmp_path / 'out', '--batch-size', '3') == 0
    results = json.loads((tmp_path / 'out/results.json').read_text())
    names = [str(folder / name) for name in ('a.PNG', 'b.png', 'below/c.png')]
    assert [image['file_name'] for image in results['images']] == names
    assert '3 images and frames' in capsys.readouterr().out

    assert tool('predict', *det, folder / 'empty', f'{folder}/*.gif', '--out', tmp_path / 'none') == 2
    shown = capsys.readouterr().err
    assert f'Folder {folder}/empty holds no image or video' in shown
    assert f'Pattern {folder}/*.gif fits no image or video' in shown
    assert not (tmp_path / 'none').exists()


def test_images_given_are_not_overwritten(det, tool, picture, capsys):
    before = picture.read_bytes()
    assert tool('predict', *det, picture, '--out', picture.parent) == 2
    assert f'--out would overwrite {picture}' in capsys.readouterr().err
    assert picture.read_bytes() == before


def test_the_batch_size_is_checked(det, tool, picture, tmp_path, capsys):
    assert tool('predict', *det, picture, '--out', tmp_path / 'out', '--batch-size', '0') == 2
    assert '--batch-size 0: give 1 or more' in capsys.readouterr().err


@pytest.fixture
def clip(tmp_path):
    """Seven frames of 65 by 51 pixels that get brighter, ten a second."""
    path = tmp_path / 'clip.mp4'
    with VideoWriter(path, 10) as writer:
        for level in range(7):
            writer.write(np.full((51, 65, 3), (20 + 30 * level, 20, 20), np.uint8))
    return path


def test_a_video_comes_back_frame_by_frame(clip):
    reader = VideoReader(clip)
    frames = list(reader)
    assert reader.announced == len(frames) == 7
    assert reader.rate == 10
    assert {frame.shape for frame in frames} == {(52, 66, 3)}  # even sides, nothing cut off
    red = [frame[..., 0].mean() for frame in frames]
    assert np.allclose(red, 20 + 30 * np.arange(7), atol=12)
    assert frames[-1][..., 0].mean() > 5 * frames[-1][..., 2].mean()  # red, not blue


def test_a_videos_pictures_and_results(det, tool, clip, picture, tmp_path):
    assert tool('predict', *det, clip, picture, '--out', tmp_path / 'out', '--batch-size', '3') == 0
    names = ['clip.json', 'clip.mp4', 'picture.png', 'results.json']
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == names
    results = json.loads((tmp_path / 'out/clip.json').read_text())
    assert [(image['frame'], image['seconds']) for image in results['images']] == [(i, i / 10) for i in range(7)]
    predictor = Predictor(*det)
    for image, frame in zip(results['images'], VideoReader(clip), strict=True):
        found = detections(results, image['id'])
        assert np.allclose([a['score'] for a in found], predictor(frame).scores, atol=1e-4)
    drawn = VideoReader(tmp_path / 'out/clip.mp4')
    assert drawn.rate == 10
    assert [frame.shape[0] >= 320 for frame in drawn] == [True] * 7
    assert len(json.loads((tmp_path / 'out/results.json').read_text())['images']) == 1


def test_a_video_that_cannot_be_read(det, tool, tmp_path, capfd):
    (tmp_path / 'bad.mp4').write_bytes(b'no video at all')
    given = [tmp_path / 'bad.mp4', tmp_path / 'gone.mp4']
    assert tool('predict', *det, *given, '--out', tmp_path / 'out') == 2
    shown = capfd.readouterr().err
    assert '2 of 2 images could not be read. Nothing was predicted.' in shown
    assert f'Video {tmp_path}/bad.mp4 cannot be read: not a format' in shown
    assert f'Video {tmp_path}/gone.mp4 cannot be read: there is no such file' in shown
    assert not (tmp_path / 'out').exists()


def test_a_video_that_is_cut_off_is_said_to_be(det, tool, clip, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        'densekit.report.video.VideoReader.__iter__', lambda self: iter([np.zeros((52, 66, 3), np.uint8)])
    )
    assert tool('predict', *det, clip, '--out', tmp_path / 'out') == 0
    assert f'Of {clip} 1 frames could be read; the file says that it has 7.' in capsys.readouterr().out


def test_what_was_predicted_before_an_interruption_is_kept(det, tool, tiny, tmp_path, monkeypatch):
    images = sorted((tiny.data / 'coco/val').glob('*.jpg'))
    read = read_image

    def interrupted(path):
        if str(path) == str(images[2]):
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr('densekit.report.predict_command.read_image', interrupted)
    assert tool('predict', *det, *images, '--out', tmp_path / 'out') == 130
    assert len(COCO(tmp_path / 'out/results.json').getImgIds()) == 2
    assert not list((tmp_path / 'out').glob('.*'))


def peak(predictor, paths, out, keep=None):
    """Bytes at most in use by Python and NumPy while images are predicted, beyond what was before."""
    tracemalloc.start()
    run = Run(predictor, out, 0.3, 2, {})
    with CocoResults(out / 'results.json', predictor.classes, {}) as results:
        for path, image, found, drawn in run.predict(readable(run, paths)):
            results.add(found, image.shape[:2], file_name=path)
            if keep is not None:
                keep.append(drawn)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert run.images == len(paths)
    return most


def test_memory_does_not_grow_with_the_images(seg, tmp_path):
    """A picture takes 0.3 MB, so 50 more of them would take 15."""
    path = tmp_path / 'large.jpg'
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((320, 320)).save(path)
    predictor = Predictor(*seg)
    few = peak(predictor, [str(path)] * 10, tmp_path / 'few')
    many = peak(predictor, [str(path)] * 60, tmp_path / 'many')
    assert many < few + 1e6
    # It would show if they were kept.
    assert peak(predictor, [str(path)] * 20, tmp_path / 'kept', keep=[]) > few + 3e6


def test_the_package_gives_the_predictor_when_asked():
    """And what it needs, which takes seconds to import, not before."""
    assert densekit.Predictor is Predictor
    assert 'Predictor' in dir(densekit)
    with pytest.raises(AttributeError, match='densekit has no Predicter; from here come Detections, Predictor'):
        densekit.Predicter  # noqa: B018
    code = "import sys, densekit; print('torch' in sys.modules, 'densekit.predictor' in sys.modules)"
    shown = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT).stdout
    assert shown.split() == ['False', 'False']


@pytest.mark.parametrize('image', [np.zeros((4, 5), np.uint8), np.zeros((4, 5, 4), np.uint8), np.zeros((4, 5, 3))])
def test_an_array_that_is_no_picture_is_refused(det, image):
    with pytest.raises(ValueError, match=r'RGB arrays, uint8 \(H, W, 3\)'):
        Predictor(*det)(image)


def test_names_that_have_no_room_are_counted():
    """Sixty objects in one place; of two names never more than a sliver lies over the other."""
    image = np.zeros((400, 400, 3), np.uint8)
    box = np.tile([150, 150, 250, 250], (60, 1))
    style = dict(classes=['one'], palette=[(250, 250, 250)])
    places = []
    with pytest.MonkeyPatch.context() as patch:
        rectangle = ImageDraw.ImageDraw.rectangle
        patch.setattr(
            ImageDraw.ImageDraw, 'rectangle', lambda self, xy, **kw: places.append(xy) or rectangle(self, xy, **kw)
        )
        draw_instances(image, boxes=box, labels=[0] * 60, scores=np.linspace(0, 1, 60), **style)
    assert 4 <= len(places) < 40
    cover = np.zeros((400, 400), int)
    for x1, y1, x2, y2 in places:
        cover[y1 : y2 + 1, x1 : x2 + 1] += 1
    assert (cover > 1).sum() < 0.1 * (cover > 0).sum()


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
