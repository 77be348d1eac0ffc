"""The demo: what it shows of a log, how it fails, and (slow) the scores it promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from densekit import demo

ROOT = Path(__file__).parents[2]
TRAIN = (
    '11/20 12:04:30 - mmengine - INFO - Iter(train) [{}/500]  base_lr: 2.9e-03 lr: 2.9e-03  eta: 0:01:58  '
    'time: 0.2703  data_time: 0.0082  grad_norm: 5.8911  loss: 1.8236  loss_rpn_cls: 0.0890'
)


@pytest.mark.parametrize(
    ('line', 'shown'),
    [
        (TRAIN.format('100'), 'iteration  100 of 500  loss 1.8236  eta 0:01:58'),
        (TRAIN.format(' 60'), None),
        (
            'INFO - Iter(val) [100/100]    coco/bbox_mAP: 0.6410  coco/bbox_mAP_50: 0.9340  coco/segm_mAP: 0.6480',
            'validation: box mAP 0.6410, mask mAP 0.6480',
        ),
        ('INFO - Iter(val) [100/100]    aAcc: 99.0  mIoU: 95.5400  mAcc: 97.81', 'validation: mIoU 95.5400 %'),
        ('INFO - bbox_mAP_copypaste: 0.641 0.934 0.712 0.632 0.742 -1.000', None),
        ('Loading and preparing results...', None),
    ],
)
def test_shows_progress_and_metrics_only(line, shown):
    assert demo._shown(line) == shown


def test_says_where_to_run_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert demo.main() == 1
    assert 'densekit checkout' in capsys.readouterr().out


def test_a_failing_step_ends_the_demo_and_names_its_log(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(demo, 'OUT', tmp_path)
    monkeypatch.setattr(demo, '_cores', lambda: 1)
    started = []
    command_of(monkeypatch, 'import sys; print("Traceback"); sys.exit(3)', started)
    assert demo.main() == 1
    out = capsys.readouterr().out
    assert 'status 3' in out and str(tmp_path / 'detection' / 'train.log') in out
    assert 'one after the other' in out
    assert (tmp_path / 'detection' / 'train.log').read_text() == 'Traceback\n'
    assert started == ['detection'], 'the other is not started any more'


def command_of(monkeypatch, code, started):
    """Has every tool run a line of Python, which gets the tool's own arguments."""
    popen = subprocess.Popen

    def fake(command, **options):
        work_dir = command[command.index('--work-dir') + 1]
        started.append(Path(work_dir).name)
        return popen([sys.executable, '-c', code, work_dir], **options)

    monkeypatch.setattr(demo.subprocess, 'Popen', fake)


def test_the_two_run_side_by_side_and_end_together(tmp_path, monkeypatch, capsys):
    """One fails once the other runs; the other, which would run for ever, is ended."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(demo, 'OUT', tmp_path)
    monkeypatch.setattr(demo, '_cores', lambda: 2)
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    code = """
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
print('threads', os.environ['OMP_NUM_THREADS'], flush=True)
if folder.name == 'detection':
    while True:
        (folder / 'running').touch()
        time.sleep(0.01)
while not (folder.parent / 'detection' / 'running').exists():
    time.sleep(0.01)
sys.exit(4)
"""
    started = []
    command_of(monkeypatch, code, started)
    assert demo.main() == 1
    out = capsys.readouterr().out
    assert sorted(started) == ['detection', 'segmentation']
    assert 'side by side, 1 of 2 cores each' in out
    assert 'segmentation.py' in out or 'upernet' in out
    assert 'status 4' in out
    assert (tmp_path / 'detection' / 'train.log').read_text() == 'threads 1\n'


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_reaches_its_scores(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(demo, 'OUT', tmp_path)
    assert demo.main() == 0
    detection = json.loads((tmp_path / 'detection' / 'metrics.json').read_text())
    segmentation = json.loads((tmp_path / 'segmentation' / 'metrics.json').read_text())
    assert detection['coco/bbox_mAP'] >= 0.50
    assert detection['coco/segm_mAP'] >= 0.45
    assert segmentation['mIoU'] >= 80
    for name in ('predictions.png', 'curves.png'):
        assert min(Image.open(tmp_path / name).size) > 500
