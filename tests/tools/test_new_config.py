"""tools/new_config.py: a config for one's own data that trains, and none for wrong data."""

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from PIL import Image

from densekit.cli import UserError
from densekit.data import new_config as command
from densekit.data import own_detection, own_segmentation
from densekit.data.own_coco import choose
from densekit.data.own_maps import MapData, label_problem
from densekit.data.own_recipe import BASES, SIZES, Part, Recipe, config_text, plan
from densekit.data.own_request import Request
from densekit.engine.config import load_config

pytestmark = pytest.mark.usefixtures('quick_mmengine')

ROOT = Path(__file__).parents[2]
NO_WEIGHTS = ['--cfg-options', 'model.backbone.init_cfg=None']


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def maps(tiny, tmp_path):
    """A folder of images and one of label maps, whose names end in _mask."""
    shutil.copytree(tiny.data / 'ade/images/training', tmp_path / 'pictures')
    shutil.copytree(tiny.data / 'ade/annotations/training', tmp_path / 'labels')
    for path in (tmp_path / 'labels').iterdir():
        path.rename(path.with_name(f'{path.stem}_mask.png'))
    return tmp_path / 'labels'


def change(edit):
    """Changes photos.json."""
    content = json.loads(Path('photos.json').read_text())
    edit(content)
    Path('photos.json').write_text(json.dumps(content))


def rename_categories(content):
    for category, name in zip(content['categories'], NAMES, strict=True):
        category['name'] = name


NAMES = ('red circle', "it's", 'say "cheese"', 'Müll\\eimer', '十字')


def test_detection(tool, photos, capsys):
    change(rename_categories)
    assert tool('new_config', '--images', photos, '--annotations', 'photos.json', '--size', 'n', '--out', 'my.py') == 0
    shown = capsys.readouterr().out
    assert 'photos.json: 8 images, boxes and masks, 5 classes' in shown
    assert '6 images to train on, 2 to validate' in shown
    assert 'red circle' in shown and 'half below' in shown
    cfg = load_config('my.py')
    assert cfg.train_dataloader.dataset.metainfo.classes == NAMES
    assert (
        len(cfg.train_dataloader.dataset.metainfo.palette) == len(set(cfg.val_dataloader.dataset.metainfo.palette)) == 5
    )
    assert cfg.model.roi_head.bbox_head.num_classes == cfg.model.roi_head.mask_head.num_classes == 5
    assert cfg.model.backbone.frozen_stages == 2
    assert cfg.test_evaluator.ann_file == str(Path('my_val.json').absolute())
    parts = [json.loads(Path(f'my_{part}.json').read_text()) for part in ('train', 'val')]
    ids = [{image['id'] for image in part['images']} for part in parts]
    assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == 8
    assert all(a['image_id'] in found for part, found in zip(parts, ids, strict=True) for a in part['annotations'])
    assert sum(len(part['annotations']) for part in parts) == len(
        json.loads(Path('photos.json').read_text())['annotations']
    )
    with Image.open('my.png') as picture:
        assert min(picture.size) > 500
    text = Path('my.py').read_text(encoding='utf-8')
    assert len(text.splitlines()) < 80
    assert '--annotations photos.json --size n --out my.py' in ast.get_docstring(ast.parse(text))
    # The next commands name the checkpoint that the training ends with.
    assert f'predict.py my.py work_dirs/my/iter_{cfg.max_iters}.pth' in shown
    assert 'report.py work_dirs/my\n' in shown
    assert cfg.max_iters % cfg.default_hooks.checkpoint.interval == 0
    assert [line.split()[1].rpartition('/')[2] for line in shown[shown.index('Next:') :].splitlines()[1:]] == [
        'train.py',
        'report.py',
        'predict.py',
    ]
    assert tool('train', 'my.py', '--dry-run', *NO_WEIGHTS) == 0
    assert 'this is a dry run and ends here' in capsys.readouterr().out


def test_boxes_with_data_to_validate(tool, photos, tiny, capsys):
    change(lambda content: [annotation.pop('segmentation') for annotation in content['annotations']])
    shutil.copy(tiny.data / 'coco/annotations/instances_val.json', 'other.json')
    options = ['--val-images', tiny.data / 'coco/val', '--val-annotations', 'other.json', '--batch', '2']
    assert tool('new_config', '--images', photos, '--annotations', 'photos.json', '--size', 'a', *options) == 0
    shown = capsys.readouterr().out
    assert '8 images to train on, 3 to validate (as given)' in shown
    assert 'It starts from convnextv2_atto.fcmae_ft_in1k, whose license is cc-by-nc-4.0' in shown
    (config,) = Path().glob('faster_rcnn_convnextv2_a_*.py')
    assert not list(Path().glob('*_train.json'))
    cfg = load_config(str(config))
    assert cfg.val_evaluator.metric == 'bbox'
    assert cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 2
    assert tool('train', config, '--dry-run', *NO_WEIGHTS) == 0


def test_segmentation(tool, maps, capsys):
    names = ['--classes', 'background', *NAMES]
    options = ['--images', 'pictures', '--masks', 'labels', '--ignore-zero', '--task', 'segmentation', '--out', 'my.py']
    assert tool('new_config', *options, '--size', 'n', *names) == 0
    shown = capsys.readouterr().out
    assert 'labels: 8 label maps (*_mask.png), 6 classes' in shown
    cfg = load_config('my.py')
    for loop, number in (('train', 6), ('val', 2)):
        dataset = cfg[f'{loop}_dataloader'].dataset
        assert dataset.metainfo.classes == ('background', *NAMES)
        assert dataset.reduce_zero_label is True
        assert len(Path(dataset.ann_file).read_text().splitlines()) == number
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == 6
    assert tool('train', 'my.py', '--dry-run', *NO_WEIGHTS) == 0


def test_label_maps_beside_their_images(tool, maps, capsys):
    for path in maps.iterdir():
        with Image.open(path) as image:
            image.save(Path('pictures', path.name))
    for path in Path('pictures').glob('*.jpg'):  # image and label map differ in `_mask` alone
        with Image.open(path) as image:
            image.save(path.with_suffix('.png'))
        path.unlink()
    assert tool('new_config', '--images', 'pictures', '--masks', 'pictures', '--out', 'my.py') == 0
    assert 'pictures: 8 label maps (*_mask.png), 7 classes' in capsys.readouterr().out
    cfg = load_config('my.py')
    listed = Path(cfg.train_dataloader.dataset.ann_file).read_text().split()
    assert len(listed) == 6 and not any('mask' in name for name in listed)


def test_formats(tool, photos, capsys):
    content = json.loads(Path('photos.json').read_text())
    labels = Path('yolo')
    labels.mkdir()
    for image in content['images']:
        lines = []
        for a in content['annotations']:
            if a['image_id'] == image['id'] and not a['iscrowd']:
                x, y, w, h = (value / image['width'] for value in a['bbox'])
                lines.append(f'{a["category_id"] - 1} {x + w / 2} {y + h / 2} {w} {h}\n')
        (labels / image['file_name']).with_suffix('.txt').write_text(''.join(lines))
    options = ['--images', photos, '--annotations', labels, '--format', 'yolo', '--out', 'my.py']
    assert tool('new_config', *options) == 2
    assert 'classes are not known' in capsys.readouterr().err
    spoilt = sorted(labels.glob('*.txt'))[0]
    good = spoilt.read_text()
    spoilt.write_text('0 0.5 0.5 3 0.1\n')
    assert tool('new_config', *options, '--classes', *'abcde') == 2
    assert f'{spoilt}: line 1' in capsys.readouterr().err
    spoilt.write_text(good)
    assert tool('new_config', *options, '--classes', *'abcde') == 0
    assert 'my_annotations.json: 8 images, boxes, 5 classes' in capsys.readouterr().out
    assert load_config('my.py').model.type == 'FasterRCNN'


# --- what a stranger does wrong: files spoilt by a function, arguments, exit status, and what is said


def into_folder():
    Path('photos/day one').mkdir()
    for path in list(Path('photos').glob('*.jpg')):
        path.rename(path.parent / 'day one' / path.name)


def name_with_folder():
    change(lambda c: [image.update(file_name=f'photos/{image["file_name"]}') for image in c['images']])


def other_set():
    change(lambda c: [image.update(file_name=f'IMG_{image["id"]}.jpg') for image in c['images']])


def one_image():
    def edit(content):
        content['images'] = content['images'][:1]
        number = content['images'][0]['id']
        content['annotations'] = [a for a in content['annotations'] if a['image_id'] == number]

    change(edit)


def corners():
    def edit(content):
        for a in content['annotations']:
            x, y, w, h = a['bbox']
            a['bbox'] = [x + w, y + h, -w, -h]

    change(edit)


def nothing():
    pass


DETECTION_MISTAKES = {
    'no such folder': (nothing, ['--images', 'fotos'], 2, 'folder of images fotos: no such folder'),
    'no images': (
        lambda: Path('void').mkdir(),
        ['--images', 'void'],
        2,
        'folder of images void: no file in it ends in',
    ),
    'no file': (nothing, ['--annotations', 'photo.json'], 2, 'annotation file photo.json: no such file'),
    'a folder': (nothing, ['--annotations', 'photos'], 2, 'add --format voc, yolo or labelme'),
    'sub-folder': (into_folder, [], 2, "they are in a folder below. Give that: --images 'photos/day one'"),
    'folder in names': (name_with_folder, [], 2, 'Give the folder above: --images '),
    'another set': (
        other_set,
        [],
        2,
        'it names IMG_1.jpg, IMG_2.jpg, IMG_3.jpg, ..., and the folder has 000000000001.jpg',
    ),
    'an image gone': (lambda: Path('photos/000000000002.jpg').unlink(), [], 1, 'error, 1 x image-missing'),
    'one image': (one_image, [], 2, '1 image cannot be parted'),
    'no annotations': (lambda: change(lambda c: c.update(annotations=[])), [], 1, 'error, 1 x annotations-none'),
    'no images listed': (
        lambda: change(lambda c: c.update(images=[], annotations=[])),
        [],
        2,
        'photos.json has no images',
    ),
    'no categories': (lambda: change(lambda c: c.pop('categories')), [], 1, 'error, 1 x json-layout'),
    'negative boxes': (corners, [], 1, 'x box-negative'),
    'cut off': (lambda: Path('photos.json').write_text('{"images": ['), [], 1, 'it was cut off'),
    'a class of none': (nothing, ['--classes', 'circle', 'trangle'], 1, "the nearest is 'triangle'"),
    'size': (nothing, ['--size', 'tiny'], 2, '--size tiny: choose from a, f, p, n, t, s, b, l, xl, h'),
    'task': (nothing, ['--task', 'segmentation'], 2, '--annotations has objects, which are for detection'),
    'batch': (nothing, ['--batch', '0'], 2, '--batch 0: detection needs 1 or more'),
    'fraction': (nothing, ['--val-fraction', '20'], 2, 'give a part between 0 and 1'),
    'half of a set': (nothing, ['--val-images', 'photos'], 2, '--val-images needs --val-annotations as well'),
    'no Python': (nothing, ['--out', 'my.yaml'], 2, 'end it in .py'),
    'there already': (lambda: Path('my.py').touch(), ['--out', 'my.py'], 2, 'my.py is there already'),
}


@pytest.mark.parametrize('mistake', DETECTION_MISTAKES)
def test_mistakes_with_a_coco_file(tool, photos, capsys, mistake):
    spoil, options, status, said = DETECTION_MISTAKES[mistake]
    spoil()
    before = set(Path().iterdir())
    given = {'--images': 'photos', '--annotations': 'photos.json'}
    arguments = [text for item in given.items() if item[0] not in options for text in item] + options
    assert tool('new_config', *arguments) == status
    shown = capsys.readouterr()
    assert said in (shown.err if status == 2 else shown.out)
    assert ('No config is written' in shown.out) == (status == 1)
    assert 'Traceback' not in shown.err
    assert set(Path().iterdir()) == before


def each_map(edit):
    def spoil():
        for path in Path('labels').iterdir():
            with Image.open(path) as image:
                edit(np.asarray(image)).save(path)

    return spoil


def coloured(labels):
    return Image.fromarray(np.stack([labels * 20] * 3, axis=-1).astype(np.uint8))


def grey(labels):
    return Image.fromarray(np.where(labels > 1, 255, 0).astype(np.uint8))


def shades(labels):
    return Image.fromarray((labels * 40).astype(np.uint8))


def elsewhere():
    for i, path in enumerate(sorted(Path('labels').iterdir())):
        path.rename(path.with_name(f'seg{i}.png'))


def other_suffix():
    with Image.open('pictures/ADE_train_00000001.jpg') as image:
        image.save('pictures/ADE_train_00000001.png')
    Path('pictures/ADE_train_00000001.jpg').unlink()


MAP_MISTAKES = {
    'RGB': (each_map(coloured), [], 1, 'RGB pixels; labels need one channel, or a palette'),
    '0 and 255': (each_map(grey), [], 1, 'hold only 0 and 255, which is never learned or scored'),
    '0 and 255, with names': (
        each_map(grey),
        ['--classes', 'background', 'thing'],
        1,
        'If 255 is a class, `tools/convert_data.py colours --annotations labels --out NEW_FOLDER` writes 0 as 0, '
        '255 as 1',
    ),
    'shades': (each_map(shades), [], 1, 'look like shades of grey and not like numbers of classes'),
    'fewer names': (nothing, ['--classes', 'a', 'b'], 1, 'the 2 names given are for 0 to 1'),
    'no pairs': (elsewhere, [], 2, 'no label map in labels has the name of an image in pictures'),
    'one gone': (lambda: Path('labels/ADE_train_00000003_mask.png').unlink(), [], 1, 'error, 1 x label-missing'),
    'suffixes': (other_suffix, [], 2, 'have several suffixes (7 .jpg, 1 .png)'),
    'batch': (nothing, ['--batch', '1'], 2, 'segmentation needs 2 or more'),
    'task': (nothing, ['--task', 'detection'], 2, '--masks has label maps, which are for segmentation'),
    'format': (nothing, ['--format', 'voc'], 2, 'go with --annotations'),
}


@pytest.mark.parametrize('mistake', MAP_MISTAKES)
def test_mistakes_with_label_maps(tool, maps, capsys, mistake):
    spoil, options, status, said = MAP_MISTAKES[mistake]
    spoil()
    assert tool('new_config', '--images', 'pictures', '--masks', 'labels', *options) == status
    shown = capsys.readouterr()
    assert said in (shown.err if status == 2 else shown.out)
    assert not list(Path().glob('*.py'))


def test_masks_of_0_and_255_as_the_message_says(tool, maps, capsys, monkeypatch):
    """Although 255 is on most pixels, it becomes the second class; without the check it would never be learned."""
    each_map(lambda labels: Image.fromarray(np.where(labels == 1, 0, 255).astype(np.uint8)))()
    given = ['--images', 'pictures', '--classes', 'background', 'thing']
    with monkeypatch.context() as patch:
        patch.setattr(own_segmentation, 'label_problem', lambda *_: '')
        assert tool('new_config', *given, '--masks', 'labels', '--out', 'wrong.py') == 0
    assert 'thing' in capsys.readouterr().out and Path('wrong.py').exists()
    assert tool('new_config', *given, '--masks', 'labels', '--out', 'my.py') == 1
    assert not Path('my.py').exists()
    assert tool('convert_data', 'colours', '--annotations', 'labels', '--out', 'numbers') == 0
    assert tool('new_config', *given, '--masks', 'numbers', '--out', 'my.py') == 0
    for path in Path('labels').iterdir():
        with Image.open(path) as before, Image.open(Path('numbers', path.name)) as after:
            np.testing.assert_array_equal(np.asarray(after), np.asarray(before) == 255)


def test_one_class_suffices_in_the_maps_to_validate():
    def data(*values):
        return MapData('images', 'maps', ['a'], ('.jpg', '.png'), {'a': values})

    names = ('background', 'thing')
    assert 'only 0 and 255' in label_problem(data(0, 255), names, False)
    assert label_problem(data(0, 255), names, False, learned={0, 1}) == ''
    assert label_problem(data(0, 1, 255), names, False) == ''
    assert 'writes 0 as 0, 1 as 1, 255 as 2' in label_problem(data(0, 1, 255), names, True)


def test_without_the_check_a_config_is_written_for_wrong_data(tool, photos, monkeypatch):
    corners()
    monkeypatch.setattr(own_detection, 'raise_for_errors', lambda *given: [])
    assert tool('new_config', '--images', photos, '--annotations', 'photos.json', '--out', 'my.py') == 0
    assert Path('my.py').exists()


def test_what_is_not_wrong(tool, photos, capsys):
    """Category ids from 0, a category without a box, an image without one, warnings."""

    def edit(content):
        for category in content['categories']:
            category['id'] -= 1
        for a in content['annotations']:
            a['category_id'] -= 1
        content['categories'].append({'id': 77, 'name': 'shapes'})
        content['annotations'] = [a for a in content['annotations'] if a['image_id'] != 1]
        content['annotations'][0]['bbox'][2] = 0

    change(edit)
    assert tool('new_config', '--images', photos, '--annotations', 'photos.json', '--out', 'my.py') == 0
    shown = capsys.readouterr().out
    assert 'categories that do not become classes (nothing is annotated as it): shapes' in shown
    assert 'warning, 1 x box-no-area' in shown
    assert load_config('my.py').num_classes == 5


def test_the_same_images_to_validate_are_told(tool, photos, capsys):
    options = ['--val-annotations', 'photos.json', '--out', 'my.py']
    assert tool('new_config', '--images', photos, '--annotations', 'photos.json', *options) == 0
    assert '8 images are both to train on and to validate' in capsys.readouterr().out


def test_a_config_inside_the_checkout_names_its_base_by_a_relative_path(photos, tmp_path):
    checkout = tmp_path / 'checkout'
    checkout.mkdir()
    (checkout / 'configs').symlink_to(ROOT / 'configs')
    out = checkout / 'mine/my.py'
    command.new_config(Request(images=str(photos), annotations='photos.json', out=str(out), checkout=checkout))
    assert "_base_ = '../configs/detection/mask_rcnn_convnext_t_quick_coco.py'" in out.read_text()
    (checkout / 'configs').unlink()
    with pytest.raises(UserError, match='of a densekit checkout'):
        command.new_config(Request(images=str(photos), annotations='photos.json', out='else.py', checkout=checkout))


# --- the recipe


@pytest.mark.parametrize('size', SIZES)
def test_every_size_builds(size, tmp_path):
    tasks = ['boxes', 'segmentation', 'masks'] if size in ('a', 't', 'xl') else ['masks']
    for task in tasks:
        seg = task == 'segmentation'
        recipe = Recipe(
            task='segmentation' if seg else 'detection',
            size=size,
            classes=('a', 'b', 'c'),
            palette=((1, 2, 3), (4, 5, 6), (7, 8, 9)),
            train=Part(5000, '/none', '/none'),
            val=Part(10, '/none', '/none'),
            batch=8,
            masks=task == 'masks',
        )
        path = tmp_path / f'{task}.py'
        path.write_text(config_text(recipe, str(ROOT / BASES[recipe.task]), 'python tools/train.py'))
        cfg = load_config(str(path))
        with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device('meta'):
            model = MODELS.build(cfg.model)
        widths = model.backbone.channels
        if seg:
            assert tuple(model.decode_head.in_channels) == widths
            assert model.auxiliary_head.in_channels == widths[2]
            assert model.decode_head.num_classes == model.auxiliary_head.num_classes == 3
        else:
            assert tuple(model.neck.in_channels) == widths
            assert model.roi_head.bbox_head.num_classes == 3
            assert model.roi_head.with_mask == (task == 'masks')
        assert cfg.model.backbone.frozen_stages == 0
        assert cfg.optim_wrapper.type == ('OptimWrapper' if size in ('l', 'xl', 'h') else 'AutocastOptimWrapper')


def test_the_plan():
    """The quick recipe for what it is made for, and the ends of the range."""
    quick = load_config(str(ROOT / 'configs/detection/mask_rcnn_convnext_t_quick_coco.py'))
    what = plan('detection', 300, 4)
    assert (what.iterations, what.frozen, what.rate) == (quick.max_iters, 2, quick.optim_wrapper.optimizer.lr)
    assert what.warmup == quick.param_scheduler[0].end
    assert plan('detection', 1, 4).iterations == 1000
    assert plan('detection', 118_000, 16).iterations == pytest.approx(118_000 * 12 / 16, rel=0.02)
    assert [plan('detection', n, 4).frozen for n in (999, 1000, 3999, 4000)] == [2, 1, 1, 0]
    assert [plan('detection', 300, batch).rate for batch in (1, 16, 64)] == [2.5e-05, 1e-04, 2e-04]
    for task in ('detection', 'segmentation'):
        for images in (1, 30, 999, 5000, 10**6):
            for batch in (2, 7, 64, 512):
                what = plan(task, images, batch)
                assert 0 < what.warmup <= what.iterations / 10
                assert what.iterations % what.interval == 0 and what.iterations >= 10


def test_the_part_set_aside():
    rng = np.random.default_rng(0)
    contents = [set(rng.choice(3, size=rng.integers(1, 3), replace=False).tolist()) for _ in range(200)]
    for i in (5, 50, 100, 150, 199):
        contents[i] = {9, 0}  # rare
    chosen = choose(contents, 0.2, 0)
    assert sum(chosen) == 40
    assert sum(part and 9 in content for part, content in zip(chosen, contents, strict=True)) == 1
    assert choose(contents, 0.2, 0) == chosen != choose(contents, 0.2, 1)
    assert choose([set(), set()], 0.01, 0).count(True) == choose([set(), set()], 0.99, 0).count(True) == 1
