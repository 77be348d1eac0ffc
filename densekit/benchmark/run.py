"""Runs cases that are not in the results file yet, one after another, within a budget of time."""

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from densekit.benchmark import chart, machine, peaks
from densekit.benchmark.case import Case, Settings
from densekit.benchmark.results import Results
from densekit.benchmark.steps import StepCase
from densekit.benchmark.table import against_best, form, render
from densekit.benchmark.timing import Budget
from densekit.engine.heap import keep_freed_memory
from densekit.files import write_whole

Say = Callable[[str], object]


def run_cases(
    cases: Sequence[tuple[int, Case]],
    *,
    device: torch.device,
    out: Path,
    say: Say,
    rounds: int = 5,
    budget: float | None = None,
    again: bool = False,
) -> list[str]:
    """Measures cases and writes each into the results file as soon as it is done; then the table and the chart.

    Args:
        cases: each with the number of its tier.
        device: to run on.
        out: folder of results.
        say: takes a line of progress.
        rounds: turns of each candidate.
        budget: seconds. No case begins that would end later if it took as long as the longest one did in this run. What
            has begun is finished, so the first case, and one that takes longer than all before, may end later.
        again: measure also what is in the file.

    Returns:
        Keys of the cases that the budget left to do.
    """
    limit = Budget(budget)
    slug = machine.slug(device)
    results = Results(out, slug, machine.describe(device), machine.revision(), command())
    todo = [(tier, case) for tier, case in cases if again or case.key not in results.cases]
    say(f'{machine.name(device)}: {len(todo)} of {len(cases)} cases to measure, into {results.path}')
    try:
        limits = results.peaks()
        if limits is None:
            limits = peaks.measure(device)
            results.save_peaks(limits)
        longest = 0.0
        while todo and limit.left() > longest:
            tier, case = todo[0]
            say(f'measuring {case.key}')
            start = time.monotonic()
            if isinstance(case, StepCase) and device.type == 'cpu':
                keep_freed_memory()  # for all candidates alike, as in each of our runs on a CPU
            record = case.measure(Settings(device, limits, rounds))
            results.save(case.key, tier, record)
            todo.pop(0)
            took = time.monotonic() - start
            longest = max(longest, took)
            say(f'  {_told(record)}; {took:.0f} s')
    finally:  # an interrupted run leaves a table of what it did
        if results.path.exists():
            write_whole(out / f'{slug}.md', render(results.content))
            chart.draw(results.content, out / f'{slug}.png')
    return [case.key for _, case in todo]


def command() -> str:
    """As it was typed, as far as that can be known."""
    return shlex.join(['python', *sys.argv])


def _told(record: dict) -> str:
    found = against_best(record)
    if found is None:
        failed = [row for row in record['rows'] if 'error' in row]
        return f'{len(record["rows"]) - len(failed)} rows' + f', {len(failed)} failed' * bool(failed)
    ours, other, ratio = found
    return f'{form(ours)} is {ratio:.2f} times as fast as {form(other)}'
