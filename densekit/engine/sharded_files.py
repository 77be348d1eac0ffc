"""Checkpoints that are folders: every process writes its part of a sharded model, and any number of them reads it.

The parts go through ``torch.distributed.checkpoint``, everything else into ``rest.pth``, as the first process has it.
torch describes its files in a pickle, ``.metadata``, and reads that without any protection (torch 2.11,
torch/distributed/checkpoint/filesystem.py). It is written, so that torch's own tools can read the folder, but never
read here: ``tensors.json`` says the same, and a folder that somebody made up executes nothing.
"""

import itertools
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor

from backbones.files import read_checkpoint
from densekit.cli import RunStopped
from densekit.engine import store
from densekit.engine.sharding import mapped

REST = 'rest.pth'
TENSORS = 'tensors.json'


def save_sharded(folder: Path, content: Mapping[str, Any], facts: dict[str, Any]) -> None:
    """Writes a checkpoint of a sharded model, whole or not at all. A collective operation.

    All of it is on disk under a temporary name, with a manifest of sizes and checksums, before ``folder`` is touched.

    Args:
        folder: to write, on a file system that all processes share. One that exists is replaced.
        content: the same in every process but for the parts: what a ``.pth`` would hold, such as
            ``{'state_dict': model.state_dict(), 'optimizer': optimizer.state_dict(), 'meta': ...}``. Whatever is cut,
            averaged weights and gradients too, is written by all, the rest by the first process.
        facts: plain data for the manifest, such as ``epoch`` and ``iter``.

    Raises:
        CheckpointNotSaved: if it cannot be written: in every process where it is a part of a tensor, else in the
            first.
        RunStopped: in the others.
    """
    parts: dict[str, Tensor] = {}
    rest = mapped(content, lambda path, value: _placeholder(parts, path, value))
    working = store.partial(folder)
    try:
        with _told_what_is_needed(folder, parts):
            _together(lambda: _empty_folder(working), first_only=True)
            dcp.save(
                parts,
                storage_writer=_Writer(working),
                planner=dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            )
            _together(lambda: _finish(working, folder, rest, facts), first_only=True)
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(working, ignore_errors=True)


def outline(folder: Path, *, trust_pickle: bool = False) -> dict[str, Any]:
    """A checkpoint without the tensors that were cut, quickly: on the device ``meta`` they have dtype and shape alone.

    Args:
        folder: of the checkpoint.
        trust_pickle: as :func:`backbones.files.read_checkpoint` has it, for ``rest.pth``.

    Raises:
        ValueError: if it is not whole, or cannot be read.
    """
    if reason := store.problem(folder, quick=True):
        raise ValueError(f'checkpoint {folder} cannot be used: {reason}')
    return read_checkpoint(folder / REST, trust_pickle=trust_pickle)


def load_sharded(
    folder: Path, model: nn.Module | None = None, optimizer: Any = None, *, trust_pickle: bool = False
) -> dict[str, Any]:
    """Reads a checkpoint in any number of processes, whatever number wrote it. All of them call it.

    Args:
        folder: of the checkpoint.
        model: sharded or not. Tensors under the name of one of its parameters (weights, averaged weights, gradients)
            are cut as that parameter is, and each process reads its part alone. Nothing is loaded into it.
        optimizer: torch's or mmengine's wrapper of one, for its states likewise.
        trust_pickle: as :func:`backbones.files.read_checkpoint` has it, for ``rest.pth``.

    Returns:
        What was saved. Tensors for which there is no such parameter, or one that is whole, are whole and on the CPU.

    Raises:
        ValueError: if it is not whole, or cannot be read.
        RunStopped: if another process cannot read it.
    """
    content, _ = _together(lambda: (outline(folder, trust_pickle=trust_pickle), _read_tensors(folder)))
    targets: dict[str, Tensor] = {}
    likes = _Likes(model, optimizer)
    content = mapped(content, lambda path, value: _target(targets, likes, path, value))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'torch.distributed is disabled')  # a single process is meant to be one
            dcp.load(
                targets,
                storage_reader=_Reader(folder),
                planner=dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                no_dist=not dist.is_initialized(),
            )
    except CheckpointException as error:  # in every process
        raise ValueError(f'checkpoint {folder} cannot be read: {_first_cause(error)}') from error
    return content


def merge(folder: Path, file: Path) -> int:
    """Writes a sharded checkpoint as one ordinary ``.pth`` with a manifest, whole or not at all.

    For one process without a process group; the memory must hold all of it.

    Args:
        folder: of the checkpoint; every byte is checked.
        file: to write; it must not exist.

    Returns:
        The number of tensors that were put together.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it is not whole or cannot be read, or ``file`` exists.
        CheckpointNotSaved: if the disk is full or cannot be written.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f'{folder} is no folder; give the folder of a sharded checkpoint, with {REST} in it')
    if file.exists():
        raise ValueError(f'{file} exists and is not overwritten; delete it or give another name')
    if reason := store.problem(folder):
        raise ValueError(f'checkpoint {folder} cannot be used: {reason}')
    facts = {key: value for key, value in store.facts_of(folder).items() if key != 'files'}
    store.save(file, load_sharded(folder), facts)
    return len(_read_tensors(folder))


class _Writer(dcp.FileSystemWriter):
    """torch's, which also describes the files in JSON."""

    def storage_meta(self) -> StorageMeta | None:
        """None: where the folder was when it was written is nobody's business."""
        return None

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """Called in the first process when all have written."""
        super().finish(metadata, results)
        stored = {(each.index.fqn, tuple(each.index.offset)): each.storage_data for each in itertools.chain(*results)}
        described = {
            name: {
                'dtype': str(tensor.properties.dtype).removeprefix('torch.'),
                'size': list(tensor.size),
                'parts': [_described(part, stored[name, tuple(part.offsets)]) for part in tensor.chunks],
            }
            for name, tensor in metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
        }
        _write(Path(self.path, TENSORS), json.dumps(described))


class _Reader(dcp.FileSystemReader):
    """torch's, which takes the description of the files from JSON."""

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """Called in the first process, or in each by itself."""
        metadata = Metadata({}, storage_data={})
        for name, tensor in _read_tensors(Path(self.path)).items():
            parts = [(torch.Size(part['offsets']), torch.Size(part['size']), part) for part in tensor['parts']]
            metadata.state_dict_metadata[name] = TensorStorageMetadata(
                TensorProperties(dtype=getattr(torch, tensor['dtype'])),
                torch.Size(tensor['size']),
                [ChunkStorageMetadata(offsets, size) for offsets, size, _ in parts],
            )
            for offsets, _, part in parts:
                place = _StorageInfo(part['file'], part['start'], part['length'])
                metadata.storage_data[MetadataIndex(name, offsets)] = place
        return metadata


class _Likes:
    """Says as what a tensor of a checkpoint is to be cut."""

    def __init__(self, model: nn.Module | None, optimizer: Any) -> None:
        self._weights = {} if model is None else model.state_dict()
        groups = [] if optimizer is None else getattr(optimizer, 'optimizer', optimizer).param_groups
        self._params = [param for group in groups for param in group['params']]

    def of(self, path: str, shape: torch.Size) -> DTensor | None:
        """The parameter of the model that a tensor belongs to, if it is cut and has its shape."""
        match path.split('/'):
            case ['optimizer', 'state', index, _] if int(index) < len(self._params):
                like = self._params[int(index)]
            case [*_, name]:
                like = self._weights.get(name.removeprefix('module.'))
        return like if isinstance(like, DTensor) and like.shape == shape else None


def _placeholder(parts: dict[str, Tensor], path: str, value: Any) -> Any:
    if not isinstance(value, DTensor):
        return value
    parts[path] = value.detach()
    return torch.empty(value.shape, dtype=value.dtype, device='meta')


def _target(targets: dict[str, Tensor], likes: _Likes, path: str, value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_meta:
        return value
    like = likes.of(path, value.shape)
    empty = torch.empty(value.shape, dtype=value.dtype) if like is None else torch.empty_like(like, dtype=value.dtype)
    targets[path] = empty.detach()
    return targets[path]


def _together(action: Callable[[], Any], *, first_only: bool = False) -> Any:
    """Does something in every process, or for all in the first. An error in one ends all, so that none waits for it."""
    if not dist.is_initialized():
        return action()
    result, error = None, None
    try:
        if dist.get_rank() == 0 or not first_only:
            result = action()
    except Exception as caught:
        error = caught
    device = 'cuda' if dist.get_backend() == 'nccl' else 'cpu'
    failed = torch.tensor([error is not None], dtype=torch.int32, device=device)
    dist.all_reduce(failed, dist.ReduceOp.MAX)
    if error is not None:
        raise error
    if failed.item():
        raise RunStopped('another process failed at a sharded checkpoint; its message says why')
    return result


def _empty_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


@contextmanager
def _told_what_is_needed(folder: Path, parts: Mapping[str, Tensor]) -> Iterator[None]:
    try:
        yield
    except (OSError, CheckpointException) as error:
        cause = _first_cause(error) if isinstance(error, CheckpointException) else error
        if not isinstance(cause, OSError):
            raise RuntimeError(f'checkpoint {folder} is not saved: {cause}') from error
        needed = sum(part.numel() * part.element_size() for part in parts.values())
        if isinstance(cause, store.CheckpointNotSaved) and isinstance(cause.__cause__, OSError):
            needed, cause = needed + cause.needed, cause.__cause__
        raise store.CheckpointNotSaved(folder, needed, cause) from error


def _first_cause(error: CheckpointException) -> BaseException:
    return error.failures[min(error.failures)][0]


def _finish(working: Path, folder: Path, rest: dict[str, Any], facts: dict[str, Any]) -> None:
    lacking = {part['file'] for tensor in _read_tensors(working).values() for part in tensor['parts']}
    lacking -= {path.name for path in working.iterdir()}
    if lacking:
        raise OSError(
            f'{len(lacking)} files of other processes are not there; a sharded checkpoint needs a folder that all '
            'nodes share, and without one save whole checkpoints'
        )
    store.save(working / REST, rest, {})
    store.seal_folder(working, facts)
    _put_in_place(working, folder)


def _put_in_place(working: Path, folder: Path) -> None:
    # No folder can take the place of another at once. In between, the old one is a checkpoint under another name.
    replaced = folder.with_name(f'{folder.name}-replaced')
    if folder.exists():
        if replaced.exists():
            store.remove(replaced)
        os.replace(folder, replaced)
    os.replace(working, folder)
    store.sync_folder(folder.parent)
    if replaced.exists():
        store.remove(replaced)


def _write(path: Path, text: str) -> None:
    with path.open('w', encoding='utf-8') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _described(part: ChunkStorageMetadata, stored: Any) -> dict[str, Any]:
    place = {'file': stored.relative_path, 'start': stored.offset, 'length': stored.length}
    return {'offsets': list(part.offsets), 'size': list(part.sizes), **place}


def _read_tensors(folder: Path) -> dict[str, Any]:
    """The description of the tensors and their parts, once it is known to be one."""
    try:
        tensors: dict[str, Any] = json.loads((folder / TENSORS).read_text(encoding='utf-8'))
        for name, tensor in tensors.items():
            _check_tensor(name, tensor)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f'checkpoint {folder} cannot be used: its {TENSORS} is damaged ({error})') from error
    return tensors


def _check_tensor(name: str, tensor: dict[str, Any]) -> None:
    """Torch reads what the parts have and leaves the rest of a tensor as it finds the memory."""
    if not isinstance(getattr(torch, tensor['dtype'], None), torch.dtype):
        raise ValueError(f'{name} has a dtype that there is not, {tensor["dtype"]!r}')
    rows, *others = tensor['size']
    known = 0
    for part in sorted(tensor['parts'], key=lambda part: part['offsets']):
        if Path(part['file']).name != part['file']:
            raise ValueError(f'{name} lies in {part["file"]!r}, outside the folder')
        if 0 in part['size']:
            continue
        if part['offsets'] != [known, *([0] * len(others))] or part['size'][1:] != others:
            raise ValueError(f'the parts of {name} do not lie one behind the other')
        known += part['size'][0]
    if known != rows:
        raise ValueError(f'the parts of {name} have {known} of its {rows} rows')
