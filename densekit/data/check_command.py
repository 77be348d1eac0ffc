"""What tools/check_data.py does."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from densekit.cli import check_writable, user_errors
from densekit.data.checks import Report, inspect_data
from densekit.data.faults import KINDS, count_kinds, describe
from densekit.data.locate import check_dataset_files
from densekit.engine.config import load_config
from densekit.report.progress import ProgressBar
from densekit.report.tables import format_table

LOOPS = ('train', 'val', 'test')
_LISTED = 20  # classes; of more, the most and the least frequent


def check(
    config: str,
    *,
    headers: bool = False,
    decode: bool = False,
    out: str | None = None,
    options: Sequence[str] = (),
) -> int:
    """Checks the data of a config, and prints what is in it and what is wrong.

    Args:
        config: path of the config file.
        headers: read the header of every image.
        decode: decode every image and label map.
        out: JSON file for all faults.
        options: ``key=value`` texts that change the config.

    Returns:
        The number of faults.

    Raises:
        UserError: if something given cannot be used, or the data is not there.
    """
    with user_errors():
        if out is not None:
            if Path(out).is_dir():
                raise ValueError(f'--json {out} is a folder; give the name of a file for the faults')
            check_writable(str(Path(out).parent), '--json')
        cfg = load_config(config, options)
        check_dataset_files(cfg, LOOPS)
        bar = ProgressBar()
        start = time.monotonic()
        reports = inspect_data(cfg, LOOPS, headers=headers, decode=decode, progress=bar)
        bar.clear()
    faults = [found for report in reports for found in report.faults]
    sys.stdout.write(f'{summary(reports)}\n{_depth(headers, decode)} ({time.monotonic() - start:.1f} s)\n')
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps([asdict(found) for found in faults], indent=1) + '\n', encoding='utf-8')
        sys.stdout.write(f'All {len(faults):,} faults are in {out}.\n')
    return len(faults)


def summary(reports: Sequence[Report]) -> str:
    """Tables of what is in each data set, the first faults of each kind, and how many there are of each."""
    parts = [_contents(report) for report in reports if report.counts or report.remarks]
    faults = [found for report in reports for found in report.faults]
    if not faults:
        return '\n'.join([*parts, 'No faults.'])
    rows = [[severity, kind, f'{count:,}', KINDS[kind].what] for (severity, kind), count in count_kinds(faults).items()]
    table = format_table(['severity', 'kind', 'faults', 'what'], rows, align='<<><')
    return '\n'.join([*parts, describe(faults), '', table, ''])


def _contents(report: Report) -> str:
    lines = [f'{report.where}: {report.source}']
    lines += ['  ' + ', '.join(f'{name} {count:,}' for name, count in report.counts.items())] if report.counts else []
    if any(report.classes.values()):
        ranked = sorted(report.classes.items(), key=lambda item: -item[1])
        shown = ranked if len(ranked) <= _LISTED else ranked[: _LISTED // 2] + ranked[-_LISTED // 2 :]
        cells = [f'{name} {count:,}' for name, count in shown]
        if len(ranked) > _LISTED:
            cells.insert(_LISTED // 2, f'... ({len(ranked) - _LISTED} more)')
        lines += _columns(cells)
    return '\n'.join([*lines, *(f'  {remark}' for remark in report.remarks), ''])


def _columns(cells: Sequence[str], width: int = 100) -> list[str]:
    """Cells side by side, as many as fit."""
    widest = max(map(len, cells)) + 2
    number = max(1, width // widest)
    return [
        ('    ' + ''.join(f'{cell:<{widest}}' for cell in cells[start : start + number])).rstrip()
        for start in range(0, len(cells), number)
    ]


def _depth(headers: bool, decode: bool) -> str:
    if decode:
        return 'Checked: annotations, files, every image and label map decoded'
    if headers:
        return 'Checked: annotations, files, the header of every image; a sample was decoded. --decode decodes all'
    return 'Checked: annotations, files, a sample of the images; --headers opens and --decode decodes every one'
