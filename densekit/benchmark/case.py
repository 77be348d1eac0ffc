"""What is measured and kept as one: rows that ran in one interleaved run."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from densekit.benchmark.launches import count
from densekit.benchmark.memory import peak_bytes
from densekit.benchmark.peaks import Peaks
from densekit.benchmark.timing import Call, Timer, interleaved, timed, why

LAYOUTS = ('nchw', 'nhwc')

Images = tuple[int, int, int]
"""Number, height, width."""

Record = dict[str, Any]
"""As it is in the results file: ``kind``, ``title``, ``rows`` and what belongs to the kind."""


@dataclass(frozen=True)
class Settings:
    """How everything is measured.

    Attributes:
        device: to run on.
        peaks: the measured rates of it.
        rounds: turns of each candidate.
        at_least: seconds of a turn.
    """

    device: torch.device
    peaks: Peaks
    rounds: int = 5
    at_least: float = 0.2


class Case(Protocol):
    """A case has a key, by which it is known in the results file, and can be measured."""

    @property
    def key(self) -> str:
        """Unlike that of any other case."""
        ...

    def measure(self, settings: Settings) -> Record:
        """Measures it."""
        ...


@dataclass(frozen=True)
class Candidate:
    """One row.

    Attributes:
        who: whose code.
        layout: of images and weights in memory: 'nchw', or 'nhwc', which is PyTorch's channels_last.
        mode: 'eager', 'compiled' or 'graphed' (a CUDA graph).
    """

    who: str
    layout: str = 'nchw'
    mode: str = 'eager'

    @property
    def name(self) -> str:
        """In a word for messages and dictionaries."""
        return f'{self.who}, {self.layout}, {self.mode}'


def measure_rows(
    makers: Mapping[Candidate, Callable[[], Call]], settings: Settings, clock: Timer = timed
) -> list[Record]:
    """Times calls in one interleaved run, then each one's memory and launches.

    Args:
        makers: make the calls, models and all.
        settings: of the measurement.
        clock: what takes the times.

    Returns:
        A row for each candidate: ``who``, ``layout``, ``mode`` and either ``error`` or ``first``, ``rounds`` (seconds),
        ``peak_bytes``, and on CUDA ``kernels``, ``host`` and ``busy`` (seconds).
    """
    calls: dict[str, Call] = {}
    errors: dict[str, str] = {}
    for candidate, make in makers.items():
        try:
            calls[candidate.name] = make()
        except Exception as error:  # a peer's own; the others are measured all the same
            errors[candidate.name] = why(error)
    times, failures = interleaved(
        calls, settings.device, rounds=settings.rounds, at_least=settings.at_least, clock=clock
    )
    errors |= failures
    rows = []
    for candidate in makers:
        row: Record = {'who': candidate.who, 'layout': candidate.layout, 'mode': candidate.mode}
        if (timing := times.get(candidate.name)) is None:
            row['error'] = errors[candidate.name]
        else:
            call = calls[candidate.name]
            row |= {'first': timing.first, 'rounds': list(timing.rounds)}
            if candidate.mode != 'graphed':  # whose memory is its own, taken when it was captured
                row['peak_bytes'] = peak_bytes(call, settings.device)
            if launches := count(call, settings.device):
                row |= {'kernels': launches.kernels, 'host': launches.host, 'busy': launches.busy}
        rows.append(row)
    calls.clear()
    free(settings.device)
    return rows


def free(device: torch.device) -> None:
    """Gives back what the last candidates held."""
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()


def parse_images(text: str) -> Images:
    """Reads ``2x800x1333``: number, height and width.

    Raises:
        ValueError: if it is written otherwise.
    """
    parts = text.lower().split('x')
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f'--images {text}: give number, height and width, such as 2x800x1333')
    number, height, width = map(int, parts)
    return number, height, width


def written(images: Images) -> str:
    """The inverse of :func:`parse_images`."""
    return 'x'.join(map(str, images))
