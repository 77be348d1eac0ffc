"""Checks that the data a config names is on disk, before anything is built."""

import os
import os.path as osp
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Generated in data_root on first use.
GENERATED = ('ShapesDetDataset', 'ShapesSegDataset')


@dataclass(frozen=True)
class _Source:
    """A public data set: what its folder holds and where it comes from."""

    name: str
    used_by: tuple[str, ...]
    layout: tuple[str, ...]
    download: str


SOURCES = (
    _Source(
        name='COCO 2017',
        used_by=('CocoDataset', 'CocoMetric', 'FastCocoMetric'),
        layout=('annotations/instances_train2017.json', 'annotations/instances_val2017.json', 'train2017/', 'val2017/'),
        download='train2017.zip, val2017.zip and annotations_trainval2017.zip from https://cocodataset.org/#download',
    ),
    _Source(
        name='ADE20K (SceneParse150)',
        used_by=('ADE20KDataset',),
        layout=('images/training/', 'images/validation/', 'annotations/training/', 'annotations/validation/'),
        download='http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip',
    ),
)


@dataclass(frozen=True)
class _Need:
    """A path that a config names.

    Attributes:
        path: the path as the run would open it.
        folder: whether it has to be a folder.
        user: type of the dataset or metric that reads it.
        origin: where the config says so, for the message.
    """

    path: str
    folder: bool
    user: str
    origin: str

    def problem(self) -> str | None:
        """What is wrong with the path, None if nothing is."""
        if self.folder:
            if not osp.isdir(self.path):
                return 'no such folder'
            with os.scandir(self.path) as entries:
                return None if any(entries) else 'an empty folder'
        return None if osp.exists(self.path) else 'no such file'


def type_name(cfg: Mapping) -> str:
    """The name of a config's type, which may stand with its module or as the class itself."""
    kind = cfg.get('type', '')
    return kind.rpartition('.')[2] if isinstance(kind, str) else kind.__name__


def leaves(cfg: Any, *keys: str) -> Iterator[Mapping]:
    """The datasets, or metrics, inside lists and wrappers that hold them under one of ``keys``."""
    if isinstance(cfg, Mapping):
        inner = [cfg[key] for key in keys if cfg.get(key)]
        if not inner:
            yield cfg
        for part in inner:
            yield from leaves(part, *keys)
    elif isinstance(cfg, Sequence) and not isinstance(cfg, str):
        for part in cfg:
            yield from leaves(part, *keys)


def is_remote(path: str, backend_args: Mapping | None) -> bool:
    """Whether a path is read through mmengine from somewhere other than this machine's files."""
    return '://' in path or (backend_args or {}).get('backend', 'local') != 'local'


def _dataset_needs(dataset: Mapping, loader: str) -> Iterator[_Need]:
    """What one dataset reads: its root, its annotation file and the folders of ``data_prefix``."""
    root = dataset.get('data_root') or ''
    paths = [('data_root', root, True), ('ann_file', dataset.get('ann_file'), False)]
    paths += [(f'data_prefix.{key}', value, True) for key, value in (dataset.get('data_prefix') or {}).items()]
    for key, path, folder in paths:
        full = osp.join(root, path) if path and key != 'data_root' and '://' not in path else path
        if full and not is_remote(full, dataset.get('backend_args')):
            yield _Need(osp.normpath(full), folder, type_name(dataset), f'{loader}.dataset, {key}')


def _needs(cfg: Mapping, loops: Sequence[str]) -> list[_Need]:
    """Everything the loops read that is not generated."""
    needs: list[_Need] = []
    generated: list[str] = []
    for loop in loops:
        loader = f'{loop}_dataloader'
        for dataset in leaves((cfg.get(loader) or {}).get('dataset'), 'dataset', 'datasets'):
            if type_name(dataset) in GENERATED:
                generated.append(osp.abspath(dataset.get('data_root') or ''))
            else:
                needs += _dataset_needs(dataset, loader)
        for metric in leaves(cfg.get(f'{loop}_evaluator'), 'metrics'):
            path = metric.get('ann_file')
            if path and not is_remote(path, metric.get('backend_args')):
                needs.append(_Need(osp.normpath(path), False, type_name(metric), f'{loop}_evaluator, ann_file'))
    return [need for need in needs if not any(_is_inside(need.path, root) for root in generated)]


def _is_inside(path: str, folder: str) -> bool:
    return osp.join(osp.abspath(path), '').startswith(osp.join(osp.abspath(folder), ''))


def _advice(needs: Sequence[_Need]) -> Iterator[str]:
    """Layout and download of every known data set among the needs."""
    for source in SOURCES:
        roots: dict[str, None] = {}  # each once, in order
        for need in needs:
            for entry in source.layout:
                tail = osp.sep + osp.normpath(entry)
                if need.user in source.used_by and (osp.sep + need.path).endswith(tail):
                    roots[need.path[: len(need.path) - len(tail)] or '.'] = None
        for root in roots:
            lines = [f'{source.name} is expected as', f'  {root}/', *(f'    {entry}' for entry in source.layout)]
            yield '\n'.join([*lines, f'Download: {source.download}'])


def check_dataset_files(cfg: Mapping, loops: Sequence[str] = ('train', 'val')) -> None:
    """Check that the files and folders which the datasets and metrics of a config read are there.

    Datasets are looked for inside wrappers and lists. Generated data sets and remote storage are passed over.

    Args:
        cfg: a config with ``{loop}_dataloader`` and ``{loop}_evaluator``.
        loops: the loops to check, any of 'train', 'val' and 'test'.

    Raises:
        FileNotFoundError: if anything is missing. The message names all of it and, for COCO and ADE20K, the layout
            expected and where to download.
    """
    broken = {need.path: need for need in _needs(cfg, loops) if need.problem()}
    if not broken:
        return
    lines = [f'  {need.path}: {need.problem()} ({need.origin} of {need.user})' for need in broken.values()]
    advice = list(_advice(list(broken.values()))) or ['Put the data there, or change these paths in the config.']
    place = f'Relative paths start at {os.getcwd()}. Data kept elsewhere can be linked: ln -s FOLDER LINK'
    raise FileNotFoundError('\n'.join(['Data that the config names is not there:', *lines, *advice, place]))
