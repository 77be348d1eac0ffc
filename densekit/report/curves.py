"""Curves of a run over its training, from what mmengine logs to ``<work_dir>/<timestamp>/vis_data/scalars.json``."""

import json
import os
from collections.abc import Mapping
from itertools import cycle
from math import floor, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from densekit.report.pictures import save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCALARS = '*/vis_data/scalars.json'

# Metrics that are drawn: end of the key, name, factor to percent.
METRICS = (('bbox_mAP', 'box AP', 100), ('segm_mAP', 'mask AP', 100), ('mIoU', 'mIoU', 1))
RATES = {'base_lr': 'base', 'lr': 'first parameter group'}
MAX_PARTS = 6  # more parts of a loss than this are not drawn
STYLE: dict[Any, Any] = {
    'font.size': 9,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.edgecolor': '0.4',
    'axes.grid': True,
    'axes.axisbelow': True,
    'axes.titlesize': 10,
    'axes.titlelocation': 'left',
    'grid.color': '0.92',
    'legend.frameon': False,
    'legend.fontsize': 8,
    'legend.title_fontsize': 8,
}
FIRST, SECOND = '#1f5fa8', '#d1662a'
PARTS = ('#4f9d69', '#b0763c', '#8a6bb3', '#c2607f', '#5b9bb5', '#8c8c3f')


def read_scalars(work_dir: str | os.PathLike) -> tuple[list[dict], list[dict]]:
    """Read what a run logged, across resumptions.

    Files are joined in the order of their timestamps. What an earlier one logged from the iteration on with which a
    later one begins is left out, as it belongs to weights that were given up. So is a file without any training that
    validates at step 0: an evaluation of its own.

    Args:
        work_dir: work folder of the run.

    Returns:
        The training and the validation records in order. Each training record holds ``loss``, ``iter`` and ``step``;
        each validation record ``step``, the iteration or epoch after which it was measured, and ``iter``, the last
        iteration logged before it in its file, 0 if none.

    Raises:
        ValueError: if nothing was logged there, or a line cannot be read.
    """
    training: list[dict] = []
    validation: list[dict] = []
    for path in sorted(Path(work_dir).glob(SCALARS)):
        trained, validated = _read_file(path)
        if trained:
            begin = trained[0]['iter']
            training = [record for record in training if record['iter'] < begin]
            validation = [record for record in validation if record['iter'] < begin]
        training += trained
        validation = list({record['step']: record for record in validation + validated}.values())
    if not training and not validation:
        raise ValueError(
            f'No logged training in {os.fspath(work_dir)}: expected {SCALARS} in it, which a training run writes. '
            'Give the work folder of a run that has trained for at least one logging interval.'
        )
    return training, validation


def _read_file(path: Path) -> tuple[list[dict], list[dict]]:
    training: list[dict] = []
    validation: list[dict] = []
    lines = path.read_text(encoding='utf-8').splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            step = record['step']
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not line.endswith('\n'):
                break  # a run that was killed while it wrote
            raise ValueError(f'{path}, line {number}: expected a JSON object with "step", found {line!r}.') from error
        if 'loss' in record:
            training.append({**record, 'iter': record.get('iter', step)})
            continue
        last = training[-1]['iter'] if training else 0
        # mmengine's defaults log step 0 in iteration-based runs; the iteration before it is known from the order.
        if step or last:
            validation.append({**record, 'step': step or last, 'iter': last})
    return training, validation


def plot_curves(runs: Mapping[str, str | os.PathLike], out: str | os.PathLike) -> None:
    """Draw loss, learning rate and metrics of runs, one row per run, and write them to ``out``.

    Args:
        runs: title to work folder.
        out: path of the PNG file.

    Raises:
        ValueError: if there is no run, or nothing was logged in one of the folders.
    """
    if not runs:
        raise ValueError('No runs given to plot: give at least one title with its work folder.')
    records = {title: read_scalars(work_dir) for title, work_dir in runs.items()}

    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with rc_context(STYLE):
        figure = Figure(figsize=(12, 3.3 * len(runs)), dpi=120, layout='constrained')
        axes = figure.subplots(len(runs), 3, squeeze=False)
        for axis in axes.flat:
            axis.xaxis.set_major_locator(MaxNLocator('auto', integer=True, steps=[1, 2, 5, 10]))
        for (title, (training, validation)), (losses, rates, metrics) in zip(records.items(), axes, strict=True):
            _plot_loss(losses, training)
            _plot_rates(rates, training)
            _plot_metrics(metrics, validation)
            for axis, what in ((losses, 'loss'), (rates, 'learning rate'), (metrics, 'validation')):
                axis.set_title(f'{title}: {what}')
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    save_png(out, np.asarray(canvas.buffer_rgba())[..., :3])


def _series(records: list[dict], key: str, x: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(record[x], record[key]) for record in records if key in record]
    xs, ys = np.array(found, np.float64).reshape(-1, 2).T
    return xs, ys


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over a twentieth of the values; at the ends over what there is of it."""
    width = max(1, len(values) // 20) // 2 * 2 + 1
    window = np.ones(width)
    reach = width // 2
    return (
        np.convolve(values, window)[reach : reach + len(values)]
        / np.convolve(np.ones(len(values)), window)[reach : reach + len(values)]
    )


def _plot_loss(axis: 'Axes', training: list[dict]) -> None:
    if not training:
        _say(axis, 'no training was logged')
        return
    iterations, values = _series(training, 'loss', 'iter')
    axis.plot(iterations, values, color=FIRST, alpha=0.25, linewidth=0.8)
    total = _smooth(values)
    _line(axis, iterations, total, FIRST, 'total')
    parts = sorted({key for record in training for key in record if 'loss' in key and key != 'loss'})
    for name, colour in zip(parts if 1 < len(parts) <= MAX_PARTS else [], PARTS, strict=False):
        iterations, values = _series(training, name, 'iter')
        _line(axis, iterations, _smooth(values), colour, name, 1)
    top = max((value for value in total if np.isfinite(value)), default=1)
    axis.set(xlabel='iteration', ylabel='loss', ylim=(0, 1.15 * top or 1))
    axis.set_xlim(left=0)
    axis.legend(title='smoothed (faint: as logged)')


def _plot_rates(axis: 'Axes', training: list[dict]) -> None:
    names = [key for key in dict.fromkeys(key for record in training for key in record) if key.endswith('lr')]
    if not names:
        _say(axis, 'no learning rate was logged')
        return
    curves = {name: _series(training, name, 'iter') for name in names}
    if {'lr', 'base_lr'} <= set(names) and np.array_equal(curves['lr'], curves['base_lr']):
        del curves['base_lr']
    for (name, (iterations, values)), colour in zip(curves.items(), cycle((FIRST, SECOND, *PARTS)), strict=False):
        _line(axis, iterations, values, colour, RATES.get(name, name))
    power = floor(log10(max(values.max() for _, values in curves.values()) or 1))
    axis.yaxis.set_major_formatter(lambda value, _: f'{value / 10**power:g}')
    axis.set(xlabel='iteration', ylabel=f'learning rate ($10^{{{power}}}$)')
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    if len(curves) > 1:
        axis.legend()


def _plot_metrics(axis: 'Axes', validation: list[dict]) -> None:
    ends = []
    for (key, name, factor), colour in zip(METRICS, (FIRST, SECOND, FIRST), strict=True):
        full = next((k for record in validation for k in record if k.rpartition('/')[2] == key), None)
        if full is not None:
            steps, values = _series(validation, full, 'step')
            _line(axis, steps, factor * values, colour)
            axis.plot(steps, factor * values, 'o', color=colour, markersize=3.5)
            ends.append((factor * values[-1], steps[-1], name, colour))
    if not ends:
        _say(axis, f'no {" or ".join(key for key, *_ in METRICS)} was logged')
        return
    for rank, (value, step, name, colour) in enumerate(sorted(ends, reverse=True)):
        # Beside the last point; of two curves, which may end close together, the upper one's a little higher.
        shift = 0 if len(ends) == 1 else 5 - 10 * rank
        axis.annotate(
            f'{name} {value:.1f}',
            (step, value),
            (7, shift),
            textcoords='offset points',
            va='center',
            color=colour,
            annotation_clip=False,
        )
    epochs = any(record['step'] < record['iter'] for record in validation)
    axis.set(xlabel='epoch' if epochs else 'iteration', ylabel=f'{" and ".join(name for _, _, name, _ in ends)} (%)')
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)


def _line(
    axis: 'Axes', xs: np.ndarray, ys: np.ndarray, colour: str, label: str | None = None, width: float = 1.8
) -> None:
    # A single value would be invisible as a line.
    axis.plot(xs, ys, color=colour, linewidth=width, label=label, marker='o' if len(xs) == 1 else '', markersize=4)


def _say(axis: 'Axes', text: str) -> None:
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha='center', va='center', color='0.5', wrap=True)
    axis.set(xticks=[], yticks=[])
