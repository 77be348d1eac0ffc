"""From a config file and command-line options to a checked config."""

import difflib
import inspect
import logging
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.logging import print_log
from mmengine.runner import Runner

from densekit.engine.config_check import check_types

# Read from the config by mmengine, mmdet, mmseg or densekit although they are no argument of the Runner.
_OTHER_KEYS = {
    'activation_checkpointing',
    'allow_changed',
    'channels_last',
    'compile',
    'custom_imports',
    'data_checks',
    'efficient_conv_bn_eval',
    'find_unused_parameters',
    'model_wrapper_cfg',
    'runner_type',
    'sharding',
    'sync_bn',
    'tta_model',
    'tta_pipeline',
}
# What mmdet and mmseg read before their version 3 and 1, and nothing reads now.
_FORMER = {
    *('checkpoint_config', 'data', 'evaluation', 'log_config', 'lr_config', 'optimizer_config', 'runner'),
    *('total_epochs', 'workflow'),
}
# Variables that configs have of their own, though alike to a name that is read.
_VARIABLES = {'act_cfg', 'conv_cfg', 'norm_cfg'}
_SMALL_SECTIONS = {
    'auto_scale_lr': {'base_batch_size', 'enable'},
    'randomness': {'deterministic', 'diff_rank_seed', 'seed'},
    'sharding': {'activation_checkpointing', 'param_dtype', 'sharded_checkpoints'},
}
_TOP_LEVEL = set(inspect.signature(Runner.__init__).parameters) - {'self', 'cfg'} | _OTHER_KEYS


def load_config(path: str, options: Sequence[str] = ()) -> Config:
    """Reads a config file, applies options and checks every key whose owner is known.

    Args:
        path: a Python config file. It is code, and is executed.
        options: ``key=value`` texts, keys dotted, as in ``model.backbone.drop_path_rate=0.3``.

    Returns:
        The config; ``work_dir`` and ``runner_type`` are set.

    Raises:
        FileNotFoundError: if there is no such file; the message names the nearest.
        ValueError: if a key is misspelt, a text is no option, or the file cannot be run.
    """
    parsed = parse_options(options)
    cfg = _read(path)
    for key in parsed:
        _check_option(cfg, key)
    if any(key.startswith('compile.') for key in parsed) and isinstance(cfg.get('compile'), bool):
        cfg.compile = {}  # options of compiling are a wish to compile, as they are where a config says nothing of it
    try:
        cfg.merge_from_dict(parsed)
    except (KeyError, IndexError, TypeError, AssertionError) as error:
        raise ValueError(f'--cfg-options cannot be applied: {error}') from error
    if cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs', Path(path).stem))
    cfg.setdefault('runner_type', 'DensekitRunner')
    _check_top_level(cfg)
    check_types(cfg)
    return cfg


def parse_options(options: Iterable[str]) -> dict[str, Any]:
    """Turns ``['a.b=1', 'c=[2,3]']`` into ``{'a.b': 1, 'c': [2, 3]}``.

    Raises:
        ValueError: if a text has no ``=``.
    """
    parsed = {}
    for option in options:
        key, equals, value = option.partition('=')
        if not equals or not key:
            raise ValueError(f'--cfg-options {option!r} is no key=value, such as train_dataloader.batch_size=4')
        parsed[key] = DictAction._parse_iterable(value)
    return parsed


def set_amp(cfg: Config, amp: str) -> None:
    """Chooses the precision of training.

    Args:
        cfg: changed in place.
        amp: 'bf16', 'fp16' (with mmengine's loss scaler, on a GPU) or 'off' (float32).

    Raises:
        ValueError: if it is none of these, or fp16 without a GPU.
    """
    if amp == 'fp16' and not torch.cuda.is_available():
        raise ValueError('--amp fp16 needs a GPU, which its loss scaler runs on; choose bf16 or off')
    wrapper = cfg.optim_wrapper
    for key in ('type', 'dtype', 'loss_scale'):
        wrapper.pop(key, None)
    if amp == 'bf16':
        wrapper.type = 'AutocastOptimWrapper'
    elif amp == 'fp16':
        wrapper.update(type='AmpOptimWrapper', dtype='float16', loss_scale='dynamic')
    elif amp == 'off':
        wrapper.type = 'OptimWrapper'
    else:
        raise ValueError(f'--amp {amp}: choose bf16, fp16 or off')


def closest(word: str, words: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The word most like ``word``, or None if none is."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=cutoff)
    return found[0] if found else None


def _read(path: str) -> Config:
    if not Path(path).is_file():
        raise FileNotFoundError(f'config {path} does not exist.{_nearest_config(path)}')
    if not path.endswith('.py'):
        raise ValueError(f'config {path} is no .py file; give one of configs/detection or configs/segmentation')
    try:
        cfg = Config.fromfile(path)
    except Exception as error:  # the file is code, and may raise anything
        raise ValueError(f'config {path} cannot be read: {_what_and_where(error)}') from error
    if 'model' not in cfg or ('test_dataloader' not in cfg and 'train_dataloader' not in cfg):
        raise ValueError(
            f'config {path} is a part of recipes, without a model or without data; give a file of configs/detection or '
            'configs/segmentation'
        )
    return cfg


def _what_and_where(error: Exception) -> str:
    if isinstance(error, SyntaxError):  # mmengine parses without telling Python the file
        text = (error.text or '').strip()
        return f'it, or a file in its _base_, has a mistake in line {error.lineno}: {error.msg}: {text}'
    if isinstance(error, FileNotFoundError) and error.filename:
        return f'{error.filename}, which it names, does not exist'
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f'{last.filename}, line {last.lineno}: {type(error).__name__}: {error}'


def _check_top_level(cfg: Config) -> None:
    """Refuses a name that is nearly one of mmengine's: nothing would read it, and nothing would say so."""
    for key in cfg:
        if key in _FORMER:
            print_log(f'{key} is of mmdet 2 or mmseg 0; nothing reads it', logger='current', level=logging.WARNING)
        if key in _TOP_LEVEL | _FORMER | _VARIABLES or 'pipeline' in key:
            continue
        nearest = closest(key, _TOP_LEVEL, cutoff=0.8)
        if nearest and key != f'{nearest}s':  # a list of several, such as models
            raise ValueError(f'the config has {key}, which nothing reads. Did you mean {nearest}?')
    for section, known in _SMALL_SECTIONS.items():
        unknown = sorted(set(cfg.get(section) or {}) - known)
        if unknown:
            raise ValueError(f'{section} has {", ".join(unknown)}; allowed are {", ".join(sorted(known))}')


def _nearest_config(path: str) -> str:
    folder = Path(path).parent
    configs = {p.name: p for p in folder.glob('*.py')} if folder.is_dir() else {}
    configs = configs or {p.name: p for p in Path('configs').glob('*/*.py') if p.parent.name != '_base_'}
    if not configs:
        return ' Configs lie in configs/detection and configs/segmentation of the densekit checkout.'
    nearest = closest(Path(path).name, configs, cutoff=0.0)
    return f' Did you mean {configs[nearest]}?' if nearest else ''


def _places(cfg: Config, name: str) -> list[str]:
    """Where a variable of the file is read under its own name, in what mmengine reads; at most three."""
    places: list[str] = []

    def walk(node: Any, path: str) -> None:
        if isinstance(node, Mapping):
            for key, value in node.items():
                if key == name:
                    places.append(f'{path}.{key}')
                walk(value, f'{path}.{key}')
        elif isinstance(node, list | tuple):
            for i, item in enumerate(node):
                walk(item, f'{path}.{i}')

    for section in cfg:
        if section in _TOP_LEVEL:
            walk(cfg[section], section)
    return places[:3]


def _check_option(cfg: Config, key: str) -> None:
    """Refuses an option that names nothing: merging would add it silently."""
    node: Any = cfg
    path = key.split('.')
    if path[0] in cfg and path[0] not in _TOP_LEVEL:
        places = _places(cfg, path[0])
        there = f'; set {" and ".join(places)}' if places else ''
        raise ValueError(
            f'--cfg-options {key}: {path[0]} is a variable of the config file, whose value is in place already{there}'
        )
    for depth, part in enumerate(path):
        if isinstance(node, list | tuple):
            if not part.isdigit() or int(part) >= len(node):
                raise ValueError(f'--cfg-options {key}: {".".join(path[:depth])} is a list of {len(node)} entries')
            node = node[int(part)]
            continue
        if not hasattr(node, 'keys'):
            return  # a value becomes a dictionary; the type check that follows judges it
        if part not in node:
            allowed = set(node) | (_TOP_LEVEL if depth == 0 else set())
            if part in allowed or 'type' in node:
                return  # new but known, or judged by the type check
            nearest = closest(part, allowed)
            if depth == 0 or nearest:
                hint = f' Did you mean {nearest}?' if nearest else ''
                raise ValueError(f'--cfg-options {key}: the config has no {".".join(path[: depth + 1])}.{hint}')
            return
        node = node[part]
