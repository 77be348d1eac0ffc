"""All of a run into a checkpoint, and back: what mmengine saves, plus what it takes to go on to the bit."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mmengine
from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop
from torch import Tensor

from densekit.engine import store
from densekit.engine.contract import check_contract, contract_of
from densekit.engine.distributed import average
from densekit.engine.sharding import is_sharded
from densekit.engine.state import (
    early_stopping_state,
    load_early_stopping,
    load_gradients,
    load_histories,
    message_hub_state,
    pending_gradients,
    plain,
)

# Below this key of a checkpoint stands what mmengine does not read.
OURS = 'densekit'


def is_sharded_checkpoint(name: str) -> bool:
    """Whether a checkpoint is a folder of parts, as :mod:`densekit.engine.sharded_files` writes it."""
    return Path(name, store.FOLDER_MANIFEST).is_file()


def run_state(runner: Any, meta: dict[str, Any], param_schedulers: bool = True) -> dict[str, Any]:
    """A checkpoint's content but for weights and optimizer, in mmengine's layout. It reads this itself.

    All of it is tensors and plain data, so that a reader which builds no objects can take it.

    Args:
        runner: in training.
        meta: 'epoch' and 'iter', counted from the beginning of the training.
        param_schedulers: include the schedulers' states.
    """
    hub, histories = message_hub_state(runner.message_hub)
    dataset = runner.train_loop.dataloader.dataset
    content: dict[str, Any] = {
        'meta': {
            **meta,
            'cfg': runner.cfg.pretty_text,
            'seed': runner.seed,
            'experiment_name': runner.experiment_name,
            'time': time.strftime('%Y%m%d_%H%M%S', time.localtime()),
            'mmengine_version': mmengine.__version__,
            'dataset_meta': plain(getattr(dataset, 'metainfo', None)),
        },
        'message_hub': hub,
        OURS: {
            'contract': contract_of(runner),
            'validated_at': runner.validated_at,
            'histories': histories,
            'early_stopping': early_stopping_state(runner.hooks),
        },
    }
    if param_schedulers and runner.param_schedulers is not None:
        schedulers = runner.param_schedulers
        if isinstance(schedulers, dict):
            content['param_schedulers'] = {name: [s.state_dict() for s in group] for name, group in schedulers.items()}
        else:
            content['param_schedulers'] = [scheduler.state_dict() for scheduler in schedulers]
    return content


def settled_gradients(runner: Any) -> dict[str, Tensor]:
    """The gradients of batches that wait for others, the same in all processes; empty right after a step.

    Without sharding processes add up their own until the step. They are averaged here, in place, in a run that goes on
    as well: so it and the one that resumes are the same.
    """
    gradients = pending_gradients(runner.bare_model(), runner.optim_wrapper)
    if not is_sharded(runner.bare_model()):
        average(list(gradients.values()))
    return gradients


def check_run(runner: Any, filename: str, checkpoint: Mapping[str, Any]) -> None:
    """Compares a run, its data built, with the one that it is to go on with.

    Raises:
        ValueError: if they differ in what is not allowed to; see :func:`check_contract`.
    """
    allowed = runner.cfg.get('allow_changed') or ()
    saved = checkpoint.get(OURS, {}).get('contract')
    if saved is None:
        print_log(
            f'{filename} was not written by densekit: whether it is of this run cannot be checked, and going on from '
            'it is not exact to the bit.',
            logger='current',
            level=30,
        )
        return
    for note in check_contract(filename, saved, contract_of(runner), allowed):
        print_log(note, logger='current', level=30)


def restore(runner: Any, checkpoint: Mapping[str, Any]) -> None:
    """Puts a run where a checkpoint left it; weights and optimizer are not touched.

    Args:
        runner: with its training loop and schedulers built.
        checkpoint: the dictionary in the file.
    """
    ours = checkpoint.get(OURS, {})
    _restore_position(runner, checkpoint['meta'], ours.get('contract'))
    runner.validated_at = ours.get('validated_at')
    runner.message_hub.load_state_dict(checkpoint['message_hub'])
    load_histories(runner.message_hub, ours.get('histories', {}))
    load_early_stopping(runner.hooks, ours.get('early_stopping', []))
    if runner.param_schedulers is not None:
        _restore_schedulers(runner.param_schedulers, checkpoint.get('param_schedulers', []))
    load_gradients(runner.bare_model(), ours.get('gradients', {}))


def _restore_schedulers(schedulers: Any, states: Any) -> None:
    pairs = [(schedulers[name], states[name]) for name in schedulers] if isinstance(schedulers, dict) else None
    for group, saved in pairs or [(schedulers, states)]:
        for scheduler, state in zip(group, saved, strict=True):
            scheduler.load_state_dict(state)


def _restore_position(runner: Any, meta: Mapping[str, Any], contract: Mapping[str, Any] | None) -> None:
    """Sets epoch and iteration; where an epoch has another number of them, at the same share of the epoch."""
    loop, epoch = runner.train_loop, meta['epoch']
    loop._epoch, loop._iter = epoch, meta['iter']
    if not isinstance(loop, EpochBasedTrainLoop):
        return
    length, before = len(loop.dataloader), (contract or {}).get('epoch_length')
    if before == length or (before is None and epoch * length <= meta['iter'] <= (epoch + 1) * length):
        return
    share = meta['iter'] / before - epoch if before else 0  # of a run that is not ours, the epoch from its start
    loop._iter = epoch * length + round(min(max(share, 0), 1) * length)
    print_log(
        f'An epoch has {length} iterations, and {before or "another number"} before: iteration {meta["iter"]} becomes '
        f'{loop._iter}. Schedulers that count iterations go on from the step that they had.',
        logger='current',
    )
