"""What ``tools/weights.py`` does: list, show, fetch and convert published weights, merge sharded checkpoints."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file

from backbones.checkpoint import with_prefix
from backbones.files import local_copy, local_file, read_checkpoint, some, state_dict_of
from backbones.formats import convert_state_dict
from backbones.zoo import ZOO, Weights, nearest
from densekit import __version__
from densekit.cli import check_writable
from densekit.report.tables import format_table


def table(pattern: str | None = None) -> str:
    """The catalogue as a table, in its order.

    Args:
        pattern: a part of the names to list, with ``*`` and ``?`` as in a shell.

    Raises:
        ValueError: if no name has such a part.
    """
    found = [weights for weights in ZOO.values() if fnmatch(weights.name, f'*{pattern or ""}*'.lower())]
    if not found:
        raise ValueError(
            f'no name of the catalogue has {pattern!r} in it.{_hint(str(pattern))} '
            f'`python tools/weights.py list` shows all {len(ZOO)}.'
        )
    rows = [
        (
            weights.name,
            weights.pretraining,
            weights.resolution,
            f'{weights.parameters / 1e6:.1f}',
            '-' if weights.top1 is None else f'{weights.top1:.1f}',
            weights.license.removesuffix('-license').replace('noncommercial', 'nc'),
        )
        for weights in found
    ]
    header = ('name', 'pretraining', 'px', 'M', 'top-1', 'license')
    return (
        f'{format_table(header, rows)}\n\n{len(found)} of {len(ZOO)}. px: resolution of the last training. '
        'M: parameters of the backbone, in millions. LAION-A: LAION-Aesthetic.\n'
        'top-1: ImageNet-1k, as published. 1k, 12k, 22k: ImageNet.'
    )


def describe(name: str) -> str:
    """All that is known of some weights, the lines of a config that use them, and where a copy may lie.

    Raises:
        ValueError: if the catalogue does not have the name.
    """
    weights = _find(name)
    copy = local_copy(weights)
    facts = {
        'pretraining': weights.pretraining,
        'resolution': f'{weights.resolution} px',
        'parameters': f'{weights.parameters:,} (backbone without its output norms or pyramid)',
        'top-1': 'not recorded' if weights.top1 is None else f'{weights.top1} % on ImageNet-1k',
        'license': weights.license,
        'address': weights.address,
        'sha256': weights.sha256 or 'not known',
        'local copy': copy or 'none',
    }
    init_cfg = dict(type='Pretrained', checkpoint=weights.name)
    mean, std = map(list, weights.normalization)
    folder = os.environ.get('DENSEKIT_WEIGHTS')
    where = f'{folder} (DENSEKIT_WEIGHTS)' if folder else 'a folder, name that in DENSEKIT_WEIGHTS,'
    return '\n'.join(
        [
            weights.name,
            *(f'  {key:<12} {value}' for key, value in facts.items()),
            '',
            'In a config:',
            '  backbone=dict(',
            f'      {_arguments(dict(type=weights.model, **weights.kwargs))},',
            f'      {_arguments(dict(init_cfg=init_cfg))}),',
            f'  data_preprocessor=dict({_arguments(dict(mean=mean, std=std))}),',
            '',
            f'Without a connection, put the file into {where} and call it',
            f'  {weights.file}',
        ]
    )


def fetch(names: Sequence[str], *, to: str | None = None) -> Iterator[str]:
    """Downloads weights, unless there is a copy already.

    Args:
        names: in the catalogue. All are checked before the first download.
        to: folder to copy them to, where DENSEKIT_WEIGHTS finds them; made if need be.

    Yields:
        Where each of them lies, and under which license.

    Raises:
        ValueError: if the catalogue lacks a name, the folder cannot be written, or a download fails.
    """
    wanted = [_find(name) for name in names]
    if to is not None:
        check_writable(to, '--to')
        Path(to).mkdir(parents=True, exist_ok=True)
    for weights in wanted:
        path = local_file(weights.name) if to is None else _fetched_to(Path(to), weights)
        yield f'{weights.name}: {path} ({path.stat().st_size / 1e6:.1f} MB), license {weights.license}'
    if to is not None:
        yield f'DENSEKIT_WEIGHTS={to} makes them found there.'


def convert(source: str, out: str, *, prefix: str = '') -> str:
    """Writes the weights of a backbone under our names, as safetensors, whole or not at all.

    Args:
        source: what :func:`backbones.files.local_file` finds.
        out: file to write. Its metadata name the source's format and file, and the version of densekit.
        prefix: take only the keys that begin so.

    Returns:
        What was written, and what was left out.

    Raises:
        FileNotFoundError: if there is no such source.
        ValueError: if the source is not known to be a ConvNeXt's, or ``out`` cannot be written or exists.
    """
    target = _new_file(out, '.safetensors')
    path = local_file(source)
    content = read_checkpoint(path)
    try:
        converted, format_ = convert_state_dict(with_prefix(state_dict_of(content), prefix))
    except ValueError as error:
        raise ValueError(f'checkpoint {source}: {error}') from error
    tensors = {name: value.contiguous() for name, value in converted.items() if value is not None}
    dropped = [name for name, value in converted.items() if value is None]
    metadata = dict(format='pt', source_format=format_, source_file=path.name, densekit_version=__version__)
    if source in ZOO:
        metadata.update(source_name=source, license=ZOO[source].license)
    with _written_whole(target) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    size = sum(value.numel() for value in tensors.values())
    left_out = f'{len(dropped)} tensors left out on purpose: {some(dropped)}' if dropped else 'nothing left out'
    return f'{out}: {len(tensors)} tensors, {size:,} values, from {format_} names; {left_out}'


def merge(folder: str, out: str) -> str:
    """Writes a sharded checkpoint as one ordinary file, whole or not at all.

    Args:
        folder: of the checkpoint.
        out: ``.pth`` file to write, which is then tested, resumed or started from like any other.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it is no whole checkpoint, or ``out`` cannot be written or exists.
    """
    from densekit.engine.sharded_files import merge as merge_parts  # late: the other commands need no engine

    target = _new_file(out, '.pth')
    count = merge_parts(Path(folder), target)
    return f'{out}: {count} tensors put together from {folder} ({target.stat().st_size / 1e6:.1f} MB)'


def _find(name: str) -> Weights:
    if name not in ZOO:
        raise ValueError(
            f'{name!r} is not in the catalogue of weights.{_hint(name)} `python tools/weights.py list` shows all names.'
        )
    return ZOO[name]


def _hint(name: str) -> str:
    near = nearest(name)
    return f' Did you mean {near!r}?' if near else ''


def _fetched_to(folder: Path, weights: Weights) -> Path:
    path = folder / weights.file
    if not path.exists():
        source = local_file(weights.name)
        with _written_whole(path) as temporary:
            shutil.copyfile(source, temporary)
    return path


def _new_file(out: str, suffix: str) -> Path:
    path = Path(out)
    if path.suffix != suffix:
        what = {'.safetensors': 'weights are written as safetensors', '.pth': 'checkpoints are written as .pth'}[suffix]
        raise ValueError(f'{out}: {what}; give a name that ends so: {path.stem}{suffix}')
    if path.exists():
        raise ValueError(f'{out} exists and is not overwritten; delete it or give another name')
    if not path.parent.is_dir():
        raise ValueError(f'{out}: there is no folder {path.parent}; make it or give another one')
    return path


@contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    """A place to write to; what is there at the end is moved to ``path``, after an error nothing is."""
    with TemporaryDirectory(dir=path.parent, prefix='.partial-') as folder:
        temporary, plain = Path(folder, path.name), Path(folder, 'plain')
        yield temporary
        plain.touch()
        shutil.copymode(plain, temporary)  # safetensors writes files that their owner alone can read
        os.replace(temporary, path)


def _arguments(arguments: dict[str, Any]) -> str:
    """Keyword arguments as a config has them."""
    texts = {
        key: f'dict({_arguments(value)})' if isinstance(value, dict) else repr(value)
        for key, value in arguments.items()
    }
    return ', '.join(f'{key}={text}' for key, text in texts.items())
