"""Sections about the training: loss, metrics on the way, learning rates, speed, memory, environment."""

import difflib
import math
from collections.abc import Sequence
from statistics import median

import numpy as np

from densekit.report.page.charts import Line, line_chart
from densekit.report.page.markup import Html, fold, join, note, number, section, side_by_side, table, tag
from densekit.report.page.run_folder import Run, batch, config_text

MAX_PARTS = 6  # of a loss in one chart
MAX_RATES = 16  # lines of learning rates
NO_LOG = 'No training was logged in this folder.'
NO_VALIDATION = 'No validation was logged.'
METRICS = {'bbox_mAP': ('box AP (%)', 100), 'segm_mAP': ('mask AP (%)', 100), 'mIoU': ('mIoU (%)', 1)}


def loss_section(runs: Sequence[Run]) -> Html:
    """Loss of all runs in one chart, its parts and the metrics of each."""
    logged = [run for run in runs if run.training]
    if not logged:
        return section('loss', 'Loss', note(NO_LOG))
    many = len(runs) > 1
    lines = []
    for place, run in enumerate(runs):
        xs, ys = series(run.training, 'loss')
        name = run.title if many else 'total'
        lines += [Line('', xs, ys, place + 1, faint=True), Line(name, xs, smooth(ys), place + 1, dash=place)]
    total = line_chart('Total loss', lines, 'iteration', 'loss')
    parts = [_parts_chart(run, many) for run in logged]
    charts = [side_by_side(total), side_by_side(*parts)] if many else [side_by_side(total, *parts)]
    return section(
        'loss',
        'Loss',
        *(note(f'{run.title}: {NO_LOG}') for run in runs if not run.training),
        *charts,
        note('Strong lines are averaged over a twentieth of the run; the faint line behind is the loss as logged.'),
        *(_not_finite(run) for run in logged),
        fold('The values as a table', side_by_side(*(_loss_table(run) for run in logged))),
    )


def validation_section(runs: Sequence[Run]) -> Html:
    """What validations during the training measured."""
    keys = list(dict.fromkeys(key for run in runs for key in _metrics(run)))
    if not keys:
        return section('validation', 'Validation during training', note(NO_VALIDATION))
    chart_keys = [key for key in keys if key.rpartition('/')[2] in METRICS] or keys[:1]
    charts = []
    for key in chart_keys:
        lines = []
        name, factor = METRICS.get(key.rpartition('/')[2], (key, 1))
        for place, run in enumerate(runs):
            xs, ys = series(run.validation, key, 'iter')
            ys = [factor * y if y >= 0 or factor == 1 else math.nan for y in ys]  # -1: nothing to measure
            lines.append(Line(run.title if len(runs) > 1 else key, xs, ys, place + 1, dash=place, dots=True))
        charts.append(line_chart(name, lines, 'iteration', name))
    tables = [
        table(f'{run.title}: as logged', ['step', *_metrics(run)], [_validation_row(run, r) for r in run.validation])
        for run in runs
        if run.validation
    ]
    return section(
        'validation',
        'Validation during training',
        *(note(f'{run.title}: {NO_VALIDATION}') for run in runs if not _metrics(run)),
        side_by_side(*charts),
        fold('The values as a table', *tables),
    )


def rates_section(runs: Sequence[Run]) -> Html:
    """Learning rate of each layer group."""
    parts = [_rates(run) if run.training else note(f'{run.title}: {NO_LOG}') for run in runs]
    return section('rates', 'Learning rates by layer group', side_by_side(*parts))


def speed_section(runs: Sequence[Run]) -> Html:
    """Time of an iteration and memory over the run."""
    logged = [run for run in runs if any('time' in record for record in run.training)]
    if not logged:
        return section('speed', 'Speed and memory', note('No times were logged.'))
    parts = []
    for run in logged:
        xs, times = series(run.training, 'time')
        waits_x, waits = series(run.training, 'data_time')
        lines = [Line('iteration', xs, times, 1), Line('of this, waiting for data', waits_x, waits, 2, dash=1)]
        chart = line_chart(f'{run.title}: time' if len(runs) > 1 else 'Time', lines, 'iteration', 'seconds')
        parts.append(tag('div', chart, _memory(run, len(runs) > 1)))
    rows = [_speed_row(run) for run in logged]
    header = ['run', 'seconds an iteration', 'waiting for data', 'images a second', 'peak memory (MB)']
    return section(
        'speed',
        'Speed and memory',
        table('Medians over the run', header, rows),
        side_by_side(*parts),
        note('Times are as logged: averages over the logging window.'),
    )


def environment_section(runs: Sequence[Run]) -> Html:
    """Command, versions and config."""
    parts = []
    for run in runs:
        commands = [tag('pre', command) for command in dict.fromkeys(run.commands)]
        text = config_text(run)
        parts.append(
            tag(
                'div',
                tag('h3', run.title if run.title == run.name else f'{run.title}: {run.name}'),
                tag('h4', 'Command'),
                *(commands or [note('This run did not record its command. Its config, below, is complete.')]),
                tag('h4', 'Environment'),
                tag('pre', run.environment) if run.environment else note('No log says what it ran on.'),
                fold('Config, with all that it inherits', tag('pre', text)) if text else note('It left no config.'),
            )
        )
    return section('environment', 'Environment and command', side_by_side(*parts), _difference(runs))


def series(records: Sequence[dict], key: str, x: str = 'iter') -> tuple[list[float], list[float]]:
    """Values of the records that have them, and where they are."""
    found = [(record[x], record[key]) for record in records if isinstance(record.get(key), int | float)]
    return [float(x) for x, _ in found], [float(y) for _, y in found]


def smooth(values: Sequence[float]) -> list[float]:
    """Centred mean over a twentieth of the values; what is no number stays so and counts nowhere else."""
    if not values:
        return []
    given = np.asarray(values, dtype=float)
    known = np.isfinite(given)
    window = np.ones(max(1, len(given) // 20) // 2 * 2 + 1)
    reach = len(window) // 2
    total = np.convolve(np.where(known, given, 0), window)[reach : reach + len(given)]
    count = np.convolve(known, window)[reach : reach + len(given)]
    return np.where(known, total / np.maximum(count, 1), np.nan).tolist()


def _parts_chart(run: Run, many: bool) -> Html:
    names = sorted({key for record in run.training for key in record if 'loss' in key and key != 'loss'})
    lines = []
    for place, name in enumerate(names[:MAX_PARTS]):
        xs, ys = series(run.training, name)
        lines.append(Line(name, xs, smooth(ys), place + 1, dash=place % 4))
    left_out = f' ({len(names) - MAX_PARTS} more are in the table)' if len(names) > MAX_PARTS else ''
    title = f'Parts of the loss{left_out}'
    if not lines:
        return note(f'{run.title}: the loss has no parts.')
    return line_chart(f'{run.title}: {title.lower()}' if many else title, lines, 'iteration', 'loss')


def _loss_table(run: Run) -> Html:
    """First, last and about ten records between them."""
    names = ['loss', *sorted({k for r in run.training for k in r if 'loss' in k and k != 'loss'}), 'grad_norm']
    names = [name for name in names if any(name in record for record in run.training)]
    places = sorted(set(np.linspace(0, len(run.training) - 1, 12).round().astype(int).tolist()))
    rows = [[run.training[i]['iter'], *(number(run.training[i].get(name), 4) for name in names)] for i in places]
    return table(f'{run.title}: loss', ['iteration', *names], rows)


def _not_finite(run: Run) -> Html:
    bad = sum(not math.isfinite(record['loss']) for record in run.training)
    return note(f'{run.title}: {bad} logged losses are no numbers; the line has gaps there.') if bad else Html('')


def _metrics(run: Run) -> list[str]:
    """Names of what validations measured."""
    skip = ('step', 'iter', 'epoch', 'time', 'data_time')
    return list(dict.fromkeys(k for r in run.validation for k, v in r.items() if k not in skip and _is_number(v)))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _validation_row(run: Run, record: dict) -> list:
    return [record['step'], *(number(record.get(key), 3) for key in _metrics(run))]


def _rates(run: Run) -> Html:
    xs, logged = series(run.training, 'lr')
    if not xs:
        return note(f'{run.title}: no learning rate was logged.')
    first = run.groups[0]['initial_lr'] if run.groups else 0
    if not first:
        base_x, base = series(run.training, 'base_lr')
        lines = [Line('first group', xs, logged, 1)] + ([Line('base', base_x, base, 2, dash=1)] if base else [])
        reason = 'has no checkpoint with an optimizer, so that the rates of the other groups are not known'
        return tag('div', line_chart(run.title, lines, 'iteration', 'learning rate'), note(f'The folder {reason}.'))
    scales: dict[float, list[str]] = {}
    for group in run.groups:
        scales.setdefault(round(group['initial_lr'] / first, 9), []).append(group['name'])
    shown = sorted(scales)
    step = max(1, -(-len(shown) // MAX_RATES))
    chosen = [*shown[:-1:step], shown[-1]]
    lines = [
        Line(_group_name(scales[s]), xs, [rate * s for rate in logged], f'ramp-{100 * i // max(len(chosen) - 1, 1)}')
        for i, s in enumerate(chosen)
    ]
    rows = [
        [
            group['name'],
            number(group['tensors'], 0),
            number(group['initial_lr'] / _base(run), 4),
            number(group['lr'], 8),
        ]
        for group in run.groups
    ]
    at = f'at iteration {run.iteration:,}' if run.iteration is not None else 'in the checkpoint'
    header = ['group', 'tensors', 'scale', f'rate {at}']
    return tag(
        'div',
        line_chart(run.title, lines, 'iteration', 'learning rate'),
        note(_how_known(run)),
        fold('Groups of the optimizer', table(f'{run.title}: groups', header, rows)),
    )


def _group_name(names: Sequence[str]) -> str:
    """Groups of one rate, such as layer_3 of layer_3_decay and layer_3_no_decay."""
    short = dict.fromkeys(name.removesuffix('_decay').removesuffix('_no') for name in names)
    listed = list(short)
    return listed[0] if len(listed) == 1 else f'{listed[0]} to {listed[-1]}'


def _base(run: Run) -> float:
    return max(group['initial_lr'] for group in run.groups)


def _how_known(run: Run) -> str:
    first = run.groups[0]
    kept = all(
        math.isclose(group['lr'] * first['initial_lr'], first['lr'] * group['initial_lr'], rel_tol=1e-6)
        for group in run.groups
    )
    if kept:
        return (
            'The log has the rate of the first group; the others follow from their scales, which still hold in the '
            'checkpoint.'
        )
    return (
        'The log has the rate of the first group; the others are drawn from their initial scales. In the checkpoint '
        'these no longer hold: see the table for its rates.'
    )


def _memory(run: Run, many: bool) -> Html:
    xs, values = series(run.training, 'memory')
    if not xs:
        return note('No memory was logged; that is done on a GPU only.')
    title = f'{run.title}: memory' if many else 'Memory'
    return line_chart(title, [Line('peak so far', xs, values, 3)], 'iteration', 'MB on the GPU')


def _speed_row(run: Run) -> list:
    times, waits = series(run.training, 'time')[1], series(run.training, 'data_time')[1]
    seconds, images = median(times), batch(run)
    share = 100 * median(waits) / seconds if waits and seconds else None
    memory = series(run.training, 'memory')[1]
    return [
        run.title,
        number(seconds, 3),
        number(share, 1) if share is None else Html(number(share, 1).replace('</td>', ' %</td>')),
        number(images / seconds if images and seconds else None, 1),
        number(max(memory) if memory else None, 0),
    ]


def _difference(runs: Sequence[Run]) -> Html:
    """What differs between the configs of two runs."""
    if len(runs) != 2 or not all(run.config for run in runs):
        return Html('')
    a, b = (config_text(run).splitlines() for run in runs)
    lines = list(difflib.unified_diff(a, b, runs[0].name, runs[1].name, lineterm='', n=1))
    if not lines:
        return note('The two configs are equal.')
    marks = {'+': 'added', '-': 'removed'}
    shown = join((tag('span', line, class_=marks.get(line[0])) for line in lines), '\n')
    return tag('div', tag('h3', 'What differs between the configs'), tag('pre', shown, class_='diff'))
