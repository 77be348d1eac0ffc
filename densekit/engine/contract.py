"""What a run and its resumption must have in common, and what is said when they have not."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

import densekit
from backbones.files import some

# What --allow-changed can name.
PARTS = ('model', 'optim_wrapper', 'param_scheduler', 'classes', 'images', 'seed', 'world_size', 'global_batch')
# What is only pointed out: a longer training, other versions.
_NOTED = ('train_cfg', 'densekit', 'torch')
# Validating more or less often changes no result.
_LENGTH = ('type', 'by_epoch', 'max_epochs', 'max_iters')


def contract_of(runner: Any) -> dict[str, Any]:
    """What a run is, as plain data for its checkpoints.

    Args:
        runner: with its training data and optimizer built.
    """
    dataset = runner.train_loop.dataloader.dataset
    cfg = runner.cfg
    wrapper = cfg.get('optim_wrapper') or {}
    return {
        'model': _plain(_without(cfg.get('model'), 'init_cfg')),
        'optim_wrapper': _plain(wrapper),
        'param_scheduler': _plain(cfg.get('param_scheduler')),
        'train_cfg': {key: value for key, value in _plain(cfg.get('train_cfg') or {}).items() if key in _LENGTH},
        'classes': list((getattr(dataset, 'metainfo', None) or {}).get('classes') or ()),
        'images': len(dataset),
        'seed': runner.seed,
        'world_size': runner.world_size,
        'global_batch': runner.global_batch(runner.optim_wrapper),
        'epoch_length': len(runner.train_loop.dataloader),
        'densekit': densekit.__version__,
        'torch': str(torch.__version__),
    }


def check_contract(
    filename: str, saved: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str] = ()
) -> list[str]:
    """Compares a resumption with the run that it goes on with.

    Args:
        filename: of the checkpoint, for the message.
        saved: the contract in the checkpoint.
        now: that of this run.
        allowed: the parts that may differ, of :data:`PARTS`.

    Returns:
        One sentence for each part that differs and may.

    Raises:
        ValueError: if a part differs that is not allowed to, or ``allowed`` names something else.
    """
    unknown = [name for name in allowed if name not in PARTS]
    if unknown:
        raise ValueError(f'--allow-changed {" ".join(unknown)}: choose from {" ".join(PARTS)}')
    differing = {name: _difference(saved[name], now[name]) for name in PARTS if name in saved}
    found = {name: text for name, text in differing.items() if text}
    forbidden = [name for name in found if name not in allowed]
    if forbidden:
        lines = [f'this run is not the one that {filename} is of:']
        lines += [f'  {name}: {found[name]}' for name in forbidden]
        lines.append(
            'Resume with what that run had, start a new one from its weights (--load-from), or, if the change is '
            f'meant: --allow-changed {" ".join([*allowed, *forbidden])}'
        )
        raise ValueError('\n'.join(lines))
    notes = [f'{name} changed as allowed: {text}' for name, text in found.items()]
    noted = {name: _difference(saved[name], now[name]) for name in _NOTED if name in saved}
    return notes + [f'{name} changed: {text}' for name, text in noted.items() if text]


def _difference(saved: Any, now: Any) -> str:
    """In words what differs, empty if nothing does."""
    if saved == now:
        return ''
    if not isinstance(saved, dict | list) and not isinstance(now, dict | list):
        return f'{saved} there, {now} here'
    before, after = dict(_entries(saved)), dict(_entries(now))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return some((f'{key or "it"} is {before.get(key, "not")} there, {after.get(key, "not")} here' for key in keys), 3)


def _entries(node: Any, name: str = '') -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict | list) and node:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _entries(value, f'{name}.{key}'.lstrip('.'))
    else:
        yield name, node


def _without(node: Any, key: str) -> Any:
    """A copy of a config without one key at any depth: where weights came from does not matter once they are there."""
    if isinstance(node, Mapping):
        return {name: _without(value, key) for name, value in node.items() if name != key}
    if isinstance(node, list | tuple):
        return [_without(value, key) for value in node]
    return node


def _plain(node: Any) -> Any:
    """What a config comes to as JSON, so that a tuple and a list are the same; classes and modules by their names."""
    return json.loads(json.dumps(node, default=lambda value: getattr(value, '__name__', type(value).__name__)))
