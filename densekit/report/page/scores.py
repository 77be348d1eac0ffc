"""Sections about what a model finds: scores, curves, confusion, errors, images."""

from collections.abc import Sequence

import numpy as np

from densekit.report.page.charts import Line, bars, line_chart
from densekit.report.page.detection import MATCH, Detection, Scores
from densekit.report.page.gallery import gallery
from densekit.report.page.markup import DASH, Html, fold, note, number, picture, section, side_by_side, table, tag
from densekit.report.page.segmentation import Segmentation, mean

RECALLS = np.linspace(0, 1, 101)
KINDS = {'bbox': 'box', 'segm': 'mask'}
FIGURES = {'mAP': 'AP', 'mAP_50': 'AP50', 'mAP_75': 'AP75', 'mAP_s': 'APs', 'mAP_m': 'APm', 'mAP_l': 'APl'}
ERRORS = {
    'Cls': 'wrong class',
    'Loc': 'poorly placed',
    'Both': 'wrong class and poorly placed',
    'Dupe': 'found a second time',
    'Bkg': 'nothing is there',
    'Miss': 'not found',
    'FP': 'all that is false',
    'FN': 'all that is missing',
}
MAX_CELLS = 21  # rows of a confusion matrix with a number in each cell; beyond it is a picture
MOST_CONFUSED = 15
HEAT = 55  # % of colour in a cell at most, so that its text has a contrast of 4.5 in light and dark

Scored = tuple[str, Detection | Segmentation]  # title of the run


def scores_section(scored: Sequence[Scored], missing: Sequence[Html]) -> Html:
    """AP of detectors, mIoU of segmentors."""
    detectors = [(title, found) for title, found in scored if isinstance(found, Detection)]
    segmentors = [(title, found) for title, found in scored if isinstance(found, Segmentation)]
    parts = [tag('p', _evaluated(title, found)) for title, found in scored]
    if detectors:
        parts += [_ap_table(detectors), *_class_tables(detectors)]
        parts += [_pr_curves(detectors, kind) for kind in KINDS if any(kind in d.scores for _, d in detectors)]
    if segmentors:
        parts += [_iou_table(segmentors), _iou_bars(segmentors)]
    return section('scores', 'Scores', *missing, *parts)


def confusion_section(scored: Sequence[Scored], missing: Sequence[Html]) -> Html:
    """Which class is taken for which."""
    parts = []
    for title, found in scored:
        if found.confusion is None:
            parts.append(note(f'{title}: the confusion of boxes needs hotcoco: pip install hotcoco'))
        elif isinstance(found, Detection):
            what = f'objects, boxes from score {found.score_thr:g} at IoU {MATCH:g}'
            said = note('Column background: objects not found. Row background: boxes where nothing is.')
            parts.append(tag('div', _confusion(title, found.confusion, found.confused, what), said))
        else:
            parts.append(_confusion(title, found.confusion, found.classes, 'pixels'))
    return section('confusion', 'Confusion', *missing, side_by_side(*parts))


def errors_section(scored: Sequence[Scored], missing: Sequence[Html]) -> Html:
    """Error types of detectors, and what hotcoco says of the ground truth."""
    detectors = [(title, found) for title, found in scored if isinstance(found, Detection)]
    if not detectors:
        return section('errors', 'Detection errors', *missing or [note('No detector was evaluated.')])
    health = side_by_side(*(_health(title, found) for title, found in detectors))
    return section('errors', 'Detection errors', *missing, _tide(detectors), tag('h3', 'Ground truth'), health)


def images_section(scored: Sequence[Scored], missing: Sequence[Html]) -> Html:
    """Worst and best images."""
    parts = []
    for title, found in scored:
        if isinstance(found, Detection):
            how = (
                f'Ranked by F1: boxes from score {found.score_thr:g} against objects of their class, from IoU '
                f'{MATCH:g}; equal ones by the number of errors, then of objects found.'
            )
        else:
            how = 'Ranked by the mean IoU over the classes that are in the image or predicted for it.'
        parts.append(
            tag('div', tag('h3', title), note(how), gallery('Worst', found.worst), gallery('Best', found.best))
        )
    return section('images', 'Worst and best images', *missing, side_by_side(*parts))


def _evaluated(title: str, found: Detection | Segmentation) -> str:
    part = 'all' if found.images == found.total else f'{found.images:,} of the'
    spread = '' if found.images == found.total else ', evenly spread: figures of the whole set differ'
    engine = f', scored by {found.engine}' if isinstance(found, Detection) else ''
    return f'{title}: {found.source} on {part} {found.total:,} validation images{spread}{engine}.'


def _known(value: float | None) -> float | None:
    """None for COCO's -1."""
    return None if value is None or value < 0 else value


def _percent(values: Sequence[float | None], digits: int = 1) -> list[Html]:
    """Cells in percent; for two runs their difference too."""
    known = [_known(value) for value in values]
    cells = [number(value, digits, 100) for value in known]
    if len(known) == 2:
        a, b = known
        cells.append(number(None if a is None or b is None else b - a, digits, 100, sign=True))
    return cells


def _runs_header(titles: Sequence[str]) -> list[str]:
    return [*titles, *([f'{titles[1]} - {titles[0]}'] if len(titles) == 2 else [])]


def _ap_table(detectors: Sequence[tuple[str, Detection]]) -> Html:
    kinds = [kind for kind in KINDS if any(kind in d.scores for _, d in detectors)]
    names = list(detectors[0][1].scores['bbox'].summary)
    rows = []
    for name in names:
        cells: list[Html] = []
        for kind in kinds:
            cells += _percent([d.scores[kind].summary[name] if kind in d.scores else None for _, d in detectors])
        rows.append([FIGURES.get(name, name), *cells])
    header = [KINDS[kind] for kind in kinds]
    if len(detectors) > 1:
        header = [f'{KINDS[kind]}, {title}' for kind in kinds for title in _runs_header([t for t, _ in detectors])]
    return table('COCO figures in %', ['', *header], rows)


def _class_tables(detectors: Sequence[tuple[str, Detection]]) -> list[Html]:
    """By kind: all figures of one run, or the AP of two."""
    made = []
    for kind, said in KINDS.items():
        having = [(title, d) for title, d in detectors if kind in d.scores]
        if len(having) == 1:
            title, d = having[0]
            rows = []
            for name, figures in d.scores[kind].classes.items():
                values = [_known(figures[figure]) for figure in FIGURES]
                cells = [number(value, 1, 100) for value in values]
                rows.append([name, number(d.objects[name], 0), *cells, bars([values[0] or 0.0])])
            made.append(
                table(f'{title}: {said} AP by class in %', ['class', 'objects', *FIGURES.values(), ''], rows, True)
            )
        elif having:
            names = list(dict.fromkeys(name for _, d in having for name in d.scores[kind].classes))
            rows = []
            for name in names:
                values = [d.scores[kind].classes.get(name, {}).get('mAP') for _, d in having]
                objects = next(d.objects[name] for _, d in having if name in d.objects)
                rows.append([name, number(objects, 0), *_percent(values), bars([_known(v) or 0.0 for v in values])])
            header = ['class', 'objects', *_runs_header([title for title, _ in having]), '']
            made.append(table(f'{said} AP by class in %', header, rows, True))
    return made


def _pr_curves(detectors: Sequence[tuple[str, Detection]], kind: str) -> Html:
    """A small chart for each class: boxes or masks at IoU 0.5 and 0.75 of one run, at 0.5 of two."""
    alone = len(detectors) == 1
    keys = ['IoU 0.5', 'IoU 0.75'] if alone else [title for title, _ in detectors]
    scores = [d.scores.get(kind) for _, d in detectors]
    names = list(dict.fromkeys(name for s in scores if s is not None for name in s.classes))
    charts, without = [], []
    for name in names:
        curves = [curve for s in scores for curve in _curves(s, name, (0, 5) if alone else (0,))]
        lines = [
            Line(key, RECALLS.tolist(), curve.tolist(), i + 1, dash=i)
            for i, (key, curve) in enumerate(zip(keys, curves, strict=True))
            if (curve >= 0).all()
        ]
        if lines:
            found = [_known(s.classes.get(name, {}).get('mAP_50')) if s is not None else None for s in scores]
            caption = f'{name} {" and ".join(DASH if ap is None else f"{100 * ap:.0f}" for ap in found)}'
            charts.append(line_chart(caption, lines, 'recall', 'precision', y_range=(0, 1), x_range=(0, 1), small=True))
        else:
            without.append(name)
    samples = [
        tag('span', tag('span', class_=f'swatch c{i + 1}'), f' {key}{" (broken line)" if i else ""} ')
        for i, key in enumerate(keys)
    ]
    return tag(
        'div',
        tag(
            'h3', f'Precision (up) over recall (right) of {"masks" if kind == "segm" else "boxes"} by class, with AP50'
        ),
        tag('p', *samples, class_='note'),
        tag('div', *charts, class_='grid'),
        note(f'No object of these classes is in the images: {", ".join(without)}.') if without else '',
    )


def _curves(scores: Scores | None, name: str, thresholds: Sequence[int]) -> list[np.ndarray]:
    """Precisions of a class, by threshold; -1 where there is nothing to find."""
    if scores is None or name not in scores.classes:
        return [np.full(len(RECALLS), -1.0) for _ in thresholds]
    return [scores.precision[threshold, :, list(scores.classes).index(name)] for threshold in thresholds]


def _iou_table(segmentors: Sequence[tuple[str, Segmentation]]) -> Html:
    figures = [
        {'mIoU': mean(s.scores['IoU']), 'mAcc': mean(s.scores['Acc']), 'aAcc': float(s.scores['aAcc'])}
        for _, s in segmentors
    ]
    rows = [[name, *_percent([f[name] for f in figures], 2)] for name in ('mIoU', 'mAcc', 'aAcc')]
    return table('Figures of all pixels in %', ['', *_runs_header([title for title, _ in segmentors])], rows)


def _iou_bars(segmentors: Sequence[tuple[str, Segmentation]]) -> Html:
    """IoU by class, with the class's share of all pixels."""
    names = list(dict.fromkeys(name for _, s in segmentors for name in s.classes))
    rows = []
    for name in names:
        values: list[float | None] = []
        for _, s in segmentors:
            value = float(s.scores['IoU'][s.classes.index(name)]) if name in s.classes else None
            values.append(None if value is None or np.isnan(value) else value)
        first = next(s for _, s in segmentors if name in s.classes)
        share = first.confusion[first.classes.index(name)].sum() / max(first.confusion.sum(), 1)
        accuracy = (
            [number(float(first.scores['Acc'][first.classes.index(name)]), 2, 100)] if len(segmentors) == 1 else []
        )
        bar = bars([float('nan') if value is None else value for value in values])
        rows.append([name, number(float(share), 2, 100), *_percent(values, 2), *accuracy, bar])
    titles = ['IoU', 'Acc'] if len(segmentors) == 1 else _runs_header([title for title, _ in segmentors])
    return table('IoU by class in %', ['class', 'of all pixels', *titles, ''], rows, True)


def _confusion(title: str, matrix: np.ndarray, names: Sequence[str], what: str) -> Html:
    """Rows are true classes; few classes as a table, many as a picture with a list of what is confused most."""
    if len(names) > MAX_CELLS:
        kept = np.flatnonzero(matrix.sum(axis=0) + matrix.sum(axis=1))
        if len(kept) < len(names):
            what += f'; without {len(names) - len(kept)} classes that neither are there nor are predicted'
        matrix, names = matrix[np.ix_(kept, kept)], [names[i] for i in kept.tolist()]
    total = matrix.sum(axis=1, keepdims=True)
    shares = matrix / np.maximum(total, 1)
    caption = f'{title}: of each true class (row) the share predicted as each class (column), in %; {what}'
    if len(names) <= MAX_CELLS:
        rows = [
            [name, *(_heat(int(n), share) for n, share in zip(counts, row, strict=True)), number(int(counts.sum()), 0)]
            for name, counts, row in zip(names, matrix, shares, strict=True)
        ]
        return tag('div', table(caption, ['true', *names, 'all'], rows), class_='confusion')
    factor = max(1, 480 // max(len(names), 1))
    grey = (255 * (1 - shares**0.5)).astype(np.uint8)
    image = np.stack([grey, grey, np.full_like(grey, 255) - (255 - grey) // 3], axis=2)
    image = image.repeat(factor, axis=0).repeat(factor, axis=1)
    off = matrix.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(off, axis=None)[::-1][:MOST_CONFUSED]
    rows = []
    for i, j in zip(*np.unravel_index(order, off.shape), strict=True):
        if off[i, j]:
            rows.append([names[i], names[j], number(int(off[i, j]), 0), number(float(shares[i, j]), 1, 100)])
    alt = f'Confusion of {len(names)} classes; dark on the diagonal is right'
    return tag(
        'div',
        tag('figure', picture(image, alt), tag('figcaption', caption), class_='matrix'),
        table(f'{title}: confused most; {what}', ['true', 'predicted', 'number', '% of true'], rows, True),
    )


def _heat(count: int, share: float) -> Html:
    """A cell, the stronger its colour the more."""
    shown = f'{100 * share:.0f}' if count else '·'
    return tag('td', shown, class_='n heat', style=f'--s:{HEAT * share:.0f}%', title=f'{count:,}', data_value=count)


def _tide(detectors: Sequence[tuple[str, Detection]]) -> Html:
    known = [(title, d.errors) for title, d in detectors if d.errors is not None]
    if not known:
        return note('Error types need hotcoco: pip install hotcoco')
    highest = max([*(e['delta_ap'][name] for _, e in known for name in ERRORS), 1e-9])
    rows = []
    for name, said in ERRORS.items():
        numbers = [number(e['counts'].get(name), 0) for _, e in known]
        gains = [e['delta_ap'][name] for _, e in known]
        rows.append([f'{name}: {said}', *numbers, *_percent(gains), bars([gain / highest for gain in gains])])
    header = ['error', 'number', 'AP50 gained', '']
    if len(known) == 2:
        titles = [title for title, _ in known]
        header = ['error', *(f'number, {t}' for t in titles), *(f'gained, {t}' for t in _runs_header(titles)), '']
    now = ', '.join(f'{title} {100 * e["ap_base"]:.1f}' for title, e in known)
    return tag(
        'div',
        table('AP50 of boxes, in %, that mending one kind of error alone would add', header, rows),
        note(
            f'AP50 now: {now}. Errors are those of TIDE, of boxes of any score: right from IoU {MATCH:g}, on '
            'background below 0.1. A model with many boxes of a low score has many errors that cost little.'
        ),
    )


def _health(title: str, found: Detection) -> Html:
    if found.health is None:
        return note(f'{title}: this check needs hotcoco: pip install hotcoco')
    summary = found.health['summary']
    problems = [
        tag('li', f'{kind}: {_told(problem)}')
        for kind, key in (('error', 'errors'), ('warning', 'warnings'))
        for problem in found.health[key]
    ]
    line = (
        f'{title}: {summary["num_images"]:,} images, {summary["num_annotations"]:,} objects of '
        f'{summary["num_categories"]:,} classes; images without any: {summary["images_without_annotations"]:,}.'
    )
    if not problems:
        return tag('p', f'{line} hotcoco finds no fault.')
    told = f'{len(problems)} remark{"s" * (len(problems) > 1)} of hotcoco'
    return tag('div', tag('p', line), fold(told, tag('ul', *problems[:50])))


def _told(problem: object) -> str:
    return ', '.join(f'{k} {v}' for k, v in problem.items()) if isinstance(problem, dict) else str(problem)
