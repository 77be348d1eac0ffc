"""tools/test.py: tables, JSON and files for test servers."""

import json
import math

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from pycocotools import mask as coco_mask

from densekit.models import mask_head
from densekit.report.scores import by_class, scores_json, scores_table

pytestmark = pytest.mark.usefixtures('quick_mmengine')

SHAPES = ['circle', 'square', 'triangle', 'star', 'cross']


@pytest.fixture(scope='module')
def weights(tiny, tmp_path_factory):
    """Checkpoints with random weights, of the detector and the segmentor."""
    paths = []
    for config in (tiny.det, tiny.seg):
        torch.manual_seed(0)
        cfg = Config.fromfile(config)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = MODELS.build(cfg.model)
            model.init_weights()
        paths.append(str(tmp_path_factory.mktemp('weights') / 'weights.pth'))
        torch.save({'state_dict': model.state_dict()}, paths[-1])
    return paths


def test_all_figures_of_a_detector(tiny, weights, tool, tmp_path, capsys):
    out = tmp_path / 'metrics.json'
    folder = tmp_path / 'found'
    run = ('--work-dir', tmp_path / 'run', '--out', out, '--results', folder)
    assert tool('test', tiny.det, weights[0], *run) == 0
    metrics = json.loads(out.read_text())
    figures = ['mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l']
    figures += ['AR@1', 'AR@10', 'AR@100', 'AR_s@100', 'AR_m@100', 'AR_l@100']
    classes = [f'{name}/{shape}' for name in ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl') for shape in SHAPES]
    assert metrics.keys() == {f'coco/{kind}_{name}' for kind in ('bbox', 'segm') for name in figures + classes}
    screen = capsys.readouterr().out
    lines = screen[screen.index(f'results of {weights[0]}') :].splitlines()[1:]
    titles = ['AP', 'AP50', 'AP75', 'APs', 'APm', 'APl', 'AR1', 'AR10', 'AR100', 'ARs', 'ARm', 'ARl']
    assert lines[0].split() == ['%', *titles]
    assert [line.split()[0] for line in lines[2:4]] == ['box', 'mask']
    start = next(i for i, line in enumerate(lines) if line.startswith('class'))
    assert lines[start].split() == ['class', 'box', 'AP', 'AP50', 'AP75', 'mask', 'AP', 'AP50', 'AP75']
    assert [line.split()[0] for line in lines[start + 2 : start + 7]] == SHAPES
    assert 'coco/bbox_AP' not in screen  # the log has the twelve, not those of every class

    entries = json.loads((folder / 'results.segm.json').read_text())
    boxes = json.loads((folder / 'results.bbox.json').read_text())
    assert len(entries) == len(boxes) > 0
    assert {entry['image_id'] for entry in entries} <= {1, 2, 3}
    assert all(coco_mask.decode(entry['segmentation']).shape == (64, 64) for entry in entries)


def test_equal_to_mmdets_own_head_and_metric(tiny, weights, tool, tmp_path, monkeypatch):
    pasted = []
    paste = mask_head.paste
    monkeypatch.setattr(mask_head, 'paste', lambda *args: pasted.append(len(args[0])) or paste(*args))
    stock = ['--cfg-options', 'model.roi_head.mask_head.type=FCNMaskHead', 'test_evaluator.type=CocoMetric']
    found, metrics = [], []
    for name, options in (('ours', []), ('theirs', stock)):
        run = ('--work-dir', tmp_path / 'run', '--out', tmp_path / 'metrics.json', '--results', tmp_path / name)
        assert tool('test', tiny.det, weights[0], *run, *options) == 0
        found.append(json.loads((tmp_path / name / 'results.segm.json').read_text()))
        metrics.append(json.loads((tmp_path / 'metrics.json').read_text()))
        assert len(pasted) == 3  # images, all of them by ours
    assert found[0] == found[1]
    assert sum(pasted) == len(found[0]) > 0
    assert {key: round(metrics[0][key], 3) for key in metrics[1]} == metrics[1]


def test_a_detector_without_ground_truth(tiny, weights, tool, tmp_path, capsys):
    run = ('--work-dir', tmp_path / 'run', '--format-only', tmp_path / 'found')
    assert tool('test', tiny.det, weights[0], *run) == 0
    assert sorted(path.name for path in (tmp_path / 'found').iterdir()) == ['results.bbox.json', 'results.segm.json']
    screen = capsys.readouterr().out
    assert 'results of' not in screen
    assert f'Detections are written to {tmp_path}/found/results.bbox.json' in screen


@pytest.mark.parametrize('option', ['--results', '--format-only'])
def test_label_maps(option, tiny, weights, tool, tmp_path):
    run = ('--work-dir', tmp_path / 'run', '--out', tmp_path / 'metrics.json', option, tmp_path / 'maps')
    assert tool('test', tiny.seg, weights[1], *run) == 0
    images = sorted(path.stem for path in (tiny.data / 'ade/images/validation').iterdir())
    maps = sorted((tmp_path / 'maps').iterdir())
    assert [path.name for path in maps] == [f'{stem}.png' for stem in images]
    labels = np.array(Image.open(maps[0]))
    assert labels.shape == (64, 64)
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    if option == '--format-only':
        assert metrics == {}
    else:
        assert {'mIoU', 'IoU/circle', 'Acc/star'} <= metrics.keys()
        known = [metrics[f'IoU/{name}'] for name in ('background', *SHAPES)]
        mean = np.mean([value for value in known if value is not None])
        assert metrics['mIoU'] == pytest.approx(mean, abs=0.006)


def test_mistakes(tiny, weights, tool, tmp_path, capsys):
    both = ('--results', tmp_path / 'a', '--format-only', tmp_path / 'b')
    assert tool('test', tiny.det, weights[0], '--work-dir', tmp_path, *both) == 2
    assert 'give one of them' in capsys.readouterr().err
    (tmp_path / 'file').write_text('')
    assert tool('test', tiny.det, weights[0], '--work-dir', tmp_path, '--results', tmp_path / 'file') == 2
    assert '--results' in capsys.readouterr().err
    other = tmp_path / 'other.py'
    other.write_text(
        f"_base_ = '{tiny.det}'\ntest_evaluator = dict(_delete_=True, type='DumpResults', out_file_path='x.pkl')\n"
    )
    assert tool('test', other, weights[0], '--work-dir', tmp_path, '--results', tmp_path / 'a') == 2
    assert '--results: DumpResults writes no files; those that do are CocoMetric' in capsys.readouterr().err


class Metric:
    prefix = 'coco'
    class_scores = {
        kind: {
            'bird': {'AP': value, 'AP50': 0.5, 'AP75': -1.0},
            'zebra crossing': {'AP': 0.1, 'AP50': 0.2, 'AP75': 0.3},
        }
        for kind, value in (('bbox', 0.25), ('segm', -1.0))
    }


def test_table_and_json():
    metrics = {
        'coco/bbox_mAP': 0.5,
        'coco/bbox_AR_s@100': -1,
        'coco/segm_mAP': 0.4,
        'coco/bbox_AP/bird': 0.25,
        'PQ': 31.0,
    }
    classes = by_class([Metric()])
    assert scores_table(metrics, classes).splitlines() == [
        '%       AP  ARs',
        '----  ----  ---',
        'box   50.0    -',
        'mask  40.0',
        '',
        'other  value',
        '-----  -----',
        'PQ        31',
        '',
        'class           box AP  AP50  AP75  mask AP  AP50  AP75',
        '--------------  ------  ----  ----  -------  ----  ----',
        'bird              25.0  50.0     -        -  50.0     -',
        'zebra crossing    10.0  20.0  30.0     10.0  20.0  30.0',
    ]
    entries = json.loads(scores_json({**metrics, 'mIoU': math.nan}, classes))
    assert entries['coco/segm_AP/zebra crossing'] == 0.1
    assert entries['mIoU'] is None
    assert scores_table({}, {}) == 'no metrics'
