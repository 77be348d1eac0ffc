"""The results file as a bar chart: the fastest form of each, case by case."""

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from densekit.benchmark.backbone import best_forms
from densekit.benchmark.case import Record
from densekit.benchmark.peers import OURS
from densekit.benchmark.table import milliseconds
from densekit.files import whole_file

_OURS, _OTHERS, _FLOOR = '#1b6ca8', '#b8c4ce', '#c0392b'
_WHISKERS = {'elinewidth': 0.8, 'ecolor': '#222222'}
_PER_ROW = 2
_BAR, _FRAME = 0.3, 0.7  # inches


def draw(content: Mapping[str, Any], path: Path) -> bool:
    """Draws the cases that have more than one candidate.

    Args:
        content: of the results file.
        path: of a PNG.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [(case, best_forms(case['rows'])) for case in content['cases'].values() if case['kind'] != 'depthwise']
    shown = [(case, best) for case, best in shown if len(best) > 1]
    if not shown:
        return False
    shown.sort(key=lambda pair: -len(pair[1]))
    # Charts side by side are as high as the higher of them needs.
    slots = [len(best) for _, best in shown[::_PER_ROW]]
    heights = [_FRAME + _BAR * number for number in slots]
    with rc_context({'font.size': 8, 'axes.titlesize': 9}):
        figure = Figure(figsize=(12, 0.6 + sum(heights)), layout='constrained')
        FigureCanvasAgg(figure)
        title = f'Milliseconds on {content["device"]}, the fastest form of each.'
        figure.suptitle(f'{title} Lines: lowest to highest round; dashed: the floor')
        grid = figure.subplots(len(slots), _PER_ROW, squeeze=False, gridspec_kw={'height_ratios': heights})
        axes = list(grid.flat)
        for place, (axis, (case, best)) in enumerate(zip(axes, shown, strict=False)):
            _draw_case(axis, case, best, slots[place // _PER_ROW])
        for axis in axes[len(shown) :]:
            axis.set_axis_off()
        with whole_file(path) as draft:
            figure.savefig(draft, dpi=110, format='png', metadata={'Software': None})
    return True


def _draw_case(axis: Any, case: Record, best: Mapping[str, Record], slots: int) -> None:
    rows = sorted(best.values(), key=lambda row: median(row['rounds']))
    times = [1e3 * median(row['rounds']) for row in rows]
    low = [time - 1e3 * min(row['rounds']) for time, row in zip(times, rows, strict=True)]
    high = [1e3 * max(row['rounds']) - time for time, row in zip(times, rows, strict=True)]
    colours = [_OURS if row['who'].partition(' ')[0] == OURS else _OTHERS for row in rows]
    names = [f'{row["who"]}: {milliseconds(median(row["rounds"]))}\n{row["layout"]}, {row["mode"]}' for row in rows]
    axis.barh(range(len(rows)), times, color=colours, xerr=[low, high], error_kw=_WHISKERS)
    axis.set_yticks(range(len(rows)), names)
    axis.set_ylim(slots - 0.4, -0.6)  # bars side by side are as thick
    if case.get('floors'):
        axis.axvline(1e3 * case['floors']['best'], color=_FLOOR, linewidth=1, linestyle='--')
    axis.set_title(case['title'])
    axis.set_xlim(left=0)
    axis.tick_params(axis='y', labelsize=7)
    for side in ('top', 'right'):
        axis.spines[side].set_visible(False)
