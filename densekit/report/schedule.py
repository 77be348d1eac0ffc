"""When the learning rate changes, and to what: mmengine's schedulers go through a training without a model."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import mmengine.optim  # noqa: F401  registers the schedulers
import torch
from mmengine.registry import PARAM_SCHEDULERS
from torch import nn

from densekit.report.tables import format_table

_UNKNOWN = '-'


@dataclass(frozen=True)
class Training:
    """How long a run is.

    Attributes:
        by_epoch: whether its loop counts epochs.
        length: number of epochs or iterations.
        epoch_length: iterations in an epoch; None where the data set is not there to tell.
    """

    by_epoch: bool
    length: int
    epoch_length: int | None = None

    def iterations(self, count: int, by_epoch: bool) -> int | None:
        """A number of epochs, or of iterations, in iterations; None if not known."""
        if not by_epoch:
            return count
        return None if self.epoch_length is None else count * self.epoch_length

    def row(self, what: str, count: int, by_epoch: bool) -> list[str]:
        """Cells: what, and the number in iterations and in epochs."""
        iterations = self.iterations(count, by_epoch)
        if by_epoch:
            epochs = f'{count:,}'
        else:
            epochs = f'{count / self.epoch_length:,.1f}' if self.epoch_length else _UNKNOWN
        return [what, _UNKNOWN if iterations is None else f'{iterations:,}', epochs]


@dataclass(frozen=True)
class Change:
    """A change of the learning rate.

    Attributes:
        what: in words.
        begin: the first epoch or iteration, from 0, at the new value or on the way to it.
        end: the first one after the way; None for a step.
        by_epoch: whether these two are epochs.
        before: learning rate of the iteration before a step, or of the first one of a way.
        after: learning rate of the first iteration after a step, or of the last one of a way.
    """

    what: str
    begin: int
    end: int | None
    by_epoch: bool
    before: float
    after: float


class Schedule:
    """The schedulers of the learning rate, apart from the optimizer of a run.

    Args:
        configs: of all schedulers; those of the momentum are passed over.
        lr: learning rate without any schedule.
        training: how long it is. Where the length of an epoch is not known, warm-up is taken to lie in the first.
    """

    def __init__(self, configs: Sequence[Mapping[str, Any]], lr: float, training: Training) -> None:
        self._training = training
        ends = [config.get('end', 0) for config in configs if not config.get('by_epoch', True)]
        self._epoch_length = training.epoch_length or 1 + max([1, *ends])
        self._total = training.length * (self._epoch_length if training.by_epoch else 1)
        self._optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=lr)
        built = [(config, self._build(config)) for config in configs]
        self._schedulers = [scheduler for _, scheduler in built if scheduler.param_name == 'lr']
        # Of one that counts iterations in a training by epochs of unknown length nothing can be said.
        judged = training.epoch_length is not None or not training.by_epoch
        self._judged = [
            scheduler
            for config, scheduler in built
            if scheduler in self._schedulers and (judged or config.get('by_epoch', True))
        ]

    def changes(self) -> list[Change]:
        """Every way and step, in the order of the schedulers; can be called once."""
        points = [(scheduler, *place) for scheduler in self._schedulers for place in _places(scheduler)]
        spans = [self._span(scheduler, begin, end) for scheduler, _, begin, end in points]
        rates = self._rates(set(chain.from_iterable(spans)))
        return [
            Change(what, begin, end, scheduler.by_epoch, rates[first], rates[last])
            for (scheduler, what, begin, end), (first, last) in zip(points, spans, strict=True)
        ]

    def problems(self) -> list[str]:
        """What contradicts the length of training."""
        found = []
        unfinished = []
        for scheduler in self._judged:
            name, unit = type(scheduler).__name__, 'epoch' if scheduler.by_epoch else 'iteration'
            if scheduler.by_epoch and not self._training.by_epoch:
                found.append(f'{name} counts epochs and training counts iterations: it never acts')
                continue
            total = self._training.length if scheduler.by_epoch else self._total
            end = _end(scheduler)
            if scheduler.begin >= total:
                found.append(f'{name} begins at {unit} {scheduler.begin:,}, and training ends at {total:,}')
            elif end > total:
                found.append(f'{name} ends at {unit} {end:,}, and training at {total:,}')
            for milestone in _milestones(scheduler):
                if not milestone < min(end, total):
                    found.append(
                        f'the milestone of {name} at {unit} {milestone:,} is not reached before {min(end, total):,}'
                    )
            if not _is_warm_up(scheduler):
                unfinished.append((end < total, f'{name} ends at {unit} {end:,}, and training goes on to {total:,}'))
        if unfinished and all(early for early, _ in unfinished):
            found.append(unfinished[-1][1])
        return found

    def _build(self, config: Mapping[str, Any]) -> Any:
        """As mmengine's runner builds it."""
        own = copy.deepcopy(dict(config))
        own.setdefault('end', self._training.length if own.get('by_epoch', True) else self._total)
        return PARAM_SCHEDULERS.build(
            own, default_args={'optimizer': self._optimizer, 'epoch_length': self._epoch_length}
        )

    def _span(self, scheduler: Any, begin: int, end: int | None) -> tuple[int, int]:
        """The iterations before and after a change, within training."""
        unit = self._epoch_length if scheduler.by_epoch else 1
        first, last = (begin * unit - 1, begin * unit) if end is None else (begin * unit, end * unit - 1)
        return max(0, min(first, self._total - 1)), max(0, min(last, self._total - 1))

    def _rates(self, wanted: Iterable[int]) -> dict[int, float]:
        """The learning rate of iterations, by stepping as mmengine's ParamSchedulerHook does."""
        by_iteration = [scheduler for scheduler in self._schedulers if not scheduler.by_epoch]
        by_epoch = [scheduler for scheduler in self._schedulers if scheduler.by_epoch and self._training.by_epoch]
        quiet = min(self._total, max((_end(scheduler) for scheduler in by_iteration), default=0))
        later = range(quiet // self._epoch_length * self._epoch_length, self._total, self._epoch_length)
        self._optimizer.step()  # schedulers warn where none went before
        group, rates, waiting = self._optimizer.param_groups[0], {}, sorted(wanted, reverse=True)
        for iteration in chain(range(1, quiet + 1), (start for start in later if start > quiet)):
            while waiting and waiting[-1] < iteration:
                rates[waiting.pop()] = group['lr']
            if iteration <= quiet:
                _step(by_iteration)
            if iteration % self._epoch_length == 0:
                _step(by_epoch)
        return rates | dict.fromkeys(waiting, group['lr'])


def schedule_table(changes: Sequence[Change], training: Training) -> str:
    """Shows changes of the learning rate."""
    rows = []
    for change in changes:
        begin = training.row('', change.begin, change.by_epoch)
        end = ['', '', ''] if change.end is None else training.row('', change.end, change.by_epoch)
        rows.append([change.what, *begin[1:], *end[1:], f'{change.before:.3g}', f'{change.after:.3g}'])
    header = ['learning rate', 'from iteration', 'epoch', 'to iteration', 'epoch', 'before', 'after']
    return format_table(header, rows, align='<>>>>>>')


def _step(schedulers: Iterable[Any]) -> None:
    for scheduler in schedulers:
        scheduler.step()


def _places(scheduler: Any) -> Iterator[tuple[str, int, int | None]]:
    """What a scheduler does in words, from when, and to when."""
    name = type(scheduler).__name__
    milestones = _milestones(scheduler)
    for milestone in milestones:
        yield f'{name} x {scheduler.gamma:g}', milestone, None
    if not milestones:
        yield f'{name}, warm-up' if _is_warm_up(scheduler) else name, scheduler.begin, _end(scheduler)


def _milestones(scheduler: Any) -> list[int]:
    """Counted from the start of training; a scheduler counts its own from where it begins."""
    return [scheduler.begin + milestone for milestone in sorted(getattr(scheduler, 'milestones', []))]


def _end(scheduler: Any) -> int:
    """Where a scheduler is through: half a period of a cosine may be shorter or longer than what it is given."""
    return scheduler.begin + scheduler.T_max if hasattr(scheduler, 'T_max') else scheduler.end


def _is_warm_up(scheduler: Any) -> bool:
    start = getattr(scheduler, 'start_factor', getattr(scheduler, 'factor', 1.0))
    return start < getattr(scheduler, 'end_factor', 1.0)
