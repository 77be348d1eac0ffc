"""Every kind of fault, seeded into 40 clean label maps, is reported with file and id; without it, nothing."""

import os
import shutil
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

import densekit.data  # noqa: F401
from densekit.data.checks import check_data, inspect_data
from densekit.data.faults import LABEL_MAP_KINDS, describe
from densekit.data.labelmap_checks import loaded_labels
from densekit.data.shapes import SEG_CLASSES, generate_shapes

SAMPLES = os.environ.get('DENSEKIT_SAMPLES')
LOAD = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]


@pytest.fixture(scope='module')
def shapes(tmp_path_factory) -> Path:
    return generate_shapes(tmp_path_factory.mktemp('data') / 'shapes', num_train=40, num_val=4, size=64) / 'ade'


class Set:
    """The clean set, in a copy to be spoiled.

    Attributes:
        images: folder of the images.
        maps: folder of the label maps.
        map: one of the label maps.
        dataset: config of the data set.
        cfg: other parts of the config.
        depth: arguments of the check.
    """

    def __init__(self, folder: Path, shapes: Path) -> None:
        self.images = Path(shutil.copytree(shapes / 'images/training', folder / 'images'))
        self.maps = Path(shutil.copytree(shapes / 'annotations/training', folder / 'maps'))
        self.map = self.maps / 'ADE_train_00000009.png'
        self.image = self.images / 'ADE_train_00000009.jpg'
        self.dataset = dict(
            type='BaseSegDataset', metainfo=dict(classes=SEG_CLASSES), reduce_zero_label=True, pipeline=LOAD
        )
        self.cfg: dict = {}
        self.depth: dict = {}

    def config(self, loops=('train',)) -> Config:
        dataset = dict(self.dataset, data_prefix=dict(img_path=str(self.images), seg_map_path=str(self.maps)))
        return Config(
            dict(default_scope='mmseg', **{f'{loop}_dataloader': dict(dataset=dataset) for loop in loops}, **self.cfg)
        )

    def check(self, loops=('train',), **depth) -> list:
        return check_data(self.config(loops), loops, **self.depth, **depth)

    def labels(self) -> np.ndarray:
        return np.asarray(Image.open(self.map))

    def write(self, labels: np.ndarray, **options) -> None:
        Image.fromarray(labels).save(self.map, **options)


@pytest.fixture
def data(tmp_path, shapes) -> Set:
    return Set(tmp_path, shapes)


SEEDS = {}


def seed(kind):
    """Registers a function that spoils a :class:`Set`; it gives the file and the id to be reported, or None."""

    def register(spoil):
        SEEDS.setdefault(kind, []).append(spoil)
        return spoil

    return register


@seed('images-none')
def images_of_another_suffix(s):
    s.dataset['img_suffix'] = '.png'
    return str(s.images), None


@seed('labels-none')
def label_maps_of_another_suffix(s):
    s.dataset['seg_map_suffix'] = '_labelTrainIds.png'
    return str(s.maps), None


@seed('label-missing')
def no_label_map(s):
    s.map.unlink()


@seed('label-unreadable')
def no_picture(s):
    s.map.write_text('no picture')


@seed('label-unreadable')
def cut_off(s):
    s.map.write_bytes(s.map.read_bytes()[:-30])


@seed('label-size-differs')
def another_size(s):
    s.write(s.labels()[:, 1:])


@seed('label-size-differs')
def image_turned_by_exif(s):
    exif = Image.Exif()
    exif[274] = 6
    Image.new('RGB', (64, 32)).save(s.image, exif=exif)
    s.write(s.labels()[:32])


@seed('label-out-of-range')
def value_of_no_class(s):
    labels = s.labels().copy()
    labels[0, 0] = 7
    s.write(labels)


@seed('label-out-of-range')
def zero_not_reduced(s):
    s.dataset['reduce_zero_label'] = False
    s.write(s.labels() * 0 + 6)
    for path in s.maps.iterdir():
        if path != s.map:
            Image.fromarray(np.asarray(Image.open(path)) % 6).save(path)


@seed('label-deep')
def sixteen_bits(s):
    s.write(s.labels().astype(np.uint16) + 256)


@seed('label-scaled')
def one_bit_by_opencv(s):
    cv2.imwrite(str(s.map), (s.labels() > 1).astype(np.uint8) * 255, [cv2.IMWRITE_PNG_BILEVEL, 1])
    s.dataset['pipeline'] = [LOAD[0], dict(type='LoadAnnotations', imdecode_backend='cv2')]


@seed('label-scaled')
def four_bits(s):
    labels = s.labels()
    packed = (labels[:, ::2] << 4 | labels[:, 1::2]).astype(np.uint8)
    rows = b''.join(b'\0' + row.tobytes() for row in packed)
    chunks = [(b'IHDR', struct.pack('>IIBBBBB', 64, 64, 4, 0, 0, 0, 0)), (b'IDAT', zlib.compress(rows)), (b'IEND', b'')]
    s.map.write_bytes(b'\x89PNG\r\n\x1a\n' + b''.join(_chunk(*chunk) for chunk in chunks))


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))


@seed('label-float')
def fractions(s):
    s.dataset['seg_map_suffix'] = '.tif'
    for path in s.maps.iterdir():
        Image.open(path).save(path.with_suffix('.tif'))
        path.unlink()
    s.map = s.map.with_suffix('.tif')
    s.write(s.labels().astype(np.float32) + 0.5)


@seed('label-coloured')
def colours(s):
    s.write(np.repeat(s.labels()[..., None], 3, axis=2))


@seed('label-coloured')
def palette_by_opencv(s):
    s.dataset['pipeline'] = [LOAD[0], dict(type='LoadAnnotations', imdecode_backend='cv2')]
    picture = Image.fromarray(s.labels()).convert('P')
    picture.save(s.map)


@seed('label-lossy')
def jpeg(s):
    s.write(s.labels(), format='JPEG')


@seed('label-all-ignored')
def all_zero(s):
    s.write(s.labels() * 0)


@seed('class-unseen')
def class_that_is_nowhere(s):
    s.depth['decode'] = True
    s.dataset['metainfo'] = dict(classes=(*SEG_CLASSES, 'moon'))
    return str(s.maps), 'moon'


@seed('classes-unknown')
def no_classes(s):
    del s.dataset['metainfo']
    return str(s.maps), None


@seed('classes-unknown')
def class_of_another_set(s):
    s.dataset.update(type='ADE20KDataset', metainfo=dict(classes=('wall', 'circle')))
    return str(s.maps), 'circle'


@seed('image-unreadable')
def image_cut_off(s):
    s.image.write_bytes(s.image.read_bytes()[:-200])
    return str(s.image), s.image.stem


@seed('image-missing')
def image_of_the_list_missing(s):
    names = sorted(path.stem for path in s.images.iterdir())
    (s.maps.parent / 'list.txt').write_text('\n'.join(names))
    s.dataset['ann_file'] = str(s.maps.parent / 'list.txt')
    s.image.unlink()
    return str(s.image), s.image.stem


@seed('heads-differ')
def a_head_of_150_classes(s):
    s.cfg['model'] = dict(decode_head=dict(type='UPerHead', num_classes=150))
    return 'the config', 'decode_head'


CASES = [
    pytest.param(kind, spoil, id=f'{kind}: {spoil.__name__}') for kind, spoilers in SEEDS.items() for spoil in spoilers
]


def test_every_kind_is_seeded():
    assert set(SEEDS) == set(LABEL_MAP_KINDS)
    assert len(LABEL_MAP_KINDS) >= 12


@pytest.mark.parametrize('depth', [{}, {'headers': True}, {'decode': True}], ids=['default', 'headers', 'decode'])
def test_a_clean_set_has_no_faults(data, depth):
    data.cfg['model'] = dict(decode_head=dict(type='UPerHead', num_classes=6))
    assert data.check(**depth) == []
    assert data.check(loops=('train', 'val', 'test'), **depth) == []


@pytest.mark.parametrize(('kind', 'spoil'), CASES)
def test_a_fault_is_reported_with_file_and_id(data, kind, spoil):
    file, wanted = spoil(data) or (str(data.map), data.image.stem)
    faults = data.check()
    assert [(found.kind, found.file, found.id) for found in faults] == [(kind, file, wanted)], describe(faults)


@pytest.mark.parametrize('reduce_zero_label', [True, False])
@pytest.mark.parametrize('classes', [None, ('sky', 'wall', 'tree')])
def test_labels_become_what_the_loader_makes_of_them(tmp_path, reduce_zero_label, classes):
    from mmseg.datasets import ADE20KDataset
    from mmseg.datasets.transforms import LoadAnnotations

    path = tmp_path / 'all.png'
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(path)
    metainfo = dict(classes=classes) if classes else None
    dataset = ADE20KDataset(metainfo=metainfo, reduce_zero_label=reduce_zero_label, lazy_init=True)
    item = dict(seg_map_path=str(path), seg_fields=[], label_map=dataset.label_map)
    loaded = LoadAnnotations()(dict(item, reduce_zero_label=reduce_zero_label))['gt_seg_map']
    assert loaded_labels(dataset).tolist() == loaded.ravel().tolist()


def palette(s: Set) -> None:
    picture = Image.fromarray(s.labels())
    picture.putpalette([200, 10, 10] * 256)
    picture.save(s.map)


def sixteen_bits_that_fit(s: Set) -> None:
    s.write(s.labels().astype(np.uint16))


def one_bit(s: Set) -> None:
    Image.fromarray(s.labels() > 1).save(s.map)


@pytest.mark.parametrize('change', [palette, sixteen_bits_that_fit, one_bit])
def test_what_loads_as_meant_is_no_fault(data, change):
    from mmseg.datasets.transforms import LoadAnnotations

    before = data.labels()
    change(data)
    assert data.check() == []
    loaded = LoadAnnotations()(dict(seg_map_path=str(data.map), seg_fields=[], label_map=None, reduce_zero_label=False))
    assert np.array_equal(loaded['gt_seg_map'], before if change is not one_bit else before > 1)


def test_what_is_reported_loads_wrong_and_silently(data):
    """Negative control: the loader takes each of these maps without an error."""
    from mmseg.datasets.transforms import LoadAnnotations

    before = data.labels()
    for spoil in (sixteen_bits, colours, jpeg, four_bits):
        data.write(before)
        spoil(data)
        item = dict(seg_map_path=str(data.map), seg_fields=[], label_map=None, reduce_zero_label=False)
        loaded = LoadAnnotations()(item)['gt_seg_map']
        assert loaded.shape != before.shape or (spoil is sixteen_bits) == bool((loaded == before).all())


def test_classes_that_count_from_one_are_pointed_out(data):
    zero_not_reduced(data)
    assert 'set reduce_zero_label=True' in data.check()[0].text


def test_beyond_the_sample_faults_show_on_demand(data, monkeypatch):
    monkeypatch.setattr('densekit.data.labelmap_checks.SAMPLE', 2)
    value_of_no_class(data)
    assert data.check() == []
    assert [found.kind for found in data.check(decode=True)] == ['label-out-of-range']
    data.image.write_bytes(b'')
    colours(data)
    assert [found.kind for found in data.check()] == ['label-coloured']  # headers of label maps are read in any case
    assert [found.kind for found in data.check(headers=True)] == ['label-coloured', 'image-unreadable']
    monkeypatch.setattr('densekit.data.labelmap_checks.HEADERS', 10)
    assert data.check() == []


@pytest.mark.parametrize('loaders', [('LoadBiomedicalImageFromFile', 'LoadBiomedicalAnnotation'), (None, 'ReadLabels')])
def test_files_that_are_read_otherwise_are_not_opened(data, loaders):
    data.map.write_bytes(b'of a kind of its own')
    assert [found.kind for found in data.check()] == ['label-unreadable']
    data.dataset['pipeline'] = [dict(type=loaders[0] or 'LoadImageFromFile'), dict(type=loaders[1])]
    assert data.check() == []
    (report,) = inspect_data(data.config(), ('train',))
    assert report.counts['label maps'] == 40
    assert 'files not opened: the pipeline' in report.remarks[0]
    data.map.unlink()
    assert [found.kind for found in data.check()] == ['label-missing']


def test_counts(data):
    report = inspect_data(data.config(), ('train',), decode=True)[0]
    assert report.counts == {'images': 40, 'label maps': 40, 'decoded': 40}
    maps = [np.unique(np.asarray(Image.open(path))) for path in data.maps.iterdir()]
    assert report.classes == {name: sum(i in m for m in maps) for i, name in enumerate(SEG_CLASSES, start=1)}


@pytest.mark.skipif(not SAMPLES, reason='DENSEKIT_SAMPLES names no folder of sample photographs')
def test_real_label_maps_have_no_faults():
    prefix = dict(img_path='images/validation', seg_map_path='annotations/validation')
    dataset = dict(type='ADE20KDataset', data_root=f'{SAMPLES}/ade20k_val_sample', data_prefix=prefix, pipeline=LOAD)
    loaders = dict(train_dataloader=dict(dataset=dataset), val_dataloader=dict(dataset=dataset))
    cfg = Config(dict(default_scope='mmseg', **loaders))
    assert check_data(cfg, headers=True) == []
    assert check_data(cfg, ('val',), decode=True) == []
