"""Figures are pycocotools' to the last bit, whichever engine computes them and however many processes there are."""

import contextlib
import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.registry import METRICS
from mmengine.structures import InstanceData
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import densekit.ops  # noqa: F401

# isort: split
from mmdet.evaluation import CocoMetric
from mmdet.structures import DetDataSample

import densekit.evaluation.coco as coco
from densekit.evaluation import coco_engine
from densekit.evaluation.coco import FastCocoMetric
from densekit.evaluation.gather import pack, unpack
from densekit.evaluation.rle import RleMasks
from densekit.models.mask_head import RleMaskHead, RleMasksHook

ROOT = Path(__file__).parents[2]
SAMPLES = os.environ.get('DENSEKIT_SAMPLES')
HOTCOCO = importlib.util.find_spec('hotcoco') is not None
CLASSES = ('ant', 'bee', 'cow', 'dog', 'eel')
IDS = {'ant': 12, 'bee': 3, 'cow': 7, 'dog': 40, 'eel': 1}  # neither in order nor without gaps
BOTH = pytest.mark.parametrize(
    'engine',
    ['pycocotools', pytest.param('hotcoco', marks=pytest.mark.skipif(not HOTCOCO, reason='hotcoco is not installed'))],
)


def random_mask(rng, box, height, width):
    """An ellipse in a box, with a hole or in two parts at times."""
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    x1, y1, x2, y2 = box
    distance = ((2 * x - x1 - x2) / max(x2 - x1, 1)) ** 2 + ((2 * y - y1 - y2) / max(y2 - y1, 1)) ** 2
    on = distance <= 1
    kind = rng.integers(4)
    if kind == 0:
        on &= distance >= 0.2
    elif kind == 1:
        on &= np.abs(2 * x - x1 - x2) > 4
    return on


def random_box(rng, height, width):
    size = np.exp(rng.uniform(np.log(3), np.log(1.3 * max(height, width)), 2))
    centre = rng.uniform(0, 1, 2) * (width, height)
    box = np.concatenate([centre - size / 2, centre + size / 2])
    return np.clip(box, 0, [width, height, width, height]).round(2)


def segmentation_of(rng, on, box, crowd):
    """A polygon, or run lengths packed or not; with the area that COCO gives it."""
    rle = coco_mask.encode(np.asfortranarray(on.astype(np.uint8)))
    if crowd:
        steps = np.flatnonzero(np.diff(on.T.ravel(), prepend=False)).tolist()
        return {'size': list(on.shape), 'counts': np.diff([0, *steps, on.size]).tolist()}, rle
    if rng.random() < 0.5:
        x1, y1, x2, y2 = box
        polygons = [[x1, y1, x2, y1, (x1 + x2) / 2, y2], [x1, y2, x1 + 4, y2, x1, y2 - 4]]
        return polygons, coco_mask.merge(coco_mask.frPyObjects(polygons, *on.shape))
    return {'size': rle['size'], 'counts': rle['counts'].decode()}, rle


def random_case(seed, images=8, most=10):
    """A ground truth, and detections of it: some near to objects, some anywhere; scores that tie."""
    rng = np.random.default_rng(seed)
    truth = {'images': [], 'annotations': [], 'categories': [{'id': IDS[name], 'name': name} for name in CLASSES]}
    found = []
    used = rng.choice(5, rng.integers(1, 6), replace=False)
    for image in rng.permutation(1000)[:images].tolist():
        height, width = rng.integers(60, 200, 2).tolist()
        truth['images'].append({'id': image, 'height': height, 'width': width, 'file_name': f'{image}.jpg'})
        rows = []
        for _ in range(rng.choice([0, 3, most])):
            label, box, crowd = int(rng.choice(used)), random_box(rng, height, width), bool(rng.random() < 0.15)
            shape, rle = segmentation_of(rng, random_mask(rng, box, height, width), box, crowd)
            x1, y1, x2, y2 = box.tolist()
            truth['annotations'].append(
                {
                    'id': len(truth['annotations']) + 1,
                    'image_id': image,
                    'category_id': IDS[CLASSES[label]],
                    'bbox': [x1, y1, x2 - x1, y2 - y1],
                    'area': float(coco_mask.area(rle)),
                    'iscrowd': int(crowd),
                    'segmentation': shape,
                    **({'ignore': 1} if rng.random() < 0.1 else {}),
                }
            )
            for _ in range(rng.integers(0, 4)):
                moved = np.clip(box + rng.normal(size=4) * rng.choice([0, 1, 5]), 0, [width, height, width, height])
                rows.append((moved, label if rng.random() < 0.8 else int(rng.integers(5))))
        rows += [(random_box(rng, height, width), int(rng.integers(5))) for _ in range(rng.choice([0, 2, 20]))]
        masks = [random_mask(rng, box, height, width) for box, _ in rows]
        found.append(
            {
                'img_id': image,
                'ori_shape': (height, width),
                'pred_instances': {
                    'bboxes': torch.tensor(np.array([box for box, _ in rows]).reshape(-1, 4), dtype=torch.float32),
                    'scores': torch.tensor(rng.integers(0, 30, len(rows)) / 29, dtype=torch.float32),
                    'labels': torch.tensor([label for _, label in rows], dtype=torch.int64),
                    'masks': torch.tensor(np.array(masks).reshape(-1, height, width)),
                },
            }
        )
    return truth, found


def reference(truth, found, kind, limits=(1, 10, 100)):
    """pycocotools alone, from COCO's own result format."""
    results = []
    for sample in found:
        part = sample['pred_instances']
        for box, score, label, mask in zip(
            *(part[key] for key in ('bboxes', 'scores', 'labels', 'masks')), strict=True
        ):
            x1, y1, x2, y2 = box.tolist()
            rle = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
            shape = {'segmentation': rle} if kind == 'segm' else {'bbox': [x1, y1, x2 - x1, y2 - y1]}
            common = {'image_id': sample['img_id'], 'category_id': IDS[CLASSES[label]], 'score': float(score)}
            results.append({**common, **shape})
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO()
        api.dataset = json.loads(json.dumps(truth))
        api.createIndex()
        evaluation = COCOeval(api, api.loadRes(results), kind)
        evaluation.params.maxDets = list(limits)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def metric_of(truth, folder, cls=FastCocoMetric, **kwargs):
    file = Path(folder, 'truth.json')
    file.write_text(json.dumps(truth))
    metric = cls(ann_file=str(file), **{'metric': ['bbox', 'segm'], 'proposal_nums': (1, 10, 100), **kwargs})
    metric.dataset_meta = {'classes': CLASSES}
    return metric


def score(metric, found):
    for sample in found:
        metric.process({}, [sample])
    return metric.evaluate(len(found))


NAMES = ['mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l', 'AR@1', 'AR@10', 'AR@100']
NAMES += ['AR_s@100', 'AR_m@100', 'AR_l@100']


@BOTH
@pytest.mark.parametrize('seed', range(6))
def test_equal_to_pycocotools_to_the_last_bit(seed, engine, tmp_path):
    truth, found = random_case(seed)
    metrics = score(metric_of(truth, tmp_path, engine=engine), found)
    assert len(metrics) == 24
    for kind in ('bbox', 'segm'):
        expected = reference(truth, found, kind).stats
        assert [metrics[f'coco/{kind}_{name}'] for name in NAMES] == expected.tolist()


@pytest.mark.skipif(not HOTCOCO, reason='hotcoco is not installed')
@pytest.mark.parametrize('seed', range(20))
def test_the_engines_fill_the_same_arrays(seed, tmp_path, monkeypatch):
    truth, found = random_case(1000 + seed, images=6)
    limits, by_class = [(1, 10, 100), (100, 300, 1000), (2, 3, 5)][seed % 3], seed % 4 > 0
    arrays = {}
    for engine in coco_engine.ENGINES:
        metric = metric_of(truth, tmp_path, engine=engine)
        monkeypatch.setattr(metric, 'compute_metrics', lambda results: {'n': len(results)})
        metric.process({}, found)
        parts = [result for _, result in metric.results]
        category_ids = [IDS[name] for name in CLASSES]
        arrays[engine] = [
            coco_engine.score(
                metric._coco_api,
                coco_engine.columns(parts, category_ids, masks),
                category_ids=category_ids,
                image_ids=sorted(image['id'] for image in truth['images']),
                limits=limits,
                thresholds=metric.iou_thrs,
                by_class=by_class,
            )
            for masks in (False, True)
        ]
    for ours, theirs in zip(*arrays.values(), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.dtype == other.dtype == np.float64
            assert np.array_equal(one, other)
    assert arrays['hotcoco'][0][0].max() >= 0


@BOTH
@pytest.mark.parametrize('limits', [(100, 1, 10), (100, 300, 1000), (1, 2, 3)])
def test_the_same_limits_give_what_pycocotools_gives(limits, engine, tmp_path):
    truth, found = random_case(3, images=5, most=60)
    metrics = score(metric_of(truth, tmp_path, engine=engine, proposal_nums=limits, metric='segm'), found)
    expected = reference(truth, found, 'segm', limits).stats.tolist()
    low, middle, high = sorted(limits)
    assert list(metrics)[6:] == [f'coco/segm_{name}' for name in (f'AR@{low}', f'AR@{middle}', f'AR@{high}')] + [
        f'coco/segm_AR_{size}@{high}' for size in 'sml'
    ]
    assert list(metrics.values()) == expected


@BOTH
def test_equal_to_mmdets_metric_but_for_its_rounding(engine, tmp_path):
    truth, found = random_case(5)
    limits = {'proposal_nums': (100, 300, 1000)}
    stock_names = list(coco.STOCK_FIGURES)
    for kind in ('bbox', 'segm', 'proposal'):
        items = {'metric_items': stock_names[6:] if kind == 'proposal' else stock_names}
        ours, theirs = (
            score(metric_of(truth, tmp_path, cls, metric=[kind], **limits, **items, **more), found)
            for cls, more in (
                (FastCocoMetric, {'engine': engine, 'classwise': True}),
                (CocoMetric, {'classwise': True}),
            )
        )
        expected = {key: value for key, value in theirs.items() if not key.endswith('_precision')}
        assert {key: round(ours[key], 3) for key in expected} == expected
        if kind == 'proposal':
            assert ours == {f'coco/{name}': value for name, value in zip(stock_names[6:], ours.values(), strict=True)}
            continue
        for name in CLASSES:
            value = theirs[f'coco/{name}_precision']
            assert round(ours[f'coco/{kind}_AP/{name}'], 3) == (-1 if np.isnan(value) else value)


@BOTH
def test_scores_of_classes(engine, tmp_path):
    truth, found = random_case(7)
    metric = metric_of(truth, tmp_path, engine=engine)
    metrics = score(metric, found)
    assert not any('/ant' in key for key in metrics)
    for kind in ('bbox', 'segm'):
        evaluation = reference(truth, found, kind)
        assert list(metric.class_scores[kind]) == list(CLASSES)
        for name, scores in metric.class_scores[kind].items():
            column = evaluation.eval['precision'][:, :, evaluation.params.catIds.index(IDS[name]), :, -1]
            known = column[:, :, 0][column[:, :, 0] > -1]
            assert scores['AP'] == (known.mean() if known.size else -1)
            assert list(scores) == list(coco.CLASS_COLUMNS)
        values = [scores['AP'] for scores in metric.class_scores[kind].values() if scores['AP'] > -1]
        assert np.mean(values) == pytest.approx(metrics[f'coco/{kind}_mAP'])


@BOTH
def test_without_a_file_the_data_sets_annotations_count(engine):
    truth, found = random_case(8)
    names = {IDS[name]: label for label, name in enumerate(CLASSES)}
    for sample in found:
        mine = [a for a in truth['annotations'] if a['image_id'] == sample['img_id']]
        sample['instances'] = [
            {
                'bbox': [*a['bbox'][:2], a['bbox'][0] + a['bbox'][2], a['bbox'][1] + a['bbox'][3]],
                'bbox_label': names[a['category_id']],
                'ignore_flag': a['iscrowd'],
                'mask': a['segmentation'],
            }
            for a in mine
        ]
    limits = {'proposal_nums': (1, 10, 100), 'metric': ['bbox', 'segm']}
    found_by = {}
    for cls, more in ((FastCocoMetric, {'engine': engine}), (CocoMetric, {})):
        metric = cls(**limits, **more)
        metric.dataset_meta = {'classes': CLASSES}
        found_by[cls] = score(metric, found)
    expected = found_by[CocoMetric]
    assert {key: round(found_by[FastCocoMetric][key], 3) for key in expected} == expected
    assert expected['coco/segm_mAP'] > 0


@BOTH
def test_nothing_found_is_zero(engine, tmp_path):
    """mmdet gives no metrics at all then, and a run that keeps its best checkpoint ends."""
    truth, found = random_case(2)
    nothing = [
        {**sample, 'pred_instances': {key: value[:0] for key, value in sample['pred_instances'].items()}}
        for sample in found
    ]
    metrics = score(metric_of(truth, tmp_path, engine=engine), nothing)
    assert metrics['coco/bbox_mAP'] == metrics['coco/segm_mAP'] == 0
    assert score(metric_of(truth, tmp_path, CocoMetric), nothing) == {}


@BOTH
def test_nothing_to_find_is_minus_one(engine, tmp_path):
    truth, found = random_case(2)
    metrics = score(metric_of({**truth, 'annotations': []}, tmp_path, engine=engine), found)
    assert set(metrics.values()) == {-1}


@BOTH
def test_masks_may_have_scores_of_their_own(engine, tmp_path):
    truth, found = random_case(9)
    rng = np.random.default_rng(0)
    for sample in found:
        part = sample['pred_instances']
        part['mask_scores'] = torch.tensor(rng.random(len(part['scores'])), dtype=torch.float32)
    metrics = score(metric_of(truth, tmp_path, engine=engine), found)
    boxes = reference(truth, found, 'bbox').stats.tolist()
    for sample in found:
        sample['pred_instances']['scores'] = sample['pred_instances']['mask_scores']
    masks = reference(truth, found, 'segm').stats.tolist()
    assert list(metrics.values()) == boxes + masks


@BOTH
def test_a_second_evaluation_starts_afresh(engine, tmp_path):
    truth, found = random_case(4)
    metric = metric_of(truth, tmp_path, engine=engine)
    first = score(metric, found)
    assert score(metric, found) == first


def test_masks_come_in_any_form(tmp_path):
    truth, found = random_case(4)
    expected = score(metric_of(truth, tmp_path), found)
    for form in (lambda rles, *_: rles, RleMasks):
        changed = []
        for sample in found:
            shape = sample['ori_shape']
            masks = sample['pred_instances']['masks'].numpy().astype(np.uint8)
            rles = [coco_mask.encode(np.asfortranarray(mask)) for mask in masks]
            changed.append({**sample, 'pred_instances': {**sample['pred_instances'], 'masks': form(rles, *shape)}})
        assert score(metric_of(truth, tmp_path), changed) == expected
        # mmdet's own metric, which a user's config may still name
        stock = score(metric_of(truth, tmp_path, CocoMetric), changed)
        assert stock['coco/segm_mAP'] == round(expected['coco/segm_mAP'], 3)


def test_as_part_of_an_evaluator(tmp_path):
    """What a validation loop hands over are data samples."""
    truth, found = random_case(4)
    expected = score(metric_of(truth, tmp_path), found)
    evaluator = Evaluator(dict(type='FastCocoMetric', ann_file=str(tmp_path / 'truth.json'), metric=['bbox', 'segm'],
                               proposal_nums=(1, 10, 100)))  # fmt: skip
    evaluator.dataset_meta = {'classes': CLASSES}
    for sample in found:
        height, width = sample['ori_shape']
        rles = coco.encode(sample['pred_instances']['masks'].numpy())
        masks = RleMasks(rles, height, width)
        data = DetDataSample(metainfo={'img_id': sample['img_id'], 'ori_shape': sample['ori_shape']})
        data.pred_instances = InstanceData(**{**sample['pred_instances'], 'masks': masks})
        evaluator.process([data.cpu()], {})
    assert evaluator.evaluate(len(found)) == expected


@pytest.mark.skipif(not SAMPLES, reason='DENSEKIT_SAMPLES names no folder of sample photographs')
@BOTH
def test_real_annotations(engine, tmp_path):
    """The objects of two photographs of COCO, found inaccurately."""
    truth = json.loads(Path(SAMPLES, 'coco_val2017_sample/annotations/instances_val2017.json').read_text())
    names = [category['name'] for category in truth['categories']]
    label_of = {category['id']: label for label, category in enumerate(truth['categories'])}
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO()
        api.dataset = truth
        api.createIndex()
    rng = np.random.default_rng(0)
    found = []
    for image in truth['images']:
        mine = api.imgToAnns[image['id']] * 2
        boxes = np.array([a['bbox'] for a in mine])
        boxes[:, 2:] += boxes[:, :2]
        shift = rng.integers(-3, 4, len(mine))
        masks = np.stack([np.roll(api.annToMask(a), by, axis=1) for a, by in zip(mine, shift, strict=True)])
        found.append(
            {
                'img_id': image['id'],
                'ori_shape': (image['height'], image['width']),
                'pred_instances': {
                    'bboxes': torch.tensor(boxes + rng.normal(size=boxes.shape), dtype=torch.float32),
                    'scores': torch.tensor(rng.random(len(mine)), dtype=torch.float32),
                    'labels': torch.tensor([label_of[a['category_id']] for a in mine]),
                    'masks': torch.tensor(masks).bool(),
                },
            }
        )
    metric = metric_of(truth, tmp_path, engine=engine)
    metric.dataset_meta = {'classes': names}
    metrics = score(metric, found)
    global IDS, CLASSES
    before = IDS, CLASSES
    try:
        IDS, CLASSES = {category['name']: category['id'] for category in truth['categories']}, names
        expected = [reference(truth, found, kind).stats.tolist() for kind in ('bbox', 'segm')]
    finally:
        IDS, CLASSES = before
    assert list(metrics.values()) == expected[0] + expected[1]
    assert 0.2 < metrics['coco/segm_mAP'] < 0.9


# Mistakes.


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'engine': 'fast'}, "engine is 'fast'; there are hotcoco and pycocotools"),
        ({'proposal_nums': (1, 10)}, r'proposal_nums is \(1, 10\); give three different limits'),
        ({'metric': 'proposal_fast'}, "NumPy below 1.24 only: 'proposal'"),
        ({'format_only': True}, 'give outfile_prefix'),
        ({'metric_items': ['AP']}, "metric_items has 'AP'; there are .*mAP_50"),
    ],
)
def test_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FastCocoMetric(**kwargs)


def test_an_engine_that_is_missing(monkeypatch):
    monkeypatch.setattr(coco_engine, 'find_spec', lambda name: name == 'pycocotools')
    assert FastCocoMetric().engine == 'pycocotools'
    with pytest.raises(ValueError, match=r"engine='hotcoco' is not installed: pip install hotcoco"):
        FastCocoMetric(engine='hotcoco')


@pytest.mark.skipif(not HOTCOCO, reason='hotcoco is not installed')
def test_ids_that_hotcoco_cannot_read(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(coco_engine, 'print_log', lambda text, *_: said.append(text))
    truth, found = random_case(10)
    expected = score(metric_of(truth, tmp_path), found)
    for part in (*truth['images'], *truth['annotations'], *found):
        for key in ('id', 'image_id', 'img_id'):
            if key in part and (key != 'id' or 'height' in part):
                part[key] = f'image {part[key]:04}'
    assert not said
    assert score(metric_of(truth, tmp_path), found) == expected
    assert 'pycocotools scores, because hotcoco cannot read' in said[0]


def test_what_does_not_belong_together(tmp_path):
    truth, found = random_case(11)
    with pytest.raises(ValueError, match='image 5000 was scored and is not in the ground truth'):
        score(metric_of(truth, tmp_path), [*found[:-1], {**found[-1], 'img_id': 5000}])
    with pytest.raises(ValueError, match='was scored twice'):
        score(metric_of(truth, tmp_path), [*found[:-1], found[0]])
    metric = metric_of(truth, tmp_path)
    metric.process({}, found)
    with pytest.raises(ValueError, match='8 images were scored, and the data set has 9'):
        metric.evaluate(9)
    assert score(metric, found)  # an error leaves nothing behind
    high = {**found[0]['pred_instances'], 'labels': torch.full_like(found[0]['pred_instances']['labels'], 9)}
    with pytest.raises(ValueError, match='label 9, and the ground truth has 5 of the'):
        score(metric, [{**found[0], 'pred_instances': high}, *found[1:]])
    boxes = [{**s, 'pred_instances': {k: v for k, v in s['pred_instances'].items() if k != 'masks'}} for s in found]
    with pytest.raises(ValueError, match="'segm', and the model gives no masks"):
        score(metric, boxes)
    with pytest.raises(ValueError, match='there is no ground truth'):
        FastCocoMetric().process({}, found)
    with pytest.raises(FileNotFoundError):
        FastCocoMetric(ann_file=str(tmp_path / 'none.json'))


def test_images_without_detections_are_told(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(coco, 'print_log', lambda text, *_: said.append(text))
    truth, found = random_case(11)
    score(metric_of(truth, tmp_path), found)
    assert not said
    score(metric_of(truth, tmp_path), found[:4])
    assert said == ['4 of the 8 images of the ground truth were not looked at; their objects count as not found']


# Result files.


@BOTH
def test_result_files_score_what_was_scored(engine, tmp_path):
    truth, found = random_case(12)
    metrics = score(metric_of(truth, tmp_path, engine=engine, outfile_prefix=str(tmp_path / 'made/results')), found)
    assert sorted(path.name for path in (tmp_path / 'made').iterdir()) == ['results.bbox.json', 'results.segm.json']
    only = metric_of(truth, tmp_path, engine=engine, format_only=True, outfile_prefix=str(tmp_path / 'only/results'))
    assert score(only, found) == {}
    for kind in ('bbox', 'segm'):
        entries = json.loads((tmp_path / f'made/results.{kind}.json').read_text())
        assert entries == json.loads((tmp_path / f'only/results.{kind}.json').read_text())
        for entry in entries if kind == 'segm' else ():
            del entry['bbox']  # as mmdet does before it scores masks
        with contextlib.redirect_stdout(io.StringIO()):
            api = COCO(tmp_path / 'truth.json')
            evaluation = COCOeval(api, api.loadRes(entries), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        assert [metrics[f'coco/{kind}_{name}'] for name in NAMES] == evaluation.stats.tolist()


# Several processes.


def test_packed_detections_are_unpacked_as_they_were(tmp_path):
    truth, found = random_case(13)
    found[0]['pred_instances']['mask_scores'] = torch.rand(len(found[0]['pred_instances']['scores']))
    metric = metric_of(truth, tmp_path)
    metric.process({}, found)
    for results in (metric.results, metric.results[:1], []):
        same = unpack(pack(results))
        assert len(same) == len(results)
        for (gt, result), (same_gt, same_result) in zip(results, same, strict=True):
            assert gt == same_gt
            assert result.keys() == same_result.keys()
            for key, value in result.items():
                if isinstance(value, np.ndarray):
                    assert value.dtype == same_result[key].dtype
                    assert np.array_equal(value, same_result[key])
                else:
                    assert value == same_result[key]


PROCESSES = """
import json, sys
import torch
import torch.distributed as dist
from mmengine.dataset import DefaultSampler
from densekit.evaluation.coco import FastCocoMetric

found = torch.load('../found.pt', weights_only=True)
if sys.argv[1] == '2':
    dist.init_process_group('gloo')

def score(ids):
    metric = FastCocoMetric(ann_file='../truth.json', metric=['bbox', 'segm'])
    metric.dataset_meta = {'classes': ['ant', 'bee', 'cow', 'dog', 'eel']}
    for i in ids:
        metric.process({}, [found[i]])
    return metric.evaluate(7)

print('RESULT', json.dumps(score(DefaultSampler(range(7), shuffle=False))))
try:
    score([0, 0, 0, 0] if sys.argv[1] == '2' else [0] * 7)
except ValueError as error:
    print('ERROR', error)
if sys.argv[1] == '2':
    dist.destroy_process_group()
"""


def test_two_processes_give_the_figures_of_one(tmp_path, monkeypatch, capsys):
    """Seven images, so that one of them is repeated."""
    (tmp_path / 'score.py').write_text(PROCESSES)
    truth, found = random_case(14, images=7)
    (tmp_path / 'truth.json').write_text(json.dumps(truth))
    torch.save(found, tmp_path / 'found.pt')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    where = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    started = []
    for rank in '01':
        (tmp_path / rank).mkdir()
        started.append(
            subprocess.Popen(
                [sys.executable, str(tmp_path / 'score.py'), '2'],
                env={**os.environ, **where, 'RANK': rank, 'WORLD_SIZE': '2'},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=tmp_path / rank,
            )
        )
    monkeypatch.chdir(tmp_path / '0')
    monkeypatch.setattr(sys, 'argv', ['score.py', '1'])
    exec(PROCESSES, {})
    outputs = [capsys.readouterr().out, *(process.communicate(timeout=120)[0] for process in started)]
    assert [process.returncode for process in started] == [0, 0], outputs
    results, errors = (
        [next(line for line in output.splitlines() if line.startswith(kind)) for output in outputs]
        for kind in ('RESULT', 'ERROR')
    )
    assert results[0] == results[1] == results[2]
    assert json.loads(results[0][7:])['coco/segm_mAP'] > 0
    assert 'was scored twice' in errors[0]
    assert 'was scored twice' in errors[1]
    assert 'the first process cannot score' in errors[2]
    assert not list(tmp_path.glob('*/.dist_test'))  # nor any other pickle


# Run lengths instead of drawn masks, where only COCO's metrics read them.


class Loop:
    def __init__(self, *metrics):
        self.evaluator = Evaluator(list(metrics))


@pytest.mark.parametrize('others', [(), ('CocoMetric',), ('Other',)], ids=str)
def test_masks_are_run_lengths_while_only_coco_looks(others):
    head = torch.nn.Sequential(RleMaskHead(num_classes=2, num_convs=0))
    classes = {'CocoMetric': CocoMetric, 'Other': METRICS.get('DumpResults')}
    metrics = [
        FastCocoMetric(),
        *(classes[name](**({'out_file_path': 'x.pkl'} if name == 'Other' else {})) for name in others),
    ]
    runner = type('Runner', (), {'model': head, 'val_loop': Loop(*metrics), 'test_loop': Loop(*metrics)})
    hook = RleMasksHook()
    for before, after in ((hook.before_val, hook.after_val), (hook.before_test, hook.after_test)):
        assert not head[0].run_lengths
        before(runner)
        assert head[0].run_lengths == (others != ('Other',))
        after(runner)
    assert not head[0].run_lengths
