"""Times of several calls in one interleaved run.

In each round every call has its turn, and each round begins with another one: what drifts (clocks, heat, other
processes) meets all alike. The first call of each, which may allocate, tune and compile, is timed apart.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from densekit.benchmark.machine import synchronize

Call = Callable[[], object]

Timer = Callable[[Call, torch.device, int], float]
"""Seconds per call of so many calls."""

WARM_UPS = 2


@dataclass(frozen=True)
class Timing:
    """Seconds per call.

    Attributes:
        first: of the first call.
        rounds: of each round, in order.
    """

    first: float
    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Over the rounds."""
        return statistics.median(self.rounds)


class Budget:
    """So many seconds from now on; None for no end."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that remain; negative when they have passed."""
        return math.inf if self._end is None else self._end - time.monotonic()


def timed(call: Call, device: torch.device, repeats: int = 1) -> float:
    """Seconds per call, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def interleaved(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    rounds: int = 5,
    at_least: float = 0.2,
    clock: Timer = timed,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times calls in turn.

    Args:
        calls: by name.
        device: that they run on.
        rounds: turns of each.
        at_least: seconds that a turn takes, by repeating what is shorter.
        clock: what takes the times of the turns.

    Returns:
        The times, and for each call that failed, why. One that fails is left out from then on.
    """
    first: dict[str, float] = {}
    repeats: dict[str, int] = {}
    failures: dict[str, str] = {}
    for name, call in calls.items():
        try:
            first[name] = timed(call, device)
            usual = min(timed(call, device) for _ in range(WARM_UPS))
        except Exception as error:  # a peer's own, of whatever kind; the others are measured all the same
            failures[name] = why(error)
            continue
        repeats[name] = max(1, round(at_least / max(usual, 1e-9)))
    turns: dict[str, list[float]] = {name: [] for name in repeats}
    for number in range(rounds):
        for name in _rotated(list(turns), number):
            if name not in failures:
                try:
                    turns[name].append(clock(calls[name], device, repeats[name]))
                except Exception as error:  # such as no memory left
                    failures[name] = why(error)
    good = {name: Timing(first[name], tuple(seconds)) for name, seconds in turns.items() if name not in failures}
    return good, failures


def why(error: Exception) -> str:
    """An error in a line."""
    if isinstance(error, torch.OutOfMemoryError):
        return 'out of memory'
    lines = str(error).strip().splitlines()
    return f'{type(error).__name__}: {lines[0][:200] if lines else ""}'


def _rotated(names: Sequence[str], by: int) -> list[str]:
    by %= max(1, len(names))
    return [*names[by:], *names[:by]]
