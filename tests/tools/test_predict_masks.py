"""tools/predict.py and Predictor: masks that are not drawn give what drawn ones give, and mistakes end in a line."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from densekit import predictor as predictor_module
from densekit.evaluation.rle import RleMasks
from densekit.predictor import Predictor, draw
from densekit.report import coco_results
from densekit.report.pictures import read_image

pytestmark = pytest.mark.usefixtures('quick_mmengine')


@pytest.fixture(scope='module')
def det(tiny, tmp_path_factory):
    """The tiny detector, whose random masks are about half on."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(Config.fromfile(tiny.det).model)
        model.init_weights()
    path = tmp_path_factory.mktemp('det') / 'det.pth'
    torch.save({'state_dict': model.state_dict()}, path)
    return tiny.det, str(path)


@pytest.fixture
def image(tiny):
    return sorted((tiny.data / 'coco/val').glob('*.jpg'))[0]


def test_results_are_those_of_drawn_masks(det, tool, image, tmp_path, monkeypatch):
    def predicted(name):
        assert tool('predict', *det, image, '--out', tmp_path / name, '--score-thr', '0.2') == 0
        return [(tmp_path / name / file).read_bytes() for file in ('results.json', f'{image.stem}.png')]

    encoded = []
    encode = coco_results.coco_mask.encode
    monkeypatch.setattr(coco_results.coco_mask, 'encode', lambda mask: encoded.append(1) or encode(mask))
    undrawn = predicted('undrawn')
    assert encoded == []
    monkeypatch.setattr(predictor_module, 'run_lengths', nullcontext)
    assert predicted('drawn') == undrawn
    assert len(encoded) == len(json.loads(undrawn[0])['annotations']) > 0


def test_what_is_drawn_is_what_is_shown(det, image, monkeypatch):
    """An array of all masks only for who asks; in a picture no mask but those of the objects in it."""
    predictor, pixels = Predictor(*det), read_image(image)
    (found,), drawn = predictor.batch([pixels], drawn=False), predictor(pixels)
    assert isinstance(found.masks, RleMasks) and isinstance(drawn.masks, np.ndarray)
    assert np.array_equal(found.masks.numpy(), drawn.masks)
    assert 0 < drawn.masks.mean() < 1
    counts = []
    numpy = RleMasks.numpy
    monkeypatch.setattr(RleMasks, 'numpy', lambda self: counts.append(len(self)) or numpy(self))
    threshold = float(np.sort(found.scores)[-2])
    assert np.array_equal(draw(pixels, found, predictor, threshold), draw(pixels, drawn, predictor, threshold))
    assert counts == [2] and len(found.scores) > 2
    head = next(module for module in predictor.model.modules() if hasattr(module, 'run_lengths'))
    assert not head.run_lengths


@pytest.mark.parametrize(
    ('error', 'said'),
    [(OSError(28, 'No space left on device'), 'No space left on device'), (ValueError('no objects'), 'no objects')],
)
def test_an_error_while_predicting_is_told_in_a_line(det, tool, image, tmp_path, capsys, monkeypatch, error, said):
    def fail(*_):
        raise error

    monkeypatch.setattr('densekit.report.predict_command.save_png', fail)
    assert tool('predict', *det, image, '--out', tmp_path / 'out') == 2
    assert said in capsys.readouterr().err


def test_a_disk_that_is_full_leaves_no_draft(tmp_path):
    results = coco_results.CocoResults(tmp_path / 'results.json', ['a'], {})
    results.add(np.zeros((2, 2), int), (2, 2))
    file = results._file

    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            file.close()

        def write(self, _):
            raise OSError(28, 'No space left on device')

    results._file = Full()
    with pytest.raises(OSError, match='No space left'), results:
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_is_given_to_predict(det, tool, image, tmp_path, capsys, monkeypatch):
    out = ['--out', tmp_path / 'out']
    assert tool('predict', *det, image, *out, '--score-thr', '30') == 2
    assert '--score-thr 30: scores are from 0 to 1' in capsys.readouterr().err
    (tmp_path / 'empty').mkdir()
    shutil.copy(image, tmp_path / 'one.jpg')
    assert tool('predict', *det, tmp_path / 'empty', *out) == 2
    said = capsys.readouterr().err
    assert 'Folders and patterns given without an image: 1. Nothing was predicted.' in said
    assert 'could not be read' not in said
    assert tool('predict', *det, tmp_path / 'empty', tmp_path / 'one.jpg', *out) == 2
    assert 'without an image: 1. The other 1 are in' in capsys.readouterr().err

    def locked(path):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(Path, 'iterdir', locked)
    assert tool('predict', *det, tmp_path / 'empty', *out) == 2
    assert f'Folder {tmp_path}/empty cannot be read: Permission denied' in capsys.readouterr().err


@pytest.mark.parametrize('place', [0, 1])
def test_no_path_at_all(det, place):
    given = list(det)
    given[place] = None
    with pytest.raises(ValueError, match='is None; give the path of a file'):
        Predictor(*given)
    assert Predictor(*map(Path, det)).classes[0] == 'circle'
