"""A run that stops and goes on ends with the same bits as one that does not."""

import contextlib
import hashlib
import itertools
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import BaseModel
from mmengine.runner import EpochBasedTrainLoop, Runner
from timm.layers import DropPath
from torch import nn

from backbones.files import read_checkpoint
from densekit.engine.resume import _restore_position
from densekit.engine.runner import DensekitRunner

pytestmark = pytest.mark.usefixtures('quick_mmengine')
NUMBER = itertools.count()


class Augmented(BaseDataset):
    """Sixteen vectors; the transform adds noise from NumPy's and torch's generators."""

    METAINFO = {'classes': ('a', 'b')}
    loaded: list[int] = []

    def __init__(self) -> None:
        super().__init__(pipeline=[self.augment], serialize_data=False)

    def load_data_list(self) -> list[dict]:
        return [{'number': i, 'width': 2 + i % 2, 'height': 3 - i % 3 % 2} for i in range(16)]

    @staticmethod
    def augment(results: dict) -> dict:
        Augmented.loaded.append(results['number'])
        noise = np.random.rand() + torch.rand(()).item()
        return {'x': torch.tensor([results['number'] / 16, noise])}


class Net(BaseModel):
    """Two layers with drop path and BN between; forward draws from torch's generator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.drop = DropPath(0.5)

    def forward(self, x, mode='tensor'):
        y = self.second(self.drop(self.norm(self.first(torch.stack(x)))))
        return {'loss': y.square().mean()} if mode == 'loss' else y


def run(work_dir, *, by_epoch, workers=0, persistent=False, end=None, runner=DensekitRunner, aspect=False, **kwargs):
    """Trains three epochs of eight batches, or 24 iterations; ``end`` stops it where a checkpoint has been written."""
    loader = dict(
        batch_size=2,
        num_workers=workers,
        persistent_workers=persistent,
        dataset=Augmented(),
        sampler=dict(type='DefaultSampler' if by_epoch else 'InfiniteSampler', shuffle=True),
    )
    if aspect:
        loader['batch_sampler'] = dict(type='mmdet.AspectRatioBatchSampler')
    config = dict(
        model=Net(),
        work_dir=str(work_dir),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=3) if by_epoch else dict(by_epoch=False, max_iters=24),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.05)),
        param_scheduler=[dict(type='CosineAnnealingLR', T_max=24, by_epoch=False)],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=4)),
        randomness=dict(seed=3),
        experiment_name=f'resume{next(NUMBER)}',
    )
    built = runner(**{**config, **kwargs})
    if end is not None:
        stop_after(built, end)
    with contextlib.suppress(Killed):
        built.train()
    MMLogger._instance_dict.clear()
    MessageHub._instance_dict.clear()
    return built


class Killed(Exception):
    pass


def stop_after(runner, iteration):
    """Ends a run like a crash right after an iteration."""

    class Crash(Hook):
        def after_train_iter(self, runner, *args, **kwargs):
            if runner.iter + 1 == iteration:
                raise Killed

    runner.register_hook(Crash(), 'LOWEST')


def digest(folder, name='iter_24.pth'):
    """Of weights, optimizer and schedulers of a checkpoint."""
    checkpoint = read_checkpoint(folder / name)
    sha = hashlib.sha256()

    def feed(node):
        if isinstance(node, torch.Tensor):
            sha.update(node.contiguous().numpy().tobytes())
        elif isinstance(node, dict):
            for key in sorted(node, key=str):
                sha.update(str(key).encode())
                feed(node[key])
        elif isinstance(node, list | tuple):
            for value in node:
                feed(value)
        else:
            sha.update(repr(node).encode())

    feed([checkpoint[key] for key in ('state_dict', 'optimizer', 'param_schedulers')])
    return sha.hexdigest()


CASES = [
    # by_epoch, workers, persistent, killed after, aspect-ratio batches
    (True, 0, False, 16, False),
    (True, 0, False, 13, False),
    (True, 2, False, 16, False),
    (True, 2, True, 13, False),
    (True, 2, False, 13, True),
    (False, 0, False, 12, False),
    (False, 0, False, 15, False),
    (False, 2, False, 15, False),
    (False, 2, True, 15, False),
    (False, 0, False, 13, True),
]


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """The digest of a run that nothing happens to; neither workers nor anything else but the loop matter."""
    found = {}

    def get(**kwargs):
        key = tuple(sorted(kwargs.items()))
        if key not in found:
            folder = tmp_path_factory.mktemp('undisturbed')
            run(folder, **kwargs)
            found[key] = digest(folder)
        return found[key]

    return get


@pytest.mark.parametrize(('by_epoch', 'workers', 'persistent', 'end', 'aspect'), CASES)
def test_a_resumed_run_has_the_same_bits(tmp_path, undisturbed, by_epoch, workers, persistent, end, aspect):
    options = dict(by_epoch=by_epoch, workers=workers, persistent=persistent, aspect=aspect)
    run(tmp_path, **options, end=end)
    assert not (tmp_path / 'iter_24.pth').exists()
    expected = undisturbed(by_epoch=by_epoch, aspect=aspect)
    Augmented.loaded.clear()
    run(tmp_path, **options, resume=True)
    assert digest(tmp_path) == expected
    if not workers:  # nothing of what is skipped was loaded
        assert len(Augmented.loaded) == 2 * (24 - end // 4 * 4)


@pytest.mark.parametrize('by_epoch', [True, False])
def test_mmengines_own_run_differs(tmp_path, by_epoch):
    """The negative control: drop path and augmentation start anew there, and an epoch is done again."""
    run(tmp_path / 'whole', by_epoch=by_epoch, runner=Runner)
    run(tmp_path / 'parts', by_epoch=by_epoch, runner=Runner, end=13)
    with torch.serialization.safe_globals([]), pytest.MonkeyPatch.context() as patch:
        load = torch.load  # or it could not read what it has written
        patch.setattr(torch, 'load', lambda *args, **kwargs: load(*args, **{**kwargs, 'weights_only': False}))
        run(tmp_path / 'parts', by_epoch=by_epoch, runner=Runner, resume=True)
    names = sorted(path.name for path in (tmp_path / 'parts').glob('iter_*.pth'))
    assert 'iter_24.pth' not in names or digest(tmp_path / 'parts') != digest(tmp_path / 'whole')


@pytest.mark.parametrize(
    ('length', 'saved', 'contract', 'iteration'),
    [
        (13, dict(epoch=9, iter=63), {'epoch_length': 7}, 9 * 13),  # 100 images in batches of 8, before of 16
        (7, dict(epoch=9, iter=9 * 13 + 6), {'epoch_length': 13}, 9 * 7 + 3),
        (10, dict(epoch=3, iter=60), {'epoch_length': 20}, 30),  # half of the images
        (40, dict(epoch=3, iter=70), {'epoch_length': 20}, 140),
        (8, dict(epoch=2, iter=20), {'epoch_length': 8}, 20),
        (8, dict(epoch=1, iter=16), {'epoch_length': 8}, 16),  # the end of an epoch that is not counted yet
        (8, dict(epoch=2, iter=20), None, 20),  # mmengine's, which do not say
        (4, dict(epoch=2, iter=16), None, 8),
    ],
)
def test_epochs_of_another_length(length, saved, contract, iteration):
    loop = EpochBasedTrainLoop.__new__(EpochBasedTrainLoop)
    loop.dataloader = range(length)
    _restore_position(SimpleNamespace(train_loop=loop), saved, contract)
    assert (loop._epoch, loop._iter) == (saved['epoch'], iteration)
    assert 0 <= loop._iter - loop._epoch * length <= length


def test_a_run_without_schedulers_goes_on(tmp_path):
    run(tmp_path / 'whole', by_epoch=False, param_scheduler=None)
    run(tmp_path / 'parts', by_epoch=False, param_scheduler=None, end=13)
    run(tmp_path / 'parts', by_epoch=False, param_scheduler=None, resume=True)
    ours, other = (read_checkpoint(tmp_path / name / 'iter_24.pth') for name in ('whole', 'parts'))
    assert 'param_schedulers' not in ours
    assert all(torch.equal(ours['state_dict'][key], value) for key, value in other['state_dict'].items())


class Scores(BaseMetric):
    """Falls all the time, and remembers when it was asked."""

    asked: list[int] = []

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        Scores.asked.append(len(Scores.asked))
        return {'score': -len(Scores.asked)}


def validated(**more):
    loader = dict(batch_size=16, dataset=Augmented(), sampler=dict(type='DefaultSampler', shuffle=False))
    cfg = dict(by_epoch=True, max_epochs=3, dynamic_intervals=[(2, 1)], val_interval=2)
    return dict(val_dataloader=loader, val_cfg={}, val_evaluator=[Scores()], train_cfg=cfg, **more)


@pytest.mark.parametrize(('end', 'asked'), [(13, 2), (16, 2), (23, 1)])
def test_validations_after_a_resume(tmp_path, end, asked):
    """After the second epoch by the changed interval, and after the third; the second one was not reached at 16."""
    run(tmp_path, by_epoch=True, end=end, **validated())
    Scores.asked.clear()
    run(tmp_path, by_epoch=True, resume=True, **validated())
    assert len(Scores.asked) == asked


def test_early_stopping_goes_on_waiting(tmp_path):
    def stopping():
        return [EarlyStoppingHook(monitor='score', rule='greater', patience=2)]

    more = dict(val_interval=1, dynamic_intervals=None)
    config = validated()
    config['train_cfg'].update(more, max_epochs=9)
    run(tmp_path / 'parts', by_epoch=True, end=17, custom_hooks=stopping(), **config)
    resumed = run(tmp_path / 'parts', by_epoch=True, resume=True, custom_hooks=stopping(), **config)
    assert resumed.epoch == 3  # the best is the first; two worse ones end it


def test_mmengine_goes_on_from_our_checkpoints(tmp_path):
    """They load with torch's own safe defaults, as mmengine calls it; what mmengine writes does not."""
    run(tmp_path, by_epoch=False, end=13)
    torch.load(tmp_path / 'iter_12.pth', weights_only=True)
    assert run(tmp_path, by_epoch=False, runner=Runner, resume=True).iter == 24
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / 'iter_24.pth', weights_only=True)
