"""Missing data is named before a run, all of it at once."""

import shutil
from pathlib import Path

import pytest
from mmengine.config import Config

from densekit.data.locate import check_dataset_files

COCO_FILES = ('annotations/instances_train2017.json', 'annotations/instances_val2017.json')
ADE_FOLDERS = ('images/training', 'images/validation', 'annotations/training', 'annotations/validation')


def fill(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / 'one').touch()


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty current folder, as relative paths start there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def coco_home(home) -> Path:
    for split in ('train2017', 'val2017'):
        fill(home / 'data/coco' / split)
    fill(home / 'data/coco/annotations')
    for file in COCO_FILES:
        (home / 'data/coco' / file).touch()
    return home


def coco_dataset(split: str = 'train', **changes) -> dict:
    cfg = {
        'type': 'CocoDataset',
        'data_root': 'data/coco/',
        'ann_file': f'annotations/instances_{split}2017.json',
        'data_prefix': {'img': f'{split}2017/', 'seg': None, 'other': ''},
        'backend_args': None,
    }
    return cfg | changes


def ade_dataset(split: str = 'training') -> dict:
    return {
        'type': 'ADE20KDataset',
        'data_root': 'data/ade/ADEChallengeData2016',
        'data_prefix': {'img_path': f'images/{split}', 'seg_map_path': f'annotations/{split}'},
    }


def config(train: dict, val: dict | None = None, evaluator=None) -> Config:
    cfg = {'train_dataloader': {'batch_size': 2, 'dataset': train}}
    if val is not None:
        cfg['val_dataloader'] = {'dataset': val}
    if evaluator is not None:
        cfg['val_evaluator'] = evaluator
    return Config(cfg)


def coco_config() -> Config:
    metric = {'type': 'CocoMetric', 'ann_file': 'data/coco/' + COCO_FILES[1]}
    return config(coco_dataset(), coco_dataset('val'), metric)


def message(cfg, **kwargs) -> str:
    with pytest.raises(FileNotFoundError) as error:
        check_dataset_files(cfg, **kwargs)
    return str(error.value)


def missing(text: str) -> list[str]:
    """The paths that a message lists as missing."""
    return [line.split(':')[0].strip() for line in text.splitlines() if ' of ' in line]


def test_no_coco_at_all(home):
    text = message(coco_config())
    expected = ['data/coco', 'data/coco/' + COCO_FILES[0], 'data/coco/train2017']
    assert missing(text) == [*expected, 'data/coco/' + COCO_FILES[1], 'data/coco/val2017']
    layout = text.partition('COCO 2017 is expected as\n  data/coco/\n')[2]
    for entry in (*COCO_FILES, 'train2017/', 'val2017/', 'annotations_trainval2017.zip', 'cocodataset.org/#download'):
        assert entry in layout
    assert str(home) in text
    assert text.count('expected as') == 1


def test_complete_coco(coco_home):
    check_dataset_files(coco_config())
    check_dataset_files(coco_config().to_dict())


def test_only_what_is_missing_is_listed(coco_home):
    shutil.rmtree(coco_home / 'data/coco/val2017')
    (coco_home / 'data/coco' / COCO_FILES[0]).unlink()
    text = message(coco_config())
    assert missing(text) == ['data/coco/' + COCO_FILES[0], 'data/coco/val2017']
    assert 'no such file (train_dataloader.dataset, ann_file of CocoDataset)' in text
    assert 'no such folder (val_dataloader.dataset, data_prefix.img of CocoDataset)' in text


def test_an_empty_folder_is_missing_data(coco_home):
    (coco_home / 'data/coco/val2017/one').unlink()
    assert 'data/coco/val2017: an empty folder' in message(coco_config())


def test_loops(coco_home):
    cfg = coco_config()
    cfg.test_dataloader = {'dataset': coco_dataset(ann_file='annotations/image_info_test2017.json')}
    check_dataset_files(cfg)
    text = message(cfg, loops=['test'])
    assert missing(text) == ['data/coco/annotations/image_info_test2017.json']
    assert 'cocodataset.org' not in text  # the layout would not help with a file of another name


def test_ade20k(home):
    cfg = config(ade_dataset(), ade_dataset('validation'), {'type': 'IoUMetric', 'iou_metrics': ['mIoU']})
    text = message(cfg)
    root = 'data/ade/ADEChallengeData2016'
    assert set(missing(text)) == {root, *(f'{root}/{folder}' for folder in ADE_FOLDERS)}
    assert f'expected as\n  {root}/\n    images/training/\n' in text
    assert 'http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip' in text
    for folder in ADE_FOLDERS:
        fill(home / root / folder)
    check_dataset_files(cfg)


@pytest.mark.parametrize('name', ['CocoDataset', 'mmdet.CocoDataset', type('CocoDataset', (), {})])
def test_ways_to_name_a_type(home, name):
    text = message({'train_dataloader': {'dataset': coco_dataset(type=name)}})
    assert 'of CocoDataset' in text and 'cocodataset.org' in text


def test_wrappers_are_looked_into(coco_home):
    inner = coco_dataset(data_root='elsewhere')
    mixed = {'type': 'MultiImageMixDataset', 'dataset': {'type': 'RepeatDataset', 'times': 2, 'dataset': inner}}
    cfg = config({'type': 'ConcatDataset', 'datasets': [coco_dataset(), mixed]})
    assert set(missing(message(cfg))) == {'elsewhere', f'elsewhere/{COCO_FILES[0]}', 'elsewhere/train2017'}


@pytest.mark.parametrize('wrap', [lambda m: [m], lambda m: {'type': 'MultiDatasetsEvaluator', 'metrics': [m]}])
def test_evaluators_in_lists(coco_home, wrap):
    metric = {'type': 'mmdet.CocoMetric', 'ann_file': f'elsewhere/{COCO_FILES[1]}'}
    text = message(config(coco_dataset(), coco_dataset('val'), wrap(metric)))
    assert missing(text) == [f'elsewhere/{COCO_FILES[1]}']
    assert 'expected as\n  elsewhere/\n' in text


def test_absolute_paths_stay(coco_home, tmp_path):
    absolute = coco_dataset(ann_file=str(tmp_path / 'lists/mine.json'), data_prefix={'img': str(tmp_path / 'pictures')})
    assert missing(message(config(absolute))) == [str(tmp_path / 'lists/mine.json'), str(tmp_path / 'pictures')]


def test_other_data_sets_get_a_general_message(home):
    balloons = coco_dataset(data_root='balloons', ann_file='train.json', data_prefix={'img': 'train/'})
    voc = {'type': 'VOCDataset', 'data_root': 'data/VOCdevkit/', 'ann_file': 'VOC2007/ImageSets/Main/test.txt'}
    text = message(config(balloons, voc))
    assert missing(text)[:3] == ['balloons', 'balloons/train.json', 'balloons/train']
    assert 'data/VOCdevkit/VOC2007/ImageSets/Main/test.txt' in text
    assert 'change these paths' in text and 'Download' not in text


def test_generated_data_is_not_looked_for(home):
    shapes = {
        'type': 'ShapesDetDataset',
        'data_root': 'data/shapes',
        'ann_file': 'coco/annotations/instances_train.json',
        'data_prefix': {'img': 'coco/train/'},
    }
    metric = {'type': 'CocoMetric', 'ann_file': 'data/shapes/coco/annotations/instances_val.json'}
    check_dataset_files(config({'type': 'RepeatDataset', 'dataset': shapes}, shapes, metric))
    metric['ann_file'] = 'data/shapes2/coco/annotations/instances_val.json'
    assert missing(message(config(shapes, shapes, metric))) == [metric['ann_file']]


@pytest.mark.parametrize(
    'changes', [{'data_root': 's3://bucket/coco/'}, {'backend_args': {'backend': 'petrel', 'path_mapping': {}}}]
)
def test_remote_storage_is_passed_over(home, changes):
    check_dataset_files(config(coco_dataset(**changes)))
    assert missing(message(config(coco_dataset(backend_args={'backend': 'local'}))))


def test_a_config_without_data(home):
    check_dataset_files(Config({'model': {'type': 'X'}, 'train_dataloader': None}))
