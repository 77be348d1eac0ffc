"""tools/convert_data.py and densekit.data.convert: known boxes in every format, and every wrong file named."""

import importlib.util
import json
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from densekit.data.convert import convert, polygon_area

HOTCOCO = importlib.util.find_spec('hotcoco') is not None
needs_hotcoco = pytest.mark.skipif(not HOTCOCO, reason='hotcoco is not installed')

VOC = """<annotation><filename>{file}</filename>
<size><width>{width}</width><height>{height}</height><depth>3</depth></size>{objects}</annotation>"""
OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult>
<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"""


def save(path, width=100, height=80, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (width, height)).save(path, **options)


@pytest.fixture
def images(tmp_path):
    """Two images, one of them in a folder, of different sizes."""
    save(tmp_path / 'images/a.jpg')
    save(tmp_path / 'images/sub/b c.png', 64, 48)
    return tmp_path / 'images'


def voc(folder, name, objects, file, width=100, height=80):
    folder.mkdir(parents=True, exist_ok=True)
    text = VOC.format(file=file, width=width, height=height, objects=''.join(OBJECT.format(**o) for o in objects))
    (folder / f'{name}.xml').write_text(text, encoding='utf-8')


def box(name, x1, y1, x2, y2, difficult=0):
    return dict(name=name, x1=x1, y1=y1, x2=x2, y2=y2, difficult=difficult)


def read(path):
    """As pycocotools reads it: names of classes, boxes and crowds by file."""
    coco = COCO(str(path))
    names = {category['id']: category['name'] for category in coco.loadCats(coco.getCatIds())}
    return {
        image['file_name']: [
            (names[a['category_id']], a['bbox'], a['iscrowd']) for a in coco.loadAnns(coco.getAnnIds([image['id']]))
        ]
        for image in coco.loadImgs(coco.getImgIds())
    }


def test_voc_counts_pixels_from_one(tool, tmp_path, images, capsys):
    labels = tmp_path / 'labels'
    voc(labels, 'a', [box('red cat', 1, 1, 100, 80), box('dög', 11, 21, 20, 21, difficult=1)], 'a.jpg')
    voc(labels, 'b', [], 'b c.png', 64, 48)
    out = tmp_path / 'out/coco.json'
    assert tool('convert_data', 'voc', '--annotations', labels, '--images', images, '--out', out) == 0
    assert '2 images, 2 objects (0 with a mask), classes dög, red cat' in capsys.readouterr().out
    assert read(out) == {
        'a.jpg': [('red cat', [0, 0, 100, 80], 0), ('dög', [10, 20, 10, 1], 1)],
        'sub/b c.png': [],
    }
    image = next(i for i in json.loads(out.read_text('utf-8'))['images'] if i['file_name'] == 'sub/b c.png')
    assert (image['width'], image['height']) == (64, 48)


def test_yolo_gives_shares_around_the_centre(tool, tmp_path, images, capsys):
    labels = tmp_path / 'labels'
    (labels / 'sub').mkdir(parents=True)
    (labels / 'a.txt').write_text('1 0.5 0.25 0.5 0.25\n\n0 0.1 0.1 0.3 0.1 0.3 0.5\n')
    (tmp_path / 'data.yaml').write_text('names: {0: red cat, 1: dög}\nnc: 2\n', encoding='utf-8')
    out = tmp_path / 'coco.json'
    assert tool('convert_data', 'yolo', '--annotations', labels, '--images', images, '--out', out) == 0
    shown = capsys.readouterr().out
    assert '2 images, 2 objects (1 with a mask), classes red cat, dög' in shown
    assert '1 images have no text file' in shown
    found = read(out)
    assert found['sub/b c.png'] == []
    (name, first, _), (other, second, _) = found['a.jpg']
    assert (name, other) == ('dög', 'red cat')
    # Centre 50, 20 and size 50 x 20 in an image of 100 x 80.
    np.testing.assert_allclose(first, [25, 10, 50, 20])
    np.testing.assert_allclose(second, [10, 8, 20, 32])
    content = json.loads(out.read_text('utf-8'))
    np.testing.assert_allclose(content['annotations'][1]['segmentation'], [[10, 8, 30, 8, 30, 40]])
    assert content['annotations'][1]['area'] == pytest.approx(20 * 32 / 2)


def test_labelme_shapes(tool, tmp_path, images):
    labels = tmp_path / 'labels'
    labels.mkdir()
    shapes = [
        dict(label='red cat', shape_type='polygon', points=[[10, 10], [30.5, 10], [30.5, 20]], group_id=None),
        dict(label='dög', shape_type='rectangle', points=[[50, 60], [40, 45]]),
        dict(label='part', shape_type='polygon', points=[[0, 0], [4, 0], [4, 4], [0, 4]], group_id=7),
        dict(label='part', shape_type='polygon', points=[[10, 0], [14, 0], [14, 4], [10, 4]], group_id=7),
        dict(label='ball', shape_type='circle', points=[[50, 40], [60, 40]]),
    ]
    content = dict(imagePath='..\\images\\a.jpg', imageWidth=100, imageHeight=80, imageData=None, shapes=shapes)
    (labels / 'a.json').write_text(json.dumps(content))
    content = dict(imagePath='b c.png', imageWidth=64, imageHeight=48, shapes=[])
    (labels / 'b.json').write_text(json.dumps(content))
    out = tmp_path / 'coco.json'
    assert tool('convert_data', 'labelme', '--annotations', labels, '--images', images, '--out', out) == 0
    found = {name: box for name, box, _ in read(out)['a.jpg']}
    assert found['red cat'] == [10, 10, 20.5, 10]
    assert found['dög'] == [40, 45, 10, 15]
    assert found['part'] == [0, 0, 14, 4]
    np.testing.assert_allclose(found['ball'], [40, 30, 20, 20])
    coco = COCO(str(out))
    areas = {coco.cats[a['category_id']]['name']: (a['area'], coco.annToMask(a).sum()) for a in coco.anns.values()}
    assert areas['red cat'][0] == 20.5 * 10 / 2
    assert areas['part'] == (32, 32)
    assert areas['ball'][0] == pytest.approx(np.pi * 100, rel=0.002)
    assert all(abs(area - pixels) < 12 for area, pixels in areas.values())


def wrong_voc(labels):
    voc(labels, 'reversed', [box('cat', 30, 1, 20, 5)], 'a.jpg')
    voc(labels, 'other_size', [], 'a.jpg', 80, 100)
    voc(labels, 'no_image', [], 'none.jpg')
    voc(labels, 'no_number', [box('cat', 'one', 1, 20, 5)], 'a.jpg')
    (labels / 'cut.xml').write_text('<annotation><filename>a.jpg')
    (labels / 'html.xml').write_text('<html></html>')
    return 6, {
        'reversed.xml': 'ends before it begins',
        'other_size.xml': 'it says 80 x 100 pixels, and its image a.jpg has 100 x 80',
        'no_image.xml': 'its image none.jpg is not below',
        'no_number.xml': "the <bndbox> of a 'cat' has one, 1, 20, 5",
        'cut.xml': 'no XML',
        'html.xml': '<html> where Pascal VOC has <annotation>',
    }


def wrong_yolo(labels):
    (labels / 'classes.txt').write_text('cat\ndog\n')
    (labels / 'a.txt').write_text('0 0.5 0.5 0.5 0.5\n2 0.5 0.5 0.5 0.5\n')
    (labels / 'none.txt').write_text('')
    (labels / 'sub').mkdir()
    (labels / 'sub/b c.txt').write_text('0 12 12 5 5\n')
    return 3, {
        'a.txt': "line 2, '2 0.5 0.5 0.5 0.5': class 2; there are 0 to 1: cat, dog",
        'none.txt': 'there is no image of this name',
        'b c.txt': "line 1, '0 12 12 5 5': a number below 0 or above 1",
    }


def wrong_labelme(labels):
    def put(name, content):
        (labels / f'{name}.json').write_text(json.dumps(content))

    put('line', dict(imagePath='a.jpg', shapes=[dict(label='cat', shape_type='line', points=[[0, 0], [1, 1]])]))
    put('size', dict(imagePath='a.jpg', imageWidth=1, imageHeight=2, shapes=[]))
    put('coco', dict(images=[], annotations=[], categories=[]))
    put('points', dict(imagePath='a.jpg', shapes=[dict(label='cat', points=[[0, 'x']])]))
    (labels / 'cut.json').write_text('{"shapes": [')
    return 5, {
        'line.json': "a 'cat' (shape number 0) is a line of 2 points",
        'size.json': 'it says 1 x 2 pixels, and its image a.jpg has 100 x 80',
        'coco.json': 'no shapes in it',
        'points.json': "the points of a 'cat' (shape number 0) are no pairs of numbers",
        'cut.json': 'no JSON',
    }


@pytest.mark.parametrize('make', [wrong_voc, wrong_yolo, wrong_labelme])
def test_every_wrong_file_is_named(tool, tmp_path, images, capsys, make):
    labels = tmp_path / 'labels'
    labels.mkdir()
    number, expected = make(labels)
    kind = make.__name__.removeprefix('wrong_')
    out = tmp_path / 'coco.json'
    assert tool('convert_data', kind, '--annotations', labels, '--images', images, '--out', out) == 2
    said = capsys.readouterr().err
    assert f'{number} annotation files cannot be converted' in said
    lines = {line.split(': ')[0].strip().rpartition('/')[2]: line for line in said.splitlines()}
    for file, text in expected.items():
        assert text in lines[file]
    assert not out.exists()


@pytest.mark.parametrize(
    ('line', 'said'),
    [
        ('0 0.5 0.5 0.5', '3 numbers; a box has 4'),
        ('0 0.5 0.5 0.5 0.5 0.9', 'this looks like a prediction'),
        ('cat 0.5 0.5 0.5 0.5', 'wanted are the number of a class'),
        ('0 0.1 0.1 0.2 0.2 0.3 0.3 0.4', '7 numbers'),
        ('-1 0.5 0.5 0.5 0.5', 'class -1'),
        ('0 nan 0.5 0.5 0.5', 'a number below 0 or above 1'),
    ],
)
def test_wrong_lines_of_yolo(tmp_path, images, line, said):
    labels = tmp_path / 'labels'
    labels.mkdir()
    (labels / 'a.txt').write_text(f'{line}\n')
    with pytest.raises(ValueError, match=said):
        convert('yolo', str(labels), str(images), ['cat'])


def test_folders_that_do_not_fit(tmp_path, images):
    labels = tmp_path / 'labels'
    labels.mkdir()
    with pytest.raises(FileNotFoundError, match=r'no file in it ends in \.xml'):
        convert('voc', str(labels), str(images))
    with pytest.raises(FileNotFoundError, match='no such folder'):
        convert('voc', str(labels), str(tmp_path / 'none'))
    (labels / 'other.txt').write_text('')
    with pytest.raises(ValueError, match='classes are not known'):
        convert('yolo', str(labels), str(images))
    with pytest.raises(ValueError, match=r'none of the 2 images .* has a text file of its name'):
        convert('yolo', str(labels), str(images), ['cat'])
    voc(labels, 'a', [box('cat', 1, 1, 2, 2)], 'a.jpg')
    with pytest.raises(ValueError, match="'cat' is none of the classes: dog"):
        convert('voc', str(labels), str(images), ['dog'])


def test_images_of_one_name(tmp_path, images):
    save(images / 'other/a.jpg')
    voc(tmp_path / 'labels', 'one', [], 'other/a.jpg')
    content, _ = convert('voc', str(tmp_path / 'labels'), str(images))
    assert [image['file_name'] for image in content['images']] == ['other/a.jpg']
    voc(tmp_path / 'labels', 'two', [], 'a.png')
    with pytest.raises(ValueError, match=r'its image a\.png is not below'):
        convert('voc', str(tmp_path / 'labels'), str(images))
    voc(tmp_path / 'labels', 'two', [], 'elsewhere/a.jpg')
    with pytest.raises(ValueError, match=r'2 images below .* are named so'):
        convert('voc', str(tmp_path / 'labels'), str(images))


def test_images_are_measured_as_loaders_turn_them(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    save(tmp_path / 'images/turned.jpg', 100, 80, exif=exif)
    (tmp_path / 'images/turned.txt').write_text('0 0.5 0.5 0.5 0.5\n')
    content, _ = convert('yolo', str(tmp_path / 'images'), None, ['cat'])
    assert (content['images'][0]['width'], content['images'][0]['height']) == (80, 100)
    assert content['annotations'][0]['bbox'] == [20, 25, 40, 50]


def test_colours(tool, tmp_path, capsys):
    """The most frequent colour is 0; palettes and shades of grey are colours."""
    rgb = np.zeros((4, 6, 3), np.uint8)
    rgb[:2, :2] = 200, 10, 10
    rgb[3, 5] = 0, 0, 255
    folder = tmp_path / 'maps'
    (folder / 'sub').mkdir(parents=True)
    Image.fromarray(rgb).save(folder / 'a.png')
    Image.fromarray(rgb).quantize(3).save(folder / 'sub/b.bmp')
    Image.fromarray(np.full((2, 2), 0, np.uint8)).save(folder / 'c.png')
    arguments = ['colours', '--annotations', folder, '--out', tmp_path / 'labels']
    assert tool('convert_data', *arguments) == 0
    shown = capsys.readouterr().out
    assert '3 label maps, 3 classes' in shown
    assert '1  was (200, 10, 10), 15.38 % of the pixels' in shown
    expected = np.zeros((4, 6), np.uint8)
    expected[:2, :2], expected[3, 5] = 1, 2
    for name in ('a.png', 'sub/b.png'):
        with Image.open(tmp_path / 'labels' / name) as image:
            assert image.mode == 'L'
            np.testing.assert_array_equal(np.asarray(image), expected)
    assert tool('convert_data', *arguments) == 2
    assert 'is there already' in capsys.readouterr().err


def test_shades_of_grey_keep_their_order(tool, tmp_path, capsys):
    labels = np.full((4, 4), 255, np.uint8)
    labels[0, :3] = 0, 100, 100
    (tmp_path / 'maps').mkdir()
    Image.fromarray(labels).save(tmp_path / 'maps/a.png')
    assert tool('convert_data', 'colours', '--annotations', tmp_path / 'maps', '--out', tmp_path / 'labels') == 0
    assert '2  was (255, 255, 255), 81.25 % of the pixels' in capsys.readouterr().out
    with Image.open(tmp_path / 'labels/a.png') as image:
        np.testing.assert_array_equal(np.asarray(image), np.searchsorted([0, 100, 255], labels))


@pytest.mark.parametrize(
    ('suffix', 'said'), [('.jpg', 'JPEG files do not keep the colours'), ('.png', 'more than 255')]
)
def test_wrong_colours(tool, tmp_path, capsys, suffix, said):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    (tmp_path / 'maps').mkdir()
    Image.fromarray(noise).save(tmp_path / f'maps/a{suffix}')
    out = tmp_path / 'labels'
    assert tool('convert_data', 'colours', '--annotations', tmp_path / 'maps', '--out', out) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_polygon_area():
    assert polygon_area([0, 0, 4, 0, 4, 3, 0, 3]) == 12
    assert polygon_area([0, 0, 0, 3, 4, 3]) == 6


@needs_hotcoco
@pytest.mark.parametrize('kind', ['voc', 'yolo'])
def test_boxes_written_by_hotcoco_come_back(tiny, tmp_path, kind):
    """An independent writer of both formats, on the generated pictures; it rounds VOC's corners to whole pixels."""
    from hotcoco import COCO as HotCOCO

    source = str(tiny.data / 'coco/annotations/instances_train.json')
    getattr(HotCOCO(source), f'to_{kind}')(str(tmp_path / 'out'))
    content, _ = convert(kind, str(tmp_path / 'out'), str(tiny.data / 'coco/train'))
    (tmp_path / 'back.json').write_text(json.dumps(content))
    expected, found = read(source), read(tmp_path / 'back.json')
    assert found.keys() == expected.keys()
    for file, objects in expected.items():
        kept = sorted(o for o in objects if kind == 'voc' or not o[2])  # YOLO has no crowds
        back = sorted(found[file])
        assert [o[0] for o in back] == [o[0] for o in kept]
        assert [o[2] for o in back] == [o[2] for o in kept]
        np.testing.assert_allclose([o[1] for o in back], [o[1] for o in kept], atol=0.001)


@needs_hotcoco
def test_hotcoco_reads_voc_as_we_do(tmp_path, images):
    from hotcoco import COCO as HotCOCO

    labels = tmp_path / 'labels'
    voc(labels, 'a', [box('cat', 3, 5, 40, 44), box('dog', 11.5, 21, 20, 30, difficult=1)], 'a.jpg')
    content, _ = convert('voc', str(labels), str(images))
    theirs = HotCOCO.from_voc(str(labels)).dataset
    for key in ('bbox', 'area', 'iscrowd', 'category_id', 'image_id'):
        assert [a[key] for a in content['annotations']] == [a[key] for a in theirs['annotations']]
    assert ElementTree.parse(labels / 'a.xml').findtext('filename') == content['images'][0]['file_name']
