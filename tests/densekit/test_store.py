"""Checkpoints survive a death at every event on the disk, a full disk and damage; see also test_checkpoint_hook.py."""

import builtins
import errno
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner import find_latest_checkpoint, save_checkpoint
from torch import Tensor

from backbones.files import read_checkpoint
from densekit.engine import store


class Disk:
    """Counts what a process does to files, between the halves of a write too.

    Every open, rename and removal is seen, whoever asks for it (an audit hook, which stays; so this is for a fork), and
    so is every write that reaches the system and every fsync.

    Args:
        at: called with each event's number, before it happens.
        full: from that event on no write succeeds.
    """

    def __init__(self, at: Callable[[int], None] = lambda event: None, full: int | None = None) -> None:
        self.at, self.full = at, full
        self.count = 0
        self.watching = True
        self.unsynced: set[int] = set()  # inodes
        real_open, disk = io.open, self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                data = memoryview(data).cast('B')
                for part in (data[: len(data) // 2], data[len(data) // 2 :]):
                    disk.event(writes=True)
                    disk.unsynced.add(os.fstat(self.fileno()).st_ino)
                    super().write(part)
                return len(data)

        def open_(file: Any, mode: str = 'r', *args: Any, **kwargs: Any) -> Any:
            if isinstance(file, int) or 'w' not in mode or not disk.watching:
                return real_open(file, mode, *args, **kwargs)
            buffered = io.BufferedWriter(Raw(file, 'w'))
            return buffered if 'b' in mode else io.TextIOWrapper(buffered, encoding='utf-8')

        builtins.open = io.open = open_
        os.fsync = self.fsync
        sys.addaudithook(self.audit)

    def audit(self, name: str, args: tuple[Any, ...]) -> None:
        opened = name == 'open' and not isinstance(args[0], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if opened or name in ('os.remove', 'os.rename', 'os.rmdir', 'os.mkdir'):
            self.event()

    def fsync(self, descriptor: int) -> None:
        self.event(writes=True)
        self.unsynced.discard(os.fstat(descriptor).st_ino)

    def event(self, writes: bool = False) -> None:
        if not self.watching:
            return
        self.count += 1
        self.watching = False
        self.at(self.count)
        self.watching = True
        if writes and self.full is not None and self.count >= self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def copy(self, folder: Path, target: Path, power_cut: bool) -> None:
        """What is on the disk at this moment; in a power cut, half of what was not brought there."""
        shutil.copytree(folder, target)
        for path in folder.rglob('*') if power_cut else ():
            if path.stat().st_ino in self.unsynced:
                os.truncate(target / path.relative_to(folder), path.stat().st_size // 2)


def in_child(work: Callable[[Callable[[str], None]], None]) -> tuple[int, list[str]]:
    """Runs work in a fork of this process; returns its exit status (negative: signal) and the lines it told."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work(lambda line: os.write(sender, f'{line}\n'.encode()) and None)
            status = 0
        except BaseException as error:
            os.write(sender, f'{type(error).__name__}: {error}\n'.encode())
        finally:
            os._exit(status)
    os.close(sender)
    with os.fdopen(receiver) as told:
        lines = told.read().splitlines()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), lines


Work = Callable[[Callable[[str], None]], None]


def each_death(folder: Path, prepare: Callable[[], None], work: Work) -> Iterator[list[str]]:
    """Kills the work at its first event on the disk, its third, ...; yields what it had told until then.

    Every second one is enough to show that :func:`each_moment`, which has all of them, sees the same states.
    """
    for event in range(1, 1000, 2):
        shutil.rmtree(folder, ignore_errors=True)
        prepare()

        def dying(tell: Callable[[str], None], event: int = event) -> None:
            Disk(lambda count: os.kill(os.getpid(), signal.SIGKILL) if count == event else None)
            work(tell)

        status, told = in_child(dying)
        assert status in (0, -signal.SIGKILL), told
        yield told
        if status == 0:
            return


def each_moment(folder: Path, power_cut: bool, prepare: Callable[[], None], work: Work) -> Iterator[list[str]]:
    """Like :func:`each_death` from copies of the folder at each event: all the states in a tenth of the time."""
    copies = folder.with_name(f'{folder.name}_copies')

    def copying(tell: Callable[[str], None]) -> None:
        def at(count: int) -> None:
            disk.copy(folder, copies / str(count), power_cut)
            tell('event')

        disk = Disk(at)
        work(tell)
        disk.event()

    for stale in (folder, copies):
        shutil.rmtree(stale, ignore_errors=True)
    prepare()
    status, lines = in_child(copying)
    assert status == 0, lines
    for count in range(1, lines.count('event') + 1):
        shutil.rmtree(folder)
        (copies / str(count)).rename(folder)
        before = [index for index, line in enumerate(lines) if line == 'event'][count - 1]
        yield [line for line in lines[:before] if line != 'event']


def content(iteration: int) -> dict[str, Any]:
    weights = torch.full((2000,), float(iteration))
    return {'meta': {'iter': iteration}, 'state_dict': {'weight': weights}, 'optimizer': {'momentum': weights + 0.5}}


def write(path: Path, iteration: int) -> None:
    store.save(path, content(iteration), {'iter': iteration})


def iteration_in(path: Path) -> int:
    """Which iteration a checkpoint is of; fails if it is a mixture of several."""
    read = read_checkpoint(path)
    iteration = read['meta']['iter']
    assert (read['state_dict']['weight'] == iteration).all()
    assert (read['optimizer']['momentum'] == iteration + 0.5).all()
    return iteration


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Death does not lose what the system has; waiting for the disk would take the time of these tests."""
    monkeypatch.setattr(os, 'fsync', lambda descriptor: None)


@pytest.mark.usefixtures('no_fsync')
@pytest.mark.parametrize('death', ['kill', 'copy', 'power cut'])
@pytest.mark.parametrize('name', ['iter_1.pth', 'iter_2.pth'])
def test_every_death_leaves_the_old_or_the_new_checkpoint(tmp_path: Path, death: str, name: str) -> None:
    """The new one has the old one's name, or another and then replaces it."""
    folder = tmp_path / 'run'

    def prepare() -> None:
        write(folder / 'iter_1.pth', 1)
        store.point_to(folder, folder / 'iter_1.pth')

    def work(tell: Callable[[str], None]) -> None:
        write(folder / name, 2)
        store.point_to(folder, folder / name)
        tell('saved')
        if name != 'iter_1.pth':
            store.remove(folder / 'iter_1.pth')

    found = []
    deaths = (
        each_death(folder, prepare, work) if death == 'kill' else each_moment(folder, death != 'copy', prepare, work)
    )
    for told in deaths:
        newest, skipped = store.newest_valid(folder)
        assert newest is not None and skipped == []
        found.append(iteration_in(newest))
        assert found[-1] == 2 or not told
        store.clean(folder)
        assert not list(folder.glob('*partial*'))
    assert len(found) >= 8 and set(found) == {1, 2} and found == sorted(found)


def lost(folder: Path, power_cut: bool, write: Callable[[Path, int], None]) -> list[bool]:
    """For each moment of overwriting a checkpoint whether there is none that is valid."""
    path = folder / 'iter_1.pth'
    moments = each_moment(folder, power_cut, lambda: write(path, 1), lambda tell: write(path, 2))
    return [store.problem(path) is not None for _ in moments]


@pytest.mark.usefixtures('no_fsync')
def test_without_fsync_a_power_cut_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(lost(tmp_path / 'run', True, write))
    monkeypatch.setattr(store, '_sync', lambda file: file.flush())
    assert any(lost(tmp_path / 'run', True, write))


def test_writing_in_place_as_mmengine_does_loses_checkpoints(tmp_path: Path) -> None:
    found = lost(tmp_path / 'run', False, lambda path, iteration: save_checkpoint(content(iteration), str(path)))
    assert any(found) and not found[0] and not found[-1]


@pytest.mark.usefixtures('no_fsync')
def test_an_old_manifest_beside_a_new_file_would_condemn_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the manifest of a file that is overwritten goes first."""

    def commit(path: Path) -> None:
        for file in (path, store.manifest_of(path)):
            os.replace(store.partial(file), file)

    monkeypatch.setattr(store, '_commit', commit)
    assert any(lost(tmp_path / 'run', False, write))


@pytest.mark.usefixtures('no_fsync')
def test_a_disk_that_fills_up_at_any_moment_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / 'iter_1.pth'
    write(path, 1)
    size, listing = path.stat().st_size, sorted(tmp_path.iterdir())
    for event in range(1, 100):

        def work(tell: Callable[[str], None], event: int = event) -> None:
            Disk(full=event)
            write(path, 2)

        status, told = in_child(work)
        if status == 0:
            break
        assert told[0].startswith('CheckpointNotSaved') and f'needs {size:,} bytes' in told[0]
        assert 'No space left on device' in told[0] and 'max_keep_ckpts' in told[0]
        assert store.problem(path) is None and iteration_in(path) in (1, 2)
        assert sorted(tmp_path.iterdir()) in (listing, [path])
    assert event > 5 and iteration_in(path) == 2


@pytest.mark.parametrize('large', [False, True])
def test_a_limit_on_file_sizes_is_told_with_the_bytes_needed(tmp_path: Path, large: bool) -> None:
    path, big = tmp_path / 'iter_1.pth', content(2)
    write(path, 1)
    big['state_dict']['extra'] = torch.zeros(1_000_000 if large else 20_000)
    store.save(tmp_path / 'size', big, {})
    needed = (tmp_path / 'size').stat().st_size
    store.remove(tmp_path / 'size')

    def work(tell: Callable[[str], None]) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            store.save(path, big, {'iter': 2})
        except store.CheckpointNotSaved as error:
            tell(f'{error.errno} {error.needed} {error.free is not None} {error.path}')

    assert in_child(work) == (0, [f'{errno.EFBIG} {needed} True {path}'])
    assert store.problem(path) is None and iteration_in(path) == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ['iter_1.pth', 'iter_1.pth.json']


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    with pytest.raises(store.CheckpointNotSaved, match=r'Make sure that .* can be written to') as caught:
        write(tmp_path / 'file/iter_1.pth', 1)
    write(tmp_path / 'iter_1.pth', 1)
    assert caught.value.needed == (tmp_path / 'iter_1.pth').stat().st_size


def test_content_that_cannot_be_saved_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Exception, match='pickle'):
        store.save(tmp_path / 'iter_1.pth', {'function': lambda: None}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_read_back_bit_for_bit_and_by_mmengine(tmp_path: Path) -> None:
    """Large tensors are hashed in a second thread."""
    tensors = {str(size): torch.randn(size) for size in (0, 1, 1000, 300_000, 2_000_000)}
    store.save(tmp_path / 'iter_7.pth', {'state_dict': tensors}, {'iter': 7, 'epoch': 1})
    store.point_to(tmp_path, tmp_path / 'iter_7.pth')
    read = torch.load(find_latest_checkpoint(str(tmp_path)), weights_only=True)['state_dict']
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    manifest = json.loads((tmp_path / 'iter_7.pth.json').read_text())
    assert manifest['iter'] == 7 and manifest['epoch'] == 1 and manifest['file'] == 'iter_7.pth'
    assert manifest['size'] == (tmp_path / 'iter_7.pth').stat().st_size
    assert manifest['sha256'] == store.digest({'state_dict': tensors})
    assert store.problem(tmp_path / 'iter_7.pth') is None


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / 'iter_1.pth'
    write(path, 1)
    good = path.read_bytes()
    positions = torch.randint(len(good), (300,), generator=torch.Generator().manual_seed(0)).tolist()
    for position in [*range(200), *range(len(good) - 200, len(good)), *positions]:
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x10]) + good[position + 1 :])
        assert 'sha256' in str(store.problem(path)), position
    path.write_bytes(good)
    assert store.problem(path) is None


def test_without_a_manifest_no_flipped_byte_reaches_a_tensor(tmp_path: Path) -> None:
    """As it is with checkpoints that mmengine wrote; some bytes, such as padding, mean nothing."""
    path = tmp_path / 'iter_1.pth'
    save_checkpoint(content(1), str(path))
    assert store.problem(path) is None
    good = path.read_bytes()
    start = good.index(torch.full((2000,), 1.0).numpy().tobytes())
    found = []
    for position in [*range(0, 400, 7), *range(start, start + 8000, 800), *range(len(good) - 700, len(good), 2)]:
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x10]) + good[position + 1 :])
        found.append(store.problem(path) is not None)
        if not found[-1]:
            assert iteration_in(path) == 1, position
        assert found[-1] or not start <= position < start + 8000
    assert sum(found) > 100


def test_torch_itself_does_not_see_a_flipped_byte(tmp_path: Path) -> None:
    path = tmp_path / 'iter_1.pth'
    write(path, 1)
    flip(path)
    read: dict[str, Tensor] = torch.load(path, weights_only=True)['state_dict']
    assert not (read['weight'] == 1).all() and store.problem(path) is not None


def flip(path: Path) -> None:
    """Changes a byte of a tensor."""
    data = bytearray(path.read_bytes())
    data[data.index(torch.full((100,), torch.load(path)['state_dict']['weight'][0]).numpy().tobytes()) + 100] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def without_manifest(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    def both(path: Path) -> None:
        damage(path)
        store.manifest_of(path).unlink()

    return both


def scribble(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 20)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    'truncated': (truncate, 'bytes and'),
    'flipped': (flip, 'sha256'),
    'empty': (lambda path: path.write_bytes(b''), 'it has 0 bytes'),
    'gone': (lambda path: path.unlink(), 'it does not exist'),
    'manifest is garbage': (lambda path: scribble(store.manifest_of(path)), 'its manifest iter_3.pth.json is damaged'),
    'manifest is a list': (lambda path: store.manifest_of(path).write_text('[1]'), 'is damaged'),
    'manifest is empty': (lambda path: store.manifest_of(path).write_text('{}'), 'None were written'),
    'truncated, no manifest': (without_manifest(truncate), 'it is truncated'),
    'flipped, no manifest': (without_manifest(flip), 'checksum of'),
    'empty, no manifest': (without_manifest(lambda path: path.write_bytes(b'')), 'no PyTorch file'),
    'another file, no manifest': (without_manifest(scribble), 'no PyTorch file'),
}


def three(folder: Path) -> None:
    for iteration in (1, 2, 3):
        write(folder / f'iter_{iteration}.pth', iteration)
    store.point_to(folder, folder / 'iter_3.pth')


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_the_reason(tmp_path: Path, damage: str) -> None:
    three(tmp_path)
    do, reason = DAMAGES[damage]
    do(tmp_path / 'iter_3.pth')
    newest, skipped = store.newest_valid(tmp_path)
    assert newest == tmp_path / 'iter_2.pth' and iteration_in(newest) == 2
    assert len(skipped) == 1 and skipped[0].startswith('iter_3.pth: ') and reason in skipped[0]


def test_a_missing_manifest_is_no_damage(tmp_path: Path) -> None:
    three(tmp_path)
    (tmp_path / 'iter_3.pth.json').unlink()
    assert store.newest_valid(tmp_path) == (tmp_path / 'iter_3.pth', [])


@pytest.mark.parametrize(
    ('text', 'expected', 'said'),
    [
        ('/moved/away/iter_3.pth\n', 'iter_3.pth', []),
        ('', 'iter_3.pth', ['last_checkpoint: it names no file']),
        ('..', 'iter_3.pth', ['last_checkpoint: it names no file']),
        ('\0\0\0', 'iter_3.pth', ['last_checkpoint: it names no file']),
        ('work_dirs/run/iter_9.pth', 'iter_3.pth', ['iter_9.pth: it does not exist']),
        (None, 'iter_3.pth', []),
    ],
)
def test_the_pointer_may_be_wrong(tmp_path: Path, text: str | None, expected: str, said: list[str]) -> None:
    three(tmp_path)
    (tmp_path / 'last_checkpoint').unlink()
    if text is not None:
        (tmp_path / 'last_checkpoint').write_text(text)
    assert store.newest_valid(tmp_path) == (tmp_path / expected, said)


def set_age(path: Path, seconds: float) -> None:
    """Makes a file older than one that is written now."""
    written = time.time() - seconds
    os.utime(path, (written, written))


LEFT_BEHIND = 'last_checkpoint names an earlier one, which the run went back to'


def test_a_run_that_went_back_goes_on_from_what_it_saved_since(tmp_path: Path) -> None:
    three(tmp_path)
    for name in ('iter_2.pth', 'iter_3.pth'):
        set_age(tmp_path / name, 10)
    store.point_to(tmp_path, tmp_path / 'iter_1.pth')
    assert store.newest_valid(tmp_path) == (
        tmp_path / 'iter_1.pth',
        [f'iter_3.pth: {LEFT_BEHIND}', f'iter_2.pth: {LEFT_BEHIND}'],
    )
    (tmp_path / 'iter_4.pth').symlink_to('nowhere')
    assert store.candidates(tmp_path)[0] == tmp_path / 'iter_1.pth'


@pytest.mark.parametrize('age', [0, 10])
def test_checkpoints_that_were_saved_and_never_named_are_newer(tmp_path: Path, age: int) -> None:
    """The run died in between, or ``last_checkpoint`` could not be written."""
    three(tmp_path)
    store.point_to(tmp_path, tmp_path / 'iter_1.pth')
    set_age(tmp_path / 'iter_2.pth', 20)  # of before the run went back
    set_age(tmp_path / 'last_checkpoint', age)
    set_age(tmp_path / 'iter_3.pth', 0)
    assert store.newest_valid(tmp_path) == (tmp_path / 'iter_3.pth', [])
    flip(tmp_path / 'iter_3.pth')
    newest, skipped = store.newest_valid(tmp_path)
    assert newest == tmp_path / 'iter_1.pth'
    assert 'sha256' in skipped[0] and skipped[1:] == [f'iter_2.pth: {LEFT_BEHIND}']


def test_an_earlier_or_equal_iteration_that_is_written_later_is_not_newer(tmp_path: Path) -> None:
    """Such as an average of this run's checkpoints, which has no optimizer."""
    three(tmp_path)
    set_age(tmp_path / 'last_checkpoint', 10)
    write(tmp_path / 'average.pth', 3)
    assert store.newest_valid(tmp_path) == (tmp_path / 'iter_3.pth', [])


def test_a_moved_folder_is_complete(tmp_path: Path) -> None:
    three(tmp_path / 'here')
    (tmp_path / 'here').rename(tmp_path / 'there')
    assert store.newest_valid(tmp_path / 'there') == (tmp_path / 'there/iter_3.pth', [])


def test_checkpoints_that_were_sent_elsewhere_are_found(tmp_path: Path) -> None:
    """mmengine's ``out_dir``: the pointer stays in the work_dir."""
    three(tmp_path / 'out/run')
    store.point_to(tmp_path, tmp_path / 'out/run/iter_3.pth')
    flip(tmp_path / 'out/run/iter_3.pth')
    assert store.newest_valid(tmp_path)[0] == tmp_path / 'out/run/iter_2.pth'


def test_candidates_are_ordered_by_iteration_and_can_be_resumed_from(tmp_path: Path) -> None:
    facts = {'epoch_2.pth': 200, 'iter_250.pth': 250, 'epoch_10.pth': 1000, 'net-9.pt': 900}
    for name, iteration in facts.items():
        store.save(tmp_path / name, {'meta': {'iter': iteration}}, {'iter': iteration})
    store.manifest_of(tmp_path / 'epoch_2.pth').unlink()  # its content says the iteration
    (tmp_path / 'epoch_11.pth').write_bytes(b'damaged')
    for other in ('best_mAP_epoch_10.pth', 'epoch_10-0a1b2c3d.pth'):
        store.save(tmp_path / other, {'meta': {}}, {'iter': 5000} if 'best' in other else {})
    (tmp_path / 'iter_3000.pth.densekit-partial').touch()
    (tmp_path / 'run.log').touch()
    (tmp_path / 'vis_data').mkdir()
    names = [path.name for path in store.candidates(tmp_path)]
    assert names == ['epoch_10.pth', 'net-9.pt', 'iter_250.pth', 'epoch_2.pth', 'epoch_11.pth']


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert store.newest_valid(tmp_path) == (None, [])
    assert store.newest_valid(tmp_path / 'missing') == (None, [])


def test_a_folder_is_a_checkpoint_once_its_manifest_is_there(tmp_path: Path) -> None:
    three(tmp_path)
    folder = tmp_path / 'iter_4'
    (folder / 'data').mkdir(parents=True)
    for name in ('data/0.distcp', 'data/1.distcp', 'meta.pth'):
        (folder / name).write_bytes(name.encode() * 1000)
    store.point_to(tmp_path, folder)
    newest, skipped = store.newest_valid(tmp_path)
    assert newest == tmp_path / 'iter_3.pth' and 'without manifest.json' in skipped[0]
    store.seal_folder(folder, {'iter': 4})
    assert store.newest_valid(tmp_path) == (folder, [])
    (tmp_path / 'last_checkpoint').unlink()
    assert store.newest_valid(tmp_path) == (folder, [])
    data = bytearray((folder / 'data/1.distcp').read_bytes())
    data[777] ^= 1
    (folder / 'data/1.distcp').write_bytes(data)
    assert 'data/1.distcp: its sha256' in str(store.problem(folder)) and store.problem(folder, quick=True) is None
    (folder / 'data/1.distcp').unlink()
    assert store.problem(folder, quick=True) == 'data/1.distcp: it does not exist'


@pytest.mark.usefixtures('no_fsync')
def test_a_folder_is_removed_at_once(tmp_path: Path) -> None:
    run = tmp_path / 'run'
    folder = run / 'iter_4'

    def prepare() -> None:
        folder.mkdir(parents=True)
        (folder / '0.distcp').write_bytes(b'0' * 1000)
        store.seal_folder(folder, {'iter': 4})

    for _ in each_moment(run, False, prepare, lambda tell: store.remove(folder)):
        assert not folder.exists() or store.problem(folder) is None
        store.clean(run)
        assert not list(run.glob('*partial'))
    assert list(run.iterdir()) == []


def test_only_our_own_leftovers_are_cleaned_away(tmp_path: Path) -> None:
    for name in ('iter_1.pth', 'other.tmp', 'iter_2.pth.densekit-partial', 'last_checkpoint.densekit-partial'):
        (tmp_path / name).touch()
    assert store.clean(tmp_path) == ['iter_2.pth.densekit-partial', 'last_checkpoint.densekit-partial']
    assert sorted(path.name for path in tmp_path.iterdir()) == ['iter_1.pth', 'other.tmp']
