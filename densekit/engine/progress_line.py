"""A line at the bottom of a terminal that shows how training goes; a file or a pipe gets the log alone."""

import datetime
import os
import resource
import sys
import time
from collections.abc import Iterable, Mapping
from logging import StreamHandler
from typing import Any, TextIO

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.runner import EpochBasedTrainLoop, Runner

PAUSE = 0.2  # seconds between two states of the line
WINDOW = 50  # iterations that loss and speed are of, as in the log
_ERASE = '\r\x1b[K'


class LiveLine:
    """A line that is rewritten in place, below all else that Python writes to the same terminal.

    Args:
        stream: the terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.shown = False
        self.in_a_line = False  # whether something else has begun a line and not ended it
        self._last = -PAUSE

    def show(self, parts: Iterable[str]) -> None:
        """Writes the line, of as many of its parts, most important first, as fit into the width of the terminal."""
        if self.in_a_line or (self.shown and time.monotonic() - self._last < PAUSE):
            return
        columns = os.get_terminal_size(self.stream.fileno()).columns or 80  # 0: the terminal does not know
        room, line = columns - 1, ''
        for part in parts:
            longer = f'{line}  {part}' if line else part
            if len(longer) > room:
                break
            line = longer
        self.stream.write(f'{_ERASE}{line}')
        self.stream.flush()
        self.shown, self._last = True, time.monotonic()

    def clear(self) -> None:
        """Removes the line."""
        if self.shown:
            self.shown = False
            self.stream.write(_ERASE)
            self.stream.flush()


class Above:
    """A stream to the terminal of a live line, which makes way for what is written here."""

    def __init__(self, stream: TextIO, line: LiveLine) -> None:
        self._stream, self._line = stream, line

    def write(self, text: str) -> int:
        """Writes text above the line."""
        if text:
            self._line.clear()
            self._line.in_a_line = not text.endswith('\n')
        return self._stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes several texts."""
        self.write(''.join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class ProgressLine(Hook):
    """Shows iteration, loss, time left, speed, learning rate and memory while a run trains, and how far it validates.

    Standard output and error make way for the line as long as it is there; :meth:`after_run` gives them back. Nothing
    waits for the GPU on its account: the numbers are those that are kept for the log.
    """

    priority = 'LOWEST'  # after the log

    def __init__(self) -> None:
        self._line: LiveLine | None = None
        self._streams: dict[str, Any] = {}
        self._handlers: list[tuple[StreamHandler, Any]] = []
        self._memory = 0.0

    @staticmethod
    def is_of_use(rank: int) -> bool:
        """Whether this process writes to a terminal, and is the one whose log is shown."""
        return rank == 0 and sys.stdout.isatty() and os.environ.get('TERM', 'dumb') != 'dumb'

    def before_train(self, runner: Runner) -> None:
        """Takes the terminal."""
        self._line = LiveLine(sys.stdout)
        for name in ('stdout', 'stderr'):
            stream = getattr(sys, name)
            if stream.isatty():
                self._streams[name] = stream
                setattr(sys, name, Above(stream, self._line))
        for handler in runner.logger.handlers:
            if isinstance(handler, StreamHandler) and handler.stream is self._line.stream:
                self._handlers.append((handler, handler.setStream(sys.stdout)))

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Shows the state of training."""
        if self._line is not None:
            self._line.show(self._training(runner, batch_idx))

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Shows the state of a validation."""
        if self._line is not None:
            hub = runner.message_hub
            images = len(data_batch['inputs']) if isinstance(data_batch, Mapping) else 0
            parts = [f'validation {batch_idx + 1:,}/{len(runner.val_dataloader):,}', _left(hub)]
            self._line.show(filter(None, [*parts, _speed(hub, 'val/time', images * runner.world_size)]))

    def after_run(self, runner: Runner) -> None:
        """Gives the terminal back."""
        if self._line is None:
            return
        self._line.clear()
        for handler, stream in self._handlers:
            handler.setStream(stream)
        for name, stream in self._streams.items():
            if isinstance(getattr(sys, name), Above):  # else somebody has put another in its place
                setattr(sys, name, stream)
        self._line, self._streams, self._handlers = None, {}, []

    def _training(self, runner: Any, batch_idx: int) -> Iterable[str]:
        """What there is to show, most important first."""
        hub = runner.message_hub
        done = f'{runner.iter + 1:,}/{runner.max_iters:,}'
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            done = f'epoch {runner.epoch + 1}/{runner.max_epochs} {batch_idx + 1:,}/{len(runner.train_dataloader):,}'
        rate = _recent(hub, 'train/base_lr', 1) or _recent(hub, 'train/lr', 1)
        loss = _recent(hub, 'train/loss')
        self._memory = max(self._memory, _memory())
        parts = [done, f'loss {np.mean(loss):#.4g}' if loss else '', _left(hub)]
        parts.append(_speed(hub, 'train/time', runner.batch_size() * runner.world_size))
        parts += [f'lr {rate[-1]:.2e}' if rate else '', f'{self._memory:.1f} GiB']
        return filter(None, parts)


def _recent(hub: MessageHub, key: str, number: int = WINDOW) -> list[float]:
    """The last values of a scalar; none if nothing writes it."""
    return list(hub.get_scalar(key).data[0][-number:]) if key in hub.log_scalars else []


def _speed(hub: MessageHub, key: str, images: int) -> str:
    """Images a second; the median, which does not notice that one iteration waited for a validation."""
    times = _recent(hub, key)
    middle = float(np.median(times)) if times else 0.0
    return f'{images / middle:.1f} images/s' if images and middle else ''


def _left(hub: MessageHub) -> str:
    """The time left, as mmengine's timer reckons it."""
    seconds = hub.runtime_info.get('eta')
    return '' if seconds is None or seconds < 0 else f'ETA {datetime.timedelta(seconds=int(seconds))}'


def _memory() -> float:
    """The most that tensors took on the GPU since the last line of the log, or this process of the CPU's; GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == 'darwin' else 1024  # of the figure, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
