"""Checkpoints on disk: whole or not at all, with a checksum, and the newest one that can be used.

A checkpoint ``epoch_3.pth`` has a manifest ``epoch_3.pth.json`` beside it with its size and SHA-256, because a flipped
byte loads silently with ``torch.load``. One without a manifest, such as mmengine's own, is judged by the CRCs that
every ``.pth`` has inside. A checkpoint may also be a folder with a ``manifest.json`` that lists its files.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from backbones.files import read_checkpoint

POINTER = 'last_checkpoint'  # mmengine's name
FOLDER_MANIFEST = 'manifest.json'

_PARTIAL = '.densekit-partial'
_NUMBERED = re.compile(r'(?:epoch|iter)_(\d+)(?:\.pth)?')
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)  # what some network file systems answer
_MARKS_FOLDER = 0x10  # in a zip's directory
_BLOCK = 1 << 22  # bytes
_BLOCKS_BEHIND = 4


class CheckpointNotSaved(OSError):
    """A checkpoint is not on disk; those that were there before still are.

    Attributes:
        path: of the checkpoint.
        needed: bytes.
        free: bytes on that disk; None if unknown.
    """

    def __init__(self, path: Path, needed: int, error: OSError) -> None:
        self.path = path
        self.needed = needed
        self.free = _free_bytes(path.parent)
        free = 'an unknown number' if self.free is None else f'{self.free:,}'
        advice = f'Make sure that {path.parent} can be written to'
        if error.errno in _NO_SPACE:
            advice = (
                'Make room, raise the limit, or keep fewer (max_keep_ckpts of the checkpoint hook; a new checkpoint is '
                'written before an old one goes)'
            )
        super().__init__(
            f'checkpoint {path} is not saved: {error.strerror or error}. It needs {needed:,} bytes, and {free} are '
            f'free on that disk. Earlier checkpoints are untouched. {advice}, or choose another folder; then resume.'
        )
        self.errno = error.errno


def save(path: Path, content: dict[str, Any], facts: dict[str, Any]) -> None:
    """Writes a checkpoint and its manifest so that at no moment there is a damaged one of this name.

    All of it is on disk under temporary names before anything that exists is touched. Tensors go to the file one by
    one: there is no second copy of the whole in memory, and those on a GPU need not be copied before.

    Args:
        path: of the checkpoint; its folder is made if need be.
        content: tensors, plain Python and what ``backbones.files.read_checkpoint`` accepts.
        facts: plain data for the manifest, such as ``epoch`` and ``iter``.

    Raises:
        CheckpointNotSaved: if the disk is full, read-only or fails.
    """
    sink = _Sink(partial(path))
    try:
        torch.save(content, cast(BinaryIO, sink))
        sink.close()
        manifest = {**facts, 'file': path.name, 'size': sink.size, 'sha256': sink.digest()}
        sink.attempt(lambda: _write(partial(manifest_of(path)), json.dumps(manifest, indent=2) + '\n'))
        sink.attempt(lambda: _commit(path))
    finally:
        sink.close()
        for leftover in (partial(path), partial(manifest_of(path))):
            with contextlib.suppress(OSError):
                leftover.unlink()
    if sink.error is not None:
        raise CheckpointNotSaved(path, sink.size, sink.error) from sink.error


def digest(content: dict[str, Any]) -> str:
    """The SHA-256 of the file that :func:`save` would write."""
    sink = _Sink(None)
    torch.save(content, cast(BinaryIO, sink))
    sink.close()
    return sink.digest()


def seal_folder(folder: Path, facts: dict[str, Any]) -> None:
    """Makes a folder of files that are on disk a checkpoint, by writing the manifest that lists them.

    Args:
        folder: of the checkpoint, with all its files.
        facts: plain data for the manifest, such as ``epoch`` and ``iter``.
    """
    files = [path for path in sorted(folder.rglob('*')) if path.is_file() and path.name != FOLDER_MANIFEST]
    entries = [
        {'file': str(path.relative_to(folder)), 'size': path.stat().st_size, 'sha256': _sha256(path)} for path in files
    ]
    _write_in_place_of(folder / FOLDER_MANIFEST, json.dumps({**facts, 'files': entries}, indent=2) + '\n')


def problem(path: Path, *, quick: bool = False) -> str | None:
    """Why a checkpoint cannot be used.

    Args:
        path: a file, or the folder of a sharded checkpoint.
        quick: look at sizes only, not at every byte.

    Returns:
        The reason, or None if it can be used.
    """
    try:
        if path.is_dir():
            return _problem_of_folder(path, quick)
        if not path.is_file():
            return 'it does not exist'
        if manifest_of(path).is_file():
            return _difference(path, facts_of(path), quick)
        return _problem_of_zip(path, quick)
    except OSError as error:
        return f'it cannot be read ({error})'
    except ValueError as error:
        return str(error)


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run that can be used.

    Args:
        folder: of the run.

    Returns:
        Its path, or None if there is none; and, for each that was skipped, a line with its name and the reason.
    """
    skipped = []
    if (folder / POINTER).is_file() and _pointed_to(folder) is None:
        skipped.append(f'{POINTER}: it names no file')
    rest = candidates(folder)
    while rest:
        path = rest.pop(0)
        reason = problem(path)
        if reason is None:
            further = [each for each in rest if _iteration(each) > _iteration(path)]
            left_behind = f'{POINTER} names an earlier one, which the run went back to'
            return path, [*skipped, *(f'{each.name}: {left_behind}' for each in further)]
        skipped.append(f'{path.name}: {reason}')
    return None, skipped


def candidates(folder: Path) -> list[Path]:
    """What a run in this folder may go on from: what ``last_checkpoint`` names, then the others, newest first.

    Checkpoints of later iterations come before it if they were written after it: the run died, or the disk failed,
    before it could name them. Those written before are of a run that went back, and come after it.

    Best and published checkpoints are not among them: they have no optimizer. Nothing is checked here.

    Args:
        folder: of the run. Where mmengine's ``out_dir`` sent the checkpoints elsewhere, ``last_checkpoint`` says where.
    """
    pointed = _pointed_to(folder)
    folders = {folder, folder if pointed is None else pointed.parent}
    found = {path for each in folders if each.is_dir() for path in each.iterdir() if _is_candidate(path)}
    newest_first = sorted(found - {pointed}, key=lambda path: (_iteration(path), path.name), reverse=True)
    if pointed is None:
        return newest_first
    reached, named = _iteration(pointed), (folder / POINTER).stat().st_mtime_ns
    # Two files that are written one after the other may have the same time.
    unnamed = [path for path in newest_first if _iteration(path) > reached and _written(path) >= named]
    return [*unnamed, pointed, *(path for path in newest_first if path not in unnamed)]


def point_to(folder: Path, path: Path | str) -> None:
    """Names the checkpoint to resume from, in mmengine's format."""
    _write_in_place_of(folder / POINTER, str(path))


def remove(path: Path) -> None:
    """Removes a checkpoint, file or folder, and its manifest; one that is not there is no mistake.

    The manifest goes first: without it the file is still whole, and a manifest alone would condemn a later file of the
    same name that mmengine writes.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(partial(path), ignore_errors=True)
        os.replace(path, partial(path))  # a folder that is half removed must not look like a checkpoint
        shutil.rmtree(partial(path))
        return
    manifest_of(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def clean(folder: Path) -> list[str]:
    """Removes what interrupted saves and removals left behind, and returns the names."""
    leftovers = sorted(folder.glob(f'*{_PARTIAL}'))
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return [path.name for path in leftovers]


def manifest_of(path: Path) -> Path:
    """Where the manifest of a checkpoint is."""
    return path / FOLDER_MANIFEST if path.is_dir() else path.with_name(f'{path.name}.json')


def partial(path: Path) -> Path:
    """The name that something has while it is written or removed; :func:`clean` knows it."""
    return path.with_name(f'{path.name}{_PARTIAL}')


def facts_of(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is damaged.
    """
    manifest = manifest_of(path)
    try:
        facts = json.loads(manifest.read_text(encoding='utf-8'))
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        raise ValueError(
            f'its manifest {manifest.name} is damaged; without one the file is judged by its own checksums'
        )
    return facts


class _Sink:
    """What ``torch.save`` writes to: a file, its SHA-256 and its size.

    The SHA-256 is computed in a second thread, a few blocks behind the file.

    Once the file has failed it only counts: torch would hide the error behind one of its own, and the message says how
    many bytes are needed.
    """

    def __init__(self, path: Path | None) -> None:
        self.size = 0
        self.error: OSError | None = None
        self._block = bytearray()
        self._sha256 = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1)
        self._hashing: deque[Future] = deque()
        self._file: BinaryIO | None = None
        if path is not None:
            self.attempt(lambda: self._open(path))

    def attempt(self, step: Callable[[], Any]) -> None:
        """Does a step unless one before it has failed."""
        if self.error is None:
            try:
                step()
            except OSError as error:
                self.error = error

    def write(self, data: Any) -> int:
        """Takes bytes whose memory is only lent for the time of the call."""
        rest = memoryview(data)
        self.size += len(rest)
        while rest and self.error is None:
            taken = rest[: _BLOCK - len(self._block)]
            self._block += taken
            rest = rest[len(taken) :]
            if len(self._block) == _BLOCK:
                self._pass_on()
        return len(data)

    def flush(self) -> None:
        """Called by torch; :meth:`close` does it."""

    def digest(self) -> str:
        """The SHA-256 after :meth:`close`."""
        return self._sha256.hexdigest()

    def close(self) -> None:
        """Brings the file to the disk."""
        self._pass_on()
        file, self._file = self._file, None
        if file is not None:
            self.attempt(lambda: _sync(file))
            with contextlib.suppress(OSError):  # what it could not flush is known already
                file.close()
        self._hasher.shutdown()

    def _pass_on(self) -> None:
        if not self._block:
            return
        block, self._block = self._block, bytearray()
        self._hashing.append(self._hasher.submit(self._sha256.update, block))
        if len(self._hashing) > _BLOCKS_BEHIND:
            self._hashing.popleft().result()
        file = self._file
        if file is not None:
            self.attempt(lambda: file.write(block))

    def _open(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open('wb')


def _commit(path: Path) -> None:
    """Gives a checkpoint and its manifest their names.

    An older checkpoint of the name loses its manifest first. From then on the CRCs inside the file count, of the old
    one and then of the new one, until the new manifest is there. Each step is on disk before the next: a power cut
    may otherwise keep a later one and lose an earlier.
    """
    manifest = manifest_of(path)
    if manifest.exists():
        manifest.unlink()
        sync_folder(path.parent)
    for file in (path, manifest):
        os.replace(partial(file), file)
        sync_folder(path.parent)


def _write_in_place_of(path: Path, text: str) -> None:
    try:
        _write(partial(path), text)
        os.replace(partial(path), path)
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            partial(path).unlink()


def _write(path: Path, text: str) -> None:
    with path.open('wb') as file:
        file.write(text.encode())
        _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Brings the names of a folder's files to the disk, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def _problem_of_folder(folder: Path, quick: bool) -> str | None:
    if not (folder / FOLDER_MANIFEST).is_file():
        return f'a folder without {FOLDER_MANIFEST}, so its saving was not finished'
    entries = facts_of(folder).get('files')
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and 'file' in entry for entry in entries):
        raise ValueError(f'its {FOLDER_MANIFEST} lists no files')
    for entry in entries:
        path = folder / str(entry['file'])
        reason = _difference(path, entry, quick) if path.is_file() else 'it does not exist'
        if reason is not None:
            return f'{entry["file"]}: {reason}'
    return None


def _difference(path: Path, expected: dict[str, Any], quick: bool) -> str | None:
    size = path.stat().st_size
    if size != expected.get('size'):
        return f'it has {size:,} bytes and {expected.get("size")} were written'
    if not quick and _sha256(path) != expected.get('sha256'):
        return 'its sha256 is not the one that was written: the file or its manifest is damaged'
    return None


def _problem_of_zip(path: Path, quick: bool) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            damaged = None if quick else archive.testzip()
    except OSError:
        raise
    except Exception as error:  # a damaged header fails wherever its bytes happen to lead
        return f'it is truncated, damaged or no PyTorch file: {error}'
    if damaged is not None:
        return f'it is damaged: the checksum of {damaged} inside is wrong'
    if any(entry.external_attr & _MARKS_FOLDER for entry in entries):
        return 'it is damaged: it has folders inside'  # torch would leave their tensors as the memory happens to be
    if not quick:
        read_checkpoint(path, mmap=True, trust_pickle=True)  # CRCs do not cover the headers that torch goes by
    return None


def _pointed_to(folder: Path) -> Path | None:
    """What ``last_checkpoint`` names: in this folder, which may have moved, or else where mmengine put it."""
    pointer = folder / POINTER
    if not pointer.is_file():
        return None
    written = Path(pointer.read_text(encoding='utf-8', errors='replace').strip().replace('\0', ''))
    if written.name in ('', '..'):
        return None
    here = folder / written.name
    return written if written.exists() and not here.exists() else here


def _is_candidate(path: Path) -> bool:
    if path.name.startswith('best_') or path.name.endswith(_PARTIAL):
        return False
    return _NUMBERED.fullmatch(path.name) is not None or isinstance(_fact(path, 'iter'), int)


def _iteration(path: Path) -> int:
    """How far training was; of a file that says nothing, the number in its name."""
    known = _fact(path, 'iter')
    if isinstance(known, int):
        return known
    with contextlib.suppress(Exception):  # whatever is wrong with it, problem() is going to tell
        return int(read_checkpoint(path, mmap=True, trust_pickle=True)['meta']['iter'])
    number = _NUMBERED.fullmatch(path.name)
    return -1 if number is None else int(number[1])


def _written(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # such as a link that leads nowhere
        return 0


def _fact(path: Path, name: str) -> Any:
    try:
        return facts_of(path).get(name)
    except (OSError, ValueError):
        return None


def _sha256(path: Path) -> str:
    sha256 = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(_BLOCK):
            sha256.update(block)
    return sha256.hexdigest()


def _free_bytes(folder: Path) -> int | None:
    for existing in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(existing).free
    return None
