from shutil import copytree

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from PIL import Image

import densekit.ops  # noqa: F401
from densekit.cli import UserError
from densekit.engine.config import load_config
from densekit.engine.runner import DensekitRunner
from densekit.report.browse import Feed, browse, picture_of

pytestmark = pytest.mark.usefixtures('quick_mmengine')

SHAPES = ['circle', 'square', 'triangle', 'star', 'cross']


class Recorder(Hook):
    """Keeps what enters the model in training."""

    def __init__(self):
        self.inputs, self.samples = [], []

    def before_train(self, runner):
        preprocessor = runner.bare_model().data_preprocessor
        forward = preprocessor.forward

        def keep(data, training=False):
            ready = forward(data, training)
            if training:
                self.inputs += [tensor.clone() for tensor in ready['inputs']]
                self.samples += [sample.clone() for sample in ready['data_samples']]
            return ready

        preprocessor.forward = keep


@pytest.fixture(scope='module')
def trained(tiny, tmp_path_factory):
    """What a run of the detector and one of the segmentor fed to their models."""
    found = {}
    for name in ('det', 'seg'):
        options = ['train_cfg.max_iters=6', 'train_cfg.val_interval=99', 'default_hooks.checkpoint.interval=99']
        cfg = load_config(getattr(tiny, name), options)
        cfg.work_dir = str(tmp_path_factory.mktemp(name))
        runner = DensekitRunner.from_cfg(cfg)
        recorder = Recorder()
        runner.register_hook(recorder)
        runner.train()
        preprocessor = runner.bare_model().data_preprocessor
        images = [(tensor * preprocessor.std + preprocessor.mean).round() for tensor in recorder.inputs]
        found[name] = [image.byte().permute(1, 2, 0).numpy() for image in images], recorder.samples
    return found


def first(feed, number):
    return [fed for fed, _ in zip(feed, range(number), strict=False)]


def test_a_detectors_samples_are_those_of_its_training(tiny, trained):
    """Six iterations of two go more than once through the eight images: flips differ from round to round."""
    images, samples = trained['det']
    feed = Feed(load_config(tiny.det))
    assert feed.classes == SHAPES
    fed = first(feed, len(images))
    assert len(fed) == 12
    for one, image, sample in zip(fed, images, samples, strict=True):
        assert np.array_equal(one.image, image)
        assert np.array_equal(one.boxes[~one.ignored], sample.gt_instances.bboxes.numpy())
        assert np.array_equal(one.labels[~one.ignored], sample.gt_instances.labels.numpy())
        assert np.array_equal(one.masks[~one.ignored], sample.gt_instances.masks.to_ndarray().astype(bool))
        for (x1, y1, x2, y2), mask in zip(one.boxes, one.masks, strict=True):
            rows, columns = np.nonzero(mask)
            assert abs(columns.min() - x1) <= 1 and abs(columns.max() + 1 - x2) <= 1
            assert abs(rows.min() - y1) <= 1 and abs(rows.max() + 1 - y2) <= 1
    unflipped = next(one for one in fed if 'no flip' in one.caption)
    file = Image.open(tiny.data / 'coco/train' / unflipped.caption.splitlines()[0])
    assert np.abs(unflipped.image.astype(int) - np.array(file)).max() <= 3  # decoders of JPEG differ that much
    flips = [('no flip' in one.caption, 'horizontal flip' in one.caption) for one in fed]
    assert len(set(flips)) > 1
    # The next ones are others.
    assert not np.array_equal(fed[0].image, fed[-1].image)


def test_a_segmentors_samples_are_those_of_its_training(tiny, trained):
    images, samples = trained['seg']
    for one, image, sample in zip(first(Feed(load_config(tiny.seg)), len(images)), images, samples, strict=True):
        assert np.array_equal(one.image, image)
        assert np.array_equal(one.label_map, sample.gt_sem_seg.data[0].numpy())
        # Pictures of 64 pixels in crops of 96: the rest is padding, which no class has.
        assert one.image.shape == (96, 96, 3)
        assert (one.height, one.width) == (64, 64)
        assert (one.label_map[64:] == 255).all() and (one.label_map[:64, :64] != 255).any()
        assert 'padded to 96 x 96' in one.caption


def test_another_seed_gives_other_samples(tiny):
    same, again, other = (first(Feed(load_config(tiny.det, [f'randomness.seed={seed}'])), 8) for seed in (0, 0, 1))
    assert [one.caption for one in same] == [one.caption for one in again]
    assert all(np.array_equal(one.image, two.image) for one, two in zip(same, again, strict=True))
    assert [one.caption for one in same] != [one.caption for one in other]


def test_an_epoch_is_followed_by_the_next(tiny):
    """By epochs, the images come again, otherwise augmented."""
    cfg = load_config(tiny.det)
    cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=2)
    cfg.train_dataloader.sampler.type = 'DefaultSampler'
    feed = Feed(cfg)
    fed = first(feed, 2 * len(feed.samples))
    half = len(feed.samples)
    names = [one.caption.splitlines()[0] for one in fed]
    assert sorted(names[:half]) == sorted(names[half:]) and names[:half] != names[half:]
    assert len({one.caption for one in fed}) > half


def test_validation_boxes_are_drawn_where_the_resized_image_has_them(tiny):
    """Test pipelines load annotations after resizing, unscaled; 64 pixels become 96."""
    fed = first(Feed(load_config(tiny.det), 'val'), 3)
    assert len(fed) == 3
    for one in fed:
        assert one.image.shape == (96, 96, 3)
        assert '64 x 64 to 96 x 96' in one.caption
        for (x1, y1, x2, y2), mask in zip(one.boxes, one.masks, strict=True):
            rows, columns = np.nonzero(mask)
            assert abs(columns.min() - x1) <= 2 and abs(columns.max() + 1 - x2) <= 2
            assert abs(rows.min() - y1) <= 2 and abs(rows.max() + 1 - y2) <= 2
    labels = first(Feed(load_config(tiny.seg), 'val'), 3)
    assert all(one.label_map.shape == (96, 96) for one in labels)


def test_boxes_are_drawn_in_their_colour(tiny):
    feed = Feed(load_config(tiny.det))
    one = next(one for one in feed if len(one.boxes) and not one.ignored.any())
    picture = picture_of(one, feed.classes, feed.palette)
    factor = picture.shape[0] // one.image.shape[0]
    x1, y1, x2, y2 = np.rint(one.boxes[-1] * factor).astype(int)
    colour = feed.palette[one.labels[-1]]
    assert picture[(y1 + y2) // 2, x1].tolist() == list(colour)
    assert picture[y2 - 1, (x1 + x2) // 2].tolist() == list(colour)


def test_sheets(tool, tiny, tmp_path, capsys):
    for folder in ('a', 'b'):
        assert tool('browse_data', tiny.det, '--number', 18, '--out', tmp_path / folder) == 0
    names = ['train_01.png', 'train_02.png']
    assert sorted(path.name for path in (tmp_path / 'a').iterdir()) == names
    assert [(tmp_path / 'a' / name).read_bytes() for name in names] == [
        (tmp_path / 'b' / name).read_bytes() for name in names
    ]
    full, rest = (Image.open(tmp_path / 'a' / name).size for name in names)
    assert full[1] > 3 * rest[1] and full[0] > 1.5 * rest[0]  # four rows of four, then two
    assert str(tmp_path / 'a' / 'train_02.png') in capsys.readouterr().out


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(number=0), '--number 0: give 1 or more'),
        (dict(split='test'), 'split test is unknown; choose from train, val'),
    ],
)
def test_what_cannot_be_shown_is_refused(tiny, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        browse(tiny.det, out=str(tmp_path / 'out'), **options)
    assert not (tmp_path / 'out').exists()


def test_a_sample_that_cannot_be_read_is_named(tool, tiny, tmp_path, capsys):
    copytree(tiny.data, tmp_path / 'shapes')
    broken = max((tmp_path / 'shapes/coco/val').glob('*.jpg'))
    broken.write_bytes(b'no picture')
    root = f'{tmp_path}/shapes/'
    options = [f'val_dataloader.dataset.data_root={root}']
    assert tool('browse_data', tiny.det, '--split', 'val', '--out', tmp_path / 'o', '--cfg-options', *options) == 2
    assert broken.name in capsys.readouterr().err


def test_torch_is_left_as_it_was(tiny):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    feed = Feed(load_config(tiny.det))
    first(feed, 2)
    assert torch.equal(torch.rand(3), expected)
