"""Labels of COCO files go by the names of the classes, never by their order in the file.

mmdet 3.3.0 asks its COCO wrapper for the ids of the categories of given names, and takes the answer to be in the order
of the names (mmdet/datasets/coco.py:70, mmdet/evaluation/metrics/coco_metric.py:417). It is in the order of the file,
and without the names that the file does not have: data sets whose files differ in that order have other labels.

Where the ids do not ascend in the order of the names, mmdet also writes the AP of one class beside the name of another:
pycocotools sorts the ids (cocoeval.py:136), and coco_metric.py:547 takes them for unsorted.
"""

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

from mmengine.logging import print_log

import densekit.ops  # noqa: F401  importing mmdet needs mmcv's ops


def ids_by_name(names: Sequence[str], categories: Iterable[dict]) -> list:
    """The ids of categories in the order of their names.

    Names after the last one that is found may be absent, unless another category looks like one of them: a file of
    things serves the things of a panoptic data set, whose stuff comes after.

    Args:
        names: of classes, by label.
        categories: of a COCO file.

    Returns:
        The ids, by label.

    Raises:
        ValueError: if a name is absent where that would shift the labels after it, or is nearly that of another
            category, or stands for several categories.
    """
    categories = list(categories)
    counts = Counter(category['name'] for category in categories)
    twice = [name for name in names if counts[name] > 1] + [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise ValueError(f'classes are known by their names, and {twice[0]!r} is that of several; rename all but one')
    ids = {category['name']: category['id'] for category in categories}
    absent = [name for name in names if name not in ids]
    last = max((i for i, name in enumerate(names) if name in ids), default=-1)
    unknown = [name for name in names[: last + 1] if name not in ids]
    others = [str(name) for name in ids if name not in set(names)]
    for name in [*unknown, *absent]:
        near = difflib.get_close_matches(str(name), others, n=1)
        if near or unknown or last < 0:
            hint = f'the nearest is {near[0]!r}' if near else f'there are {", ".join(map(str, list(ids)[:10]))}'
            raise ValueError(
                f'class {name!r} is no category of the COCO file; {hint}. Set metainfo.classes of the data set to '
                'names of its categories.'
            )
    if absent:
        told = f'{", ".join(absent[:3])}{", ..." if len(absent) > 3 else ""}'
        print_log(f'The COCO file has no category for the last {len(absent)} classes ({told}).', logger='current')
    return [ids[name] for name in names if name in ids]


if find_spec('mmdet'):
    from mmdet.datasets.api_wrappers import COCO, COCOeval, COCOevalMP
    from mmdet.evaluation.metrics import coco_metric

    _upstream_get_cat_ids = COCO.get_cat_ids

    def _get_cat_ids(self: Any, cat_names: Any = [], sup_names: Any = [], cat_ids: Any = []) -> list:
        """The ids of the categories of given names, in the order of the names; other questions as before."""
        if isinstance(cat_names, str) or not len(cat_names) or len(sup_names) or len(cat_ids):
            return _upstream_get_cat_ids(self, cat_names, sup_names, cat_ids)
        return ids_by_name(list(cat_names), self.dataset['categories'])

    class _InGivenOrder:
        """Keeps the results of pycocotools in the order in which the categories were given."""

        def evaluate(self) -> None:
            self._given = list(self.params.catIds)  # type: ignore[attr-defined]
            super().evaluate()  # type: ignore[misc]

        def accumulate(self, p: Any = None) -> None:
            super().accumulate(p)  # type: ignore[misc]
            if self.params.useCats and p is None:  # type: ignore[attr-defined]
                order = [self.params.catIds.index(i) for i in self._given]  # type: ignore[attr-defined]
                for name, axis in (('precision', 2), ('scores', 2), ('recall', 1)):
                    self.eval[name] = self.eval[name].take(order, axis)  # type: ignore[attr-defined]

    class COCOevalInOrder(_InGivenOrder, COCOeval):
        """pycocotools' evaluation, for mmdet's CocoMetric."""

    class COCOevalMPInOrder(_InGivenOrder, COCOevalMP):
        """The same in several processes."""


def match_classes_by_name() -> None:
    """Makes mmdet's COCO data sets and metrics match classes by name; without mmdet there is nothing to do."""
    if find_spec('mmdet'):
        COCO.get_cat_ids = _get_cat_ids
        coco_metric.COCOeval, coco_metric.COCOevalMP = COCOevalInOrder, COCOevalMPInOrder
