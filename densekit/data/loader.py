"""The data loader of a run: reproducible samples, and errors that name the sample a worker died or hangs over."""

import atexit
import ctypes
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from typing import Any
from weakref import WeakSet

from torch.utils.data import DataLoader

from densekit.data.sampling import NamedSamples, SampleError

# Seconds without a batch after which a worker counts as hung. An image of any size is read and augmented in less.
TIMEOUT = 600

_loaders: 'WeakSet[RunLoader]' = WeakSet()
# Held on to until they have ended: a loader that is let go of leaves its workers waiting for ever if it could not end
# them, and at the end of the process Python would wait for them.
_workers: dict[BaseProcess, int] = {}  # and by the process that started them


class WorkerError(RuntimeError):
    """A data worker died or hangs; the text names what it was reading."""


class RunLoader(DataLoader):
    """A data loader over :class:`NamedSamples`.

    Raises:
        SampleError: while iterated, if a sample cannot be used; the text names its file.
        WorkerError: while iterated, if a worker died or did not answer within ``timeout`` seconds.
    """

    workers: Sequence[BaseProcess] = ()

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        self.workers = list(getattr(batches, '_workers', ()))
        _loaders.add(self)
        for worker in [worker for worker in _own_workers() if not worker.is_alive()]:
            del _workers[worker]
        _workers.update(dict.fromkeys(self.workers, os.getpid()))
        atexit.unregister(_kill_workers)
        atexit.register(_kill_workers)  # before what torch has registered just now, which waits for each
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except SampleError as error:
                self.kill_workers()
                # Without the traceback that a worker sends along.
                raise SampleError(str(error).rpartition('SampleError: ')[2].strip()) from error
            except (RuntimeError, ConnectionError, EOFError) as error:
                elsewhere = isinstance(error, RuntimeError) and not str(error).startswith('DataLoader ')
                if not self.num_workers or elsewhere:  # such as tensors that cannot be stacked to a batch
                    raise
                raise self.ended_by(error) from error
            yield batch

    def ended_by(self, error: Exception) -> WorkerError:
        """Ends the workers, and tells what each was at when an error came from one."""
        self.kill_workers()
        return WorkerError(self._obituary(error))

    def kill_workers(self) -> None:
        """Ends the workers at once; torch would wait seconds for each that hangs."""
        _kill(self.workers)

    def _obituary(self, error: Exception) -> str:
        samples = self.dataset
        said = str(error).partition('\n')[0]
        lines = [f'a data worker died or hangs ({type(error).__name__}: {said}). The workers were last at:']
        if isinstance(samples, NamedSamples):
            at = samples.reading.tolist()
            lines += [f'  worker {i}: {samples.name(index)}' for i, index in enumerate(at) if index >= 0]
        lines.append(
            'Workers are killed mostly for want of memory (fewer: train_dataloader.num_workers) or of shared memory '
            f'(/dev/shm); slow ones get more than {self.timeout:g} s with train_dataloader.timeout.'
        )
        return '\n'.join(lines)


@contextmanager
def worker_errors() -> Iterator[None]:
    """Within this context, the death of a data worker is a :class:`WorkerError` wherever it shows.

    torch raises it from a signal handler: in the middle of whatever the main process is doing, such as a step.
    """
    try:
        yield
    except RuntimeError as error:
        pids = {int(number) for number in re.findall(r'DataLoader worker \(pid\(?s?\)? ?([0-9]+)', str(error))}
        for loader in list(_loaders):
            if not isinstance(error, WorkerError) and pids & {worker.pid for worker in loader.workers}:
                raise loader.ended_by(error) from error
        raise


def run_loader(loader: DataLoader, seed: int | None, *, batches: Any = None) -> DataLoader:
    """Makes a data loader's errors telling and its samples reproducible.

    Args:
        loader: as mmengine built it. One without batches of indices is returned as it is.
        seed: of the run.
        batches: the batches to use in the place of the loader's own.
    """
    if loader.batch_sampler is None:
        return loader
    workers = loader.num_workers
    options: dict[str, Any] = {}
    if workers:
        options = {
            'timeout': loader.timeout or TIMEOUT,
            'prefetch_factor': loader.prefetch_factor,
            'persistent_workers': loader.persistent_workers,
            'multiprocessing_context': loader.multiprocessing_context,
            'worker_init_fn': _WorkerStart(loader.worker_init_fn),
        }
    return RunLoader(
        NamedSamples(loader.dataset, seed or 0, workers),
        batch_sampler=batches or loader.batch_sampler,
        num_workers=workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        generator=loader.generator,
        **options,
    )


class _WorkerStart:
    """Ties a worker's life to that of its process: one that hangs would outlive a process that is killed.

    Args:
        then: what mmengine has a worker do first.
    """

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self.then = then

    def __call__(self, worker: int) -> None:
        if sys.platform == 'linux':
            pr_set_pdeathsig = 1
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        # A stop signal sent to the whole group is the main process's business, which still needs its batches. When
        # that process ends it kills what is left (_kill_workers).
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.then is not None:
            self.then(worker)


def _kill_workers() -> None:
    """Python's own end asks workers to terminate and waits; one that hangs or does not listen would keep it waiting."""
    _kill(_own_workers())


def _own_workers() -> list[BaseProcess]:
    """Those that this process started, and not one that it was forked from."""
    return [worker for worker, process in _workers.items() if process == os.getpid()]


def _kill(workers: Iterable[BaseProcess]) -> None:
    for worker in workers:
        with suppress(RuntimeError):  # torch's handler takes this for a failure of theirs
            worker.kill()
            worker.join(1)
