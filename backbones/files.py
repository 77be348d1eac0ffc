"""Files of weights: found, downloaded whole or not at all, and read without executing anything in them."""

import argparse
import hashlib
import importlib
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO
from urllib.request import Request, urlopen

import numpy as np
import torch
from filelock import FileLock
from mmengine.logging import print_log
from mmengine.logging.history_buffer import HistoryBuffer
from safetensors.torch import load_file
from torch import Tensor

from backbones.zoo import SUFFIXES, ZOO, Weights, nearest

# File names that say nothing of what is in them.
EVERYBODYS = ('model.safetensors', 'pytorch_model.bin', 'open_clip_model.safetensors', 'open_clip_pytorch_model.bin')

# A pickle can corrupt memory even under weights_only=True before this version (CVE-2026-24747).
SAFE_TORCH = (2, 10)


def _statistic_of_history(owner: Any, name: Any) -> Any:
    """Stands for ``getattr`` while reading: mmengine's loss histories name their statistics so, nothing else may."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise pickle.UnpicklingError(f'WeightsUnpickler error: getattr of {name!r} is not allowed')
    return getattr(owner, name)


_MULTIARRAY = importlib.import_module('numpy._core.multiarray' if find_spec('numpy._core') else 'numpy.core.multiarray')

# What mmengine's own checkpoints hold besides tensors and plain Python: loss histories as NumPy arrays. None of these
# can run code of the file. Files written under NumPy 1 name the same functions numpy.core instead of numpy._core.
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,  # the options of a run, which the official training code keeps; it only takes attributes
    HistoryBuffer,
    (_statistic_of_history, 'builtins.getattr'),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes['AllInteger'] + np.typecodes['Float'] + '?'},
    *(
        (getattr(_MULTIARRAY, name), f'{module}.multiarray.{name}')
        for module in ('numpy._core', 'numpy.core')
        for name in ('_reconstruct', 'scalar')
    ),
]


def read_checkpoint(
    checkpoint: str | os.PathLike[str],
    map_location: Any = 'cpu',
    *,
    mmap: bool = False,
    trust_pickle: bool = False,
) -> dict[str, Any]:
    """Reads a checkpoint file without executing anything in it.

    Args:
        checkpoint: what :func:`local_file` finds.
        map_location: device of the tensors.
        mmap: leave the tensors in the file until they are used. Only for weights that are copied at once: the file
            must not be overwritten as long as one of them lives.
        trust_pickle: read a pickle on torch < 2.10 as well, where one made for the purpose can corrupt memory.

    Returns:
        The dictionary in the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, holds Python objects other than tensors and plain data, is no dictionary, or
            is a pickle that this torch cannot read safely.
    """
    name = str(checkpoint)
    path = local_file(name)
    try:
        if path.suffix == '.safetensors':
            return load_file(path, device=str(map_location))
        _check_torch(name, trust_pickle)
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            content = torch.load(
                path, map_location=map_location, weights_only=True, mmap=mmap and zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f'checkpoint {name} is not read: it is no PyTorch file, or holds Python objects that could run code. Only '
            f'tensors and plain data are accepted. If you trust it, load it yourself and save its state_dict alone. '
            f'({_first_line(error)})'
        ) from error
    except (MemoryError, PermissionError, torch.OutOfMemoryError, _UnsafeTorch):
        raise  # nothing is wrong with the file
    except Exception as error:  # a damaged file fails wherever its bytes happen to lead: IndexError, TypeError, ...
        advice = 'Copy or download it again'
        if name in ZOO or '://' in name:
            advice = f'Delete the copy, {path}, to download it again'
        raise ValueError(
            f'checkpoint {name} cannot be read ({path.stat().st_size:,} bytes): it is no PyTorch file, truncated or '
            f'damaged. {advice}. ({_first_line(error)})'
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f'checkpoint {name} holds a {type(content).__name__}; expected a dictionary of tensors')
    return content


def state_dict_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights in a checkpoint's dictionary, out of ``{'model': ...}`` or ``{'state_dict': ...}``.

    Averaged weights (EMA) are taken where there are no others; the papers start from the ones that are not averaged.

    Raises:
        ValueError: if there are no tensors where they are expected.
    """
    for key in ('state_dict', 'model', 'model_ema', 'state_dict_ema', 'ema_state_dict'):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    found = [(str(key).removeprefix('module.'), value) for key, value in content.items() if isinstance(value, Tensor)]
    tensors = dict(found)
    if len(tensors) < len(found):
        raise ValueError("the file has some tensors twice, with 'module.' before their names and without; save one set")
    if not tensors:
        raise ValueError(
            f"no weights found: the file's top-level keys are {some(content)}; expected tensors there, "
            "or below 'model' or 'state_dict'"
        )
    return tensors


def local_file(name: str) -> Path:
    """The file of weights that a name stands for, downloaded if need be.

    Args:
        name: a file; a folder with one file of weights; an ``https://`` address, kept in torch's cache; or a name of
            ``backbones.zoo.ZOO``, looked for in the folder that the environment variable DENSEKIT_WEIGHTS names, in
            torch's cache, and then at its address.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be downloaded, has not the checksum of the catalogue, or a folder has several files.
    """
    if '://' in name:
        if not name.startswith('https://'):
            raise ValueError(f'checkpoint {name}: only https:// addresses and files are read')
        weights = next((weights for weights in ZOO.values() if weights.address == name), None)
        return _in_local_folder(cached_copy(name).name) or _downloaded(name, weights)
    if not name:
        raise ValueError("checkpoint '' names nothing; give a file, a folder, an https:// address or a catalogue name")
    path = Path(name).expanduser()
    if path.is_dir():
        return _file_of_folder(path)
    if path.is_file():
        return path
    if name in ZOO:
        return _file_of_catalogue(ZOO[name])
    near = nearest(name)
    hint = f' Did you mean {near!r}, of the catalogue?' if near else ''
    raise FileNotFoundError(
        f'checkpoint {name} does not exist; give the path of a .safetensors or .pth file, a folder with one, an '
        f'https:// address, or a name of the catalogue (python tools/weights.py list).{hint}'
    )


def local_copy(weights: Weights) -> Path | None:
    """The file that :func:`local_file` takes for a name of the catalogue without a download, if there is one."""
    names = [weights.name, *(f'{weights.name}{suffix}' for suffix in SUFFIXES), weights.file]
    cached = cached_copy(weights.address)
    return _in_local_folder(*names) or (cached if cached.is_file() else None)


def cached_copy(address: str) -> Path:
    """Where the download of an address is kept."""
    # Other hosts have files of the same name; the folder keeps them apart.
    host = hashlib.sha256(address.rpartition('/')[0].encode()).hexdigest()[:8]
    return Path(torch.hub.get_dir(), 'checkpoints', host, address.split('?')[0].rsplit('/', 1)[-1])


def some(keys: Iterable[Any], limit: int = 5) -> str:
    """The first few of many, and how many more there are."""
    names = [str(key) for key in keys]
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(names[:limit]) + more


class _UnsafeTorch(ValueError):
    """Says that nothing is wrong with the file."""


def _check_torch(name: str, trust_pickle: bool) -> None:
    version = tuple(int(part) for part in torch.__version__.split('.')[:2])
    if version < SAFE_TORCH and not trust_pickle and os.environ.get('DENSEKIT_TRUST_PICKLE') != '1':
        raise _UnsafeTorch(
            f'checkpoint {name} is a pickle, and in torch {torch.__version__} one made for the purpose can corrupt '
            'memory (CVE-2026-24747, mended in torch 2.10). Take a .safetensors file or a newer torch, or, if you '
            'trust where the file comes from, set the environment variable DENSEKIT_TRUST_PICKLE=1.'
        )


def _file_of_folder(folder: Path) -> Path:
    found = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    # Downloads of Hugging Face hold the same weights in both forms.
    safe = [path for path in found if path.suffix == '.safetensors'] or found
    if len(safe) == 1:
        return safe[0]
    if not safe:
        raise FileNotFoundError(f'checkpoint {folder} is a folder without a file of weights ({", ".join(SUFFIXES)})')
    if any(re.search(r'-\d+-of-\d+\.', path.name) for path in safe):
        raise ValueError(
            f'checkpoint {folder} is a folder with weights in several parts, which are not put together here: '
            "transformers' save_pretrained(..., max_shard_size='20GB') writes one file"
        )
    raise ValueError(f'checkpoint {folder} is a folder with several files of weights; give one: {some(safe)}')


def _file_of_catalogue(weights: Weights) -> Path:
    try:
        found = local_copy(weights)
        if found is None:
            return _downloaded(weights.address, weights)
        # Under another name it is the user's own, such as a converted file.
        if found.name in (weights.file, Path(weights.address).name):
            _check_sha256(found, weights)
        return found
    except ValueError as error:
        raise ValueError(f'weights {weights.name}: {error}') from error


def _in_local_folder(*names: str) -> Path | None:
    """The first of these files, or folders with a file, in the folder that DENSEKIT_WEIGHTS names."""
    folder = os.environ.get('DENSEKIT_WEIGHTS')
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise ValueError(f'DENSEKIT_WEIGHTS names {folder}, which is no folder')
    for path in (Path(folder, name) for name in names if name not in EVERYBODYS):
        if path.is_dir():
            return _file_of_folder(path)
        if path.is_file():
            return path
    return None


def _downloaded(address: str, weights: Weights | None = None) -> Path:
    cached = cached_copy(address)
    if cached.is_file():
        return cached
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f'{address} cannot be downloaded: {cached.parent} cannot be made ({error}). TORCH_HOME names another place.'
        ) from error
    partial = cached.with_name(f'{cached.name}.partial')
    with FileLock(f'{cached}.lock'):  # of several processes one downloads, and the others wait for it
        if cached.is_file():
            return cached
        print_log(f'Downloading {address} to {cached}', logger='current')
        try:
            with partial.open('wb') as file:
                _download(address, file)
            if weights is not None:
                _check_sha256(partial, weights)
            os.replace(partial, cached)  # under its name only when it is whole and right
        except (OSError, HTTPException) as error:
            name = weights.file if weights else cached.name
            raise ValueError(
                f'{address} cannot be downloaded ({error}). Put the file at {cached}, or as {name} into a folder that '
                'the environment variable DENSEKIT_WEIGHTS names, or give its path.'
            ) from error
        finally:
            partial.unlink(missing_ok=True)
    return cached


def _download(address: str, file: BinaryIO) -> None:
    request = Request(address, headers={'User-Agent': 'densekit'})
    with urlopen(request, timeout=60) as response:
        if not response.geturl().startswith('https://'):
            raise OSError(f'it leads to {response.geturl()}, which is not https')
        shutil.copyfileobj(response, file, length=1 << 20)
        expected = response.headers.get('Content-Length')
    if expected is not None and file.tell() != int(expected):  # a connection that breaks looks like the end
        raise OSError(f'the connection broke after {file.tell():,} of {int(expected):,} bytes')


def _check_sha256(path: Path, weights: Weights) -> None:
    if weights.sha256 is None:
        return
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()
    if not found.startswith(weights.sha256):
        raise ValueError(
            f'{path} is not the published file: its sha256 is {found}, the catalogue has {weights.sha256}. '
            'Delete it and download it again.'
        )


def _first_line(error: BaseException) -> str:
    """What went wrong, without torch's advice to read the file unsafely."""
    parts = re.split(r'\n\s*\n|WeightsUnpickler error:|Please use', str(error))
    said = [part.strip() for part in parts if part.strip() and 'weights_only' not in part]
    return said[0].splitlines()[0][:200] if said else type(error).__name__
