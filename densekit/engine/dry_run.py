"""All that a training is going to do, in tables, without a step of it; and what in it contradicts itself.

A run that cannot start (wrong config, weights that do not fit, data that is not there, heads and data of different
numbers of classes, validation without an evaluator) is an error, as in training. Inconsistencies are those with which
it would start and go wrong:

- no parameter is trainable, or a trainable one is in no group of the optimizer, or backbone, neck and dense heads
  compute nothing from it;
- a scheduler counts epochs where training counts iterations, begins or ends after the end of training (so a warm-up
  longer than training), or has a milestone that is not reached; or all but the warm-up end before training does;
- an epoch-based loop draws from an endless sampler, or an epoch has no iteration;
- checkpoints are counted in epochs where training counts iterations;
- validation begins after the end of training;
- a data set is without images;
- training and validation name other classes.

A learning rate for another global batch is none: it is said in a line, with the option that scales it.
"""

import logging
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.runner import BaseLoop, EpochBasedTrainLoop
from torch import nn

from backbones.files import some
from densekit.engine.amp import AutocastOptimWrapper
from densekit.engine.runner import DensekitRunner, accumulated_batches
from densekit.engine.sharding import is_sharded
from densekit.report.image_size import Size, padded, training_size
from densekit.report.memory import Activations, activations, gradient_bytes, state_bytes, weight_bytes
from densekit.report.model_tables import groups_table, parts_table, ungrouped
from densekit.report.schedule import Schedule, Training, schedule_table
from densekit.report.tables import format_table

_NAMES_WIDTH = 60
_PRECISIONS = {torch.float32: 'float32', torch.bfloat16: 'bf16', torch.float16: 'fp16'}


def rehearse(runner: DensekitRunner) -> list[str]:
    """Builds and checks all that training needs and logs what it is, the parts that need no data first.

    Args:
        runner: a fresh one. Afterwards its learning rates are those of the run; its weights are initialized.

    Returns:
        The inconsistencies, one sentence each.

    Raises:
        FileNotFoundError: as :meth:`DensekitRunner.prepare`.
        ValueError: as :meth:`DensekitRunner.prepare`.
    """
    runner.prepare_model('train', 'val')
    problems = _told(_show_model(runner))
    _show_optimizer(runner)
    try:
        runner.prepare_data('train', 'val')
    finally:  # without the data, in epochs
        problems += _told(_show_schedule(runner))
        problems += _told(_show_memory(runner))
    problems += _told(_show_data(runner))
    if not problems:
        print_log('Model, weights and data are in order; this is a dry run and ends here.', logger='current')
    return problems


def _told(problems: list[str]) -> list[str]:
    for problem in problems:
        print_log(f'inconsistent: {problem}', logger='current', level=logging.ERROR)
    return problems


def _show_model(runner: DensekitRunner) -> list[str]:
    model, optimizer = runner.bare_model(), runner.optim_wrapper.optimizer
    lines = [
        parts_table(model),
        f'precision: {_precision(runner.optim_wrapper)}',
        f'batch norms: {_batch_norms(runner, model)}',
        f'starting weights: {_starting_weights(runner, model)}',
    ]
    _show(f'Model: {type(model).__name__}', *lines)
    problems = []
    if not any(parameter.requires_grad for parameter in model.parameters()):
        problems.append('no parameter of the model is trainable')
    if names := ungrouped(model, optimizer):
        problems.append(f'{len(names)} trainable parameters are in no group of the optimizer: {some(names)}')
    return problems


def _show_optimizer(runner: DensekitRunner) -> None:
    wrapper, auto = runner.optim_wrapper, runner.auto_scale_lr or {}
    batch, recipe = runner.global_batch(wrapper), auto.get('base_batch_size')
    header = ['per process', 'processes', 'accumulated', 'global', 'of the recipe']
    row = [runner.batch_size(), runner.world_size, accumulated_batches(wrapper), batch, recipe or 'not given']
    _show('Batch, in images', format_table(header, [row], align='>>>>>'), _scaling(runner, batch, recipe))

    runner.scale_lr(wrapper, runner.auto_scale_lr)  # as training does first of all
    base_lr = wrapper.optimizer.defaults['lr'] * (
        batch / recipe if recipe and auto.get('enable') and not runner._resume else 1
    )
    table = groups_table(runner.bare_model(), wrapper.optimizer, base_lr)
    _show(f'Optimizer: {type(wrapper.optimizer).__name__}', table)


def _show_schedule(runner: DensekitRunner) -> list[str]:
    training, cfg = _training(runner), runner.cfg.train_cfg
    rows = [] if training.epoch_length is None else [training.row('epoch', 1, True)]
    rows.append(training.row('training', training.length, training.by_epoch))
    if runner.cfg.get('val_cfg') is not None:
        interval = cfg.get('val_interval', 1 if training.by_epoch else 1000)  # mmengine's
        rows.append(training.row('validation, every', interval, training.by_epoch))
    for hook in _checkpoint_hooks(runner):
        rows.append(training.row('checkpoint, every', hook.interval, hook.by_epoch))
    _show('Schedule', format_table(['', 'iterations', 'epochs'], rows, align='<>>'))

    configs = runner.cfg.get('param_scheduler') or []
    lr = max(group['lr'] for group in runner.optim_wrapper.optimizer.param_groups)
    schedule = Schedule([configs] if isinstance(configs, Mapping) else configs, lr, training)
    if configs:
        _show('Learning rate of the group that has the highest', schedule_table(schedule.changes(), training))
    else:
        _show(f'Learning rate: constant, {lr:.4g}')
    return schedule.problems() + _loop_problems(runner, training)


def _loop_problems(runner: DensekitRunner, training: Training) -> list[str]:
    problems = []
    begin = runner.cfg.train_cfg.get('val_begin', 1)
    if runner.cfg.get('val_cfg') is not None and begin > training.length:
        problems.append(f'validation begins at {begin:,}, and training ends at {training.length:,}')
    if training.by_epoch and 'Infinite' in str((runner.cfg.train_dataloader.get('sampler') or {}).get('type')):
        problems.append('training counts epochs and draws from an endless sampler: its first epoch never ends')
    if not training.by_epoch and any(hook.by_epoch for hook in _checkpoint_hooks(runner)):
        problems.append('checkpoints are counted in epochs, and training counts iterations: only the last is saved')
    return problems


def _show_memory(runner: DensekitRunner) -> list[str]:
    model, optimizer = runner.bare_model(), runner.optim_wrapper.optimizer
    sizes = {
        'weights': (weight_bytes(model), 'parameters and buffers'),
        'gradients': (gradient_bytes(model), 'of trainable parameters'),
        'optimizer state': (state_bytes(optimizer), type(optimizer).__name__),
    }
    if is_sharded(model):
        sizes = {
            name: (size // runner.world_size, f'{what}, cut among processes') for name, (size, what) in sizes.items()
        }
    elif runner.distributed:
        sizes['gradient buckets'] = gradient_bytes(model), 'of DistributedDataParallel'
    found, remark = _activations(runner)
    if found is not None:
        sizes['activations'] = found.size, remark
    rows = [[name, _mebibytes(count), what] for name, (count, what) in sizes.items()]
    if found is None:
        rows.append(['activations', '-', remark])
    rows.append(['in all', _mebibytes(sum(count for count, _ in sizes.values())), 'at least'])
    left_out = (
        'Left out: heads on proposals or queries, losses, what lives within a step only, workspaces, fragmentation'
    )
    _show('Memory per process, an estimate', format_table(['', 'MiB', ''], rows, align='<><'), left_out)
    if found is None or not found.unreached:
        return []
    return [f'{len(found.unreached)} trainable parameters get no gradient: {some(list(found.unreached))}']


def _show_data(runner: DensekitRunner) -> list[str]:
    problems, rows, folders, classes = [], [], [], {}
    loops = {'train': runner.train_loop} | ({'val': runner.val_loop} if runner.val_loop is not None else {})
    for name, loop in loops.items():
        dataset = loop.dataloader.dataset
        dataset = getattr(dataset, 'inner', dataset)  # what names samples in errors, around the one of the config
        classes[name] = tuple((getattr(dataset, 'metainfo', None) or {}).get('classes') or ())
        names = ', '.join(classes[name])
        names = names if len(names) <= _NAMES_WIDTH else f'{names[: _NAMES_WIDTH - 3]}...'
        rows.append([name, type(dataset).__name__, f'{len(dataset):,}', len(classes[name]) or '-', names])
        folders.append(f'{name}: {", ".join(_folders(dataset)) or "no folder"}')
        if len(dataset) == 0:
            problems.append(f'the {name} data set has no image left to use')
    if isinstance(runner.train_loop, EpochBasedTrainLoop) and len(runner.train_loop.dataloader) == 0:
        problems.append('an epoch has no iteration: the train data set has fewer images than a batch')
    if 'val' in classes and all(classes.values()) and classes['train'] != classes['val']:
        here, there = next(pair for pair in zip_longest(classes['train'], classes['val']) if pair[0] != pair[1])
        problems.append(f'the classes of the train and val data sets differ, first {here} and {there}')
    _show('Data', format_table(['', 'type', 'images', 'classes', 'names'], rows, align='<<>><'), *folders)
    return problems


def _training(runner: DensekitRunner) -> Training:
    cfg = runner.cfg.train_cfg
    by_epoch = 'max_epochs' in cfg
    epoch_length = None
    if isinstance(runner._train_loop, BaseLoop):
        loader = runner._train_loop.dataloader
        # An endless sampler calls itself as long as the data set in every process.
        images = runner.batch_size() * runner.world_size
        epoch_length = len(loader) if by_epoch else -(-len(loader.dataset) // images)
    return Training(by_epoch, cfg['max_epochs' if by_epoch else 'max_iters'], epoch_length)


def _checkpoint_hooks(runner: DensekitRunner) -> list[CheckpointHook]:
    return [hook for hook in runner.hooks if isinstance(hook, CheckpointHook) and hook.interval > 0]


def _image_size(runner: DensekitRunner) -> Size | None:
    """The largest image of training by the config, or else that of the first in the data."""
    loader, model = runner.cfg.get('train_dataloader') or {}, runner.cfg.get('model')
    preprocessor = model.get('data_preprocessor') if isinstance(model, Mapping) else None
    dataset = loader.get('dataset')
    size = training_size(dataset, preprocessor) if isinstance(dataset, Mapping) else None
    if size is not None or not isinstance(runner._train_loop, BaseLoop):
        return size
    built = runner._train_loop.dataloader.dataset
    info = built.get_data_info(0) if hasattr(built, 'get_data_info') and len(built) else {}
    return padded((info['height'], info['width']), preprocessor) if 'height' in info else None


def _activations(runner: DensekitRunner) -> tuple[Activations | None, str]:
    """What is kept for backward, and in words of what, or why it is not known."""
    batch, dtype = runner.batch_size(), _dtype(runner.optim_wrapper)
    if is_sharded(runner.bare_model()):
        return None, 'not estimated for a sharded model: see a dry run without --shard'
    try:
        size = _image_size(runner)
        if size is None:
            return None, 'not estimated: the config does not say how large images are'
        found = activations(runner.bare_model(), batch, size, dtype)
    except Exception as error:  # a user's own model may fail in any way without real tensors
        said = str(error).partition('\n')[0]
        return None, f'not estimated: {type(error).__name__}: {said}'[:90]
    where = f'{batch} x 3 x {size[0]} x {size[1]}, {_PRECISIONS[dtype]}'
    unheeded = ', activation_checkpointing not heeded' if runner.cfg.get('activation_checkpointing') else ''
    return found, f'about; kept for backward by {", ".join(found.parts)}: {where}{unheeded}'


def _precision(wrapper: OptimWrapper) -> str:
    dtype = _dtype(wrapper)
    return 'float32' if dtype == torch.float32 else f'{_PRECISIONS[dtype]} autocast ({type(wrapper).__name__})'


def _dtype(wrapper: OptimWrapper) -> torch.dtype:
    if isinstance(wrapper, AutocastOptimWrapper):
        return torch.bfloat16
    return (wrapper.cast_dtype or torch.float16) if isinstance(wrapper, AmpOptimWrapper) else torch.float32


def _batch_norms(runner: DensekitRunner, model: nn.Module) -> str:
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    synchronized = sum(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    counts = {'SyncBN': synchronized, 'BN': len(norms) - synchronized}
    said = ', '.join(f'{count} {name}' for name, count in counts.items() if count) or 'none'
    if counts['BN'] and not synchronized and "'SyncBN'" in str(runner.cfg.get('model')):
        said += '; the config has SyncBN, which needs several processes with CUDA'
    return said


def _starting_weights(runner: DensekitRunner, model: nn.Module) -> str:
    if runner._load_from is not None:
        return f'{runner._load_from} ({"goes on from it" if runner._resume else "load_from: the whole model"})'
    pretrained = [
        f'{name or "model"} from {module.init_cfg["checkpoint"]}'
        for name, module in model.named_modules()
        if isinstance(getattr(module, 'init_cfg', None), Mapping) and module.init_cfg.get('type') == 'Pretrained'
    ]
    return f'{", ".join(pretrained)}; all else at random' if pretrained else 'at random'


def _scaling(runner: DensekitRunner, batch: int, recipe: int | None) -> str:
    if not recipe or batch == recipe:
        return 'learning rate: as in the config'
    if (runner.auto_scale_lr or {}).get('enable'):
        return f'learning rate: multiplied by {batch / recipe:.3g} (auto_scale_lr)'
    return (
        f'learning rate: as in the config; the linear rule multiplies it by {batch / recipe:.3g} '
        '(--cfg-options auto_scale_lr.enable=True)'
    )


def _folders(dataset: Any) -> list[str]:
    """Where the images of a data set lie, those inside of wrappers included; each folder once."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    if inner[0] is not None:
        return list(dict.fromkeys(folder for part in inner for folder in _folders(part)))
    prefixes = getattr(dataset, 'data_prefix', None) or {}
    return [str(folder) for folder in prefixes.values() if folder]


def _mebibytes(count: int) -> str:
    return f'{count / 2**20:,.1f}'


def _show(title: str, *lines: str) -> None:
    print_log('\n'.join([title, *lines]), logger='current')
