"""Labels go by the names of the classes: the order of the categories in a COCO file changes nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import densekit.data

# isort: split
from mmdet.datasets import CocoDataset, CocoPanopticDataset
from mmdet.datasets.api_wrappers import COCO, COCOeval
from mmdet.evaluation.metrics import CocoMetric, coco_metric

from densekit.data import class_order
from densekit.data.class_order import ids_by_name
from densekit.data.shapes import CLASSES, generate_shapes

ORDERS = {
    'as it was': lambda categories: categories,
    'reversed': lambda categories: categories[::-1],
    'rotated': lambda categories: categories[2:] + categories[:2],
}


@pytest.fixture(scope='module')
def content(tmp_path_factory) -> dict:
    root = generate_shapes(tmp_path_factory.mktemp('data') / 'shapes', num_train=2, num_val=10, size=64)
    return json.loads((root / 'coco/annotations/instances_val.json').read_text())


@pytest.fixture
def as_upstream(monkeypatch):
    """Switches the protection off."""
    monkeypatch.setattr(COCO, 'get_cat_ids', class_order._upstream_get_cat_ids)
    monkeypatch.setattr(coco_metric, 'COCOeval', COCOeval)


def write(path: Path, content: dict, order: str, renumber: bool = False) -> str:
    """A COCO file with its categories in another order, and perhaps ids of that order."""
    categories = ORDERS[order](content['categories'])
    ids = {c['id']: i + 1 if renumber else c['id'] for i, c in enumerate(categories)}
    annotations = [dict(a, category_id=ids[a['category_id']]) for a in content['annotations']]
    categories = [dict(c, id=ids[c['id']]) for c in categories]
    path.write_text(json.dumps(dict(content, annotations=annotations, categories=categories)))
    return str(path)


def dataset(file: str) -> CocoDataset:
    return CocoDataset(ann_file=file, metainfo=dict(classes=CLASSES), test_mode=True, data_prefix=dict(img=''))


def labels(file: str) -> list[list[int]]:
    items = dataset(file)
    return [[instance['bbox_label'] for instance in item['instances']] for item in items]


def score(file: str, truth: list[list[int]]) -> dict:
    """AP, of each class as well, of predictions that are the better the higher the label."""
    metric = CocoMetric(ann_file=file, metric=['bbox'], classwise=True, proposal_nums=(1, 10, 100))
    metric.dataset_meta = dict(classes=CLASSES)
    random = np.random.default_rng(0)
    items = dataset(file)
    for item, numbers in zip(items, truth, strict=True):
        boxes = torch.tensor([instance['bbox'] for instance in item['instances']]).reshape(-1, 4)
        noise = torch.from_numpy(random.normal(0, 1.0, boxes.shape)) * (5 - torch.tensor(numbers)).reshape(-1, 1)
        scores = torch.from_numpy(random.random(len(boxes)))
        predicted = dict(bboxes=boxes + noise, scores=scores, labels=torch.tensor(numbers, dtype=torch.long))
        metric.process({}, [dict(img_id=item['img_id'], ori_shape=(64, 64), pred_instances=predicted)])
    return metric.evaluate(len(items))


@pytest.mark.parametrize('renumber', [False, True], ids=['own ids', 'ids of the new order'])
@pytest.mark.parametrize('order', list(ORDERS)[1:])
def test_the_order_of_categories_changes_nothing(tmp_path, content, order, renumber):
    file = write(tmp_path / 'file.json', content, 'as it was')
    permuted = write(tmp_path / 'permuted.json', content, order, renumber)
    truth = labels(file)
    assert labels(permuted) == truth
    expected = score(file, truth)
    assert score(permuted, truth) == expected
    each = [expected[f'coco/{name}_precision'] for name in CLASSES]
    assert each[0] < each[-1] and len(set(each)) > 2  # so that a swap of classes would show


def test_the_label_is_that_of_the_name(tmp_path, content):
    """Independently of the loader."""
    file = write(tmp_path / 'file.json', content, 'rotated', renumber=True)
    permuted = json.loads(Path(file).read_text())
    names = {category['id']: category['name'] for category in permuted['categories']}
    wanted: dict[int, list[int]] = {image['id']: [] for image in permuted['images']}
    for annotation in permuted['annotations']:
        wanted[annotation['image_id']].append(CLASSES.index(names[annotation['category_id']]))
    assert labels(file) == list(wanted.values())


def test_training_and_validation_files_in_different_orders(tmp_path, content):
    """A model that learned the labels of one file is scored by another: AP 1 if they agree."""
    learned = labels(write(tmp_path / 'train.json', content, 'reversed'))
    perfect = score_exact(write(tmp_path / 'val.json', content, 'rotated', renumber=True), learned)
    assert perfect['coco/bbox_mAP'] == 1.0


def test_training_and_validation_files_in_different_orders_upstream(tmp_path, content, as_upstream):
    """Negative control: labels and AP are others, without a word."""
    learned = labels(write(tmp_path / 'train.json', content, 'reversed'))
    assert learned != labels(write(tmp_path / 'other.json', content, 'as it was'))
    scored = score_exact(write(tmp_path / 'val.json', content, 'rotated'), learned)
    assert scored['coco/bbox_mAP'] < 0.3


def score_exact(file: str, truth: list[list[int]]) -> dict:
    metric = CocoMetric(ann_file=file, metric=['bbox'], proposal_nums=(1, 10, 100))
    metric.dataset_meta = dict(classes=CLASSES)
    items = dataset(file)
    for item, numbers in zip(items, truth, strict=True):
        boxes = torch.tensor([instance['bbox'] for instance in item['instances']]).reshape(-1, 4)
        predicted = dict(bboxes=boxes, scores=torch.ones(len(boxes)), labels=torch.tensor(numbers, dtype=torch.long))
        metric.process({}, [dict(img_id=item['img_id'], ori_shape=(64, 64), pred_instances=predicted)])
    return metric.evaluate(len(items))


def test_ap_stands_beside_the_wrong_class_upstream(tmp_path, content, monkeypatch):
    """Negative control of the order of results; ids by name alone do not mend that."""
    truth = labels(write(tmp_path / 'file.json', content, 'as it was'))
    file = write(tmp_path / 'permuted.json', content, 'reversed', renumber=True)
    right = score(file, truth)
    monkeypatch.setattr(coco_metric, 'COCOeval', COCOeval)
    swapped = score(file, truth)
    assert swapped['coco/bbox_mAP'] == right['coco/bbox_mAP']
    assert [swapped[f'coco/{name}_precision'] for name in CLASSES] == [
        right[f'coco/{name}_precision'] for name in CLASSES[::-1]
    ]


def test_the_patch_is_still_needed(tmp_path, content):
    """Fails once mmdet gives the ids in the order of the names; then densekit/data/class_order.py can go."""
    api = COCO(write(tmp_path / 'file.json', content, 'as it was'))
    names = [category['name'] for category in content['categories']]
    ids = [category['id'] for category in content['categories']]
    assert class_order._upstream_get_cat_ids(api, cat_names=names[::-1]) == ids
    assert class_order._upstream_get_cat_ids(api, cat_names=['moon', *names]) == ids
    assert api.get_cat_ids(cat_names=names[::-1]) == ids[::-1]


def test_other_questions_are_answered_as_before(tmp_path, content):
    api = COCO(write(tmp_path / 'file.json', content, 'rotated'))
    ids = [category['id'] for category in content['categories']]
    assert api.get_cat_ids() == ORDERS['rotated'](ids)
    assert api.get_cat_ids(cat_names=['star'], sup_names=['shape']) == [4]
    assert api.get_cat_ids(cat_ids=[3, 2]) == [3, 2]


def test_panoptic_sets_go_by_name_too(tmp_path, content):
    categories = [dict(category, isthing=1) for category in content['categories']]
    segments: dict[int, list] = {image['id']: [] for image in content['images']}
    for annotation in content['annotations']:
        kept = ('id', 'category_id', 'bbox', 'area', 'iscrowd')
        segments[annotation['image_id']].append({key: annotation[key] for key in kept})
    entries = [{'image_id': i, 'file_name': f'{i}.png', 'segments_info': found} for i, found in segments.items()]
    seen = []
    for order in ORDERS:
        file = tmp_path / f'{order}.json'
        panoptic = dict(content, categories=ORDERS[order](categories), annotations=entries)
        file.write_text(json.dumps(panoptic))
        metainfo = dict(classes=CLASSES, thing_classes=CLASSES, stuff_classes=())
        items = CocoPanopticDataset(
            ann_file=str(file), metainfo=metainfo, test_mode=True, data_prefix=dict(img='', seg='')
        )
        seen.append([[segment['category'] for segment in item['segments_info']] for item in items])
    assert seen[0] == seen[1] == seen[2] == labels(write(tmp_path / 'boxes.json', content, 'reversed'))


CATEGORIES = [dict(id=i, name=name) for i, name in enumerate(CLASSES, start=1)]


@pytest.mark.parametrize(
    ('names', 'said'),
    [
        (('circle', 'squares'), "class 'squares' is no category of the COCO file; the nearest is 'square'"),
        (('moon', 'circle'), "class 'moon' is no category of the COCO file; there are circle, square, triangle"),
        (('moon', 'sun'), "class 'moon' is no category"),
        (('star', 'star'), "'star' is that of several"),
    ],
)
def test_names_that_are_not_there(names, said):
    with pytest.raises(ValueError, match=said):
        ids_by_name(names, CATEGORIES)


def test_a_name_of_two_categories():
    with pytest.raises(ValueError, match="'star' is that of several"):
        ids_by_name(('star', 'circle'), [*CATEGORIES, dict(id=9, name='star')])
    assert ids_by_name(('circle',), [*CATEGORIES, dict(id=9, name='star')]) == [1]  # not asked for


def test_stuff_after_the_things_of_a_file_of_things():
    """mmdet scores the instances of a panoptic model with the 133 names and a file of the 80 things."""
    names = CocoPanopticDataset.METAINFO['classes']
    things = [dict(id=3 * i, name=name) for i, name in enumerate(CocoPanopticDataset.METAINFO['thing_classes'])]
    assert ids_by_name(names, things) == [category['id'] for category in things]


def test_importing_the_package_is_enough():
    assert densekit.data and COCO.get_cat_ids is class_order._get_cat_ids
    assert coco_metric.COCOeval is class_order.COCOevalInOrder
