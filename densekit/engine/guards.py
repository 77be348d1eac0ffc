"""Stops a run before it steps on numbers that are none, and when it is told to: on all processes at the same step."""

import functools
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from mmengine.hooks import EMAHook, Hook
from mmengine.optim import OptimWrapperDict
from torch import Tensor, nn

from backbones.files import some
from densekit.cli import Interrupted, RunStopped
from densekit.engine.checkpoint_hook import DensekitCheckpointHook

# Under float16, steps in a row that the loss scaler may skip: it halves its scale each time, from 65536 at first.
MOST_SKIPPED = 50

_NORM = 'norm of the gradients'  # a name that no loss has

# Seconds within which a second SIGTERM is the same one: SLURM sends it to torchrun and to its processes, and torchrun
# sends it to them once more.
SAME_SIGNAL = 2.0


class NonFiniteError(RunStopped):
    """A loss or gradient is NaN or infinite; no parameter has been changed by it."""


class FiniteGuard(Hook):
    """Looks at all losses and gradients right before every step, and ends the run if one is not finite.

    Four flags per step are reduced across processes, so that all end at the same step. Under float16, a step that the
    loss scaler skips does not count, unless there is no other for long.

    The host waits for the device once. The losses that mmengine writes down come with the flags; it would wait for each
    of them.
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self._images: list[str] = []
        # Losses and images of the batches whose gradients make up the next step.
        self._batches: deque[tuple[dict[str, Any], list[str]]] = deque(maxlen=1)
        self._handles: list[Any] = []
        self._to_log: dict[str, Any] = {}
        self._norm: tuple[Any, Tensor] | None = None  # of clipped gradients, and the wrapper that clipped
        self._clips: list[Any] = []
        self._runner: Any = None
        self._without_step = 0  # batches
        self.told_to_stop = False  # this process
        self.stopping = False  # all of them, from this step on

    def before_train(self, runner: Any) -> None:
        """Attaches itself to model and optimizer."""
        self._runner = runner
        self._batches = deque(maxlen=getattr(runner.optim_wrapper, '_accumulative_counts', 1))
        model = runner.bare_model()
        if parse := getattr(model, 'parse_losses', None):
            model.parse_losses = functools.partial(self._parse_losses, parse)
        self._clips = [wrapper for wrapper in _wrappers(runner.optim_wrapper) if hasattr(wrapper, 'clip_func')]
        for wrapper in self._clips:
            wrapper.clip_func = functools.partial(self._clip, wrapper, wrapper.clip_func)
        self._handles = [model.register_forward_hook(self._keep_losses)]
        self._handles += [
            optimizer.register_step_pre_hook(self._before_step) for optimizer in _optimizers(runner.optim_wrapper)
        ]

    def after_run(self, runner: Any) -> None:
        """Detaches itself."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            vars(self._runner.bare_model()).pop('parse_losses', None)
            for wrapper in self._clips:
                wrapper.clip_func = wrapper.clip_func.args[1]
        self._handles = []

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Remembers the images."""
        self._images = _images(data_batch)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Ends a run whose steps are all skipped."""
        self._without_step += 1
        if self._norm is not None:  # of a step that the loss scaler skipped
            self._write_norm(self._norm[1])
        wrapper = runner.optim_wrapper
        scaled = hasattr(wrapper, 'loss_scaler')
        if self._batches.maxlen == 1 or wrapper.should_update():
            self._batches.clear()  # a batch that the loss scaler skipped has no part in the next step
        if scaled and self._without_step > MOST_SKIPPED * (self._batches.maxlen or 1):
            raise NonFiniteError(
                f'iteration {runner.iter + 1}: no step of the optimizer for {self._without_step} batches. Under '
                'float16 that means gradients that are NaN or infinite at any scale of the loss. The last checkpoint '
                'is good. bfloat16 has the range for them: --amp bf16, or off.'
            )

    def _keep_losses(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Mapping):
            self._batches.append((_detached(output), self._images))

    def _parse_losses(self, parse: Callable[[Any], tuple[Tensor, dict[str, Any]]], losses: Any) -> Any:
        total, self._to_log = parse(losses)
        return total, self._to_log

    def _clip(self, wrapper: Any, clip: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Clips gradients; mmengine would wait for their norm right away to write it down."""
        norm = clip(*args, **kwargs)
        if norm is not None:
            self._norm = wrapper, norm.full_tensor() if hasattr(norm, 'full_tensor') else norm

    def _write_norm(self, norm: Tensor | None) -> None:
        if norm is not None and self._norm is not None:
            wrapper, self._norm = self._norm[0], None
            wrapper.message_hub.update_scalar(f'train/{wrapper.grad_name}', float(norm))

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        device = next(p.device for group in optimizer.param_groups for p in group['params'])
        # A fused optimizer is called for a step that the loss scaler skips, and does the skipping itself.
        skips: Any = getattr(optimizer, 'found_inf', None)
        flags = [
            _norm_overflows(optimizer),
            _losses_nonfinite(self._batches, device),
            False if skips is None else skips != 0,
        ]
        if self._norm is not None:
            self._to_log[_NORM] = self._norm[1]
        suspect, lost, skipped, stop = agree([*flags, self.told_to_stop], device, self._to_log)
        self._write_norm(self._to_log.pop(_NORM, None))
        self.stopping = self.stopping or stop
        if skipped:
            return
        self._without_step = -1  # this batch is no such
        broken = suspect and agree([_any_nonfinite(optimizer)], device)[0]
        if broken or lost:
            raise NonFiniteError(self._report(optimizer, 'gradient' if broken else 'loss'))

    def _report(self, optimizer: torch.optim.Optimizer, what: str) -> str:
        """What this process knows of it."""
        runner = self._runner
        several = runner.world_size > 1
        lines = [
            f'iteration {runner.iter + 1}{f", process {runner.rank}" if several else ""}: a {what} is NaN or '
            'infinite. The optimizer did not step; the last checkpoint is good.'
        ]
        at_fault = [(losses, images) for losses, images in self._batches if any(_nonfinite(losses))]
        for losses, images in at_fault:
            lines.append(f'  losses of this process: {some(_nonfinite(losses))}')
            lines.append(f'  its images: {some(images, 16)}')
        if several and not at_fault:
            lines.append('  the losses of this process are finite; another process may have the cause')
        names = {id(parameter): name for name, parameter in runner.bare_model().named_parameters()}
        broken = [
            names.get(id(parameter), '?')
            for parameter in _parameters(optimizer)
            if not torch.isfinite(_gradient(parameter)).all()
        ]
        if broken:
            lines.append(f'  gradients: {some(broken)}')
        lines.append(
            'Common causes: the learning rate (linear rule: auto_scale_lr), no warm-up, float16 (--amp bf16 or off), '
            'wrong boxes or labels (python tools/check_data.py CONFIG). optim_wrapper.clip_grad bounds gradients.'
        )
        return '\n'.join(lines)


class StopSignalHook(Hook):
    """On SIGTERM, saves a checkpoint at the end of the step and ends the run with a status of its own.

    Batch systems send it before they take the machine away. A second one, :data:`SAME_SIGNAL` seconds later, ends the
    process at once.

    Args:
        guard: tells the other processes, and is told when all are at the same step.
    """

    priority = 'LOWEST'  # after the checkpoint hook, which may be saving this very step

    def __init__(self, guard: FiniteGuard) -> None:
        self.guard = guard
        self._before: Any = None
        self._told_at = 0.0

    def before_train(self, runner: Any) -> None:
        """Listens to SIGTERM; only a main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._on_signal)

    def after_run(self, runner: Any) -> None:
        """Gives the signal back."""
        self.release()

    def release(self) -> None:
        """Puts the former handler in place again."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Saves and ends, once all processes know of the signal."""
        if self.guard.stopping:
            self._save_and_stop(runner, {'epoch': runner.epoch, 'iter': runner.iter + 1})

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Ends a validation that training would go on after."""
        loader = runner.val_dataloader
        batch_size = getattr(loader.batch_sampler, 'batch_size', None) or loader.batch_size or 1
        everybodys = len(loader.dataset) // runner.world_size // batch_size
        if batch_idx >= everybodys:  # a process may have one more than the others, which then would wait for ever
            return
        device = next(runner.bare_model().parameters()).device
        if agree([self.guard.told_to_stop], device)[0]:
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):
                    hook._swap_ema_parameters()  # the model validates with the averaged weights
            self._save_and_stop(runner, {'epoch': runner.epoch, 'iter': runner.iter})

    def _save_and_stop(self, runner: Any, meta: dict[str, int]) -> None:
        hook = next((hook for hook in runner.hooks if isinstance(hook, DensekitCheckpointHook)), None)
        if hook is None:
            raise Interrupted('stopped by SIGTERM; there is no hook that saves checkpoints, so nothing was saved')
        if runner.saved_at != meta['iter']:
            hook.save_now(runner, meta)
        self.release()
        raise Interrupted(
            f'stopped by SIGTERM after iteration {meta["iter"]}; the checkpoint is in {hook.out_dir}. The same command '
            'with --resume=auto goes on from there.'
        )

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.guard.told_to_stop:
            self._told_at = now
            self.guard.told_to_stop = True
        elif now - self._told_at > SAME_SIGNAL:
            self.release()
            signal.raise_signal(number)


def agree(
    flags: Sequence[bool | Tensor], device: torch.device, numbers: MutableMapping[str, Any] | None = None
) -> list[bool]:
    """Whether any process has raised each of some flags; all get the same answer, at the price of one reduction.

    Args:
        flags: of this process, on the host or on the device.
        device: where processes reduce.
        numbers: tensors of one number each, which come with the answer: copies on the host take their places.
    """
    # Those of the host are filled in on the device: the host would wait for a copy.
    raised = (flag if isinstance(flag, Tensor) else torch.full((), flag, device=device) for flag in flags)
    stacked = torch.stack([flag.to(device, torch.int32) for flag in raised])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(stacked, op=dist.ReduceOp.MAX)
    there = {
        name: value.detach()
        for name, value in (numbers or {}).items()
        if isinstance(value, Tensor) and value.device.type != 'cpu' and value.numel() == 1
    }
    if not there or numbers is None:
        return [bool(flag) for flag in stacked.tolist()]
    exact = torch.float64 if any(value.dtype == torch.float64 for value in there.values()) else torch.float32
    together = torch.cat([part.reshape(-1).to(exact) for part in (stacked, *there.values())]).cpu()
    for (name, value), number in zip(there.items(), together[len(flags) :], strict=True):
        numbers[name] = number.to(value.dtype).reshape(value.shape)
    return [bool(flag) for flag in together[: len(flags)].tolist()]


def _wrappers(optim_wrapper: Any) -> Iterable[Any]:
    return optim_wrapper.values() if isinstance(optim_wrapper, OptimWrapperDict) else [optim_wrapper]


def _optimizers(optim_wrapper: Any) -> Iterator[torch.optim.Optimizer]:
    for wrapper in _wrappers(optim_wrapper):
        yield wrapper.optimizer


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group['params'] if p.grad is not None]


def _gradient(parameter: nn.Parameter) -> Tensor:
    """The values of a parameter's gradient; this process's part of a sharded one."""
    gradient: Any = parameter.grad
    if gradient.is_sparse:
        return gradient.coalesce().values()
    return gradient.to_local() if hasattr(gradient, 'to_local') else gradient


def _norm_overflows(optimizer: torch.optim.Optimizer) -> Tensor | bool:
    """Whether a gradient has no finite norm, which is one pass for all; large ones have none either."""
    gradients = [_gradient(parameter) for parameter in _parameters(optimizer)]
    if not gradients:
        return False
    return ~torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all()


def _any_nonfinite(optimizer: torch.optim.Optimizer) -> bool:
    return any(not bool(torch.isfinite(_gradient(parameter)).all()) for parameter in _parameters(optimizer))


def _losses_nonfinite(batches: Iterable[tuple[Mapping[str, Any], list[str]]], device: torch.device) -> Tensor | bool:
    """Whether a term of the losses that were added up is not finite; other outputs, such as accuracies, may be."""
    terms = [part for losses, _ in batches for name, parts in losses.items() if 'loss' in name for part in parts]
    if not terms:
        return False
    return ~torch.isfinite(torch.cat([term.to(device, torch.float32).flatten() for term in terms])).all()


def _detached(losses: Mapping[str, Any]) -> dict[str, Any]:
    """Losses without the graphs that hang on them."""
    return {
        name: [
            part.detach()
            for part in (value if isinstance(value, list | tuple) else [value])
            if isinstance(part, Tensor)
        ]
        for name, value in losses.items()
    }


def _nonfinite(losses: Mapping[str, Any]) -> Iterator[str]:
    """Losses that are no numbers, as texts."""
    for name, parts in losses.items():
        for value in (part.float().mean().item() for part in parts):
            if value - value != 0:
                yield f'{name} is {value:g}'


def _images(batch: Any) -> list[str]:
    """The files, or numbers, of a batch's images, as far as the data samples tell."""
    samples = batch.get('data_samples', []) if isinstance(batch, Mapping) else []
    return [str(getattr(sample, 'img_path', getattr(sample, 'img_id', '?'))) for sample in samples]
