"""metafile.yml beside the recipes: what of each is published, by whom, and what was measured here."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

METAFILE = 'metafile.yml'
# The last is for papers that do not say whether they test at several scales.
METRICS = ('box AP', 'mask AP', 'PQ', 'mIoU', 'multi-scale mIoU', 'mIoU at one scale or several')
NOT_RUN = 'not run'


@dataclass(frozen=True)
class Paper:
    """What a paper prints of a model.

    Attributes:
        table: where, as in ``arXiv 2201.03545, Table 3``.
        parameters: millions, or None where it prints none.
        gflops: 10^9 multiply-adds, or None.
        metrics: name to value in %, names as in ``METRICS``; empty where it prints none.
    """

    table: str
    parameters: int | None
    gflops: int | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class Zoo:
    """What OpenMMLab measured with the same recipe.

    Attributes:
        package: mmdet or mmseg.
        model: its name in the model index of the package.
        metrics: as in :class:`Paper`.
    """

    package: str
    model: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class Ours:
    """What was measured here.

    Attributes:
        source: the file that says on what and how, from the root of the repository.
        metrics: as in :class:`Paper`.
    """

    source: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class Recipe:
    """An entry.

    Attributes:
        config: name of the file, in the folder of the metafile.
        task: such as ``instance segmentation``.
        dataset: such as ``COCO``.
        schedule: such as ``3x`` or ``160k``.
        weights: that the backbone starts from, as the config names them; None for random ones.
        paper: None for a recipe that is in no paper.
        zoo: None for one that OpenMMLab has not.
        ours: None for ``not run``.
    """

    config: str
    task: str
    dataset: str
    schedule: str
    weights: str | None
    paper: Paper | None
    zoo: Zoo | None
    ours: Ours | None


def read_metafile(path: Path) -> list[Recipe]:
    """Reads a metafile.

    Args:
        path: of a YAML file with a list ``recipes``, whose entries have the fields of :class:`Recipe`, all of them.

    Raises:
        ValueError: if a field is missing or unknown, a metric is none of ``METRICS``, or a config has two entries.
    """
    return _recipes(_load(path), path)


def find_recipe(config: Path) -> Recipe | None:
    """The entry of a config in the metafile beside it, or None if there is no such file or entry.

    A metafile of OpenMMLab's form, which has ``Models``, counts as none.

    Raises:
        ValueError: as :func:`read_metafile` does.
    """
    path = config.parent / METAFILE
    document = _load(path) if path.is_file() else None
    if not document or 'recipes' not in document:
        return None
    return next((recipe for recipe in _recipes(document, path) if recipe.config == config.name), None)


def _load(path: Path) -> Any:
    """As safe_load, with libyaml where PyYAML has it: ten times as fast."""
    try:
        return yaml.load(path.read_text(encoding='utf-8'), Loader=getattr(yaml, 'CSafeLoader', yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ValueError(f'{path} cannot be read: {error}') from error


def _recipes(document: Any, path: Path) -> list[Recipe]:
    _check_fields(document, {'recipes'}, str(path))
    recipes = [_recipe(entry, f'{path}, entry {i}') for i, entry in enumerate(document['recipes'], start=1)]
    names = [recipe.config for recipe in recipes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f'{path} has more than one entry for {", ".join(twice)}; leave one of each')
    return recipes


def _recipe(entry: Any, where: str) -> Recipe:
    _check_fields(entry, _names(Recipe), where)
    where = f'{where} ({entry["config"]})'
    return Recipe(
        **{
            **entry,
            'paper': _part(Paper, entry['paper'], f'{where}, paper'),
            'zoo': _part(Zoo, entry['zoo'], f'{where}, zoo'),
            'ours': None if entry['ours'] == NOT_RUN else _part(Ours, entry['ours'], f'{where}, ours'),
        }
    )


def _part(cls: type, part: Any, where: str) -> Any:
    if part is None and cls is not Ours:
        return None
    _check_fields(part, _names(cls), where)
    metrics = part['metrics']
    if not isinstance(metrics, Mapping) or (not metrics and cls is not Paper):
        raise ValueError(f'{where}: metrics is {metrics!r}; give a name and a value in % for each')
    for name, value in metrics.items():
        if name not in METRICS or not isinstance(value, float):
            raise ValueError(f'{where}: {name}: {value!r} is no metric with a decimal; names are {", ".join(METRICS)}')
    return cls(**part)


def _names(cls: type) -> set[str]:
    return {field.name for field in fields(cls)}


def _check_fields(node: Any, expected: set[str], where: str) -> None:
    if not isinstance(node, Mapping):
        raise ValueError(f'{where} is {node!r}; it has to have the fields {", ".join(sorted(expected))}')
    missing, unknown = sorted(expected - set(node)), sorted(set(node) - expected)
    if missing or unknown:
        problems = [f'lacks {", ".join(missing)}'] * bool(missing) + [f'has unknown {", ".join(unknown)}'] * bool(
            unknown
        )
        raise ValueError(f'{where} {" and ".join(problems)}; fields are {", ".join(sorted(expected))}')
