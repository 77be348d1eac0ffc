"""The results file as Markdown."""

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from densekit.benchmark.backbone import best_forms
from densekit.benchmark.case import Record
from densekit.benchmark.peers import OURS

TIERS = {
    1: 'Backbone',
    2: 'Larger backbone',
    3: 'Other precision',
    4: 'Compiled',
    5: 'Many sizes',
    6: 'Whole steps',
    7: 'Depthwise convolution',
}
ALONE = 0
"""The tier of cases that a command named one by one."""

_MIB = 2**20


def render(content: Mapping[str, Any]) -> str:
    """The page of a machine.

    Args:
        content: of the results file.
    """
    cases = sorted(content['cases'].values(), key=lambda case: case['tier'] or max(TIERS) + 1)
    parts = [f'# Speed on {content["device"]}', _versions(content), _peaks(content), _summary(cases)]
    for number, title in [*TIERS.items(), (ALONE, 'Measured by themselves')]:
        of_tier = [case for case in cases if case['tier'] == number]
        if of_tier:
            parts += [f'## {title}', *(_case(case) for case in of_tier)]
    return '\n\n'.join(part for part in parts if part) + '\n'


def against_best(record: Record) -> tuple[Record, Record, float] | None:
    """Our fastest row, that of the others, and how many times as fast ours is; None where one is missing."""
    if record['kind'] == 'depthwise':  # rows of different work
        return None
    best = best_forms(record['rows'])
    ours = best.pop(OURS, None)
    if ours is None or not best:
        return None
    other = min(best.values(), key=_median)
    return ours, other, _median(other) / _median(ours)


def round_by_round(ours: Record, other: Record) -> float:
    """How many times as fast ours is: the median over the rounds of the ratio within each.

    What drifts meets both in a round alike, and the least of many medians, by which the other was chosen, is luck in
    part.
    """
    return median(theirs / own for own, theirs in zip(ours['rounds'], other['rounds'], strict=True))


def form(row: Record) -> str:
    """A row's name in a word or three."""
    return f'{row["who"]} ({row["layout"]}, {row["mode"]})'


def milliseconds(seconds: float) -> str:
    """Of a time."""
    return digits(1e3 * seconds)


def digits(value: float) -> str:
    """Three digits that count, or all before the point."""
    return f'{value:.0f}' if value >= 100 else f'{value:.3g}'


def markdown(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table; all columns but the first go to the right."""
    titles = list(header)
    lines = [titles, ['---', *['---:'] * (len(titles) - 1)], *([str(cell) for cell in row] for row in rows)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _median(row: Record) -> float:
    return median(row['rounds'])


def _versions(content: Mapping[str, Any]) -> str:
    cases = content['cases'].values()
    dates = sorted({case['date'] for case in cases})
    commands = sorted({case['command'] for case in cases})
    revisions = sorted({case['revision'] for case in cases} - {''})
    lines = [
        ', '.join(f'{name} {version}' for name, version in content['versions'].items()) + '.',
        f'Measured {" to ".join(dict.fromkeys([dates[0], dates[-1]]))}' if dates else 'Nothing is measured yet',
    ]
    if revisions:
        lines[-1] += f' at commit {", ".join(revisions)} (+: with changes)'
    lines[-1] += '. docs/speed.md says what the columns mean.'
    return '\n'.join(lines) + ''.join(f'\n\n    {command}' for command in commands)


def _peaks(content: Mapping[str, Any]) -> str:
    peaks = content['peaks']
    if not peaks:
        return ''
    return (
        f'Measured limits: copies {peaks["copy"] / 1e9:.4g} GB/s, matrix products {peaks["fp32"] / 1e12:.3g} TFLOP/s '
        f'in float32 and {peaks["bf16"] / 1e12:.3g} TFLOP/s in bfloat16.'
    )


def _summary(cases: Iterable[Record]) -> str:
    rows = []
    for case in cases:
        found = against_best(case)
        if found:
            ours, other, ratio = found
            share = f'{case["floors"]["best"] / _median(ours):.2f}' if case.get('floors') else '-'
            times = [milliseconds(_median(ours)), milliseconds(_median(other))]
            cells = [*times, f'{ratio:.2f}x', f'{round_by_round(ours, other):.2f}x', share]
            rows.append([case['title'], form(ours), cells[0], form(other), *cells[1:]])
    header = ['', 'ours', 'ms', 'fastest other', 'ms', 'ours is faster', 'round by round', 'floor / ours']
    return markdown(header, rows) if rows else ''


def _case(case: Record) -> str:
    lines = [f'### {case["title"]}']
    if case.get('text'):
        lines.append(case['text'])
    if case.get('floors'):
        floors = ', '.join(f'{name} {milliseconds(seconds)} ms' for name, seconds in case['floors'].items())
        lines.append(f'Floors: {floors}.')
    lines.append(_rows(case))
    if any(row.get('parts') for row in case['rows']):
        lines.append(_parts(case['rows']))
    failed = [f'{form(row)}: {row["error"]}.' for row in case['rows'] if 'error' in row]
    left_out = [f'{name}: {reason}.' for name, reason in case.get('left_out', {}).items()]
    if failed:
        lines.append('Failed: ' + ' '.join(failed))
    if left_out:
        lines.append('Left out: ' + ' '.join(left_out))
    return '\n\n'.join(lines)


def _rows(case: Record) -> str:
    """The table of a case; columns in which no row has anything are left out."""
    number, floors = case.get('images'), case.get('floors') or {}
    columns: dict[str, list[str]] = {}
    good = [row for row in case['rows'] if 'error' not in row]

    def add(title: str, cells: list[str | None]) -> None:
        if any(cells):
            columns[title] = [cell or '-' for cell in cells]

    add('', [row['who'] for row in good])
    add('layout', [row['layout'] for row in good])
    add('mode', [row['mode'] for row in good])
    add('ms', [milliseconds(_median(row)) for row in good])
    add('lowest to highest', [f'{milliseconds(min(r["rounds"]))} to {milliseconds(max(r["rounds"]))}' for r in good])
    add('images/s', [digits(number / _median(row)) if number else None for row in good])
    floor_of = [row.get('floor') or floors.get('best') for row in good]
    add('floor / it', [f'{x / _median(row):.2f}' if x else None for x, row in zip(floor_of, good, strict=True)])
    each = [1e12 * _median(row) / row['elements'] if 'elements' in row else None for row in good]
    add('ps per element', [digits(x) if x else None for x in each])
    add('first ms', [milliseconds(row['first']) for row in good])
    add('cold ms', [milliseconds(row['cold']) if 'cold' in row else None for row in good])
    add('peak MiB', [_mebibytes(row) for row in good])
    add('objects', [str(row['found']) if 'found' in row else None for row in good])
    add('launches', [str(row['kernels']) if 'kernels' in row else None for row in good])
    add('host ms', [milliseconds(row['host']) if 'host' in row else None for row in good])
    idle = [max(0.0, 1 - row['busy'] / _median(row)) if 'busy' in row else None for row in good]
    add('GPU idle', [f'{100 * share:.0f} %' if share is not None else None for share in idle])
    return markdown(columns, zip(*columns.values(), strict=True)) if good else 'No candidate ran.'


def _mebibytes(row: Record) -> str | None:
    if 'peak_bytes' not in row:
        return None
    value = row['peak_bytes'] / _MIB
    return f'{value:.0f}' if value >= 10 else f'{value:.1f}'


def _parts(rows: Iterable[Record]) -> str:
    """Milliseconds of each part of a step."""
    good = [row for row in rows if row.get('parts')]
    names = list(dict.fromkeys(name for row in good for name in row['parts']))
    idle = ['of it, GPU idle', *(milliseconds(max(0.0, _median(r) - r['busy'])) if 'busy' in r else '' for r in good)]
    return markdown(
        ['ms of', *map(form, good)],
        [
            *(
                [name, *(milliseconds(row['parts'][name]) if name in row['parts'] else '-' for row in good)]
                for name in names
            ),
            ['sum', *(milliseconds(sum(row['parts'].values())) for row in good)],
            *([idle] if any(idle[1:]) else []),
            ['whole, without timers', *(milliseconds(_median(row)) for row in good)],
        ],
    )
