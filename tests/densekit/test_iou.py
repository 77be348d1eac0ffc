"""mIoU counts every pixel or refuses, and is the same however many processes count."""

import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import METRICS
from PIL import Image

import densekit.ops  # noqa: F401

# isort: split
from mmseg.evaluation import IoUMetric

import densekit.evaluation.iou as iou
from densekit.evaluation import ExactIoUMetric

ROOT = Path(__file__).parents[2]
IGNORE = 255


def metric_of(num_classes, cls=ExactIoUMetric, **kwargs):
    metric = cls(**kwargs)
    metric.dataset_meta = {'classes': [f'class{i}' for i in range(num_classes)]}
    return metric


def sample(predicted, truth=None, name='0', **more):
    """As the model's output comes to a metric."""
    found = {'img_path': f'images/{name}.jpg', 'pred_sem_seg': {'data': torch.as_tensor(predicted)[None]}, **more}
    if truth is not None:
        found |= {'gt_sem_seg': {'data': torch.as_tensor(truth)[None]}, 'seg_map_path': f'labels/{name}.png'}
    return found


def score(metric, pairs):
    for i, (predicted, truth) in enumerate(pairs):
        metric.process(None, [sample(predicted, truth, str(i))])
    return metric.evaluate(len(pairs))


def random_case(seed):
    """Classes, and label maps of a few images: some classes nowhere, some pixels ignored, some images all ignored."""
    rng = np.random.default_rng(seed)
    num_classes = int(rng.integers(1, 30))
    used = rng.choice(num_classes, rng.integers(1, num_classes + 1), replace=False)
    pairs = []
    for _ in range(rng.integers(1, 6)):
        size = rng.integers(1, 40, 2)
        predicted, truth = rng.choice(used, size), rng.choice(used, size)
        agree = rng.random(size) < rng.random()
        truth = np.where(agree, predicted, truth)
        truth[rng.random(size) < rng.choice([0, 0.3, 1], p=[0.4, 0.5, 0.1])] = IGNORE
        pairs.append((predicted, truth.astype(rng.choice([np.uint8, np.int64]))))
    return num_classes, pairs


def reference(num_classes, pairs):
    """In NumPy, class by class, without a table."""
    predicted = np.concatenate([p[t != IGNORE] for p, t in pairs])
    truth = np.concatenate([t[t != IGNORE] for _, t in pairs])
    scores = {name: np.full(num_classes, np.nan) for name in ('IoU', 'Acc', 'Dice', 'Fscore', 'Precision', 'Recall')}
    for label in range(num_classes):
        p, t = predicted == label, truth == label
        both, either = (p & t).sum(), (p | t).sum()
        with np.errstate(invalid='ignore', divide='ignore'):
            scores['IoU'][label] = both / either
            scores['Acc'][label] = scores['Recall'][label] = both / t.sum()
            scores['Dice'][label] = 2 * both / (p.sum() + t.sum())
            scores['Precision'][label] = both / p.sum()
            product, total = both / p.sum() * (both / t.sum()), both / p.sum() + both / t.sum()
            scores['Fscore'][label] = 2 * product / total
    scores['aAcc'] = np.array((predicted == truth).mean() if truth.size else np.nan)
    return scores


@pytest.mark.parametrize('seed', range(200))
def test_equal_to_numpy_to_the_last_bit(seed):
    num_classes, pairs = random_case(seed)
    metric = metric_of(num_classes, iou_metrics=['mIoU', 'mDice', 'mFscore'])
    found = score(metric, pairs)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of empty means
        expected = reference(num_classes, pairs)
        means = {name: float(np.round(np.nanmean(values) * 100, 2)) for name, values in expected.items()}
    scores = iou.class_scores(metric.confusion, metric.metrics)
    assert scores.keys() == expected.keys()
    for name, values in scores.items():
        assert np.array_equal(values, expected[name], equal_nan=True), name
        key = name if name == 'aAcc' else f'm{name}'
        assert found[key] == means[name] or np.isnan([found[key], means[name]]).all()


@pytest.mark.parametrize('kwargs', [{}, {'iou_metrics': ['mDice', 'mFscore'], 'beta': 2}, {'nan_to_num': 0}], ids=str)
@pytest.mark.parametrize('seed', range(20))
def test_equal_to_mmseg_where_labels_are_in_range(seed, kwargs):
    """As far as mmseg's own float32 goes, which may round the last of two decimals otherwise."""
    num_classes, pairs = random_case(1000 + seed)
    if all((truth == IGNORE).all() for _, truth in pairs):
        pairs.append((np.zeros((1, 1), int), np.zeros((1, 1), int)))  # mmseg warns where nothing counts
    ours, theirs = metric_of(num_classes, **kwargs), metric_of(num_classes, IoUMetric, **kwargs)
    found, expected = score(ours, pairs), score(theirs, pairs)
    assert list(found) == list(expected)
    assert found == pytest.approx({key: float(value) for key, value in expected.items()}, abs=0.0101)


def test_one_histogram_is_exact_beyond_float32():
    """2**24 + 1 is no float32: where mmseg adds up images, pixels of a class get lost."""
    metric, theirs = metric_of(2), metric_of(2, IoUMetric)
    pair = np.zeros((1024, 1024), np.uint8), np.zeros((1024, 1024), np.uint8)
    single = np.zeros((1, 1), np.uint8), np.zeros((1, 1), np.uint8)
    pairs = [pair] * 16 + [single]
    score(metric, pairs)
    assert metric.confusion[0, 0] == 2**24 + 1
    for predicted, truth in pairs:
        theirs.process(None, [sample(predicted, truth)])
    assert sum(result[0] for result in theirs.results)[0] == 2**24


@pytest.mark.parametrize(('value', 'dtype'), [(2, np.uint8), (300, np.int32), (-1, np.int64)])
def test_a_label_out_of_range_is_an_error(value, dtype):
    truth = np.zeros((4, 5), dtype)
    truth[0, :3] = value
    truth[1] = IGNORE
    predicted = np.zeros((4, 5), np.int64)
    pairs = [(predicted, np.zeros((4, 5), dtype)), (predicted, truth)]
    with pytest.raises(ValueError, match=r'2 classes, so that labels are 0 to 1, and 255') as error:
        score(metric_of(2), pairs)
    assert f'labels/1.png of images/1.jpg: labels from {min(value, 0)} to {max(value, 0)}' in str(error.value)
    assert 'images/0.jpg' not in str(error.value)
    if value > 0:  # what it protects from
        assert score(metric_of(2, IoUMetric), pairs)['aAcc'] == 100


def test_a_prediction_out_of_range_is_an_error():
    predicted, truth = np.array([[0, 1, 2]]), np.array([[0, 1, 1]], np.uint8)
    with pytest.raises(ValueError, match=r'prediction for images/0\.jpg: labels from 0 to 2'):
        score(metric_of(2), [(predicted, truth)])
    assert score(metric_of(2, IoUMetric), [(predicted, truth)])['mIoU'] == 75  # of 100 and 50, the third is no union


def test_many_bad_images_are_told_in_few_lines():
    bad = np.full((1, 1), 9), np.zeros((1, 1), np.uint8)
    with pytest.raises(ValueError, match=r'(?s)^25 label maps.*and 15 more') as error:
        score(metric_of(2), [bad] * 25)
    assert len(str(error.value).splitlines()) == 13


def test_after_an_error_the_next_evaluation_starts_afresh():
    metric = metric_of(2)
    good = np.zeros((2, 2), int), np.zeros((2, 2), np.uint8)
    with pytest.raises(ValueError, match='cannot be scored'):
        score(metric, [(np.full((2, 2), 7), good[1])])
    assert score(metric, [good])['mIoU'] == 100
    assert score(metric, [good])['mIoU'] == 100
    assert metric.confusion.sum() == 4


@pytest.mark.parametrize('shape', [(4, 6), (5, 4), (4, 5, 3)])
def test_sizes_that_disagree_are_an_error(shape):
    with pytest.raises(ValueError, match=r'images/0\.jpg: the ground truth labels/0\.png is of shape \(.*of \(4, 5\)'):
        score(metric_of(2), [(np.zeros((4, 5), int), np.zeros(shape, np.uint8))])


def test_without_ground_truth():
    with pytest.raises(ValueError, match=r'images/0\.jpg has no ground truth.*format_only=True'):
        metric_of(2).process(None, [sample(np.zeros((2, 2), int))])


def test_images_that_were_not_scored_are_missed():
    metric = metric_of(2)
    metric.process(None, [sample(np.zeros((2, 2), int), np.zeros((2, 2), np.uint8))])
    with pytest.raises(ValueError, match=r"1 images were scored .* 3 are its part of the data set's 3"):
        metric.evaluate(3)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'iou_metrics': ['mIOU']}, r"iou_metrics is \['mIOU'\]; give one or more of mIoU, mDice, mFscore"),
        ({'format_only': True}, 'give output_dir'),
    ],
)
def test_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ExactIoUMetric(**kwargs)


def test_prefix_and_table(monkeypatch):
    said = []
    monkeypatch.setattr(iou, 'print_log', lambda text, **_: said.append(text))
    metric = metric_of(3, prefix='val')
    found = score(metric, [(np.array([[0, 1, 1, 1]]), np.array([[0, 0, 1, 1]], np.uint8))])
    assert found == {'val/aAcc': 75.0, 'val/mIoU': 58.33, 'val/mAcc': 75.0}
    assert said[-1].splitlines()[1:] == [
        'class     IoU     Acc',
        '------  -----  ------',
        'class0  50.00   50.00',
        'class1  66.67  100.00',
        'class2    nan     nan',
    ]


# No waiting for a GPU.


def test_counting_does_not_look_at_values():
    """A tensor without values cannot be waited for."""
    labels = torch.empty(4, 5, dtype=torch.int64, device='meta')
    counts, ranges = iou.label_counts(labels, labels.byte(), 150, IGNORE)
    assert counts.shape == (22501,)
    assert ranges.shape == (4,)
    metric = metric_of(150)
    for _ in range(3):
        metric.process(None, [sample(labels, labels.byte())])
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.bincount(labels.flatten(), minlength=150)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_gpu_is_waited_for_once():
    num_classes, pairs = random_case(3)
    expected = score(metric_of(num_classes), pairs)
    metric = metric_of(num_classes)
    on_gpu = [sample(torch.tensor(p).cuda(), torch.tensor(t).cuda()) for p, t in pairs]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        metric.process(None, on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert metric.evaluate(len(pairs)) == pytest.approx(expected, nan_ok=True, abs=0)


# Several processes.


def dealt(num_images, rank, world_size):
    """Which images mmengine's DefaultSampler gives to a process: the first are repeated until all have as many."""
    total = -(-num_images // world_size) * world_size
    return [i % num_images for i in range(rank, total, world_size)]


@pytest.mark.parametrize('world_size', [2, 3, 4, 8])
@pytest.mark.parametrize('num_images', range(1, 12))
def test_a_repeated_image_counts_once(num_images, world_size, monkeypatch):
    rng = np.random.default_rng(num_images)
    pairs = [(rng.integers(0, 5, (8, 8)), rng.integers(0, 5, (8, 8)).astype(np.uint8)) for _ in range(num_images)]
    whole = metric_of(5)
    score(whole, pairs)
    parts = []
    monkeypatch.setattr(iou, 'all_reduce', lambda counts: parts.append(counts.clone()))
    for rank in range(world_size):
        monkeypatch.setattr(iou, 'get_dist_info', lambda rank=rank: (rank, world_size))
        metric = metric_of(5)
        for i in dealt(num_images, rank, world_size):
            metric.process(None, [sample(*pairs[i], str(i))])
        metric.evaluate(num_images)
    assert np.array_equal(sum(parts)[:25].reshape(5, 5), whole.confusion)
    assert len(parts) == world_size


TWO_PROCESSES = """
import sys
import numpy as np
import torch
import torch.distributed as dist
from mmengine.dataset import DefaultSampler
from densekit.evaluation import ExactIoUMetric

def maps(i, bad):
    rng = np.random.default_rng(i)
    truth = rng.integers(0, 6, (16, 16))
    truth[0, 0] = 77 if i == bad else 255
    return rng.integers(0, 6, (16, 16)), truth

def score(bad=None):
    metric = ExactIoUMetric()
    metric.dataset_meta = {'classes': list('abcdef')}
    for i in DefaultSampler(range(7), shuffle=False):
        predicted, truth = (torch.as_tensor(labels)[None] for labels in maps(i, bad))
        metric.process(None, [{'img_path': f'{i}.jpg', 'pred_sem_seg': {'data': predicted},
                               'gt_sem_seg': {'data': truth}}])
    return metric.evaluate(7), metric.confusion.tolist()

if sys.argv[1] == '2':
    dist.init_process_group('gloo')
print('RESULT', score())
try:
    score(bad=3)
except ValueError as error:
    print('ERROR', str(error).replace('\\n', ' '))
"""


def test_two_processes_give_the_figure_of_one(tmp_path, monkeypatch, capsys):
    """Seven images, so that one of them is repeated; and a label out of range, which only one of them has."""
    (tmp_path / 'score.py').write_text(TWO_PROCESSES)
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        port = str(found.getsockname()[1])
    where = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    started = [
        subprocess.Popen(
            [sys.executable, 'score.py', '2'],
            env={**os.environ, **where, 'RANK': rank, 'WORLD_SIZE': '2'},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
        )
        for rank in '01'
    ]
    monkeypatch.setattr(sys, 'argv', ['score.py', '1'])
    exec(TWO_PROCESSES, {})
    outputs = [capsys.readouterr().out, *(process.communicate(timeout=120)[0] for process in started)]
    assert [process.returncode for process in started] == [0, 0], outputs
    results, errors = (
        [next(line for line in output.splitlines() if line.startswith(kind)) for output in outputs]
        for kind in ('RESULT', 'ERROR')
    )
    assert results[0] == results[1] == results[2]
    assert 'prediction' not in errors[0]
    assert '3.jpg: labels from 0 to 77' in errors[0]
    assert '3.jpg: labels from 0 to 77' in errors[2]  # it had image 3
    assert 'another process cannot score its part' in errors[1]
    assert not list(tmp_path.glob('.dist_test'))  # nor any other pickle


# Writing predictions.


@pytest.mark.parametrize('reduce_zero_label', [True, False])
def test_label_maps_are_written_as_mmseg_writes_them(reduce_zero_label, tmp_path):
    predicted = np.arange(150).reshape(10, 15)
    for cls in (ExactIoUMetric, IoUMetric):
        metric = metric_of(150, cls, output_dir=str(tmp_path / cls.__name__), format_only=True)
        metric.process(None, [sample(predicted, name='x', reduce_zero_label=reduce_zero_label)])
        assert metric.evaluate(1) == {}
    ours, theirs = (tmp_path / cls.__name__ / 'x.png' for cls in (ExactIoUMetric, IoUMetric))
    assert ours.read_bytes() == theirs.read_bytes()
    assert np.array_equal(np.array(Image.open(ours)), predicted + reduce_zero_label)


def test_label_maps_are_written_while_scoring(tmp_path):
    metric = metric_of(2, output_dir=str(tmp_path))
    assert score(metric, [(np.ones((2, 2), int), np.ones((2, 2), np.uint8))])['mIoU'] == 100
    assert [path.name for path in tmp_path.iterdir()] == ['0.png']


def test_what_cannot_be_written_is_an_error(tmp_path):
    metric = metric_of(300, output_dir=str(tmp_path), format_only=True)
    with pytest.raises(ValueError, match=r'0\.png cannot be written.*holds 0 to 255.*has 299 to 299'):
        metric.process(None, [sample(np.full((2, 2), 299))])
    metric.process(None, [sample(np.zeros((2, 2), int), name='a/x')])
    with pytest.raises(ValueError, match=r'images/b/x\.jpg and images/a/x\.jpg would both be written to'):
        metric.process(None, [sample(np.zeros((2, 2), int), name='b/x')])


@pytest.mark.parametrize('name', ['upernet_convnext_t_ade20k', 'upernet_convnext_mini_shapes'])
def test_the_recipes_use_it(name):
    cfg = Config.fromfile(ROOT / f'configs/segmentation/{name}.py')
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        assert type(METRICS.build(evaluator)) is ExactIoUMetric
