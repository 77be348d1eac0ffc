"""Finds what is wrong with the data of a config before the first step.

:data:`densekit.data.faults.KINDS` lists all that is looked for. Annotations are read whole and every file named in them
is looked for; label maps are listed, and their headers read. Some images and label maps spread over all are decoded, so
that what is wrong with a whole data set shows; ``headers`` and ``decode`` open all of them.

What no check sees: a wrong label, a missing object, and damage within an image that its decoder does not notice.
"""

import inspect
import os.path as osp
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, Registry

from densekit.data.coco_checks import CocoUse, Table, check_file, check_use
from densekit.data.coco_file import read_coco
from densekit.data.faults import Fault, fault
from densekit.data.image_files import Progress
from densekit.data.labelmap_checks import LabelMapUse, check_label_maps
from densekit.data.locate import GENERATED, is_remote, leaves, type_name

_PARTS = ('dataloader', 'evaluator')
_PANOPTIC = ('CocoPanopticDataset', 'CocoPanopticMetric')
# Data sets that read the very files their annotations name, and loaders that read files as these checks do.
_READ_AS_THEY_ARE = ('CocoDataset', 'CocoPanopticDataset', *GENERATED)
_IMAGE_LOADER, _LABEL_LOADER = 'LoadImageFromFile', 'LoadAnnotations'
HEADS = re.compile(r'(?:^|\.)(?:bbox_head|mask_head|decode_head|auxiliary_head)(?:\.\d+)?$')


@dataclass
class Report:
    """What is in a data set, or a file that an evaluator reads, and what is wrong with it.

    Attributes:
        where: the part of the config, such as 'train_dataloader'.
        source: annotation file or folder.
        counts: what there is, such as ``{'images': 40, 'boxes': 97}``.
        classes: usable boxes, or decoded label maps, by class.
        faults: all of them.
        remarks: what is not at fault and good to know; why something was not checked.
    """

    where: str
    source: str
    counts: dict[str, int] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def check_data(
    cfg: Config,
    loops: Sequence[str] = ('train', 'val'),
    *,
    headers: bool = False,
    decode: bool = False,
    progress: Progress | None = None,
) -> list[Fault]:
    """Finds what is wrong with the data sets of a config and with the annotations its evaluators read.

    Data sets are looked for inside wrappers and lists. Remote files, generated data that is not there yet and types
    of data sets that are not of COCO's kind nor of label maps are passed over; :func:`inspect_data` says which.

    Args:
        cfg: a config with ``{loop}_dataloader`` and ``{loop}_evaluator``.
        loops: any of 'train', 'val' and 'test'.
        headers: read the header of every image.
        decode: decode every image and label map.
        progress: called with a title, the files done and their number.

    Returns:
        The faults, none for clean data. :func:`densekit.data.faults.raise_for` makes an error of them.
    """
    reports = inspect_data(cfg, loops, headers=headers, decode=decode, progress=progress)
    return [found for report in reports for found in report.faults]


def inspect_data(
    cfg: Config,
    loops: Sequence[str] = ('train', 'val'),
    *,
    headers: bool = False,
    decode: bool = False,
    progress: Progress | None = None,
) -> list[Report]:
    """As :func:`check_data`, by data set and with counts."""
    reports: list[Report] = []
    coco: dict[tuple[str, bool], list[CocoUse]] = {}
    for loop in loops:
        if loop == 'test' and 'val' in loops and all(cfg.get(f'test_{p}') == cfg.get(f'val_{p}') for p in _PARTS):
            continue
        for dataset in leaves((cfg.get(f'{loop}_dataloader') or {}).get('dataset'), 'dataset', 'datasets'):
            _Dataset(cfg, loop, dataset).collect(reports, coco, headers, decode, progress)
        _collect_evaluators(cfg, loop, reports, coco)
    reports += _check_coco(coco, headers, decode, progress)
    return _without_repetition(reports)


@dataclass
class _Dataset:
    """A data set of a config, not built."""

    cfg: Config
    loop: str
    dataset: Mapping

    @property
    def where(self) -> str:
        return f'{self.loop}_dataloader'

    def collect(
        self,
        reports: list[Report],
        coco: dict[tuple[str, bool], list[CocoUse]],
        headers: bool,
        decode: bool,
        progress: Progress | None,
    ) -> None:
        """Checks a data set of label maps; a COCO file is put among those to be read."""
        kind = type_name(self.dataset)
        cls = _lookup(DATASETS, self.cfg, self.dataset.get('type'))
        root = self.dataset.get('data_root') or ''
        report = Report(self.where, root or kind)
        if any(is_remote(path, self.dataset.get('backend_args')) for path in self._paths()):
            report.remarks.append('not checked: it is remote')
        elif kind in GENERATED and not osp.exists(osp.join(root, 'shapes.json')):
            report.remarks.append('not checked: it is generated on first use')
        elif _is_coco(cls):
            path, use = self._coco(cls)
            coco.setdefault((path, _is_panoptic(cls)), []).append(use)
            report.faults += self.head_faults(cls)
            report.source = path
        elif hasattr(cls, 'get_label_map'):
            report = self._label_maps(cls, headers, decode, progress)
        else:
            report.remarks.append(f'not checked: of type {kind}, whose files are neither COCO JSON nor label maps')
        if report.faults or report.remarks or report.counts:
            reports.append(report)

    def _paths(self) -> list[str]:
        """What the config says of files, as it stands there."""
        named = [self.dataset.get('data_root'), self.dataset.get('ann_file')]
        return [path or '' for path in [*named, *(self.dataset.get('data_prefix') or {}).values()]]

    def _path(self, path: str) -> str:
        root = self.dataset.get('data_root') or ''
        return path if osp.isabs(path) or not root else osp.join(root, path)

    def head_faults(self, cls: Any) -> Iterator[Fault]:
        """The heads of the model of another number of classes than the data set; those of boxes know things only."""
        metainfo = cls._load_metainfo(self.dataset.get('metainfo'))
        things = metainfo.get('thing_classes') if _is_panoptic(cls) else None
        return _head_faults(self.cfg, self.loop, metainfo.get('classes') or (), things)

    def _coco(self, cls: Any) -> tuple[str, CocoUse]:
        metainfo = cls._load_metainfo(self.dataset.get('metainfo'))
        prefix = self.dataset.get('data_prefix') or {}
        filters = self.dataset.get('filter_cfg') or {}
        pipeline = list(_transforms(self.dataset.get('pipeline')))
        unopened = _names_otherwise(cls) or _read_otherwise(pipeline, _IMAGE_LOADER)
        use = CocoUse(
            where=self.where,
            classes=tuple(map(str, metainfo.get('classes') or ())),
            kind=type_name(self.dataset),
            default_classes='classes' not in (self.dataset.get('metainfo') or {}),
            training=self.loop == 'train' and not self.dataset.get('test_mode'),
            image_prefix=None if unopened else self._path(prefix.get('img') or ''),
            seg_prefix=self._path(prefix['seg']) if _is_panoptic(cls) and prefix.get('seg') else None,
            filter_empty=filters.get('filter_empty_gt'),
            min_size=filters.get('min_size', 0),
            masks=any(t.get('with_mask') for t in pipeline if 'LoadAnnotations' in type_name(t)),
            oriented=_follows_exif(pipeline),
            unopened=unopened,
        )
        return osp.normpath(self._path(self.dataset.get('ann_file') or '')), use

    def _label_maps(self, cls: Any, headers: bool, decode: bool, progress: Progress | None) -> Report:
        """Lists the files as the class itself does, and checks them."""
        report = Report(self.where, self._path((self.dataset.get('data_prefix') or {}).get('seg_map_path') or ''))
        classes = cls._load_metainfo(self.dataset.get('metainfo')).get('classes')
        own = cls.METAINFO.get('classes') or ()
        strange = sorted(set(classes or ()) - set(own)) if own else []
        if not classes or strange:
            text = f'{", ".join(strange)}: {type_name(self.dataset)} has {", ".join(own[:10])}, ...'
            report.faults.append(fault('classes-unknown', report.source, strange[0] if strange else None, text))
            return report
        arguments = {key: value for key, value in self.dataset.items() if key not in ('type', '_scope_')}
        built = cls(**arguments | dict(pipeline=[], serialize_data=False, lazy_init=False))
        pipeline = list(_transforms(self.dataset.get('pipeline')))
        loaders = [t for t in pipeline if type_name(t) == 'LoadAnnotations']
        use = LabelMapUse(
            where=self.where,
            training=self.loop == 'train',
            ignored=_ignored_label(self.cfg, self.loop),
            opencv=any(t.get('imdecode_backend') == 'cv2' for t in loaders),
            oriented=_follows_exif(pipeline),
            unopened=_read_otherwise(pipeline, _IMAGE_LOADER, _LABEL_LOADER),
        )
        found = check_label_maps(built, use, headers=headers, decode=decode, progress=progress)
        report.faults += [*self.head_faults(cls), *found.faults]
        report.counts = {'images': found.images, 'label maps': found.maps, 'decoded': found.decoded}
        report.classes, report.remarks = found.classes, found.remarks
        return report


def _collect_evaluators(
    cfg: Config, loop: str, reports: list[Report], coco: dict[tuple[str, bool], list[CocoUse]]
) -> None:
    """The annotation files of the evaluators of a loop, for the classes of its data set."""
    datasets = list(leaves((cfg.get(f'{loop}_dataloader') or {}).get('dataset'), 'dataset', 'datasets'))
    classes = [_lookup(DATASETS, cfg, dataset.get('type')) for dataset in datasets]
    if not datasets or not _is_coco(classes[0]):
        return
    metainfo = classes[0]._load_metainfo(datasets[0].get('metainfo'))
    for metric in leaves(cfg.get(f'{loop}_evaluator'), 'metrics'):
        path, kind = metric.get('ann_file'), type_name(metric)
        panoptic = kind in _PANOPTIC
        if not path or 'Coco' not in kind or is_remote(path, metric.get('backend_args')):
            continue
        if any(osp.abspath(path).startswith(osp.abspath(root) + osp.sep) for root in _not_generated_yet(datasets)):
            continue
        # Instances are scored in the things alone, which a file of instances is of.
        of_things = _is_panoptic(classes[0]) and not panoptic
        names = metainfo.get('thing_classes' if of_things else 'classes') or ()
        wanted = metric.get('metric', 'bbox')
        segm = wanted == 'segm' or (not isinstance(wanted, str) and 'segm' in wanted)
        uses = coco.setdefault((osp.normpath(path), panoptic), [])
        own = next((i for i, use in enumerate(uses) if use.where == f'{loop}_dataloader'), None)
        if own is not None:
            uses[own] = replace(uses[own], scored=True, masks=uses[own].masks or segm)
        else:
            where = f'{loop}_evaluator'
            uses.append(CocoUse(where, tuple(map(str, names)), kind, scored=True, masks=segm and not panoptic))


def _check_coco(
    coco: Mapping[tuple[str, bool], Sequence[CocoUse]], headers: bool, decode: bool, progress: Progress | None
) -> list[Report]:
    """Reads each file once, one after the other, as each may take gigabytes."""
    reports, ids = [], dict[str, list[tuple[str, np.ndarray]]]()
    for (path, panoptic), uses in coco.items():
        if progress is not None:
            progress(f'reading {path}', 0, 0)
        table = Table(read_coco(path, panoptic))
        of_file = check_file(table)
        for use in uses:
            report = Report(use.where, path, faults=of_file)
            of_file = []  # told once
            if table.file.readable:
                found = check_use(table, use, headers=headers, decode=decode, progress=progress)
                ids.setdefault(use.where, []).append((path, found.image_ids))
                report.counts = {'images': found.images, 'without boxes': found.without, 'boxes': found.boxes}
                report.classes, report.remarks = found.classes, found.remarks
                report.faults += found.faults
            reports.append(report)
    reports += [_differing(where, ids) for where in ids if where.endswith('_evaluator')]
    return reports


def _differing(where: str, ids: Mapping[str, Sequence[tuple[str, np.ndarray]]]) -> Report:
    """Whether the files of an evaluator have the images of the data sets that it scores."""
    loader = where.replace('_evaluator', '_dataloader')
    own = np.concatenate([found for _, found in ids.get(loader, [])] or [np.zeros(0, np.int64)])
    report = Report(where, '')
    for path, scored in ids[where]:
        for here, text in ((np.setdiff1d(scored, own), 'is scored and not predicted'),
                           (np.setdiff1d(own, scored), 'is predicted and not in this file')):  # fmt: skip
            if len(here) and loader in ids:
                told = f'image {here[0]} (one of {len(here):,}) of {loader} {text}'
                report.faults.append(fault('evaluator-differs', path, int(here[0]), told))
    return report


def _without_repetition(reports: Sequence[Report]) -> list[Report]:
    """Without the faults of a data set that another loop reads as well, and without empty reports."""
    told: set[tuple] = set()
    kept = []
    for report in reports:
        fresh = [found for found in report.faults if (found.kind, found.file, found.id) not in told]
        told.update((found.kind, found.file, found.id) for found in fresh)
        report.faults = fresh
        if fresh or report.counts or report.remarks:
            kept.append(report)
    return kept


def _lookup(registry: Registry, cfg: Config, kind: Any) -> Any:
    """The class that a type names, as mmengine finds it when it builds the config."""
    if not isinstance(kind, str):
        return kind
    with registry.switch_scope_and_registry(cfg.get('default_scope')) as scoped:
        return scoped.get(kind)


def _is_coco(cls: Any) -> bool:
    """Whether a data set reads COCO's format; LVIS, which derives from it, labels and names images otherwise."""
    names = {owner.__name__ for owner in getattr(cls, '__mro__', ())}
    return 'CocoDataset' in names and not any(name.startswith('LVIS') for name in names)


def _is_panoptic(cls: Any) -> bool:
    return any(owner.__name__ in _PANOPTIC for owner in getattr(cls, '__mro__', ()))


def _names_otherwise(cls: Any) -> str:
    """Why the files of a data set of COCO's kind are not those that its annotation file names, or ''."""
    for method in ('load_data_list', 'parse_data_info'):
        owner = next((owner.__name__ for owner in cls.__mro__ if method in vars(owner)), '')
        if owner not in _READ_AS_THEY_ARE:
            return f'images not looked for: {owner}.{method} may name other files than the annotations do'
    return ''


def _read_otherwise(pipeline: Sequence[Mapping], *loaders: str) -> str:
    """Why files are not opened: a pipeline without the loaders that read them as these checks do, or ''."""
    names = [type_name(transform) for transform in pipeline]
    absent = [loader for loader in loaders if names and loader not in names]
    others = [name for name in names if 'Load' in name and name not in loaders] or names[:1]
    return f'files not opened: the pipeline reads them by {", ".join(others)}, not {absent[0]}' if absent else ''


def _transforms(pipeline: Any) -> Iterator[Mapping]:
    """The transforms of a pipeline, those inside others as well."""
    if isinstance(pipeline, Mapping):
        if 'type' in pipeline:
            yield pipeline
        pipeline = list(pipeline.values())
    if isinstance(pipeline, list | tuple):
        for part in pipeline:
            yield from _transforms(part)


def _follows_exif(pipeline: Sequence[Mapping]) -> bool:
    loader = next((t for t in pipeline if 'LoadImage' in type_name(t)), {})
    ignores = str(loader.get('color_type', 'color'))
    return ignores in ('color', 'grayscale') and loader.get('imdecode_backend', 'cv2') in ('cv2', 'pillow')


def _ignored_label(cfg: Config, loop: str) -> int:
    if loop == 'train':
        head = (cfg.get('model') or {}).get('decode_head') or {}
        head = head[-1] if isinstance(head, list | tuple) else head
        return head.get('ignore_index', 255)
    metrics = list(leaves(cfg.get(f'{loop}_evaluator'), 'metrics'))
    return next((m['ignore_index'] for m in metrics if 'ignore_index' in m), 255)


def _not_generated_yet(datasets: Sequence[Mapping]) -> list[str]:
    roots = [dataset.get('data_root') or '' for dataset in datasets if type_name(dataset) in GENERATED]
    return [root for root in roots if not osp.exists(osp.join(root, 'shapes.json'))]


def _head_faults(
    cfg: Config, loop: str, classes: Sequence[str], things: Sequence[str] | None = None
) -> Iterator[Fault]:
    """The heads of the model of another number of classes than the data set, or than its things have."""
    file = str(getattr(cfg, 'filename', None) or 'the config')
    for path, head in _heads(cfg.get('model') or {}, ''):
        count = head.get('num_classes', _default(_lookup(MODELS, cfg, head.get('type')), 'num_classes'))
        learned = things or classes
        if isinstance(count, int) and classes and count != len(learned) and not head.get('class_agnostic'):
            kind = 'classes of things' if things else 'classes'
            text = f'model.{path} has num_classes={count}, and the {loop} data set {len(learned)} {kind}'
            yield fault('heads-differ', file, path, text)


def _heads(node: Any, path: str) -> Iterator[tuple[str, Mapping]]:
    if isinstance(node, Mapping):
        # Heads that have a place per word, or tell edges from the rest, whatever the number of classes.
        if node.get('language_model') or type_name(node) == 'STDCHead':
            return
        if HEADS.search(path) and 'type' in node:
            yield path, node
        children = list(node.items())
    elif isinstance(node, list | tuple):
        children = list(enumerate(node))
    else:
        return
    for key, child in children:
        yield from _heads(child, f'{path}.{key}' if path else str(key))


def _default(cls: Any, name: str) -> Any:
    """The default of an argument of a class, or of the base class that takes it."""
    for owner in getattr(cls, '__mro__', ()):
        if '__init__' in vars(owner):
            parameter = inspect.signature(owner.__init__).parameters.get(name)
            if parameter is not None:
                return parameter.default
    return None
