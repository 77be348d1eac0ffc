"""Every kind of fault, seeded into a clean COCO set of 40 images, is reported with file and id; without it, nothing."""

import copy
import json
import os
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

import densekit.ops

# isort: split
from mmdet.datasets import CocoDataset
from mmengine.registry import DATASETS

import densekit.data  # noqa: F401
from densekit.data import checks
from densekit.data.checks import check_data, inspect_data
from densekit.data.coco_file import judge
from densekit.data.faults import COCO_KINDS, describe, raise_for
from densekit.data.locate import leaves
from densekit.data.shapes import CLASSES, generate_shapes, mask_to_rle

SAMPLES = os.environ.get('DENSEKIT_SAMPLES')
LOAD = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True)]


@pytest.fixture(scope='module')
def shapes(tmp_path_factory) -> Path:
    return generate_shapes(tmp_path_factory.mktemp('data') / 'shapes', num_train=40, num_val=4, size=64) / 'coco'


@pytest.fixture(scope='module')
def clean(shapes) -> dict:
    return json.loads((shapes / 'annotations/instances_train.json').read_text())


class Set:
    """The clean set, to be spoiled: content of the file, config, and a copy of the images on demand.

    Attributes:
        content: of the annotation file.
        text: what to write in its place.
        file: its path.
        images: folder of the images.
        dataset: config of the data set.
        cfg: other parts of the config.
    """

    def __init__(self, folder: Path, shapes: Path, clean: dict) -> None:
        self.folder, self.content, self.text = folder, copy.deepcopy(clean), None
        self.file, self.images = folder / 'train.json', shapes / 'train'
        self.dataset = dict(
            type='CocoDataset',
            metainfo=dict(classes=CLASSES),
            filter_cfg=dict(filter_empty_gt=True, min_size=32),
            pipeline=LOAD,
        )
        self.cfg: dict = {}

    def own_images(self) -> Path:
        self.images = Path(shutil.copytree(self.images, self.folder / 'images'))
        return self.images

    def annotation(self, **wanted) -> dict:
        """One of the ordinary annotations."""
        return next(a for a in self.content['annotations'] if not a['iscrowd'] and wanted.items() <= a.items())

    def path(self, image: dict) -> str:
        return str(self.images / image['file_name'])

    def check(self, loops=('train',), **depth) -> list:
        if self.text is not None or self.content is not None:
            self.file.write_text(json.dumps(self.content) if self.text is None else self.text)
        dataset = dict(self.dataset, ann_file=str(self.file), data_prefix=dict(img=str(self.images)))
        loaders = {f'{loop}_dataloader': dict(dataset=dataset) for loop in loops}
        return check_data(Config(dict(default_scope='mmdet', **loaders, **self.cfg)), loops, **depth)


@pytest.fixture
def data(tmp_path, shapes, clean) -> Set:
    return Set(tmp_path, shapes, clean)


SEEDS = {}


def seed(kind, *also):
    """Registers a function that spoils a :class:`Set` and gives the id to be reported, or the file and the id.

    ``also`` are kinds that follow from the same fault.
    """

    def register(spoil):
        SEEDS.setdefault(kind, []).append((spoil, also))
        return spoil

    return register


@seed('json-missing')
def _(s):
    s.content = None
    return None


@seed('json-unreadable')
def cut_off(s):
    s.text = json.dumps(s.content)[:-1000]
    return None


@seed('json-unreadable')
def nested_too_deeply(s):
    s.text = '[' * 100_000
    return None


@seed('json-layout')
def a_list(s):
    s.content = [s.content]
    return None


@seed('json-layout')
def no_categories(s):
    del s.content['categories']
    return None


@seed('key-missing', 'annotation-image-unknown', 'class-unused')
def image_without_height(s):
    del s.content['images'][3]['height']
    return s.content['images'][3]['id']


@seed('key-missing')
def annotation_without_area(s):
    del s.content['annotations'][5]['area']
    return s.content['annotations'][5]['id']


@seed('key-missing')
def no_iscrowd_for_the_evaluator(s):
    s.cfg['train_evaluator'] = dict(type='CocoMetric', ann_file=str(s.file))
    return next(a.pop('iscrowd') or a['id'] for a in s.content['annotations'] if not a['iscrowd'])


@seed('id-not-integer')
def id_as_text(s):
    s.content['annotations'][5]['id'] = 'six'
    return 'six'


@seed('id-not-integer')
def id_of_half(s):
    s.content['annotations'][5]['image_id'] += 0.5
    return s.content['annotations'][5]['id']


@seed('category-name-twice')
def category_name_twice(s):
    s.content['categories'].append({'id': 77, 'name': 'star'})
    return 'star'


@seed('category-id-twice', 'class-unused')
def category_id_twice(s):
    s.content['categories'].append({'id': 1, 'name': 'moon'})
    return 1


@seed('class-absent')
def misspelt_class(s):
    s.dataset['metainfo'] = dict(classes=('circle', 'square', 'triangel', 'star', 'cross'))
    return 'triangel'


@seed('classes-default')
def default_classes(s):
    del s.dataset['metainfo']
    return 'person'


@seed('classes-none')
def none_of_the_classes(s):
    s.dataset['metainfo'] = dict(classes=('moon', 'sun'))
    return 'moon'


@seed('class-unused')
def category_without_annotations(s):
    s.content['categories'].append({'id': 77, 'name': 'moon'})
    s.dataset['metainfo'] = dict(classes=(*CLASSES, 'moon'))
    return 'moon'


@seed('annotations-none')
def no_annotations(s):
    s.content['annotations'] = []
    return None


@seed('annotations-none', 'annotation-image-unknown')
def all_of_other_images(s):
    for annotation in s.content['annotations']:
        annotation['image_id'] += 1000
    return None


@seed('nothing-left')
def a_filter_for_larger_images(s):
    s.dataset['filter_cfg'] = dict(filter_empty_gt=True, min_size=65)
    return None


@seed('annotation-id-twice')
def annotation_id_twice(s):
    s.content['annotations'][7]['id'] = s.content['annotations'][6]['id']
    return s.content['annotations'][6]['id']


@seed('annotation-image-unknown')
def unknown_image(s):
    s.annotation()['image_id'] = 12345
    return s.annotation(image_id=12345)['id']


@seed('annotation-category-unknown')
def unknown_category(s):
    s.annotation()['category_id'] = 99
    return s.annotation(category_id=99)['id']


def spoil_box(kind, box, **more):
    def spoil(s):
        annotation = s.annotation(category_id=2)
        annotation.update(bbox=box, **more)
        return annotation['id']

    spoil.__name__ = f'box {box} {more or ""}'
    seed(kind, 'image-nothing-usable')(spoil)


spoil_box('box-malformed', [1, 2, 3])
spoil_box('box-malformed', [1, 2, 3, '4'])
spoil_box('box-malformed', [1, 2, 30, 40], area=None)
spoil_box('box-not-finite', [float('nan'), 2, 30, 40])
spoil_box('box-not-finite', [1, 2, float('inf'), 40])
spoil_box('box-not-finite', [1, 2, 10**30, 40])
spoil_box('box-not-finite', [1, 2, 30, 40], area=float('nan'))
spoil_box('box-negative', [40, 40, -30, 10])
spoil_box('box-no-area', [1, 2, 30, 0])
spoil_box('box-no-area', [1, 2, 30, 40], area=0)
spoil_box('box-outside', [300, 300, 50, 50])
spoil_box('box-outside', [-50, 10, 50, 50])
spoil_box('box-sticks-out', [30, 30, 50, 50])


def spoil_mask(kind, segmentation):
    def spoil(s):
        annotation = s.annotation()
        annotation['segmentation'] = segmentation
        return annotation['id']

    spoil.__name__ = f'segmentation {segmentation}'
    seed(kind)(spoil)


spoil_mask('mask-missing', [])
spoil_mask('mask-malformed', [1, 2, 3, 4, 5, 6])
spoil_mask('mask-malformed', 'mask.png')
spoil_mask('polygon-bad', [[1, 2, 3, 4]])
spoil_mask('polygon-bad', [[1, 2, 3, 4, 5, 6, 7]])
spoil_mask('mask-malformed', [[1, 2, 3, 4, 5, float('nan')]])
spoil_mask('mask-malformed', [[1, 2, 3, 4, 5, -1e30]])
spoil_mask('mask-malformed', [[1, 2, 3, 4, 5, '6']])
spoil_mask('run-lengths-bad', {'size': [64, 32], 'counts': [64 * 32]})
spoil_mask('run-lengths-bad', {'size': [64, 64], 'counts': [64 * 64 + 1]})
spoil_mask('run-lengths-bad', {'size': [64, 64], 'counts': 'PPYo'})
spoil_mask('run-lengths-bad', {'counts': 'PPYo1'})


@seed('image-id-twice', 'image-all-crowd', 'image-nothing-usable', 'annotation-image-unknown', 'class-unused')
def image_id_twice(s):
    s.content['images'][7]['id'] = s.content['images'][6]['id']
    return s.content['images'][6]['id']


@seed('file-name-twice')
def file_name_twice(s):
    s.content['images'][7]['file_name'] = s.content['images'][6]['file_name']
    return s.content['images'][7]['id']


@seed('image-size-invalid', 'box-outside', 'image-size-differs', 'image-nothing-usable', 'run-lengths-bad')
def image_without_width(s):
    s.content['images'][3]['width'] = 0
    return s.content['images'][3]['id']


@seed('image-all-crowd')
def crowds_only(s):
    image = s.annotation()['image_id']
    for annotation in s.content['annotations']:
        annotation['iscrowd'] |= annotation['image_id'] == image
    return image


@seed('image-nothing-usable', 'box-no-area')
def boxes_without_area_only(s):
    image = s.annotation()['image_id']
    for annotation in s.content['annotations']:
        if annotation['image_id'] == image:
            annotation['bbox'] = [*annotation['bbox'][:3], 0]
    return image


@seed('image-empty')
def image_without_annotation(s):
    del s.dataset['filter_cfg']
    return min({i['id'] for i in s.content['images']} - {a['image_id'] for a in s.content['annotations']})


@seed('image-missing')
def missing_image(s):
    image = s.content['images'][9]
    s.own_images()
    os.remove(s.path(image))
    return s.path(image), image['id']


@seed('image-missing')
def link_to_nowhere(s):
    image = s.content['images'][9]
    s.own_images()
    os.remove(s.path(image))
    os.symlink('nowhere.jpg', s.path(image))
    return s.path(image), image['id']


def spoil_image(kind, name, spoil_file):
    def spoil(s):
        image = s.content['images'][9]
        s.own_images()
        spoil_file(Path(s.path(image)))
        return s.path(image), image['id']

    spoil.__name__ = name
    seed(kind)(spoil)


spoil_image('image-unreadable', 'junk', lambda path: path.write_text('no picture'))
spoil_image('image-unreadable', 'an empty file', lambda path: path.write_bytes(b''))
spoil_image('image-unreadable', 'a cut-off file', lambda path: path.write_bytes(path.read_bytes()[:-200]))
spoil_image('image-size-differs', 'another size', lambda path: Image.new('RGB', (60, 40)).save(path))


@seed('image-size-differs')
def turned_by_exif(s):
    """The file is 64 x 32 with the orientation 'turn by 90 degrees': loaders give 32 x 64."""
    image = s.content['images'][0]
    s.own_images()
    s.content['images'], s.content['annotations'] = (
        [dict(image, width=64, height=32)],
        [dict(s.annotation(), image_id=image['id'], bbox=[1, 1, 20, 20], segmentation=[[1, 1, 20, 1, 20, 20]])],
    )
    s.dataset['metainfo'] = dict(classes=[CLASSES[s.content['annotations'][0]['category_id'] - 1]])
    exif = Image.Exif()
    exif[274] = 6
    Image.new('RGB', (64, 32)).save(s.path(image), exif=exif)
    return s.path(image), image['id']


@seed('evaluator-differs')
def evaluator_with_more_images(s):
    other = s.folder / 'other.json'
    images = [*s.content['images'], dict(s.content['images'][0], id=777, file_name='777.jpg')]
    other.write_text(json.dumps(dict(s.content, images=images)))
    s.cfg['train_evaluator'] = dict(type='CocoMetric', ann_file=str(other), metric=['bbox', 'segm'])
    return str(other), 777


@seed('heads-differ')
def a_head_of_80_classes(s):
    s.cfg['model'] = dict(
        roi_head=dict(bbox_head=[dict(type='Shared2FCBBoxHead'), dict(type='BBoxHead', num_classes=5)])
    )
    return 'the config', 'roi_head.bbox_head.0'


CASES = [
    pytest.param(kind, spoil, also, id=f'{kind}: {spoil.__name__}') for kind in SEEDS for spoil, also in SEEDS[kind]
]


def test_every_kind_is_seeded():
    assert set(SEEDS) == set(COCO_KINDS)
    assert len(COCO_KINDS) >= 25


@pytest.mark.parametrize('depth', [{}, {'headers': True}, {'decode': True}], ids=['default', 'headers', 'decode'])
def test_a_clean_set_has_no_faults(data, depth):
    data.cfg['train_evaluator'] = dict(type='CocoMetric', ann_file=str(data.file), metric=['bbox', 'segm'])
    assert data.check(**depth) == []
    assert data.check(loops=('train', 'val', 'test'), **depth) == []


@pytest.mark.parametrize(('kind', 'spoil', 'also'), CASES)
def test_a_fault_is_reported_with_file_and_id(data, kind, spoil, also):
    where = spoil(data)
    file, wanted = where if isinstance(where, tuple) else (str(data.file), where)
    faults = data.check()
    assert (kind, file, wanted) in [(found.kind, found.file, found.id) for found in faults], describe(faults)
    assert {found.kind for found in faults} <= {kind, *also}, describe(faults)
    assert all(found.text for found in faults)


def test_the_checks_find_what_the_loader_drops(data, monkeypatch):
    """Negative control: without the checks of annotations nothing is said, and mmdet drops the box silently."""
    from mmdet.datasets import CocoDataset

    annotation = data.annotation(category_id=2)
    annotation['bbox'] = [300, 300, 50, 50]
    assert [found.kind for found in data.check()] == ['box-outside']
    arguments = {key: value for key, value in data.dataset.items() if key not in ('type', 'pipeline', 'filter_cfg')}
    loaded = CocoDataset(ann_file=str(data.file), data_prefix=dict(img=str(data.images)), **arguments)
    assert sum(len(item['instances']) for item in loaded) == len(data.content['annotations']) - 1
    monkeypatch.setattr('densekit.data.coco_checks._annotation_faults', lambda table: [])
    assert data.check() == []


def test_corners_instead_of_width_and_height_are_an_error(data):
    for annotation in data.content['annotations']:
        x, y, width, height = annotation['bbox']
        annotation['bbox'] = [x, y, x + width, y + height]
    faults = [found for found in data.check() if found.kind == 'box-sticks-out']
    assert len(faults) > 10
    assert {found.severity for found in faults} == {'error'}
    assert '[x, y, width, height] is wanted, not corners' in faults[0].text


def test_counts_are_those_of_the_loader(data):
    """The boxes said to be usable are those that mmdet keeps, spoiled ones among them."""
    from mmdet.datasets import CocoDataset

    boxes = [[-50, 10, 50, 50], [1, 2, 30, 0], [40, 40, -30, 10], [float('nan'), 2, 30, 40], [30, 30, 50, 50]]
    for annotation, box in zip(data.content['annotations'], boxes, strict=False):
        annotation['bbox'] = box
    data.content['annotations'][9]['ignore'] = 1
    data.content['annotations'][11]['area'] = 0
    data.check()
    dataset = dict(data.dataset, ann_file=str(data.file), data_prefix=dict(img=str(data.images)))
    report = inspect_data(Config(dict(default_scope='mmdet', train_dataloader=dict(dataset=dataset))), ('train',))[0]
    arguments = {key: value for key, value in dataset.items() if key not in ('type', 'pipeline', 'filter_cfg')}
    loaded = list(CocoDataset(**arguments))
    labels = [instance['bbox_label'] for item in loaded for instance in item['instances']]
    assert report.counts['boxes'] == len(labels)
    assert list(report.classes.values()) == np.bincount(labels, minlength=5).tolist()


def test_run_lengths_are_judged_as_pycocotools_reads_them():
    from pycocotools import mask as masks

    random = np.random.default_rng(0)
    for _ in range(50):
        height, width = (int(side) for side in random.integers(1, 300, 2))
        painted = random.random((height, width)) < random.random()
        painted[: random.integers(height)] = 0
        text = masks.encode(np.asfortranarray(painted, np.uint8))['counts'].decode()
        fine = judge({'size': [height, width], 'counts': text})
        assert fine.kind == '' and fine.size == (height, width)
        assert judge(mask_to_rle(painted)) == fine
        assert judge({'size': [height, width + 1], 'counts': text}).kind == 'run-lengths-bad'
        assert judge({'size': [height, width], 'counts': text[:-1]}).kind == 'run-lengths-bad'


@pytest.mark.parametrize('counts', ['', 'é', ' ', 'ooooooooooooooo0', 'oo', '~', [1.5], [-1, 5], None, {}])
def test_run_lengths_of_anything_are_judged(counts):
    assert judge({'size': [2, 2], 'counts': counts}).kind == 'run-lengths-bad'


def panoptic(s: Set) -> None:
    """Makes a panoptic set of the clean one: two things and three kinds of stuff."""
    segments: dict[int, list] = {image['id']: [] for image in s.content['images']}
    for annotation in s.content['annotations']:
        segments[annotation['image_id']].append(
            {k: annotation[k] for k in ('id', 'category_id', 'bbox', 'area', 'iscrowd')}
        )
    s.content['annotations'] = [
        {'image_id': image['id'], 'file_name': image['file_name'], 'segments_info': segments[image['id']]}
        for image in s.content['images']
    ]
    for category in s.content['categories']:
        category['isthing'] = int(category['id'] < 3)
    maps = s.folder / 'maps'
    maps.mkdir()
    for image in s.content['images']:
        (maps / image['file_name']).with_suffix('.png').touch()
    s.dataset.update(
        type='CocoPanopticDataset', pipeline=[LOAD[0], dict(type='LoadPanopticAnnotations', with_mask=True)]
    )
    s.dataset['metainfo'] = dict(classes=CLASSES, thing_classes=CLASSES[:2], stuff_classes=CLASSES[2:])


def panoptic_check(s: Set) -> list:
    s.file.write_text(json.dumps(s.content))
    prefix = dict(img=str(s.images), seg=str(s.folder / 'maps'))
    dataset = dict(s.dataset, ann_file=str(s.file), data_prefix=prefix)
    return check_data(Config(dict(default_scope='mmdet', train_dataloader=dict(dataset=dataset), **s.cfg)), ('train',))


def test_panoptic_sets_are_checked(data, shapes, clean):
    panoptic(data)
    things = data.folder / 'things.json'
    instances = [annotation for annotation in clean['annotations'] if annotation['category_id'] < 3]
    things.write_text(json.dumps(dict(clean, annotations=instances, categories=clean['categories'][:2])))
    data.cfg['train_evaluator'] = [
        dict(type='CocoPanopticMetric', ann_file=str(data.file)),
        dict(type='CocoMetric', ann_file=str(things), metric=['bbox', 'segm']),
    ]
    assert panoptic_check(data) == []
    segment = data.content['annotations'][4]['segments_info'][0]
    segment['category_id'] = 99
    lost = Path(data.folder / 'maps' / data.content['images'][5]['file_name']).with_suffix('.png')
    lost.unlink()
    found = {(found.kind, found.file, found.id) for found in panoptic_check(data)}
    assert ('annotation-category-unknown', str(data.file), segment['id']) in found
    assert ('image-missing', str(lost), data.content['images'][5]['id']) in found


def test_data_sets_are_found_inside_wrappers_and_lists(data):
    unknown = data.annotation()
    unknown['category_id'] = 99
    data.check()
    own = dict(data.dataset, ann_file=str(data.file), data_prefix=dict(img=str(data.images)))
    wrapped = dict(type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=[own, own]))
    cfg = Config(dict(default_scope='mmdet', train_dataloader=dict(dataset=wrapped)))
    assert [found.id for found in check_data(cfg, ('train',))] == [unknown['id']]


def test_what_cannot_be_checked_is_said(tmp_path):
    datasets = [
        dict(type='VOCDataset', data_root='VOC'),
        dict(type='CocoDataset', data_root='s3://bucket/coco', ann_file='x.json'),
        dict(type='ShapesDetDataset', data_root=str(tmp_path / 'none'), ann_file='x.json'),
    ]
    cfg = Config(
        dict(default_scope='mmdet', train_dataloader=dict(dataset=dict(type='ConcatDataset', datasets=datasets)))
    )
    reports = inspect_data(cfg, ('train',))
    assert [report.faults for report in reports] == [[], [], []]
    said = [report.remarks[0] for report in reports]
    assert 'of type VOCDataset' in said[0] and 'remote' in said[1] and 'generated on first use' in said[2]


@DATASETS.register_module()
class RenamingDataset(CocoDataset):
    """Images are in another folder than the annotations say."""

    def parse_data_info(self, raw_data_info):
        image = raw_data_info['raw_img_info']
        return super().parse_data_info(dict(raw_data_info, raw_img_info=dict(image, file_name=image['file_name'][4:])))


@DATASETS.register_module()
class KeptNamesDataset(CocoDataset):
    """Of another name, and of the same files."""


def remarks(data) -> list[str]:
    dataset = dict(data.dataset, ann_file=str(data.file), data_prefix=dict(img=str(data.images)))
    reports = inspect_data(Config(dict(default_scope='mmdet', train_dataloader=dict(dataset=dataset))), ('train',))
    return [remark for report in reports for remark in report.remarks]


def test_files_that_the_data_set_names_otherwise_are_not_looked_for(data):
    for image in data.content['images']:
        image['file_name'] = 'old/' + image['file_name']
    assert {found.kind for found in data.check()} == {'image-missing'}
    data.dataset['type'] = 'KeptNamesDataset'
    assert {found.kind for found in data.check()} == {'image-missing'}
    for kind, method in (('RenamingDataset', 'parse_data_info'), ('Objects365V2Dataset', 'load_data_list')):
        data.dataset['type'] = kind
        assert data.check() == []
        assert any(f'images not looked for: {kind}.{method}' in said for said in remarks(data))


def test_files_that_are_read_otherwise_are_not_opened(data):
    for path in data.own_images().iterdir():
        path.write_bytes(b'of a kind of its own')
    assert {found.kind for found in data.check()} == {'image-unreadable'}
    data.dataset['pipeline'] = [dict(type='LoadImageFromNDArray'), LOAD[1]]
    assert data.check() == []
    assert any('the pipeline reads them by LoadImageFromNDArray' in said for said in remarks(data))


FAMILIES = [
    'mmdet:panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py',
    'mmdet:mm_grounding_dino/rtts/grounding_dino_swin-t_finetune_8xb4_1x_rtts.py',
    'mmdet:mm_grounding_dino/coco/grounding_dino_swin-t_finetune_16xb4_1x_coco.py',
    'mmdet:mm_grounding_dino/odinw/grounding_dino_swin-t_pretrain_odinw13.py',
    'mmdet:glip/odinw/glip_atss_swin-t_a_fpn_dyhead_pretrain_odinw13.py',
    'mmdet:mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py',
    'mmdet:cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
    'mmdet:soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py',
    'mmseg:stdc/stdc1_4xb12-80k_cityscapes-512x1024.py',
    'mmseg:pspnet/pspnet_r50-d8_4xb4-80k_ade20k-512x512.py',
]


@pytest.mark.parametrize('file', FAMILIES)
def test_the_heads_of_stock_configs_fit_their_data(file):
    package, _, path = file.partition(':')
    cfg = Config.fromfile(Path(import_module(package).__file__).parent / '.mim/configs' / path)
    checked = 0
    for loop in ('train', 'val'):
        for dataset in leaves(cfg[f'{loop}_dataloader']['dataset'], 'dataset', 'datasets'):
            cls = checks._lookup(DATASETS, cfg, dataset['type'])
            if checks._is_coco(cls) or hasattr(cls, 'get_label_map'):
                checked += 1
                assert list(checks._Dataset(cfg, loop, dataset).head_faults(cls)) == []
    assert checked


def test_heads_of_things_count_things(monkeypatch):
    """The counterpart: with one class of things more, the heads of the same config do not fit."""
    file = FAMILIES[0].partition(':')[2]
    cfg = Config.fromfile(Path(import_module('mmdet').__file__).parent / '.mim/configs' / file)
    cls, dataset = checks._lookup(DATASETS, cfg, 'CocoPanopticDataset'), cfg.train_dataloader.dataset
    things = (*cls.METAINFO['thing_classes'], 'unicorn')
    dataset.metainfo = dict(thing_classes=things)
    found = list(checks._Dataset(cfg, 'train', dataset).head_faults(cls))
    assert [one.id for one in found] == ['roi_head.bbox_head', 'roi_head.mask_head']
    assert 'num_classes=80, and the train data set 81 classes of things' in found[0].text


def test_errors_stop_a_run_and_warnings_do_not(data):
    data.annotation()['bbox'] = [1, 1, 5, 0]
    warnings = data.check()
    assert [found.severity for found in warnings] == ['warning']
    raise_for(warnings)
    for annotation in data.content['annotations'][2:12]:
        annotation['category_id'] = 99
    with pytest.raises(ValueError, match='the data has 10 faults') as caught:
        raise_for(data.check())
    said = str(caught.value)
    assert f'{data.file}: annotation {data.content["annotations"][2]["id"]} of image' in said
    assert 'and 7 more' in said
    assert 'box-no-area' not in said
    assert 'tools/check_data.py CONFIG --json FILE' in said


@pytest.mark.skipif(not SAMPLES, reason='DENSEKIT_SAMPLES names no folder of sample photographs')
def test_real_photographs_have_no_faults():
    root = f'{SAMPLES}/coco_val2017_sample/'
    file = 'annotations/instances_val2017.json'
    dataset = dict(type='CocoDataset', data_root=root, ann_file=file, data_prefix=dict(img='val2017/'), pipeline=LOAD)
    dataset['filter_cfg'] = dict(filter_empty_gt=True)
    metric = dict(type='CocoMetric', ann_file=root + file, metric=['bbox', 'segm'])
    loaders = dict(train_dataloader=dict(dataset=dataset), val_dataloader=dict(dataset=dict(dataset, test_mode=True)))
    cfg = Config(dict(default_scope='mmdet', **loaders, val_evaluator=metric))
    assert check_data(cfg, ('val',), decode=True) == []
    # Two photographs do not show all 80 classes, which is all that is said of training on them.
    assert {found.kind for found in check_data(cfg, decode=True)} == {'class-unused'}
