"""The generated shapes data set: reproducible, the same in both formats, safe on first use."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from densekit.data.shapes import (
    CLASSES,
    MANIFEST,
    SEG_CLASSES,
    generate_shapes,
    mask_to_polygons,
    mask_to_rle,
)

SMALL = {'num_train': 60, 'num_val': 20, 'size': 96, 'seed': 3}


@pytest.fixture(scope='module')
def root(tmp_path_factory) -> Path:
    return generate_shapes(tmp_path_factory.mktemp('data') / 'shapes', **SMALL)


@pytest.fixture(scope='module')
def coco(root) -> COCO:
    return COCO(root / 'coco/annotations/instances_train.json')


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def label_map(root: Path, image_id: int) -> np.ndarray:
    file = root / f'ade/annotations/training/ADE_train_{image_id:08d}.png'
    return cv2.imread(str(file), cv2.IMREAD_UNCHANGED)


# Reproducible


def test_same_seed_gives_the_same_bytes(root, tmp_path):
    again = generate_shapes(tmp_path / 'again', **SMALL)
    assert contents(again) == contents(root)


def test_other_seed_gives_other_pictures(root, tmp_path):
    other = generate_shapes(tmp_path / 'other', num_train=5, num_val=1, seed=SMALL['seed'] + 1)
    first = 'coco/train/000000000001.jpg'
    assert (other / first).read_bytes() != (root / first).read_bytes()


def test_an_image_does_not_depend_on_how_many_there_are(root, tmp_path):
    fewer = generate_shapes(tmp_path / 'fewer', **(SMALL | {'num_train': 25, 'num_val': 2}))
    pictures = {name: data for name, data in contents(fewer).items() if not name.endswith('.json')}
    assert len(pictures) == 3 * 27
    assert pictures.items() <= contents(root).items()
    few, many = (json.loads((f / 'coco/annotations/instances_train.json').read_text()) for f in (fewer, root))
    assert few['annotations'] == [a for a in many['annotations'] if a['image_id'] <= 25]


def test_training_and_validation_differ(root):
    assert (root / 'coco/train/000000000001.jpg').read_bytes() != (root / 'coco/val/000000000001.jpg').read_bytes()


# COCO's side


def test_boxes_areas_and_segmentations_agree(coco):
    for annotation in coco.dataset['annotations']:
        mask = coco.annToMask(annotation)
        ys, xs = np.nonzero(mask)
        assert annotation['area'] == mask.sum() > 0
        assert annotation['bbox'] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]


def test_annotations_cover_every_case(coco):
    annotations = coco.dataset['annotations']
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    assert {a['category_id'] for a in annotations} == set(coco.getCatIds())
    crowds = [a for a in annotations if a['iscrowd']]
    assert crowds and all(isinstance(a['segmentation']['counts'], list) for a in crowds)
    assert all(isinstance(a['segmentation'], list) for a in annotations if not a['iscrowd'])
    empty = [i for i in coco.getImgIds() if not coco.getAnnIds(imgIds=[i])]
    assert empty == [25, 50]
    assert len({a['id'] for a in annotations}) == len(annotations)


def test_some_objects_touch_and_none_share_a_pixel(coco):
    touching = 0
    for image_id in coco.getImgIds():
        masks = [coco.annToMask(a) for a in coco.loadAnns(coco.getAnnIds(imgIds=[image_id]))]
        assert np.sum(masks, axis=0).max(initial=0) <= 1
        grown = [cv2.dilate(mask, np.ones((3, 3), np.uint8)) for mask in masks]
        touching += int(np.sum(grown, axis=0).max(initial=0) > 1)
    assert touching > 10


@pytest.mark.parametrize('density', [0.1, 0.5, 0.9])
def test_tracing_random_masks(density):
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = rng.random((9, 12)) < density
        assert np.array_equal(mask_utils.decode(mask_utils.frPyObjects(mask_to_rle(mask), 9, 12)), mask)
        # Holes filled, as the outline alone is traced.
        contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        filled = cv2.drawContours(np.zeros(mask.shape, np.uint8), contours, -1, 1, cv2.FILLED)
        polygons = mask_to_polygons(mask)
        assert np.array_equal(mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(polygons, 9, 12))), filled)


# ADE20K's side


def test_label_maps_match_the_masks(root, coco):
    for image_id in coco.getImgIds():
        labels = label_map(root, image_id)
        assert labels.shape == (96, 96) and labels.dtype == np.uint8
        expected = np.ones_like(labels)
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=[image_id])):
            expected[coco.annToMask(annotation) == 1] = annotation['category_id'] + 1
        kept = labels > 0
        assert np.array_equal(labels[kept], expected[kept])
        # What is ignored is a thin border, and a bar in every tenth image.
        assert kept.mean() > (0.7 if image_id % 10 == 4 else 0.85)


def test_labels_in_range_and_ignored_ones_occur(root):
    values = {image_id: set(np.unique(label_map(root, image_id))) for image_id in range(1, 61)}
    assert set.union(*values.values()) == set(range(len(SEG_CLASSES) + 1))
    assert values[25] == {1}


def test_both_formats_show_the_same_pictures(root):
    for coco_split, ade_split in (('train', 'training'), ('val', 'validation')):
        pictures = [path.read_bytes() for path in sorted((root / 'coco' / coco_split).iterdir())]
        assert pictures == [path.read_bytes() for path in sorted((root / 'ade/images' / ade_split).iterdir())]
        names = [path.stem for path in sorted((root / 'ade/images' / ade_split).iterdir())]
        assert names == [path.stem for path in sorted((root / 'ade/annotations' / ade_split).iterdir())]


def test_copies_where_links_are_impossible(root, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError('no links here')

    monkeypatch.setattr(os, 'link', refuse)
    copied = generate_shapes(tmp_path / 'copied', **SMALL)
    assert contents(copied) == contents(root)


# On first use


def test_second_call_leaves_the_data_alone(root):
    file = root / 'coco/annotations/instances_val.json'
    before = file.stat().st_mtime_ns
    assert generate_shapes(root, **SMALL) == root
    assert file.stat().st_mtime_ns == before


def test_three_processes_at_once(root, tmp_path):
    code = f"""
import sys
sys.modules.update(mmdet=None, mmseg=None)  # generating needs neither
from multiprocessing import get_context
from densekit.data.shapes import generate_shapes
fork = get_context('fork')
start = fork.Barrier(3)
def generate():
    start.wait()
    generate_shapes({str(tmp_path / 'shapes')!r}, **{SMALL})
processes = [fork.Process(target=generate) for _ in range(3)]
for process in processes: process.start()
for process in processes: process.join()
assert [process.exitcode for process in processes] == [0, 0, 0]
"""
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ['shapes']
    assert contents(tmp_path / 'shapes') == contents(root)


def test_loser_of_the_race_takes_the_winners(root, tmp_path, monkeypatch):
    rename = Path.rename

    def late(self, target):
        monkeypatch.setattr(Path, 'rename', rename)
        generate_shapes(target, **SMALL)
        return rename(self, target)

    monkeypatch.setattr(Path, 'rename', late)
    assert contents(generate_shapes(tmp_path / 'shapes', **SMALL)) == contents(root)
    assert [path.name for path in tmp_path.iterdir()] == ['shapes']


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args):
        raise OSError('no space left on device')

    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(OSError, match='no space'):
        generate_shapes(tmp_path / 'shapes', **SMALL)
    assert not list(tmp_path.iterdir())


def test_other_parameters_are_refused(root):
    with pytest.raises(ValueError, match=r"(?s)shapes.*'seed': 3.*'seed': 4.*Delete this folder.*another data_root"):
        generate_shapes(root, **(SMALL | {'seed': 4}))


@pytest.mark.parametrize('text', [None, '{'])
def test_foreign_folder_is_refused(tmp_path, text):
    (tmp_path / 'precious.txt').touch()
    if text:
        (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=r'no readable shapes\.json.*Delete this folder'):
        generate_shapes(tmp_path, **SMALL)
    assert (tmp_path / 'precious.txt').exists()


def test_empty_folder_is_used(tmp_path):
    assert (generate_shapes(tmp_path, num_train=1, num_val=1) / MANIFEST).exists()


@pytest.mark.parametrize('wrong', [{'num_train': 0}, {'num_val': 0}, {'size': 31}, {'seed': -1}])
def test_parameters_out_of_range(tmp_path, wrong):
    with pytest.raises(ValueError, match=f'{next(iter(wrong))}={next(iter(wrong.values()))}.*allowed'):
        generate_shapes(tmp_path / 'shapes', **wrong)


# As dataset classes


def det_cfg(root: Path, split: str = 'train', **changes) -> dict:
    cfg = {
        'type': 'ShapesDetDataset',
        'data_root': str(root),
        'ann_file': f'coco/annotations/instances_{split}.json',
        'data_prefix': {'img': f'coco/{split}/'},
        'shapes': SMALL,
    }
    return cfg | changes


def seg_cfg(root: Path, **changes) -> dict:
    cfg = {
        'type': 'ShapesSegDataset',
        'data_root': str(root),
        'data_prefix': {'img_path': 'ade/images/training', 'seg_map_path': 'ade/annotations/training'},
        'shapes': SMALL,
    }
    return cfg | changes


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_both_registries_build_both(root, scope):
    registry = import_module(f'{scope}.registry').DATASETS
    detection, segmentation = registry.build(det_cfg(root)), registry.build(seg_cfg(root))
    assert len(detection) == len(segmentation) == 60
    assert detection.metainfo['classes'] == CLASSES
    assert segmentation.metainfo['classes'] == SEG_CLASSES
    assert len(detection.metainfo['palette']) == len(CLASSES)
    assert len(segmentation.metainfo['palette']) == len(SEG_CLASSES)


def test_generated_on_first_use_and_not_before(tmp_path):
    from mmdet.registry import DATASETS

    small = {'num_train': 3, 'num_val': 2}
    dataset = DATASETS.build(det_cfg(tmp_path / 'shapes', shapes=small, lazy_init=True))
    assert not list(tmp_path.iterdir())
    dataset.full_init()
    assert len(dataset) == 3
    with pytest.raises(ValueError, match='is not the shapes data set asked for'):
        DATASETS.build(seg_cfg(tmp_path / 'shapes', shapes={}))


def test_detection_samples(root):
    import mmdet.datasets.transforms  # noqa: F401  registers them
    from mmdet.registry import DATASETS
    from mmengine.registry import init_default_scope

    init_default_scope('mmdet')
    pipeline = [
        {'type': 'LoadImageFromFile'},
        {'type': 'LoadAnnotations', 'with_bbox': True, 'with_mask': True},
        {'type': 'PackDetInputs'},
    ]
    dataset = DATASETS.build(det_cfg(root, pipeline=pipeline, filter_cfg={'filter_empty_gt': True, 'min_size': 4}))
    assert len(dataset) == 58
    sample = dataset[10]['data_samples']
    assert sample.img_id == 11 and len(sample.ignored_instances) == 1
    boxes = sample.gt_instances.bboxes.tensor
    assert len(boxes) > 0 and sample.gt_instances.masks.get_bboxes('hbox').tensor.equal(boxes)


def test_segmentation_samples(root):
    from mmseg.registry import DATASETS

    pipeline = [
        {'type': 'mmseg.LoadImageFromFile'},
        {'type': 'mmseg.LoadAnnotations'},
        {'type': 'mmseg.PackSegInputs'},
    ]
    dataset = DATASETS.build(seg_cfg(root, pipeline=pipeline))
    on_disk = label_map(root, 1).astype(int)
    loaded = dataset[0]['data_samples'].gt_sem_seg.data[0].numpy()
    assert np.array_equal(loaded, np.where(on_disk == 0, 255, on_disk - 1))


def test_ground_truth_scores_full_marks(root):
    from mmdet.evaluation import CocoMetric

    metric = CocoMetric(ann_file=str(root / 'coco/annotations/instances_val.json'), metric=['bbox', 'segm'])
    metric.dataset_meta = {'classes': CLASSES}
    truth = COCO(root / 'coco/annotations/instances_val.json')
    results = []
    for image_id in truth.getImgIds():
        objects = [a for a in truth.loadAnns(truth.getAnnIds(imgIds=[image_id])) if not a['iscrowd']]
        boxes = np.array([a['bbox'] for a in objects], float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        prediction = {
            'img_id': image_id,
            'labels': np.array([a['category_id'] - 1 for a in objects], int),
            'bboxes': boxes,
            'scores': np.ones(len(objects)),
            'masks': [truth.annToRLE(a) for a in objects],
        }
        results.append(({}, prediction))
    scores = metric.compute_metrics(results)
    assert scores['bbox_mAP'] == scores['segm_mAP'] == 1.0


@pytest.mark.parametrize(
    ('changes', 'message'),
    [({'data_root': ''}, 'no data_root given'), ({'shapes': {'nm_train': 5}}, 'unknown nm_train.*num_train, num_val')],
)
def test_wrong_arguments(root, changes, message):
    from mmdet.registry import DATASETS

    with pytest.raises(ValueError, match=message):
        DATASETS.build(det_cfg(root, **changes))


def test_detection_without_mmseg():
    code = (
        'import sys; sys.modules.update(mmseg=None)\n'
        'import densekit.data; from mmengine.registry import DATASETS\n'
        "assert 'ShapesDetDataset' in DATASETS.module_dict and 'ShapesSegDataset' not in DATASETS.module_dict"
    )
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
