"""tools/report.py: what the page says is what was logged and measured, and it needs nothing but itself."""

import base64
import contextlib
import copy
import hashlib
import io
import json
import re
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from report_reader import Page

from backbones.files import read_checkpoint
from densekit.data.shapes import generate_shapes
from densekit.evaluation import ExactIoUMetric, coco_engine
from densekit.report.page import predictions
from densekit.report.page.charts import MOST_POINTS, Line, line_chart, thin, ticks
from densekit.report.page.detection import match
from densekit.report.page.gallery import worst_and_best
from densekit.report.page.markup import DASH, MAX_BYTES, MAX_SIDE, Html, picture, tag

pytestmark = pytest.mark.usefixtures('quick_mmengine')
needs_hotcoco = pytest.mark.skipif(find_spec('hotcoco') is None, reason='hotcoco is not installed')

CLASSES = ['circle', 'square', 'triangle', 'star', 'cross']
LOGGED = [
    {'lr': 1e-4 * i, 'loss': 4 - 0.3 * i, 'loss_cls': 1 - 0.1 * i, 'data_time': 0.25, 'time': 0.5 + 0.01 * i, 'iter': i}
    for i in range(1, 9)
]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    generate_shapes(folder, num_train=1, num_val=12, size=64)
    return folder


@pytest.fixture(scope='module')
def truth(data):
    return json.loads((data / 'coco/annotations/instances_val.json').read_text())


@pytest.fixture(scope='module')
def configs(tiny, data):
    """The tiny configs on more validation images, as a run writes them down."""
    made = {}
    for name, file in (('det', tiny.det), ('seg', tiny.seg)):
        cfg = Config.fromfile(file)
        cfg.val_dataloader.dataset.data_root = f'{data}/'
        cfg.val_dataloader.dataset.shapes = dict(num_train=1, num_val=12, size=64)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr('mmengine.config.config.FormatCode', lambda text, **_: (text, True))
            made[name] = cfg.pretty_text
    return made


@pytest.fixture
def work_dir(tmp_path, configs):
    """Makes a work folder with what a run would have logged."""

    def make(config='det', name='run', logged=LOGGED, validated=None):
        folder = tmp_path / name
        (folder / '20250101_000000/vis_data').mkdir(parents=True)
        if config:
            (folder / '20250101_000000/vis_data/config.py').write_text(configs.get(config, config))
        lines = [{**record, 'step': record['iter']} for record in logged]
        lines += [{'coco/bbox_mAP': 0.25, 'step': 8}] if validated is None else validated
        (folder / '20250101_000000/vis_data/scalars.json').write_text('\n'.join(map(json.dumps, lines)) + '\n')
        return folder

    return make


@pytest.fixture
def page(tool, tmp_path):
    """Runs the tool and reads its page."""

    def run(*argv):
        out = tmp_path / 'page.html'
        assert tool('report', *argv, '--out', out) == 0
        return Page(out.read_text(encoding='utf-8'))

    return run


def perfect(truth):
    """The objects as results; crowds left out."""
    return [
        {**{key: a[key] for key in ('image_id', 'category_id', 'bbox')}, 'score': 0.9 - 0.001 * i, 'id_': a['id']}
        for i, a in enumerate(truth['annotations'])
        if not a['iscrowd']
    ]


def noisy(truth, data):
    """Results with masks, of which some are misplaced, of another class, doubled or missing."""
    rng = np.random.default_rng(0)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(data / 'coco/annotations/instances_val.json')
    rows = []
    for annotation in truth['annotations']:
        rle = coco.annToRLE(annotation)
        for _ in range(rng.integers(0, 4)):
            x, y, w, h = annotation['bbox']
            rows.append(
                {
                    'image_id': annotation['image_id'],
                    'category_id': annotation['category_id'] if rng.random() < 0.7 else int(rng.integers(1, 6)),
                    'bbox': [x + rng.normal() * w / 8, y + rng.normal() * h / 8, w, h],
                    'score': float(rng.random()),
                    'segmentation': {'size': list(rle['size']), 'counts': rle['counts'].decode()},
                }
            )
    return rows


def written(path, rows):
    path.write_text(json.dumps([{key: v for key, v in row.items() if key != 'id_'} for row in rows]))
    return path


def reference(data, results, kind, category=None):
    """What pycocotools itself says."""
    rows = json.loads(results.read_text())
    if kind == 'segm':
        rows = [{key: value for key, value in row.items() if key != 'bbox'} for row in rows]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(data / 'coco/annotations/instances_val.json')
        evaluation = COCOeval(coco, coco.loadRes(rows), kind)
        if category:
            evaluation.params.catIds = [category]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def test_scores_and_curves_are_those_of_pycocotools(page, work_dir, truth, data, tmp_path):
    results = written(tmp_path / 'found.json', noisy(truth, data))
    made = page(work_dir(), '--results', results)
    names = ['AP', 'AP50', 'AP75', 'APs', 'APm', 'APl', 'AR@1', 'AR@10', 'AR@100', 'AR_s@100', 'AR_m@100', 'AR_l@100']
    for kind, said in (('bbox', 'box'), ('segm', 'mask')):
        expected = reference(data, results, kind)
        shown = made.tables['COCO figures in %'].column(said)
        assert shown == {name: value if value >= 0 else DASH for name, value in zip(names, expected.stats, strict=True)}
        assert 0.1 < shown['AP'] < 0.9
        table = made.tables[f'run: {said} AP by class in %']
        for label, name in enumerate(CLASSES):
            of_class = reference(data, results, kind, label + 1).stats
            assert table.column('AP')[name] == pytest.approx(of_class[0], abs=1e-12)
            assert table.column('APs')[name] == pytest.approx(of_class[3], abs=1e-12)
            what = {'bbox': 'boxes', 'segm': 'masks'}[kind]
            charts = made.below[f'Precision (up) over recall (right) of {what} by class, with AP50']
            for line, threshold in (('IoU 0.5', 0), ('IoU 0.75', 5)):
                xs, ys = np.array(charts[f'{name} {100 * of_class[1]:.0f}'].values(line)).T
                np.testing.assert_allclose(xs, np.linspace(0, 1, 101), atol=0.001)
                np.testing.assert_allclose(ys, expected.eval['precision'][threshold, :, label, 0, -1], atol=0.001)
    counts = [sum(a['category_id'] == i + 1 and not a['iscrowd'] for a in truth['annotations']) for i in range(5)]
    assert list(made.tables['run: box AP by class in %'].column('objects').values()) == counts


@needs_hotcoco
def test_confusion_and_error_types(page, work_dir, truth, tmp_path):
    rows = perfect(truth)
    for row in rows:
        if row['category_id'] == 2:
            row['category_id'] = 1  # every square is taken for a circle
    lost = next(i for i, row in enumerate(rows) if row['category_id'] == 3)
    rows[lost]['bbox'] = [0, 0, 1, 1]  # a triangle is missed, and something found on background
    made = page(work_dir(), '--results', written(tmp_path / 'found.json', rows))
    table = next(table for name, table in made.tables.items() if 'of each true class' in name)
    assert table.header == ['true', *CLASSES, 'background', 'all']
    counts = np.array(list(table.rows.values()))
    per_class = [sum(a['category_id'] == i + 1 and not a['iscrowd'] for a in truth['annotations']) for i in range(5)]
    assert (counts[:, :-1].sum(axis=1) == counts[:, -1]).all()
    expected = np.diag([*per_class, 0])
    expected[1] = [per_class[1], 0, 0, 0, 0, 0]
    expected[2, 2] -= 1
    expected[2, 5] = expected[5, 2] = 1
    np.testing.assert_array_equal(counts[:, :-1], expected)
    errors = made.tables['AP50 of boxes, in %, that mending one kind of error alone would add'].column('number')
    # One of them overlaps a circle a little, which TIDE counts as poorly placed.
    assert errors['Cls: wrong class'] + errors['Loc: poorly placed'] == per_class[1] > errors['Loc: poorly placed']
    assert errors['Bkg: nothing is there'] == 1 and errors['Dupe: found a second time'] == 0
    assert f'12 images, {len(truth["annotations"])} objects of 5 classes' in made.sections['errors']


@needs_hotcoco
def test_errors_are_of_the_images_evaluated_and_of_all_classes(page, work_dir, configs, truth, tmp_path):
    """Classes that are in none of these images can be predicted all the same."""
    chosen = next(i['id'] for i in truth['images'] if 0 < len({a['category_id'] for a in _of(truth, i['id'])}) < 3)
    present = {a['category_id'] for a in _of(truth, chosen)}
    absent = next(i for i in range(1, 6) if i not in present)
    rows = [row for row in perfect(truth) if row['image_id'] == chosen]
    rows.append({'image_id': chosen, 'category_id': absent, 'bbox': [60, 60, 3, 3], 'score': 0.8})
    number = next(i for i, image in enumerate(truth['images']) if image['id'] == chosen)
    config = configs['det'] + f"\nval_dataloader['dataset']['indices'] = [{number}]\n"
    made = page(work_dir(config), '--results', written(tmp_path / 'found.json', rows))
    table = next(table for name, table in made.tables.items() if 'of each true class' in name)
    counts = np.array(list(table.rows.values()))[:, :-1]
    assert table.header == ['true', *CLASSES, 'background', 'all']
    assert counts[5, absent - 1] == 1 and counts.sum() == len(rows)
    errors = made.tables['AP50 of boxes, in %, that mending one kind of error alone would add'].column('number')
    assert errors['Bkg: nothing is there'] == 1 and errors['Miss: not found'] == 0
    assert f'No object of these classes is in the images: {", ".join(_names(set(range(1, 6)) - present))}' in made.text


def _of(truth, image_id):
    return [a for a in truth['annotations'] if a['image_id'] == image_id]


def _names(categories):
    return [CLASSES[i - 1] for i in sorted(categories)]


def test_worst_and_best_images_of_a_detector(page, work_dir, truth, tmp_path):
    rows = perfect(truth)
    per_image = [row['image_id'] for row in rows]
    by_number = sorted(set(per_image), key=per_image.count)
    empty, spoiled, fullest = by_number[-2], by_number[-3], by_number[-1]
    number = per_image.count(spoiled)
    rows = [row for row in rows if row['image_id'] != empty]
    rows.append({'image_id': spoiled, 'category_id': 1, 'bbox': [0, 0, 2, 2], 'score': 0.5})
    rows.append({'image_id': fullest, 'category_id': 1, 'bbox': [0, 0, 2, 2], 'score': 0.29})  # does not count
    made = page(work_dir(), '--results', written(tmp_path / 'found.json', rows))
    shown = [text for text in made.shown if 'F1' in text]
    name = '{:012d}.jpg'.format
    assert shown[0] == f'{name(empty)} F1 0.00: 0 found, 0 false, {per_image.count(empty)} missed'
    assert shown[1] == f'{name(spoiled)} F1 {2 * number / (2 * number + 1):.2f}: {number} found, 1 false, 0 missed'
    assert shown[4] == f'{name(fullest)} F1 1.00: {per_image.count(fullest)} found, 0 false, 0 missed'
    assert len(shown) == 8 and len(made.images) == 16
    lowered = page(tmp_path / 'run', '--results', tmp_path / 'found.json', '--score-thr', 0.2)
    assert [text for text in lowered.shown if 'F1' in text][4] != shown[4]


def test_objects_are_matched_within_their_class_and_crowds_excuse():
    def true(x, category=1, crowd=0):
        return {'bbox': [x, 0, 10, 10], 'category_id': category, 'iscrowd': crowd}

    def found(x, score, category=1, width=10):
        return {'bbox': [x, 0, width, 10], 'category_id': category, 'score': score}

    assert match([true(0)], [found(0, 0.9)]) == (1, 0, 0, 1.0)
    assert match([true(0)], [found(0, 0.9, category=2)]) == (0, 1, 1, 0)
    assert match([true(0)], [found(0, 0.9), found(0, 0.8)]) == (1, 1, 0, 1.0)
    assert match([true(0, crowd=1)], [found(1, 0.9), found(4, 0.8, width=5)]) == (0, 0, 0, 0)
    assert match([true(0)], [found(6, 0.9)]) == (0, 1, 1, 0)
    assert match([true(0), true(4)], [found(3, 0.9), found(0, 0.8)])[:3] == (2, 0, 0)
    assert match([], []) == (0, 0, 0, 0)


def label_maps(data, folder, spoil):
    """Writes the ground truth as predictions, but for the label maps that ``spoil`` changes."""
    folder.mkdir()
    for path in sorted((data / 'ade/annotations/validation').glob('*.png')):
        labels = np.array(Image.open(path)).astype(np.int64)
        labels[labels == 0] = 1  # 0 is ignored, and no prediction
        Image.fromarray(spoil(path.stem, labels).astype(np.uint8)).save(folder / path.name)
    return folder


def test_segmentation_scores_are_those_of_the_evaluator(page, work_dir, data, tmp_path):
    rng = np.random.default_rng(0)

    def spoil(name, labels):
        if name.endswith('05'):
            return np.full_like(labels, 6)
        wrong = rng.random(labels.shape) < 0.2
        return np.where(wrong, rng.integers(1, 7, labels.shape), labels)

    maps = label_maps(data, tmp_path / 'maps', spoil)
    made = page(work_dir('seg', validated=[]), '--results', maps)
    metric = ExactIoUMetric()
    metric.dataset_meta = {'classes': ['background', *CLASSES]}
    truths = sorted((data / 'ade/annotations/validation').glob('*.png'))
    for path in truths:
        true, guessed = (np.array(Image.open(p)).astype(np.int64) - 1 for p in (path, maps / path.name))
        true[true < 0] = 255
        sample = {
            'pred_sem_seg': {'data': torch.tensor(guessed)[None]},
            'gt_sem_seg': {'data': torch.tensor(true)[None]},
        }
        metric.process(None, [{**sample, 'img_path': path.name}])
    expected = metric.evaluate(len(truths))
    shown = made.tables['Figures of all pixels in %'].column('run')
    assert {name: round(100 * value, 2) for name, value in shown.items()} == expected
    matrix = metric.confusion
    union = matrix.sum(axis=0) + matrix.sum(axis=1) - matrix.diagonal()
    ious = made.tables['IoU by class in %'].column('IoU')
    assert list(ious.values()) == pytest.approx(matrix.diagonal() / union)
    table = next(table for name, table in made.tables.items() if 'of each true class' in name)
    counts = np.array(list(table.rows.values()))
    np.testing.assert_array_equal(counts[:, :-1], matrix)
    assert counts[:, -1].sum() == matrix.sum()
    assert made.shown[[('mIoU' in text and '.jpg' in text) for text in made.shown].index(True)].startswith(
        'ADE_val_00000005'
    )
    assert 'No detector was evaluated' in made.sections['errors']


def test_curves_and_tables_are_what_was_logged(page, work_dir):
    made = page(work_dir(), '--images', 0)
    loss = made.tables['run: loss']
    assert loss.column('loss') == {str(r['iter']): r['loss'] for r in LOGGED}
    assert loss.column('loss_cls') == {str(r['iter']): r['loss_cls'] for r in LOGGED}
    assert made.tables['run: as logged'].column('coco/bbox_mAP') == {'8': 0.25}
    xs, ys = np.array(made.charts['Parts of the loss'].values('loss_cls')).T
    np.testing.assert_allclose(xs, [r['iter'] for r in LOGGED], atol=0.05)
    np.testing.assert_allclose(ys, [r['loss_cls'] for r in LOGGED], atol=0.005)
    speed = made.tables['Medians over the run']
    assert speed.column('seconds an iteration')['run'] == pytest.approx(0.545)
    assert speed.column('waiting for data')['run'] == pytest.approx(100 * 0.25 / 0.545)
    assert 'No evaluation was asked for' in made.sections['scores']


def test_losses_that_are_no_numbers_leave_a_gap(page, work_dir):
    logged = copy.deepcopy(LOGGED)
    logged[3]['loss'] = float('nan')
    made = page(work_dir(logged=logged), '--images', 0)
    assert '1 logged losses are no numbers' in made.sections['loss']
    assert made.tables['run: loss'].column('loss')['4'] == DASH
    assert made.text.count('data-name="total"') == 2  # two pieces of one line


def test_names_from_the_data_are_text(page, work_dir, configs, truth, data, tmp_path):
    evil = {'circle': '<b>', 'square': '"><script>alert(1)</script>', 'star': "'&amp;"}
    content = copy.deepcopy(truth)
    for category in content['categories']:
        category['name'] = evil.get(category['name'], category['name'])
    (tmp_path / 'evil.json').write_text(json.dumps(content))
    names = tuple(evil.get(name, name) for name in CLASSES)
    config = configs['det'] + (
        f"\nval_dataloader['dataset'] = dict(type='CocoDataset', ann_file='{tmp_path}/evil.json', test_mode=True, "
        f"data_prefix=dict(img='{data}/coco/val/'), metainfo=dict(classes={names!r}), pipeline=[])\n"
    )
    results = written(tmp_path / 'found.json', perfect(truth))
    made = page(work_dir(config, '<i>run'), '--results', results)
    assert 'i' not in made.tags and made.tags.count('b') == 8  # names of images only
    assert made.tags.count('script') == 1 and 'alert' not in made.scripts[0]
    assert list(made.tables['<i>run: box AP by class in %'].rows) == list(names)
    assert not [key for _, key, _ in made.attributes if key.startswith('on')]


def test_two_runs_are_compared(page, work_dir, truth, data, tmp_path):
    a, b = work_dir(name='first/run'), work_dir(name='second/run', logged=LOGGED[:5])
    files = written(tmp_path / 'a.json', noisy(truth, data)), written(tmp_path / 'b.json', perfect(truth))
    made = page(a, b, '--results', *files)
    table = made.tables['COCO figures in %']
    assert table.header == ['', 'box, A', 'box, B', 'box, B - A', 'mask, A', 'mask, B', 'mask, B - A']
    first, second = (reference(data, file, 'bbox').stats[0] for file in files)
    assert table.rows['AP'][:3] == [first, second, second - first]
    assert table.rows['AP'][4:] == [DASH, DASH]  # the second has no masks
    curves = {
        what: made.below[f'Precision (up) over recall (right) of {what} by class, with AP50']
        for what in ('boxes', 'masks')
    }
    assert all(set(chart.lines) == {'A', 'B'} for chart in curves['boxes'].values())
    assert all(set(chart.lines) == {'A'} and title.endswith(f' and {DASH}') for title, chart in curves['masks'].items())
    assert len(curves['boxes']) == len(curves['masks']) == 5
    assert {'A', 'B'} == set(made.charts['Total loss'].lines)
    assert list(made.tables['Overview (figures in %)'].rows) == ['A: first/run', 'B: second/run']
    assert len([text for text in made.shown if 'F1' in text]) == 16
    assert 'The two configs are equal' in made.sections['environment']


def test_a_detector_beside_a_segmentor(page, work_dir, truth, data, tmp_path):
    maps = label_maps(data, tmp_path / 'maps', lambda name, labels: labels)
    found = written(tmp_path / 'found.json', perfect(truth))
    made = page(work_dir(), work_dir('seg', 'other', validated=[]), '--results', found, maps)
    assert made.tables['COCO figures in %'].header == ['', 'box']
    assert made.tables['Figures of all pixels in %'].column('B')['mIoU'] == 1


def test_what_is_missing_is_said_in_a_line(page, work_dir, capsys, tmp_path, monkeypatch, truth):
    made = page(work_dir(name='without_checkpoint'))
    assert 'there is no checkpoint that could be evaluated' in made.sections['scores']
    assert 'without_checkpoint is not evaluated' in capsys.readouterr().err
    assert 'did not record its command' in made.sections['environment']
    assert 'No log says what it ran on' in made.sections['environment']
    made = page(work_dir(config=None, name='without_config', validated=[]))
    assert 'the run left no config' in made.sections['images']
    assert 'No validation was logged' in made.sections['validation']
    (tmp_path / 'bare').mkdir()
    (tmp_path / 'bare/config.py').write_text(
        (tmp_path / 'without_checkpoint/20250101_000000/vis_data/config.py').read_text()
    )
    made = page(tmp_path / 'bare')
    assert all('No training was logged' in made.sections[name] for name in ('loss', 'rates'))
    assert 'No times were logged' in made.sections['speed']
    made = page(tmp_path / 'bare', tmp_path / 'without_checkpoint', '--images', 0)
    assert list(made.charts['Total loss'].lines) == ['B'] and 'A: No training was logged' in made.sections['loss']
    monkeypatch.setattr(coco_engine, 'choose', lambda engine: 'pycocotools')
    found = written(tmp_path / 'found.json', perfect(truth))
    made = page(tmp_path / 'without_checkpoint', '--results', found)
    assert 'scored by pycocotools' in made.sections['scores']
    assert all('pip install hotcoco' in made.sections[name] for name in ('confusion', 'errors'))


def test_the_page_needs_nothing_else(page, work_dir, truth, tmp_path):
    made = page(work_dir(), '--results', written(tmp_path / 'found.json', perfect(truth)))
    links = [value for _, key, value in made.attributes if key in ('src', 'href', 'srcset', 'action', 'data')]
    assert links and all(value.startswith(('data:', '#')) for value in links)
    assert not re.search(
        r'url\(|@import|fetch\(|https?:', made.scripts[0] + re.search('<style>.*</style>', made.text, re.S)[0]
    )
    assert {'iframe', 'object', 'embed', 'base', 'form'}.isdisjoint(made.tags)
    policy = next(value for tag_, key, value in made.attributes if tag_ == 'meta' and 'default-src' in str(value))
    digest = base64.b64encode(hashlib.sha256(made.scripts[0].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"'sha256-{digest}'" in policy
    assert all(image['alt'] for image in made.images)
    anchors = {value[1:] for _, key, value in made.attributes if key == 'href' and value.startswith('#')}
    assert anchors == set(made.sections)


def test_command_and_environment(page, work_dir):
    folder = work_dir()
    (folder / '20250101_000000/command.txt').write_text("python tools/train.py 'a b.py'\n")
    line = '-' * 60
    log = f'{line}\nSystem environment:\n    Python: 3.11\n\nRuntime environment:\n    GPU number: 2\n{line}\nloss: 1\n'
    (folder / '20250101_000000/run.log').write_text(log)
    made = page(folder, '--images', 0)
    said = made.sections['environment']
    assert "python tools/train.py 'a b.py'" in said
    assert 'Python: 3.11' in said and 'GPU number: 2' in said and 'loss: 1' not in said
    assert made.tables['Medians over the run'].column('images a second')['run'] == pytest.approx(4 / 0.545)


def test_a_detector_is_evaluated_once(tool, page, tiny, tmp_path, capsys, monkeypatch):
    run = tmp_path / 'run'
    assert tool('train', tiny.det, '--work-dir', run) == 0
    scores = json.loads(next(run.glob('*/vis_data/scalars.json')).read_text().splitlines()[-1])
    made = page(run)
    assert capsys.readouterr().err.endswith('evaluation: 3\n')
    for kind, said in (('bbox', 'box'), ('segm', 'mask')):
        shown = made.tables['COCO figures in %'].column(said)
        for name, key in (('AP', 'mAP'), ('AP50', 'mAP_50'), ('APs', 'mAP_s')):
            assert shown[name] == pytest.approx(scores[f'coco/{kind}_{key}'], abs=5.1e-4)
    groups = read_checkpoint(run / 'iter_4.pth')['optimizer']['param_groups']
    rates = made.tables['run: groups']
    assert rates.column('rate at iteration 4') == {group['group_name']: group['lr'] for group in groups}
    assert len(made.charts['run'].lines) == len({group['initial_lr'] for group in groups})
    monkeypatch.setattr(predictions, '_samples', lambda *args: pytest.fail('evaluated again'))
    assert page(run).tables['COCO figures in %'] == made.tables['COCO figures in %']
    monkeypatch.undo()
    again = page(run, '--checkpoint', run / 'iter_2.pth', '--images', 2)
    assert 'iter_2.pth on 2 of the 3 validation images' in again.sections['scores']


def test_a_segmentor_is_evaluated(tool, page, tiny, tmp_path):
    run = tmp_path / 'run'
    assert tool('train', tiny.seg, '--work-dir', run) == 0
    made = page(run)
    validated = json.loads(next(run.glob('*/vis_data/scalars.json')).read_text().splitlines()[-1])
    shown = made.tables['Figures of all pixels in %'].column('run')
    assert {name: round(100 * value, 2) for name, value in shown.items()} == {name: validated[name] for name in shown}


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['nowhere'], 'work folder nowhere does not exist'),
        (['.'], '. is no work folder'),
        (['.', '.', '.'], '3 work folders given'),
        (['.', '--images', '-1'], '--images is -1'),
        (['.', '--out', '.'], '--out . is a folder'),
        (['.', '--checkpoint', 'a', 'b'], '--checkpoint has 2 paths for 1 work folders'),
        (['.', '--checkpoint', 'a.pth'], '--checkpoint a.pth does not exist; . has none'),
    ],
)
def test_wrong_usage(tool, capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert tool('report', *argv) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_results_of_other_data_are_refused(tool, capsys, work_dir, truth, tmp_path):
    rows = perfect(truth)
    rows[0]['image_id'] = 99
    assert tool('report', work_dir(), '--results', written(tmp_path / 'found.json', rows)) == 2
    assert 'has results for image 99, which is not in the validation set' in capsys.readouterr().err
    assert tool('report', tmp_path / 'run', '--results', tmp_path / 'nothing.json') == 2
    assert 'nothing.json: expected' in capsys.readouterr().err
    assert not (tmp_path / 'run/report.html').exists()


def test_pictures_are_bounded():
    noise = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), dtype=np.uint8)
    made = Page(picture(noise, 'noise')).images[0]
    content = base64.b64decode(made['src'].partition(',')[2])
    assert len(content) <= MAX_BYTES
    assert max(Image.open(io.BytesIO(content)).size) == MAX_SIDE == int(made['width'])
    small = Page(picture(noise[:20, :30], 'noise')).images[0]
    assert (small['width'], small['height']) == ('30', '20')


def test_long_curves_are_thinned_and_keep_their_peaks():
    xs, ys = np.arange(100_000.0), np.zeros(100_000)
    ys[[12_345, 77_777]] = 9, -9
    ys[50_000] = np.nan
    some_xs, some_ys = thin(xs, ys)
    assert len(some_xs) <= MOST_POINTS
    assert {12_345, 77_777, 50_000, 0, 99_999} <= set(some_xs.tolist())
    assert (np.diff(some_xs) > 0).all()
    np.testing.assert_array_equal(some_ys, ys[some_xs.astype(int)])


def test_ticks_are_round_and_inside():
    for low, high, expected in ((0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 3e-4, [0, 1e-4, 2e-4, 3e-4]), (5, 5, [5])):
        assert ticks(low, high) == pytest.approx(expected)


def test_charts_of_nothing_say_so():
    assert 'nothing was logged' in line_chart('loss', [Line('a', [1.0], [float('nan')])], 'x', 'y')


def test_attributes_are_escaped():
    assert tag('td', '<', title='"><i>') == '<td title="&quot;&gt;&lt;i&gt;">&lt;</td>'
    assert tag('td', Html('<i></i>')) == '<td><i></i></td>'


def test_no_image_is_worst_and_best():
    for number in range(12):
        worst, best = worst_and_best(range(number))
        assert not set(worst) & set(best)
        assert worst == sorted(worst) and best == sorted(best, reverse=True)
        assert len(worst) + len(best) == min(number, 8)
