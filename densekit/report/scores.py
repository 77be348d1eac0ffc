"""The figures of a test: a table for the terminal, JSON for whatever comes after."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from densekit.report.tables import COCO_ROWS, format_table, metrics_table

COCO_FIGURE = re.compile(r'((?:.*/)?)(bbox|segm)_(mAP(?:_(?:50|75|[sml]))?|AR(?:_[sml])?@\d+)')
SHOWN_BY_CLASS = ('AP', 'AP50', 'AP75')

ByClass = dict[str, dict[str, dict[str, float]]]


def by_class(metrics: Iterable[Any]) -> ByClass:
    """The figures of each class.

    Args:
        metrics: of an evaluator that has evaluated, in the first process.

    Returns:
        Figures by what was scored ('coco/bbox', 'coco/segm', or '' for label maps), class, and name; as fractions from
        COCO, -1 where there is nothing to measure, in % from label maps, NaN where a class is nowhere.
    """
    tables: ByClass = {}
    for metric in metrics:
        prefix = f'{metric.prefix}/' if metric.prefix else ''
        for kind, table in getattr(metric, 'class_scores', {}).items():
            tables[f'{prefix}{kind}'] = table
        confusion = getattr(metric, 'confusion', None)
        if confusion is not None:
            from densekit.evaluation.iou import class_scores

            scores = class_scores(confusion, metric.metrics, metric.beta)
            scores.pop('aAcc')
            tables[prefix.rstrip('/')] = {
                name: {column: 100 * float(values[label]) for column, values in scores.items()}
                for label, name in enumerate(metric.dataset_meta['classes'])
            }
    return tables


def scores_table(metrics: Mapping[str, float], classes: ByClass) -> str:
    """COCO's twelve figures in a row for boxes and one for masks, the other metrics, then AP by class.

    Args:
        metrics: as the evaluators name them.
        classes: what :func:`by_class` gave; IoU by class is not shown, its metric has logged it.
    """
    rows: dict[tuple[str, str], dict[str, float]] = {}
    others = {}
    for key, value in metrics.items():
        if match := COCO_FIGURE.fullmatch(key):
            rows.setdefault((match[1], match[2]), {})[_short(match[3])] = value
        elif '_AP/' not in key:
            others[key] = value
    tables = []
    if rows:
        columns = list(dict.fromkeys(name for row in rows.values() for name in row))
        several = len({prefix for prefix, _ in rows}) > 1
        lines = [
            [(prefix if several else '') + COCO_ROWS[kind], *(_percent(row.get(name)) for name in columns)]
            for (prefix, kind), row in rows.items()
        ]
        tables.append(format_table(['%', *columns], lines))
    if others or not rows:
        tables.append(metrics_table(others))
    coco = {key: table for key, table in classes.items() if key.endswith(('bbox', 'segm'))}
    if coco:
        heads = [COCO_ROWS[key[-4:]] for key in coco]
        columns = [f'{head} {name}' if name == 'AP' else name for head in heads for name in SHOWN_BY_CLASS]
        names = dict.fromkeys(name for table in coco.values() for name in table)
        lines = [
            [name, *(_percent(table.get(name, {}).get(column)) for table in coco.values() for column in SHOWN_BY_CLASS)]
            for name in names
        ]
        tables.append(format_table(['class', *columns], lines))
    return '\n\n'.join(tables)


def scores_json(metrics: Mapping[str, float], classes: ByClass) -> str:
    """The metrics, and those of each class under names such as ``coco/bbox_AP/person`` and ``IoU/wall``.

    Args:
        metrics: as the evaluators name them.
        classes: what :func:`by_class` gave.

    Returns:
        JSON; null in the place of NaN, which JSON does not know.
    """
    entries = dict(metrics)
    for what, table in classes.items():
        for name, scores in table.items():
            for column, value in scores.items():
                start = f'{what}_' if what.endswith(('bbox', 'segm')) else f'{what}/' if what else ''
                entries[f'{start}{column}/{name}'] = value
    plain = {key: None if math.isnan(value) else value for key, value in entries.items()}
    return json.dumps(plain, indent=2, sort_keys=True) + '\n'


def _short(name: str) -> str:
    """``AP50`` for ``mAP_50``, ``AR10`` for ``AR@10``, ``ARs`` for ``AR_s@100``."""
    if size := re.fullmatch(r'AR_([sml])@\d+', name):
        return f'AR{size[1]}'
    return name.removeprefix('m').replace('_', '').replace('@', '')


def _percent(value: float | None) -> str:
    return '' if value is None else '-' if value == -1 else f'{100 * value:.1f}'
