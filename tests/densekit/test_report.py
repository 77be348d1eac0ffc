"""Pictures, curves and tables of densekit.report."""

import json
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from densekit.report import curves
from densekit.report.curves import plot_curves, read_scalars
from densekit.report.pictures import comparison_sheet, draw_instances, draw_label_map, read_image, save_png
from densekit.report.tables import format_table, metrics_table

CLASSES = ('circle', 'square')
PALETTE = [(200, 30, 40), (20, 60, 220)]
NAMES = dict(classes=CLASSES, palette=PALETTE)
NO_OBJECTS = dict(boxes=np.zeros((0, 4)), labels=np.zeros(0, int))


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 200, (height, width, 3), dtype=np.uint8)


def text_pixels(picture):
    """Pixels of the white text on PALETTE's colours; the images here are darker."""
    return int((picture.min(axis=2) > 230).sum())


# ------------------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'L', 'P', 'LA', '1'])
def test_read_image_gives_rgb(tmp_path, mode):
    image = Image.fromarray(noise(6, 9)).convert(mode)
    image.save(tmp_path / 'a.png')
    read = read_image(tmp_path / 'a.png')
    assert read.shape == (6, 9, 3) and read.dtype == np.uint8 and read.flags.writeable
    assert np.array_equal(read, np.asarray(image.convert('RGB')))


def test_read_image_reduces_16_bits_and_turns_upright(tmp_path):
    Image.fromarray(np.array([[0, 0x1234, 0xFFFF]], np.uint16)).save(tmp_path / 'deep.png')
    assert read_image(tmp_path / 'deep.png')[0, :, 0].tolist() == [0, 0x12, 0xFF]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(noise(20, 30)).save(tmp_path / 'turned.jpg', exif=exif)
    assert read_image(tmp_path / 'turned.jpg').shape == (30, 20, 3)


def test_read_image_refuses_what_it_cannot_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'gone\.png.*no such file.*PNG'):
        read_image(tmp_path / 'gone.png')
    with pytest.raises(FileNotFoundError, match='it is a folder'):
        read_image(tmp_path)
    (tmp_path / 'text.jpg').write_text('not an image')
    with pytest.raises(ValueError, match=r'text\.jpg.*not a known image format.*JPEG'):
        read_image(tmp_path / 'text.jpg')
    Image.fromarray(np.ones((3, 3), np.float32)).save(tmp_path / 'depth.tiff')
    with pytest.raises(ValueError, match='32 bits'):
        read_image(tmp_path / 'depth.tiff')


@pytest.mark.parametrize('name', ['cut.png', 'cut.jpg'])
def test_read_image_refuses_a_truncated_file(tmp_path, name):
    path = tmp_path / name
    Image.fromarray(noise(64, 64)).save(path)
    assert read_image(path).shape == (64, 64, 3)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=name):
        read_image(path)


def test_save_png(tmp_path):
    path = tmp_path / 'new' / 'folder' / 'a.png'
    image = noise(5, 7)
    save_png(path, image[..., ::-1])
    save_png(path, image)
    assert np.array_equal(read_image(path), image)
    assert [entry.name for entry in path.parent.iterdir()] == ['a.png']
    with pytest.raises(ValueError, match=r'a\.jpg.*\.png'):
        save_png(tmp_path / 'a.jpg', image)
    with pytest.raises(ValueError, match='float64'):
        save_png(path, image / 255)
    assert np.array_equal(read_image(path), image)


# --------------------------------------------------------------------------------------------------------- instances


def test_draw_instances_blends_masks_and_leaves_its_inputs_alone():
    image = noise(400, 500)
    masks = np.zeros((2, 400, 500), bool)
    masks[0, 100:200, 50:150] = True
    masks[1, 250:350, 300:450] = True
    boxes = np.array([[50.0, 100, 150, 200], [300, 250, 450, 350]])
    given = dict(boxes=boxes, labels=np.array([0, 1]), masks=masks, scores=np.array([0.934, 0.5]))
    before = {name: value.copy() for name, value in given.items()} | {'image': image.copy()}
    picture = draw_instances(image, **given, **NAMES)

    assert picture.shape == image.shape and picture.dtype == np.uint8
    assert all(np.array_equal(value, before[name]) for name, value in (given | {'image': image}).items())
    for (y, x), colour in (((160, 100), PALETTE[0]), ((310, 380), PALETTE[1])):
        assert np.abs(picture[y, x] - (0.6 * image[y, x] + 0.4 * np.array(colour))).max() <= 0.5
        assert (picture[y, x] != image[y, x]).any()
    assert np.array_equal(picture[:60], image[:60]) and np.array_equal(picture[:, 460:], image[:, 460:])
    assert picture[150, 50].tolist() == list(PALETTE[0]) and picture[150, 149].tolist() == list(PALETTE[0])
    assert text_pixels(picture) > 50


def test_draw_instances_enlarges_small_images_by_a_whole_factor():
    image = noise(96, 100)
    mask = np.zeros((1, 96, 100), bool)
    mask[0, 40:80, 40:80] = True
    box = np.array([[40, 40, 80, 80]])
    picture = draw_instances(image, boxes=box, labels=[1], masks=mask, **NAMES)
    assert picture.shape == (384, 400, 3)
    assert (picture[240:244, 240:244] == picture[240, 240]).all()
    assert np.array_equal(picture[::4, :150:4], image[:, :38])
    assert picture[240, 160].tolist() == picture[240, 319].tolist() == list(PALETTE[1])
    assert draw_instances(image, boxes=box, labels=[1], min_side=96, **NAMES).shape == image.shape


def test_draw_instances_with_nothing_to_draw():
    image = noise(330, 340)
    masks = np.zeros((0, 330, 340), bool)
    picture = draw_instances(image, **NO_OBJECTS, masks=masks, scores=np.zeros(0), **NAMES)
    assert np.array_equal(picture, image) and picture is not image
    empty_mask = draw_instances(image, boxes=[[5, 5, 5, 5]], labels=[0], masks=np.zeros((1, 330, 340)), **NAMES)
    assert text_pixels(empty_mask) > 20


def test_names_stay_inside_the_image_and_apart():
    image = noise(400, 400)

    def text(*boxes):
        return text_pixels(draw_instances(image, boxes=boxes, labels=[0] * len(boxes), **NAMES))

    whole = text((150, 150, 250, 250))
    assert whole > 20
    for box in ((0, 0, 40, 40), (370, 0, 400, 30), (370, 370, 400, 400), (0, 0, 400, 400), (-50, -50, 450, 450)):
        assert text(box) == whole, box
    assert text(*[(150, 150, 250, 250)] * 4) == 4 * whole


def test_names_are_black_on_light_colours_and_white_on_dark_ones():
    image = np.full((330, 330, 3), 120, np.uint8)
    box = [[100, 100, 200, 200]]
    light = draw_instances(image, boxes=box, labels=[0], classes=['a'], palette=[(250, 240, 90)])
    assert light.min() == 0
    dark = draw_instances(image, boxes=box, labels=[0], classes=['a'], palette=[(60, 20, 90)])
    assert dark.min() == 20 and dark.max() == 255


def test_ignored_instances_are_grey():
    image = noise(330, 330)
    masks = np.ones((1, 330, 330), bool)
    given = dict(boxes=[[20, 50, 300, 300]], labels=[0], masks=masks, **NAMES)
    picture = draw_instances(image, ignored=np.array([True]), **given)
    assert not (picture == PALETTE[0]).all(axis=2).any()
    unchanged = (picture[150:250, 100:200] == image[150:250, 100:200]).all(axis=2).mean()
    assert 0.3 < unchanged < 0.7  # hatched
    assert (draw_instances(image, ignored=[False], **given) == PALETTE[0]).all(axis=2).any()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(labels=[2]), r'Labels \[2\] have no class; there are 2'),
        (dict(labels=[-1]), r'Labels \[-1\]'),
        (dict(labels=[0, 1]), r'2 labels .* boxes \(1, 4\)'),
        (dict(masks=np.zeros((1, 330, 329))), r'masks \(1, 330, 329\)'),
        (dict(scores=[0.1, 0.2]), r'scores \(2,\)'),
        (dict(ignored=[]), r'ignored \(0,\)'),
        (dict(palette=PALETTE[:1]), '2 classes but 1 colours'),
        (dict(image=np.zeros((330, 330), np.uint8)), r'uint8 \(330, 330\)'),
        (dict(image='a.png'), 'given was str'),
    ],
)
def test_draw_instances_refuses_what_does_not_fit(change, message):
    given = dict(image=noise(330, 330), boxes=[[0, 0, 5, 5]], labels=[0], **NAMES) | change
    with pytest.raises(ValueError, match=message):
        draw_instances(given.pop('image'), **given)


# -------------------------------------------------------------------------------------------------------- label maps


def test_draw_label_map():
    image = noise(100, 120)
    labels = np.zeros((100, 120), np.uint8)
    labels[:, 60:] = 1
    labels[90:] = 255
    before = image.copy(), labels.copy()
    picture = draw_label_map(image, labels, **NAMES)
    assert picture.shape == (400, 480, 3) and picture.dtype == np.uint8
    assert np.array_equal(image, before[0]) and np.array_equal(labels, before[1])
    for (y, x), colour in (((10, 10), PALETTE[0]), ((10, 110), PALETTE[1])):
        expected = 0.4 * image[y, x] + 0.6 * np.array(colour)
        assert np.abs(picture[4 * y, 4 * x] - expected).max() <= 0.5
    bottom = image[90:].repeat(4, axis=0).repeat(4, axis=1)
    assert 0.3 < (picture[360:] == bottom).all(axis=2).mean() < 0.7  # hatched
    halves = picture[:360, :240], picture[:360, 240:]
    assert all(text_pixels(half) > 20 for half in halves)
    assert all((half == colour).all(axis=2).any() for half, colour in zip(halves, PALETTE, strict=True))


def test_draw_label_map_with_only_ignored_pixels():
    image = noise(330, 330)
    picture = draw_label_map(image, np.full((330, 330), 7), ignore_index=7, **NAMES)
    assert text_pixels(picture) == 0


def test_draw_label_map_refuses_what_does_not_fit():
    image = noise(330, 330)
    with pytest.raises(ValueError, match=r'Labels \[2, 255\] have no class'):
        draw_label_map(image, np.array([[0, 2, 255]] * 330).repeat(110, axis=1), ignore_index=9, **NAMES)
    with pytest.raises(ValueError, match=r'\(330, 329\)'):
        draw_label_map(image, np.zeros((330, 329), int), **NAMES)


# ------------------------------------------------------------------------------------------------------------ sheets


def patch(value, height=100, width=100):
    """A plain picture in a red that no text on the sheet has."""
    return np.full((height, width, 3), (value, 0, 0), np.uint8)


def where(sheet, value):
    """First and last row and column of a patch."""
    ys, xs = np.nonzero((sheet == (value, 0, 0)).all(axis=2))
    return ys.min(), ys.max(), xs.min(), xs.max()


def test_sheet_shows_every_picture_in_its_place():
    sheet = comparison_sheet([[patch(81), patch(82)], [patch(83), patch(84)]], ['truth', 'prediction'])
    assert sheet.dtype == np.uint8 and sheet.ndim == 3
    places = [where(sheet, value) for value in (81, 82, 83, 84)]
    assert all(place[1] - place[0] == place[3] - place[2] == 99 for place in places)
    assert places[0][:2] == places[1][:2] and places[0][2:] == places[2][2:]
    assert places[0][3] < places[1][2] and places[0][1] < places[2][0]
    frame = np.concatenate([sheet[0], sheet[-1], sheet[:, 0], sheet[:, -1]])
    assert (frame == 255).all()
    titles = sheet[: places[0][0]]
    assert all((titles[:, left : right + 1] < 128).any() for *_, left, right in places[:2])
    titled = comparison_sheet([[patch(81), patch(82)], [patch(83), patch(84)]], ['truth', 'prediction'], 'Shapes')
    assert titled.shape[0] > sheet.shape[0] and titled.shape[1] == sheet.shape[1]


def test_sheet_fits_different_sizes():
    sheet = comparison_sheet([[patch(81, 50, 100), patch(82, 200, 100)], [patch(83, 1500, 3000), patch(84)]], 'ab')
    sizes = [
        (bottom - top + 1, right - left + 1) for top, bottom, left, right in (where(sheet, v) for v in range(81, 85))
    ]
    assert sizes == [(320, 640), (640, 320), (320, 640), (640, 640)]


def test_sheet_sets_pairs_apart():
    sheet = comparison_sheet([[patch(81), patch(82), patch(83), patch(84)]], ['truth', 'prediction'] * 2)
    columns = [where(sheet, value)[2:] for value in (81, 82, 83, 84)]
    gaps = [right[0] - left[1] for left, right in pairwise(columns)]
    assert gaps[0] == gaps[2] < gaps[1]


def test_sheet_refuses_uneven_rows():
    with pytest.raises(ValueError, match=r'2 titles and rows of \[2, 1\]'):
        comparison_sheet([[patch(1), patch(2)], [patch(3)]], ['a', 'b'])
    with pytest.raises(ValueError, match='0 titles'):
        comparison_sheet([[]], [])
    with pytest.raises(ValueError, match=r'rows of \[\]'):
        comparison_sheet([], ['a'])


# ------------------------------------------------------------------------------------------------------------ curves


def write_run(work_dir, timestamp, *records, end='\n'):
    folder = work_dir / timestamp / 'vis_data'
    folder.mkdir(parents=True)
    (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, records)) + end)


def train(iteration, loss=1.0, **others):
    return {'lr': 0.001, 'loss': loss, 'iter': iteration, 'step': iteration, **others}


def valid(step, value=0.5, key='coco/bbox_mAP'):
    return {key: value, 'time': 0.1, 'step': step}


def test_read_scalars(tmp_path):
    write_run(tmp_path, '20260101_000000', train(10), valid(10, 0.1), train(20), valid(20, 0.2))
    training, validation = read_scalars(tmp_path)
    assert training == [train(10), train(20)]
    assert validation == [{**valid(10, 0.1), 'iter': 10}, {**valid(20, 0.2), 'iter': 20}]


def test_read_scalars_joins_a_resumed_run(tmp_path):
    # The run stopped at 35, was resumed from 20, and stopped at 30 again: what came after 20 at first was given up.
    write_run(tmp_path, '20260102_000000', train(25, 7.0), train(30, 8.0), valid(30, 0.3))
    first = [train(10), train(20), valid(20, 0.2), train(25), train(30), valid(30, 0.9), train(35), valid(35, 0.9)]
    write_run(tmp_path, '20260101_000000', *first)
    training, validation = read_scalars(tmp_path)
    assert [(record['iter'], record['loss']) for record in training] == [(10, 1), (20, 1), (25, 7), (30, 8)]
    assert [(record['step'], record['coco/bbox_mAP']) for record in validation] == [(20, 0.2), (30, 0.3)]


def test_read_scalars_leaves_an_evaluation_of_its_own_out(tmp_path):
    write_run(tmp_path, '20260101_000000', train(10), valid(10, 0.1))
    write_run(tmp_path, '20260102_000000', valid(0, 0.9))
    assert [record['coco/bbox_mAP'] for record in read_scalars(tmp_path)[1]] == [0.1]


def test_read_scalars_of_a_killed_run(tmp_path):
    write_run(tmp_path, '20260101_000000', train(10), end='\n{"lr": 0.0')
    assert read_scalars(tmp_path) == ([train(10)], [])
    write_run(tmp_path, '20260102_000000', train(10), end='\n{"lr": 0.0\n')
    with pytest.raises(ValueError, match=r'20260102_000000.*line 2'):
        read_scalars(tmp_path)


@pytest.mark.parametrize('folder', ['.', 'missing'])
def test_no_scalars(tmp_path, folder):
    with pytest.raises(ValueError, match=rf'{tmp_path.name}.*expected \*/vis_data/scalars\.json'):
        read_scalars(tmp_path / folder)
    with pytest.raises(ValueError, match='No logged training'):
        plot_curves({'detection': tmp_path / folder}, tmp_path / 'curves.png')
    with pytest.raises(ValueError, match='No runs'):
        plot_curves({}, tmp_path / 'curves.png')
    assert not (tmp_path / 'curves.png').exists()


def test_plot_curves(tmp_path):
    losses = [3.0, 2.0, float('nan'), 1.0]
    records = [train(i, loss, base_lr=0.01, loss_cls=loss / 2, loss_bbox=0.1) for i, loss in enumerate(losses, start=1)]
    write_run(tmp_path / 'det', '20260101_000000', *records, valid(4), valid(4, 0.4, 'coco/segm_mAP'))
    write_run(tmp_path / 'seg', '20260101_000000', train(1))  # no validation yet
    runs = {'detection': tmp_path / 'det', 'segmentation': tmp_path / 'seg'}
    plot_curves(runs, tmp_path / 'out' / 'curves.png')
    both = read_image(tmp_path / 'out' / 'curves.png')
    plot_curves({'detection': tmp_path / 'det'}, tmp_path / 'curves.png')
    one = read_image(tmp_path / 'curves.png')
    assert both.shape[0] == 2 * one.shape[0] and both.shape[1] == one.shape[1] > 1000
    assert (both[0] == 255).all() and both.min() < 100


@pytest.fixture
def axis():
    from matplotlib.figure import Figure

    return Figure().subplots()


def test_validation_panel_counts_iterations_or_epochs(tmp_path, axis):
    write_run(tmp_path / 'iterations', 't', train(10), valid(10), train(20), valid(20, 0.612))
    curves._plot_metrics(axis, read_scalars(tmp_path / 'iterations')[1])
    assert axis.get_xlabel() == 'iteration' and axis.get_ylabel() == 'box AP (%)'
    assert [text.get_text() for text in axis.texts] == ['box AP 61.2']
    axis.clear()
    write_run(tmp_path / 'epochs', 't', train(10), valid(1, 80.5, 'mIoU'), train(20), valid(2, 81.23, 'mIoU'))
    curves._plot_metrics(axis, read_scalars(tmp_path / 'epochs')[1])
    assert axis.get_xlabel() == 'epoch'
    assert [text.get_text() for text in axis.texts] == ['mIoU 81.2']
    axis.clear()
    curves._plot_metrics(axis, [{'coco/AR@100': 0.5, 'step': 1, 'iter': 1}])
    assert axis.texts[0].get_text() == 'no bbox_mAP or segm_mAP or mIoU was logged'


def test_rates_panel_shows_the_base_rate_where_it_differs(axis):
    curves._plot_rates(axis, [train(1, base_lr=0.001), train(2, base_lr=0.001)])
    assert len(axis.lines) == 1 and axis.get_legend() is None
    axis.clear()
    curves._plot_rates(axis, [train(1, base_lr=0.003), train(2, base_lr=0.003)])
    assert {line.get_label() for line in axis.lines} == {'base', 'first parameter group'}
    assert axis.get_ylabel() == 'learning rate ($10^{-3}$)'


def test_smoothing_keeps_length_level_and_ends():
    assert np.allclose(curves._smooth(np.full(200, 3.0)), 3)
    assert len(curves._smooth(np.arange(7.0))) == 7
    values = np.random.default_rng(0).normal(size=400)
    assert curves._smooth(values).std() < 0.5 * values.std()


@pytest.mark.parametrize('by_epoch', [True, False])
def test_mmengine_logs_what_is_read(tmp_path, by_epoch):
    """With mmengine's default hooks, which log step 0 for every validation of an iteration-based run."""
    import torch
    from mmengine.evaluator import BaseMetric
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Model(BaseModel):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, inputs, mode='tensor'):
            return {'loss_a': self.weight, 'loss_b': self.weight**2} if mode == 'loss' else [inputs]

    class Metric(BaseMetric):
        def process(self, data_batch, data_samples):
            self.results.append(1)

        def compute_metrics(self, results):
            return {'mIoU': 50.0}

    loader = dict(batch_size=1, dataset=[torch.ones(1)] * 4, sampler=dict(type='DefaultSampler', shuffle=False))
    loop = dict(by_epoch=True, max_epochs=2) if by_epoch else dict(by_epoch=False, max_iters=8, val_interval=4)
    Runner(
        Model(),
        str(tmp_path),
        train_dataloader=loader,
        val_dataloader=loader,
        train_cfg=loop,
        val_cfg=dict(),
        val_evaluator=[Metric()],
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=2), checkpoint=None),
        experiment_name=f'report_{by_epoch}',
    ).train()
    training, validation = read_scalars(tmp_path)
    assert [record['iter'] for record in training] == [2, 4, 6, 8]
    assert {'loss', 'loss_a', 'loss_b', 'lr'} <= set(training[0])
    assert [record['step'] for record in validation] == ([1, 2] if by_epoch else [4, 8])
    assert [record['mIoU'] for record in validation] == [50, 50]


# ------------------------------------------------------------------------------------------------------------ tables


def test_format_table():
    rows = [('tiny', 28.6, '1,024'), ('huge', '-', '')]
    assert format_table(['size', 'M', 'count'], rows) == (
        'size     M  count\n----  ----  -----\ntiny  28.6  1,024\nhuge     -'
    )
    assert format_table(['a', 'b'], [['x', 1]], align='><') == 'a  b\n-  -\nx  1'
    assert format_table(['name'], []) == 'name\n----'
    with pytest.raises(ValueError, match='2 columns, row 1 has 1'):
        format_table(['a', 'b'], [[1, 2], [3]])
    with pytest.raises(ValueError, match="align is '<'"):
        format_table(['a', 'b'], [], align='<')


def test_metrics_table_of_a_detector():
    metrics = {
        'coco/bbox_mAP': 0.512,
        'coco/bbox_mAP_50': 0.7,
        'coco/bbox_mAP_75': 0.55,
        'coco/bbox_mAP_s': -1.0,
        'coco/bbox_mAP_m': 0.4,
        'coco/bbox_mAP_l': np.float32(1),
        'coco/segm_mAP': 0.48,
        'coco/segm_mAP_50': 0.66,
    }
    assert metrics_table(metrics) == (
        '%       AP  AP50  AP75  APs   APm    APl\n'
        '----  ----  ----  ----  ---  ----  -----\n'
        'box   51.2  70.0  55.0    -  40.0  100.0\n'
        'mask  48.0  66.0'
    )


def test_metrics_table_of_a_segmentor_and_unknown_metrics():
    metrics = {
        'aAcc': 95.1,
        'mIoU': np.float32(81.23),
        'mAcc': 90,
        'mDice': 0.123456,
        'note': 'fine',
        'bad': float('nan'),
    }
    assert metrics_table(metrics) == (
        '%          mIoU  mAcc  aAcc\n'
        '---------  ----  ----  ----\n'
        'label map  81.2  90.0  95.1\n'
        '\n'
        'other   value\n'
        '-----  ------\n'
        'mDice  0.1235\n'
        'note     fine\n'
        'bad       nan'
    )


def test_metrics_table_of_several_data_sets():
    table = metrics_table({'a/bbox_mAP': 0.1, 'b/bbox_mAP': 0.2, 'b/mIoU': 30.0})
    assert [line.split() for line in table.splitlines() if '/' in line] == [
        ['a/box', '10.0'],
        ['b/box', '20.0'],
        ['b/label', 'map', '30.0'],
    ]
    assert metrics_table({}) == 'no metrics'


def test_imports_are_light():
    code = (
        'import sys, densekit.report.pictures, densekit.report.curves, densekit.report.tables\n'
        "print([name for name in ('torch', 'matplotlib', 'mmengine', 'mmcv', 'mmdet', 'mmseg') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == '[]\n'
