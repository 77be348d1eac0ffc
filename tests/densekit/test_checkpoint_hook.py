"""The checkpoint hook deletes nothing that is needed, wherever the process dies."""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from mmengine.runner import Runner, find_latest_checkpoint, save_checkpoint
from test_store import content, each_moment, flip, iteration_in, write

from backbones.files import read_checkpoint
from densekit.engine import store
from densekit.engine.checkpoint_hook import DensekitCheckpointHook

SCORES = (0.3, 0.5, 0.4, 0.7)  # the fourth is of a resumed run
OPTIONS = {'interval': 1, 'max_keep_ckpts': 1, 'save_best': 'mAP'}


def write_whole(path: Path, whole: dict[str, Any]) -> None:
    store.save(path, whole, whole['meta'])


class Training:
    """What a hook sees of a runner; epochs of ten iterations, after each a validation."""

    def __init__(self, folder: Path, hook: CheckpointHook, write: Callable[[Path, dict], None] = write_whole) -> None:
        self.work_dir, self.hook, self.write = str(folder), hook, write
        self.epoch = self.iter = 0
        self.max_epochs, self.max_iters = 100, 1000
        self.message_hub = MessageHub('test')
        self.logger = logging.getLogger('test_checkpoint_hook')
        self._load_from: str | None = None

    @property
    def train_loop(self) -> Any:
        return SimpleNamespace(stop_training=False)

    def start(self, resume: Path | str | None = None) -> 'Training':
        if resume is not None:
            whole, self._load_from = read_checkpoint(resume), str(resume)
            self.epoch, self.iter = whole['meta']['epoch'], whole['meta']['iter']
            self.message_hub.load_state_dict(whole['message_hub'])
        self.hook.before_train(self)
        return self

    def run(self, score: float | None = None) -> 'Training':
        """One epoch, and its validation if there is a score."""
        self.iter += 9
        self.hook.after_train_iter(self, 9)
        self.iter += 1
        self.hook.after_train_epoch(self)
        self.epoch += 1
        if score is not None:
            self.hook.after_val_epoch(self, {'mAP': score})
        return self

    def save_checkpoint(self, out_dir: str, filename: str, *_: Any, **options: Any) -> None:
        whole = {**content(options['meta']['iter']), 'message_hub': self.message_hub.state_dict()}
        whole['meta'] = dict(options['meta'])
        if not options['save_optimizer']:
            del whole['optimizer']
        self.write(Path(out_dir, filename), whole)


def ours(folder: Path, **options: Any) -> Training:
    return Training(folder, DensekitCheckpointHook(**{**OPTIONS, **options}))


def theirs(folder: Path) -> Training:
    return Training(folder, CheckpointHook(**OPTIONS), lambda path, whole: save_checkpoint(whole, str(path)))


def names(folder: Path, pattern: str = '*.pth') -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


def three_epochs(training: Training, tell: Callable[[str], None]) -> None:
    training.start()
    for score in SCORES[:3]:
        training.run(score)
        tell(str(training.iter))
    if isinstance(training.hook, DensekitCheckpointHook):
        training.iter += 4
        training.hook.save_now(training, {'epoch': training.epoch, 'iter': training.iter})
        tell(str(training.iter))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, 'fsync', lambda descriptor: None)
    level = logging.getLogger('mmengine').level
    logging.getLogger('mmengine').setLevel('ERROR')
    yield
    logging.getLogger('mmengine').setLevel(level)


def known_in(checkpoint: Path) -> dict[str, Any]:
    return read_checkpoint(checkpoint)['message_hub']['runtime_info']


def best_of(folder: Path, checkpoint: Path) -> Path | None:
    """The best checkpoint that a checkpoint knows of."""
    best = known_in(checkpoint).get('best_ckpt')
    return best and folder / Path(best).name


@pytest.mark.usefixtures('quick')
@pytest.mark.parametrize('power_cut', [False, True])
def test_with_one_checkpoint_kept_every_death_leaves_the_newest(tmp_path: Path, power_cut: bool) -> None:
    folder = tmp_path / 'run'
    moments = 0
    for told in each_moment(folder, power_cut, folder.mkdir, lambda tell: three_epochs(ours(folder), tell)):
        moments += 1
        newest, skipped = store.newest_valid(folder)
        assert skipped == []
        if newest is None:
            assert not told and not names(folder)
            continue
        assert iteration_in(newest) >= int(told[-1] if told else 0)
        best = best_of(folder, newest)
        assert best is None or store.problem(best) is None
        assert not told or names(folder, 'best_*.pth')
        assert len(names(folder, 'epoch_*.pth')) <= 2
        if power_cut:
            continue  # going on is the same as after a kill

        resumed = ours(folder).start(newest).run(SCORES[3])
        kept = [path.name for path in store.candidates(folder)]
        assert kept == [f'epoch_{resumed.epoch}.pth'] == [Path(find_latest_checkpoint(str(folder))).name]
        best = best_of(folder, folder / kept[0])
        assert best is not None and best.name == f'best_mAP_epoch_{resumed.epoch}.pth'
        assert store.problem(best) is None
        assert not names(folder, '*partial*')
    assert moments > 100


@pytest.mark.usefixtures('quick')
def test_mmengines_own_hook_leaves_nothing_at_some_deaths(tmp_path: Path) -> None:
    folder = tmp_path / 'run'
    failures = []
    for told in each_moment(folder, False, folder.mkdir, lambda tell: three_epochs(theirs(folder), tell)):
        pointed = Path(((folder / 'last_checkpoint').exists() and find_latest_checkpoint(str(folder))) or 'none')
        if told:
            failures.append(not pointed.is_file() or store.problem(pointed) is not None)
    assert sum(failures) > 5


@pytest.mark.usefixtures('quick')
def test_deleting_first_is_what_loses_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our files, mmengine's order."""

    def mmengines_order(self: Any, runner: Any, name: str, *_: Any, **__: Any) -> bool:
        self._delete_outdated(runner)
        return save(self, runner, name, *_, **__)

    save = DensekitCheckpointHook._save_and_point
    monkeypatch.setattr(DensekitCheckpointHook, '_save_and_point', mmengines_order)
    monkeypatch.setattr(store, 'problem', lambda path, quick=False, problem=store.problem: quick or problem(path))
    monkeypatch.setattr(DensekitCheckpointHook, '_bests', lambda self: {})
    folder = tmp_path / 'run'

    def work(tell: Callable[[str], None]) -> None:
        training = ours(folder, save_best=None).start().run()
        training.hook.last_ckpt = None
        tell('saved')
        training.run()

    found = [store.newest_valid(folder)[0] for told in each_moment(folder, False, folder.mkdir, work) if told]
    assert None in found


@pytest.mark.usefixtures('quick')
@pytest.mark.parametrize('keep', [-1, 1, 2])
def test_what_is_kept_is_what_mmengine_keeps(tmp_path: Path, keep: int) -> None:
    for folder, hook in ((tmp_path / 'ours', DensekitCheckpointHook), (tmp_path / 'theirs', CheckpointHook)):
        training = Training(folder, hook(**{**OPTIONS, 'max_keep_ckpts': keep})).start()
        for score in (0.3, 0.5, 0.4, 0.4, 0.7, 0.1):
            training.run(score)
    assert names(tmp_path / 'ours') == names(tmp_path / 'theirs')
    for name in names(tmp_path / 'ours'):
        hub, expected = (
            read_checkpoint(tmp_path / each / name)['message_hub']['runtime_info'] for each in ('ours', 'theirs')
        )
        assert hub.get('keep_ckpt_ids') == expected.get('keep_ckpt_ids')
        assert hub.get('best_score') == expected.get('best_score')
    assert len(names(tmp_path / 'ours', '*.json')) == len(names(tmp_path / 'ours'))


@pytest.mark.usefixtures('quick')
def test_a_lower_limit_on_resuming_deletes_nothing_before_the_next_save(tmp_path: Path) -> None:
    training = ours(tmp_path, max_keep_ckpts=3).start()
    for _ in range(3):
        training.run()
    flip(tmp_path / 'epoch_3.pth')
    newest, _ = store.newest_valid(tmp_path)
    resumed = ours(tmp_path).start(newest)
    assert names(tmp_path) == ['epoch_1.pth', 'epoch_2.pth', 'epoch_3.pth']
    resumed.run()
    assert names(tmp_path) == ['epoch_3.pth'] and iteration_in(tmp_path / 'epoch_3.pth') == 30


@pytest.mark.usefixtures('quick')
def test_a_stopped_run_goes_on_from_where_it_was(tmp_path: Path) -> None:
    training = ours(tmp_path).start().run(0.5)
    training.iter += 3
    training.hook.save_now(training, {'epoch': 1, 'iter': 13})
    assert names(tmp_path) == ['best_mAP_epoch_1.pth', 'epoch_1.pth', 'iter_13.pth']
    newest, _ = store.newest_valid(tmp_path)
    assert newest == tmp_path / 'iter_13.pth' and iteration_in(newest) == 13
    ours(tmp_path).start(newest).run(0.4)
    assert names(tmp_path) == ['best_mAP_epoch_1.pth', 'epoch_2.pth']


@pytest.mark.usefixtures('quick')
@pytest.mark.parametrize('keep', [-1, 2])
def test_a_run_by_iterations_stops_too(tmp_path: Path, keep: int) -> None:
    options = {'by_epoch': False, 'interval': 10, 'save_best': None, 'max_keep_ckpts': keep}
    training = ours(tmp_path, **options).start().run()
    assert names(tmp_path) == ['iter_10.pth']
    training.hook.save_now(training, {'epoch': 0, 'iter': 10})  # it is one of the regular ones
    training.hook.save_now(training, {'epoch': 0, 'iter': 15})
    ours(tmp_path, **options).start(tmp_path / 'iter_15.pth')
    resumed = ours(tmp_path, **options).start(tmp_path / 'iter_15.pth')
    resumed.iter = 10
    resumed.run()
    assert names(tmp_path) == ['iter_10.pth', *(['iter_15.pth'] if keep < 0 else []), 'iter_20.pth']


@pytest.mark.usefixtures('quick')
def test_what_this_run_did_not_save_is_left_alone(tmp_path: Path) -> None:
    """A copy of the folder has new times, and users have files of their own in it."""
    run, copied = tmp_path / 'run', tmp_path / 'copied'
    training = ours(run, max_keep_ckpts=3).start().run().run().run()
    training.hook.save_now(training, {'epoch': 3, 'iter': 35})
    write(run / 'my_average.pth', 30)
    write(run / 'iter_99.pth', 99)
    copied.mkdir()
    for name in ('last_checkpoint', *names(run), *names(run, '*.pth.json')):  # the pointer is the oldest
        (copied / name).write_bytes((run / name).read_bytes())
    os.utime(copied / 'last_checkpoint', (1, 1))
    ours(copied, max_keep_ckpts=3).start(copied / 'epoch_2.pth').run()
    assert set(names(copied)) >= {*names(run), 'epoch_1.pth', 'epoch_2.pth', 'epoch_3.pth'}


def another_run(folder: Path) -> Path:
    """Returns a checkpoint that names, as kept, outdated and best, files that a run in another folder has too."""
    training = ours(folder, max_keep_ckpts=2).start().run(0.5).run(0.4)
    training.hook.save_now(training, {'epoch': 2, 'iter': 25})
    assert names(folder) == ['best_mAP_epoch_1.pth', 'epoch_1.pth', 'epoch_2.pth', 'iter_25.pth']
    known = known_in(folder / 'iter_25.pth')
    assert known['keep_ckpt_ids'] == [1, 2] and known['outdated_ckpts'] == ['iter_25.pth']
    return folder / 'iter_25.pth'


@pytest.mark.usefixtures('quick')
@pytest.mark.parametrize('restarted', [False, True])
def test_going_on_from_another_folder_deletes_nothing_that_was_there(tmp_path: Path, restarted: bool) -> None:
    theirs, mine = another_run(tmp_path / 'theirs'), another_run(tmp_path / 'mine').parent
    before, there = set(names(mine)), names(theirs.parent)
    training = ours(mine).start(theirs).run(0.1)
    if restarted:
        training = ours(mine).start(mine / 'epoch_3.pth')
    training.run(0.95)
    assert set(names(mine)) == before | {'epoch_4.pth', 'best_mAP_epoch_4.pth'}
    assert names(theirs.parent) == there


@pytest.mark.usefixtures('quick')
@pytest.mark.parametrize('forgets', [False, True])
def test_without_forgetting_it_would_delete_them(tmp_path: Path, monkeypatch: Any, forgets: bool) -> None:
    if not forgets:
        monkeypatch.setattr(DensekitCheckpointHook, '_from_elsewhere', lambda self, runner: False)
    theirs, mine = another_run(tmp_path / 'theirs'), another_run(tmp_path / 'mine').parent
    before = set(names(mine))
    ours(mine).start(theirs).run(0.9)
    lost = {'best_mAP_epoch_1.pth', 'epoch_1.pth', 'epoch_2.pth', 'iter_25.pth'}
    assert before - set(names(mine)) == (set() if forgets else lost)


@pytest.mark.usefixtures('quick')
def test_the_same_folder_by_another_path_is_no_other(tmp_path: Path) -> None:
    run = another_run(tmp_path / 'run').parent
    (tmp_path / 'link').symlink_to(run)
    ours(run).start(tmp_path / 'link/iter_25.pth').run(0.9)
    assert names(run) == ['best_mAP_epoch_3.pth', 'epoch_3.pth']


@pytest.mark.usefixtures('quick')
def test_nothing_is_deleted_where_the_new_one_is_not_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training = ours(tmp_path).start().run()
    training.write = lambda path, whole: path.write_bytes(b'cut')
    training.run()
    assert 'No checkpoint is deleted' in caplog.text
    assert store.newest_valid(tmp_path)[0] == tmp_path / 'epoch_1.pth'
    training.write = write_whole
    training.run()
    assert names(tmp_path) == ['epoch_3.pth']


@pytest.mark.usefixtures('quick')
def test_a_save_that_fails_keeps_what_there_is(tmp_path: Path) -> None:
    def full(path: Path, whole: dict) -> None:
        raise store.CheckpointNotSaved(path, 1, OSError(28, 'No space left on device'))

    training = ours(tmp_path).start().run(0.5)
    before = names(tmp_path)
    training.write = full
    with pytest.raises(store.CheckpointNotSaved):
        training.run()
    with pytest.raises(store.CheckpointNotSaved):
        training.hook.after_val_epoch(training, {'mAP': 0.9})
    assert names(tmp_path) == before
    assert store.newest_valid(tmp_path) == (tmp_path / 'epoch_1.pth', [])


@pytest.mark.usefixtures('quick')
def test_a_pointer_or_an_old_file_that_cannot_be_changed_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any) -> None:
        raise PermissionError('not allowed')

    training = ours(tmp_path).start().run()
    with monkeypatch.context() as context:
        context.setattr(store, 'point_to', refuse)
        training.run()
    assert 'last_checkpoint cannot be written: not allowed' in caplog.text
    assert names(tmp_path) == ['epoch_1.pth', 'epoch_2.pth']  # the pointer still names the first
    with monkeypatch.context() as context:
        context.setattr(store, 'remove', refuse)
        training.run()
    assert 'epoch_1.pth is outdated and cannot be deleted: not allowed' in caplog.text
    training.run()
    assert names(tmp_path) == ['epoch_4.pth']


@pytest.mark.usefixtures('quick')
def test_several_best_checkpoints_each_have_their_own(tmp_path: Path) -> None:
    hook = DensekitCheckpointHook(interval=1, max_keep_ckpts=1, save_best=['mAP', 'loss'])
    training = Training(tmp_path, hook).start()
    for metrics in ({'mAP': 0.3, 'loss': 1.0}, {'mAP': 0.5, 'loss': 2.0}, {'mAP': 0.4, 'loss': 0.5}):
        training.run()
        hook.after_val_epoch(training, metrics)
    assert names(tmp_path) == ['best_loss_epoch_3.pth', 'best_mAP_epoch_2.pth', 'epoch_3.pth']


@pytest.mark.usefixtures('quick')
def test_the_old_best_of_a_moved_folder_is_found(tmp_path: Path) -> None:
    ours(tmp_path / 'here').start().run(0.5)
    (tmp_path / 'here').rename(tmp_path / 'there')
    ours(tmp_path / 'there').start(tmp_path / 'there/epoch_1.pth').run(0.6)
    assert names(tmp_path / 'there') == ['best_mAP_epoch_2.pth', 'epoch_2.pth']


@pytest.mark.usefixtures('quick')
def test_without_regular_checkpoints_only_the_best_is_kept(tmp_path: Path) -> None:
    training = ours(tmp_path, interval=-1, save_last=False).start()
    for score in SCORES:
        training.run(score)
    assert names(tmp_path) == ['best_mAP_epoch_4.pth']


@pytest.mark.usefixtures('quick')
def test_sharded_checkpoints_are_folders(tmp_path: Path) -> None:
    def write_folder(path: Path, whole: dict) -> None:
        folder = path.with_suffix('')
        folder.mkdir()
        torch.save(whole, folder / '0.pth')
        store.seal_folder(folder, whole['meta'])

    training = Training(tmp_path, DensekitCheckpointHook(**{**OPTIONS, 'save_best': None}), write_folder).start()
    training.run().run()
    assert names(tmp_path, 'epoch_*') == ['epoch_2']
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'epoch_2')
    assert store.newest_valid(tmp_path) == (tmp_path / 'epoch_2', [])


@pytest.mark.usefixtures('quick')
def test_publishing_reads_safely_and_names_the_file_by_its_checksum(tmp_path: Path) -> None:
    training = ours(tmp_path, published_keys=['state_dict', 'meta']).start().run(0.5)
    training.hook.after_train(training)
    published = {name for name in names(tmp_path) if re.search(r'-[0-9a-f]{8}\.pth', name)}
    assert {name[:-13] for name in published} == {'epoch_1', 'best_mAP_epoch_1'}
    for name in published:
        assert set(read_checkpoint(tmp_path / name)) == {'state_dict', 'meta'}
        manifest = json.loads((tmp_path / f'{name}.json').read_text())
        assert manifest['sha256'].startswith(name[-12:-4]) and store.problem(tmp_path / name) is None
    assert [path.name for path in store.candidates(tmp_path)] == ['epoch_1.pth']


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ('touch executed',)


@pytest.mark.usefixtures('quick')
def test_publishing_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    training = ours(tmp_path, published_keys='state_dict').start().run(0.5)
    torch.save({'state_dict': Evil()}, tmp_path / 'epoch_1.pth')
    with pytest.raises(ValueError, match='could run code'):
        training.hook.after_train(training)
    assert not (tmp_path / 'executed').exists()


@pytest.mark.usefixtures('quick')
def test_leftovers_are_removed_at_the_start_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store.partial(tmp_path / 'epoch_1.pth').touch()
    write(tmp_path / 'net.pth', 1)
    ours(tmp_path).start()
    assert 'epoch_1.pth.densekit-partial' in caplog.text
    assert names(tmp_path, '*') == ['net.pth', 'net.pth.json']


def test_a_remote_folder_is_left_to_mmengine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    called = []
    for name in ('before_train', '_save_checkpoint_with_step'):
        monkeypatch.setattr(CheckpointHook, name, lambda self, *args, name=name: called.append(name))
    training = ours(tmp_path, out_dir='https://example.org/checkpoints')
    training.start().hook._save_checkpoint(training)
    assert called == ['before_train', '_save_checkpoint_with_step']
    assert caplog.text.count('is no local folder') == 1


class Toy(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)

    def forward(self, *inputs: Any, mode: str = 'tensor') -> Any:
        return {'loss': self.linear(torch.ones(1, 1)).sum()}


@pytest.mark.usefixtures('quick', 'quick_mmengine')
def test_mmengines_own_runner_works_with_it(tmp_path: Path) -> None:
    """It is named in a user's own config; that runner's files have no manifests, and are judged all the same."""
    assert HOOKS.get('DensekitCheckpointHook') is DensekitCheckpointHook
    runner = Runner(
        Toy(),
        str(tmp_path),
        train_dataloader=dict(dataset=list(range(4)), sampler=dict(type=DefaultSampler), batch_size=2, num_workers=0),
        train_cfg=dict(by_epoch=True, max_epochs=3),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        default_hooks=dict(checkpoint=dict(type='DensekitCheckpointHook', interval=1, max_keep_ckpts=2)),
        experiment_name='test_checkpoint_hook',
    )
    runner.train()
    assert names(tmp_path) == ['epoch_2.pth', 'epoch_3.pth']
    assert store.newest_valid(tmp_path) == (tmp_path / 'epoch_3.pth', [])
