"""Files of one's own as they come: long lists of classes, odd encodings, folders that cannot be read, old results."""

import json
import os
from pathlib import Path

import densekit.ops  # noqa: F401  before mmdet

# isort: split
import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from densekit.data import convert as convert_module
from densekit.data.coco_file import read_coco
from densekit.data.convert import convert
from densekit.data.faults import describe
from densekit.data.own_recipe import BASES, Part, Recipe, config_text
from densekit.engine.config import load_config

pytestmark = pytest.mark.usefixtures('quick_mmengine')

ROOT = Path(__file__).parents[2]
HYPHENS = (*(f'long-haired cat-o-nine-tails {i}' for i in range(9)), 'b' * 130, "it's a", 'c, d', 'Müll', 'x - y', 'q')


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def yolo(tmp_path):
    """Makes sets/mine with two images and text files, of which the text can be given."""

    def make(text='1 0.5 0.5 0.5 0.5\n', names=('a.jpg', 'b.jpg')):
        for folder in ('images', 'labels'):
            Path('sets/mine', folder).mkdir(parents=True)
        for name in names:
            Image.new('RGB', (100, 80)).save(Path('sets/mine/images', name))
            Path('sets/mine/labels', name).with_suffix('.txt').write_text(text, encoding='utf-8')

    return make


def converted(classes=None):
    return convert('yolo', 'sets/mine/labels', 'sets/mine/images', classes)


def change(edit):
    content = json.loads(Path('photos.json').read_text())
    edit(content)
    Path('photos.json').write_text(json.dumps(content))


# --- the config


@pytest.mark.parametrize('classes', [CocoDataset.METAINFO['classes'], HYPHENS], ids=['coco', 'hyphens'])
def test_many_classes_are_written_whole(classes, tmp_path):
    """On several lines, none of which breaks within a name."""
    colours = tuple((i, 255 - i, 7) for i in range(len(classes)))
    part = Part(5000, '/none', '/none')
    recipe = Recipe('detection', 't', tuple(classes), colours, part, part, 8)
    path = tmp_path / 'my.py'
    text = config_text(recipe, str(ROOT / BASES['detection']), 'python tools/train.py')
    path.write_text(text, encoding='utf-8')
    cfg = load_config(str(path))
    assert cfg.metainfo.classes == tuple(classes)
    assert [tuple(colour) for colour in cfg.metainfo.palette] == list(colours)
    assert all(len(line) <= 120 for line in text.splitlines() if 'b' * 130 not in line)


def test_a_config_that_cannot_be_read_leaves_nothing(tool, photos, monkeypatch, capsys):
    monkeypatch.setattr('densekit.data.own_recipe._schedule', lambda recipe: ["'"])
    before = set(Path().iterdir())
    assert tool('new_config', '--images', photos, '--annotations', 'photos.json', '--out', 'my.py') == 2
    assert 'cannot be read' in capsys.readouterr().err
    assert set(Path().iterdir()) == before


def test_images_count_that_show_the_classes_asked_for(tool, photos, capsys):
    """As mmdet counts them: of the others it trains on none."""

    def edit(content):  # circles on two images to train on and one to validate
        for a in content['annotations']:
            a['category_id'] = 2
            a['iscrowd'] = 0
        for i in (0, 3, 6):
            image = content['images'][i]['id']
            next(a for a in content['annotations'] if a['image_id'] == image)['category_id'] = 1

    change(edit)
    options = ['--classes', 'circle', '--val-fraction', '0.3', '--out', 'my.py']
    assert tool('new_config', '--images', photos, '--annotations', 'photos.json', *options) == 0
    shown = capsys.readouterr().out
    cfg = load_config('my.py')
    init_default_scope('mmdet')
    built = len(DATASETS.build(cfg.train_dataloader.dataset))
    assert built == 2
    assert 'which training leaves out: 4' in shown
    text = Path('my.py').read_text()
    assert f'each of the {built} images about {cfg.max_iters * 4 / built:.0f} times' in text
    val = json.loads(Path('my_val.json').read_text())
    assert sum(a['category_id'] == 1 for a in val['annotations']) == 1


def test_masks_on_some_objects(tool, photos, capsys):
    change(lambda content: [a.pop('segmentation') for a in content['annotations'][::3]])
    given = ['--images', photos, '--annotations', 'photos.json', '--out', 'my.py']
    assert tool('new_config', *given) == 1
    assert 'from the boxes of all objects and from no masks, add --boxes-only' in capsys.readouterr().out
    assert tool('new_config', *given, '--boxes-only') == 0


@pytest.mark.parametrize(
    ('name', 'said'),
    [
        ('C:\\Users\\me\\{}', 'are there under another name, such as 00'),
        ('{}.JPG', 'Upper and lower case have to be the same'),
        ('other_{}', 'annotation file of another data set?'),
    ],
)
def test_names_of_another_machine(tool, photos, capsys, name, said):
    def edit(content):
        for image in content['images']:
            file = image['file_name']
            image['file_name'] = name.format(file.removesuffix('.jpg') if '.JPG' in name else file)

    change(edit)
    assert tool('new_config', '--images', photos, '--annotations', 'photos.json') == 2
    assert said in capsys.readouterr().err


def test_a_coco_file_with_a_byte_order_mark(tmp_path):
    """pycocotools would stop at it later."""
    path = tmp_path / 'bom.json'
    path.write_text('{"images": [], "annotations": [], "categories": []}', encoding='utf-8-sig')
    said = describe(read_coco(str(path)).faults)
    assert 'byte order mark' in said and 'without BOM' in said


# --- nothing is written over


def test_no_file_is_written_over(tool, yolo, capsys):
    yolo()
    given = ['--annotations', 'sets/mine/labels', '--images', 'sets/mine/images', '--classes', 'cat', 'dog']
    Path('q.json').write_text('mine')
    assert tool('convert_data', 'yolo', *given, '--out', 'q.json') == 2
    assert '--out q.json is there already; give another name, or --overwrite' in capsys.readouterr().err
    assert Path('q.json').read_text() == 'mine'
    assert tool('convert_data', 'yolo', *given, '--out', 'q.json', '--overwrite') == 0
    Path('my_annotations.json').write_text('mine')
    assert tool('new_config', *given, '--format', 'yolo', '--out', 'my.py') == 2
    assert 'my_annotations.json is there already' in capsys.readouterr().err
    assert Path('my_annotations.json').read_text() == 'mine'


def test_a_folder_for_the_converted_file_is_refused_before_the_work(tool, yolo, capsys, monkeypatch):
    yolo()
    Path('out').mkdir()
    monkeypatch.setattr(convert_module, 'convert', None)
    given = ['--annotations', 'sets/mine/labels', '--images', 'sets/mine/images']
    assert tool('convert_data', 'yolo', *given, '--out', 'out') == 2
    assert '--out out is a folder; give the name of a file, such as out/instances.json' in capsys.readouterr().err


def test_what_was_converted_goes_when_it_is_wrong(tool, yolo, capsys):
    yolo(text='')
    before = set(Path().iterdir())
    given = ['--annotations', 'sets/mine/labels', '--images', 'sets/mine/images', '--classes', 'cat', 'dog']
    assert tool('new_config', *given, '--format', 'yolo', '--out', 'my.py') == 1
    shown = capsys.readouterr().out
    assert 'annotations-none' in shown
    assert 'convert_data.py yolo --annotations sets/mine/labels --images sets/mine/images --out FILE.json' in shown
    assert set(Path().iterdir()) == before


# --- YOLO


def names(content):
    return [category['name'] for category in content['categories']]


def test_names_come_from_the_nearest_file_and_it_is_told(yolo):
    yolo()
    Path('sets/coco.yaml').write_text('names: [person, bicycle]\n')  # of the folder beside it
    with pytest.raises(ValueError, match='classes are not known'):
        converted()
    Path('sets/data.yaml').write_text('names: [a, b]\n')
    content, remarks = converted()
    assert names(content) == ['a', 'b']
    assert f'the classes are those of {Path("sets/data.yaml").absolute()}' in remarks
    Path('sets/mine/any.yaml').write_text("names: {'0': c, '1': d}\n")
    assert names(converted()[0]) == ['c', 'd']
    Path('sets/mine/data.yaml').write_text('names: [e, f]\n')
    assert names(converted()[0]) == ['e', 'f']
    Path('sets/mine/images/classes.txt').write_text('g\nh\n\n')
    assert names(converted()[0]) == ['g', 'h']


def test_a_yaml_of_something_else_is_passed_over(yolo):
    yolo()
    Path('sets/mine/home.yaml').write_text('light: !include lights.yaml\n')
    Path('sets/mine/site.yaml').write_text('names: {7: seven}\n')
    with pytest.raises(ValueError, match=r'classes are not known.*Passed over: .*site\.yaml'):
        converted()
    Path('sets/mine/zoo.yaml').write_text('names: [a, b]\n')
    assert names(converted()[0]) == ['a', 'b']
    Path('sets/mine/data.yaml').write_text('names: !include names.yaml\n')
    with pytest.raises(ValueError, match=r'data\.yaml cannot be read'):
        converted()


def test_an_empty_line_among_the_names(yolo):
    yolo()
    Path('sets/mine/labels/classes.txt').write_text('a\n\nb\n')
    with pytest.raises(ValueError, match=r'classes\.txt: line 2 is empty'):
        converted()


def test_byte_order_marks(yolo):
    yolo(text='\ufeff1 0.5 0.5 0.5 0.5\n')
    Path('sets/mine/labels/classes.txt').write_text('cat\ndog\n', encoding='utf-8-sig')
    content, _ = converted()
    assert names(content) == ['cat', 'dog']
    assert [a['category_id'] for a in content['annotations']] == [2, 2]


def test_numbers_that_were_rounded(yolo):
    yolo(text='1.0 0.5 0.5 1.0000001 1\n0 -0.0000001 0 1 0 1 1.0000005\n')
    content, _ = converted(['cat', 'dog'])
    assert [a['bbox'] for a in content['annotations'][:2]] == [[0, 0, 100, 80], [0, 0, 100, 80]]
    for wrong in ('1.5 0.5 0.5 1 1', '0 0.5 0.5 1.00001 1', 'nan 0.5 0.5 1 1', 'inf 0.5 0.5 1 1'):
        Path('sets/mine/labels/a.txt').write_text(wrong)
        with pytest.raises(ValueError, match='1 annotation files cannot be converted'):
            converted(['cat', 'dog'])


def test_two_images_of_one_text_file(yolo):
    yolo(names=('a.jpg', 'a.png', 'b.jpg'))
    with pytest.raises(ValueError, match=r'a\.txt: it may be of a\.jpg or of a\.png; keep one of them'):
        converted(['cat', 'dog'])
    Path('sets/mine/labels/a.txt').unlink()
    content, remarks = converted(['cat', 'dog'])
    assert len(content['images']) == 3
    assert remarks == ['2 images have no text file: taken as showing none of the classes']


# --- VOC and LabelMe


@pytest.mark.parametrize('least', [0, 1])
def test_voc_that_counts_from_zero_is_remarked(tmp_path, least):
    Image.new('RGB', (100, 80)).save('a.jpg')
    corners = f'<xmin>5</xmin><ymin>{least}</ymin><xmax>9</xmax><ymax>9</ymax>'
    text = f'<annotation><object><name>cat</name><bndbox>{corners}</bndbox></object></annotation>'
    Path('a.xml').write_text(text, encoding='utf-8-sig')
    _, remarks = convert('voc', str(tmp_path))
    assert ['1 objects begin at pixel 0' in remark for remark in remarks] == [True] * (1 - least)


def test_labelme_with_a_byte_order_mark_and_an_odd_group(tmp_path):
    Image.new('RGB', (100, 80)).save('a.jpg')
    shape = dict(label='cat', points=[[1, 1], [5, 1], [5, 5]])
    Path('a.json').write_text(json.dumps(dict(shapes=[shape])), encoding='utf-8-sig')
    assert len(convert('labelme', str(tmp_path))[0]['annotations']) == 1
    Path('a.json').write_text(json.dumps(dict(shapes=[shape | dict(group_id=[1])])))
    with pytest.raises(ValueError, match=r"a\.json: group_id of a 'cat' \(shape number 0\) is \[1\]"):
        convert('labelme', str(tmp_path))


# --- folders


def test_a_folder_that_cannot_be_read_is_not_passed_over(yolo, monkeypatch):
    yolo()
    Path('sets/mine/images/locked').mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith('locked'):
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(PermissionError, match='folder sets/mine/images/locked cannot be read: Permission denied'):
        converted(['cat', 'dog'])


def test_a_wrong_folder_is_called_what_it_was_given_as(tool, photos, capsys):
    assert tool('new_config', '--images', photos, '--masks', 'nope') == 2
    assert 'folder of label maps nope: no such folder' in capsys.readouterr().err
    assert tool('new_config', '--images', 'photos.json', '--annotations', 'photos.json') == 2
    assert 'folder of images photos.json: it is a file' in capsys.readouterr().err


def test_images_of_two_cases_are_to_be_renamed(tool, photos, capsys):
    first, *others = sorted(photos.iterdir())
    first.rename(first.with_suffix('.JPG'))
    Path('maps').mkdir()
    for path in (first, *others):
        Image.new('L', (64, 64)).save(Path('maps', path.name).with_suffix('.png'))
    assert tool('new_config', '--images', photos, '--masks', 'maps') == 2
    assert 'several suffixes (7 .jpg, 1 .JPG); mmseg reads one. Rename them' in capsys.readouterr().err


# --- label maps of many bits


@pytest.mark.parametrize('mode', ['I;16', 'I'])
def test_maps_of_16_and_32_bits_keep_their_values(tool, tmp_path, capsys, mode):
    """As colours all values from 256 on were white."""
    labels = np.repeat(np.arange(0, 1801, 300), 4).reshape(4, 7)
    suffix, kind = ('png', np.uint16) if mode == 'I;16' else ('tif', np.int32)
    Path('maps').mkdir()
    Image.fromarray(labels.astype(kind)).save(f'maps/a.{suffix}')
    with Image.open(f'maps/a.{suffix}') as image:
        assert image.mode.startswith('I')
    assert tool('convert_data', 'colours', '--annotations', 'maps', '--out', 'numbers') == 0
    shown = capsys.readouterr().out
    assert '7 classes' in shown and '6  was 1800, 14.29 % of the pixels' in shown
    with Image.open('numbers/a.png') as image:
        np.testing.assert_array_equal(np.asarray(image), labels // 300)


@pytest.mark.parametrize(
    ('second', 'said'),
    [
        (Image.new('RGB', (7, 4)), 'have 16 or 32 bits, and others have not'),
        (Image.fromarray(np.zeros((4, 7), np.float32)), 'cannot be read as a label map: 32 bits'),
    ],
)
def test_maps_that_are_not_alike(tool, tmp_path, capsys, second, said):
    Path('maps').mkdir()
    Image.fromarray(np.full((4, 7), 300, np.uint16)).save('maps/a.png')
    second.save('maps/b.tif')
    assert tool('convert_data', 'colours', '--annotations', 'maps', '--out', 'numbers') == 2
    assert said in capsys.readouterr().err
    assert not Path('numbers').exists()
