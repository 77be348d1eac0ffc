"""Weights from files into a backbone: read safely, rename, and load all of them or fail.

mmengine's ``Pretrained`` initializer loads with ``strict=False``: weights under other names, or in an official
``{'model': ...}`` file, leave the network at random values with no more than a warning. Here every parameter is
accounted for, or loading raises.
"""

import hashlib
import importlib
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import print_log
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.model.weight_init import update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from safetensors.torch import load_file
from torch import Tensor, nn

Renaming = tuple[tuple[str, str | None], ...]

# One table for each naming: a pattern for the whole key, and our name for it (None: dropped on purpose).
# The first match counts; a key that matches nothing is an error.
_OWN: Renaming = (
    (r'(downsample_layers\.\d\.\d\.(?:weight|bias))', r'\1'),
    (r'(stages\.\d\.\d+\.(?:dwconv|norm|pwconv1|pwconv2)\.(?:weight|bias))', r'\1'),
    (r'(stages\.\d\.\d+\.gamma)', r'\1'),
    (r'(stages\.\d\.\d+\.grn\.(?:gamma|beta))', r'\1'),
    (r'(norm[0-3]\.(?:weight|bias))', r'\1'),
)
_HEAD: Renaming = ((r'(?:norm|head)\.(?:weight|bias)', None),)  # the classifier and the norm before it

FORMATS: dict[str, tuple[str, Renaming]] = {
    # source: (a pattern that one of its keys has and no other source's keys have, its names)
    'openmmlab': (
        r'stages\.\d\.\d+\.depthwise_conv\.weight',
        (
            (r'(stages\.\d\.\d+)\.depthwise_conv\.(weight|bias)', r'\1.dwconv.\2'),
            (r'(stages\.\d\.\d+)\.pointwise_conv([12])\.(weight|bias)', r'\1.pwconv\2.\3'),
            *_OWN,
            (r'head\.fc\.(?:weight|bias)', None),
            *_HEAD,
        ),
    ),
    'official': (r'stages\.\d\.\d+\.dwconv\.weight', _OWN + _HEAD),
}


def _statistic_of_history(owner: Any, name: Any) -> Any:
    """Stands for ``getattr`` while reading: mmengine's loss histories name their statistics so, nothing else may."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise pickle.UnpicklingError(f'WeightsUnpickler error: getattr of {name!r} is not allowed')
    return getattr(owner, name)


_MULTIARRAY = importlib.import_module('numpy._core.multiarray' if find_spec('numpy._core') else 'numpy.core.multiarray')

# What mmengine's own checkpoints hold besides tensors and plain Python: loss histories as NumPy arrays. None of these
# can run code of the file. Files written under NumPy 1 name the same functions numpy.core instead of numpy._core.
_SAFE_GLOBALS: list[Any] = [
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


@dataclass
class LoadReport:
    """What became of every key of a checkpoint and of every parameter of the backbone."""

    source: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f'{len(self.loaded)} tensors loaded ({self.source} names, {len(self.reshaped)} of them reshaped)']
        for what, keys in (
            ('left at their initial values', self.missing),
            ('of another shape (file, model)', self.misshapen),
            ('not known to the backbone', self.unexpected),
            ('left out on purpose', self.dropped),
        ):
            if keys:
                parts.append(f'{what}: {_some(keys)}')
        return '; '.join(parts)


def read_checkpoint(checkpoint: str | os.PathLike[str], map_location: Any = 'cpu') -> dict[str, Any]:
    """Reads a checkpoint file without executing anything in it.

    Args:
        checkpoint: a ``.pth`` (or ``.safetensors``) file, or an ``https://`` address of one, which is downloaded once
            into torch's cache.
        map_location: device of the tensors.

    Returns:
        The dictionary in the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, holds Python objects other than tensors and plain data, or is no dictionary.
    """
    name = str(checkpoint)
    path = _local_file(name)
    try:
        if path.suffix == '.safetensors':
            return load_file(path, device=str(map_location))
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            content = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f'checkpoint {name} is not read: it is no PyTorch file, or holds Python objects that could run code. Only '
            f'tensors and plain data are accepted. If you trust it, load it yourself and save its state_dict alone. '
            f'({_first_line(error)})'
        ) from error
    except (MemoryError, PermissionError, torch.OutOfMemoryError):
        raise  # nothing is wrong with the file
    except Exception as error:  # a damaged file fails wherever its bytes happen to lead: IndexError, TypeError, ...
        copy = f' Its copy is {path}.' if '://' in name else ''
        raise ValueError(
            f'checkpoint {name} cannot be read ({path.stat().st_size:,} bytes): it is no PyTorch file, truncated or '
            f'damaged. Delete it and copy or download it again.{copy} ({_first_line(error)})'
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f'checkpoint {name} holds a {type(content).__name__}; expected a dictionary of tensors')
    return content


def state_dict_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights in a checkpoint's dictionary, out of ``{'model': ...}`` or ``{'state_dict': ...}``.

    Raises:
        ValueError: if there are no tensors where they are expected.
    """
    for key in ('state_dict', 'model'):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = {str(key).removeprefix('module.'): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(
            f"no weights found: the file's top-level keys are {_some(content)}; expected tensors there, "
            "or below 'model' or 'state_dict'"
        )
    return tensors


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor | None], str]:
    """Renames the weights of another project's ConvNeXt to ours.

    Weights of a whole detector or segmentor are accepted: when names begin with ``backbone.``, that part is taken.

    Args:
        state_dict: names and tensors, as in the file.

    Returns:
        Our names with their tensors (``None`` under the original name where a tensor is dropped on purpose), and the
        name of the source.

    Raises:
        ValueError: if the naming is not known, or a key does not belong to it.
    """
    parts = {key.removeprefix('backbone.'): value for key, value in state_dict.items() if key.startswith('backbone.')}
    inner = parts or dict(state_dict)
    outside = [key for key in state_dict if parts and not key.startswith('backbone.')]  # neck and heads
    for source, (signature, table) in FORMATS.items():
        if not any(re.fullmatch(signature, key) for key in inner):
            continue
        converted: dict[str, Tensor | None] = dict.fromkeys(outside)
        unknown = []
        for key, value in inner.items():
            known, name = _rename(key, table)
            if not known:
                unknown.append(key)
            elif name is None:
                converted[key] = None
            else:
                converted[name] = value
        if unknown:
            raise ValueError(f'the weights look like {source} ConvNeXt, but have other keys as well: {_some(unknown)}')
        return converted, source
    raise ValueError(
        f'these are not the weights of a ConvNeXt known here ({", ".join(FORMATS)} names). The first keys are '
        f'{_some(state_dict)}; where the backbone lies deeper, give its prefix.'
    )


def load_pretrained(
    backbone: nn.Module,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    *,
    prefix: str = '',
    strict: bool = True,
) -> LoadReport:
    """Loads weights into a backbone, all of them or none.

    The only parameters that may stay at their initial values are the per-stage output norms, and those only where the
    weights are a classifier's, which has none.

    Args:
        backbone: such as :class:`backbones.ConvNeXt`.
        checkpoint: a file, an ``https://`` address, or a dictionary already read.
        prefix: take only the keys that begin so, without it (``'backbone.'`` for a trained detector).
        strict: raise where weights do not fit. Otherwise what fits is loaded and the report says what did not; names
            that belong to no known ConvNeXt are an error in any case.

    Returns:
        What was loaded, missing, unexpected, misshapen, reshaped, and left out on purpose.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if keys or shapes do not fit; the message lists them. The backbone is unchanged then.
    """
    name = 'the given dictionary' if isinstance(checkpoint, Mapping) else str(checkpoint)
    content = checkpoint if isinstance(checkpoint, Mapping) else read_checkpoint(checkpoint)
    try:
        weights = _with_prefix(state_dict_of(content), prefix)
        converted, source = convert_state_dict(weights)
    except ValueError as error:
        raise ValueError(f'checkpoint {name}: {error}') from error

    own = backbone.state_dict()
    report = LoadReport(source)
    fitting: dict[str, Tensor] = {}
    for key, value in converted.items():
        if value is None or (key not in own and re.match(r'norm\d\.', key)):  # norms of stages that are not emitted
            report.dropped.append(key)
        elif key not in own:
            report.unexpected.append(key)
        elif _squeezed(value) != _squeezed(own[key]):
            report.misshapen.append(f'{key} {tuple(value.shape)} for {tuple(own[key].shape)}')
        else:
            if value.shape != own[key].shape:
                report.reshaped.append(key)
            fitting[key] = value.reshape(own[key].shape)
    report.loaded = list(fitting)
    report.missing = [key for key in own if key not in fitting]
    # A classifier has at most the last of these norms (OpenMMLab's files name it norm3), a detector has all.
    from_classifier = not any(re.match(r'norm[0-2]\.', key) for key in converted)
    lacking = [key for key in report.missing if not (from_classifier and re.match(r'norm\d\.', key))]
    if strict and (lacking or report.unexpected or report.misshapen):
        raise ValueError(_refusal(name, backbone, report, lacking))
    backbone.load_state_dict(fitting, strict=False)
    return report


@WEIGHT_INITIALIZERS.register_module()
class PretrainedBackbone:
    """Initializer for ``init_cfg``: :func:`load_pretrained`, with one line on what it loaded.

    Args:
        checkpoint: a file or an ``https://`` address.
        prefix: take only the keys that begin so, such as ``'backbone.'``.
        map_location: accepted because mmengine's ``Pretrained`` has it; weights are read on the CPU.
    """

    def __init__(self, checkpoint: str, prefix: str | None = None, map_location: Any = 'cpu') -> None:
        self.checkpoint = checkpoint
        self.prefix = prefix or ''

    def __call__(self, module: nn.Module) -> None:
        """Loads the weights into ``module``; raises on every rank if they do not fit."""
        report = load_pretrained(module, self.checkpoint, prefix=self.prefix)
        if hasattr(module, '_params_init_info'):  # mmengine's record of where each value comes from
            update_init_info(module, init_info=f'{type(self).__name__}: loaded from {self.checkpoint}')
        print_log(f'{type(module).__name__} initialized from {self.checkpoint}: {report}', logger='current')


def _local_file(name: str) -> Path:
    """The file itself, or torch's cached copy of an https address (downloaded under another name, then renamed)."""
    if '://' not in name:
        if not Path(name).is_file():
            raise FileNotFoundError(f'checkpoint {name} does not exist; give the path of a .pth or .safetensors file')
        return Path(name)
    if not name.startswith('https://'):
        raise ValueError(f'checkpoint {name}: only https:// addresses and files are read')
    # Other hosts have files of the same name; the folder keeps them apart.
    host = hashlib.sha256(name.rpartition('/')[0].encode()).hexdigest()[:8]
    cached = Path(torch.hub.get_dir(), 'checkpoints', host, name.split('?')[0].rsplit('/', 1)[-1])
    if not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(name, str(cached), progress=False)
        except OSError as error:
            raise ValueError(
                f'checkpoint {name} cannot be downloaded ({error}). Put the file at {cached}, or give its path.'
            ) from error
    return cached


def _with_prefix(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    if not prefix:
        return weights
    prefix = prefix.rstrip('.') + '.'
    part = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    if not part:
        raise ValueError(
            f'no key begins with the prefix {prefix!r}. The first keys are {_some(weights)}; '
            'leave the prefix out for weights of a classifier or a whole detector.'
        )
    return part


def _rename(key: str, table: Renaming) -> tuple[bool, str | None]:
    for pattern, name in table:
        match = re.fullmatch(pattern, key)
        if match:
            return True, None if name is None else match.expand(name)
    return False, None


def _squeezed(tensor: Tensor) -> tuple[int, ...]:
    """The shape without ones, in which a 1x1 convolution equals a Linear layer and (1, 1, 1, C) equals (C,)."""
    return tuple(size for size in tensor.shape if size != 1)


def _refusal(name: str, backbone: nn.Module, report: LoadReport, lacking: list[str]) -> str:
    lines = [f'checkpoint {name} ({report.source} names) does not fit this {type(backbone).__name__}.']
    for what, keys in (
        ('of another shape (file, model)', report.misshapen),
        ('missing in the file', lacking),
        ('unknown to the model', report.unexpected),
    ):
        if keys:
            lines.append(f'  {len(keys)} {what}: {_some(keys)}')
    lines.append('Nothing was loaded. Give the arch, use_grn and layer scale of these weights, or other weights.')
    return '\n'.join(lines)


def _some(keys: Iterable[str], limit: int = 5) -> str:
    names = [str(key) for key in keys]
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(names[:limit]) + more


def _first_line(error: BaseException) -> str:
    """What went wrong, without torch's advice to read the file unsafely."""
    reason = str(error).split('WeightsUnpickler error:')[-1].split('Please use')[0].strip()
    return (reason.splitlines() or [type(error).__name__])[0][:200]
