"""What is asked of tools/new_config.py, what comes of it, and what detection and segmentation have in common."""

import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from mmengine.config import Config

from densekit.cli import check_writable
from densekit.data.checks import Report, inspect_data
from densekit.data.faults import Fault, describe
from densekit.data.own_recipe import BASES, SIZES, Recipe
from densekit.report.progress import ProgressBar

_PLAIN = ('images', 'image', 'img', 'imgs', 'train', 'train2017', 'data', 'jpegimages', 'photos')


@dataclass(frozen=True)
class Request:
    """The arguments of tools/new_config.py, as it describes them; `command` is for the docstring of the config."""

    images: str
    annotations: str | None = None
    masks: str | None = None
    format: str = 'coco'
    val_images: str | None = None
    val_annotations: str | None = None
    val_masks: str | None = None
    val_fraction: float = 0.2
    seed: int = 0
    task: str | None = None
    size: str = 't'
    batch: int = 4
    classes: Sequence[str] | None = None
    boxes_only: bool = False
    ignore_zero: bool = False
    out: str | None = None
    overwrite: bool = False
    command: Sequence[str] = ()
    checkout: Path = field(default_factory=lambda: Path(__file__).resolve().parents[2])


class WrongData(Exception):
    """The data has errors; the text is the report."""


@dataclass
class Output:
    """All that is written if nothing is wrong.

    Attributes:
        out: path of the config.
        recipe: what is in it.
        files: others beside it, with their content.
        lines: what is in the data, for the terminal.
        picture: the same as a picture, RGB (H, W, 3) uint8; made when it is asked for.
        examples: a few images to predict.
    """

    out: Path
    recipe: Recipe
    files: dict[Path, str]
    lines: list[str]
    picture: Callable[[], np.ndarray]
    examples: list[str]


def check_request(request: Request) -> None:
    """Refuses arguments that do not go together, before any file is read."""
    needed = 'detection' if request.annotations else 'segmentation'
    if request.task not in (None, needed):
        given = '--annotations has objects' if request.annotations else '--masks has label maps'
        raise ValueError(f'--task {request.task}: {given}, which are for {needed}')
    if request.size not in SIZES:
        raise ValueError(f'--size {request.size}: choose from {", ".join(SIZES)}')
    base = request.checkout / BASES[needed]
    if not base.is_file():
        raise FileNotFoundError(f'{base} does not exist: run tools/new_config.py of a densekit checkout')
    least = 2 if request.masks else 1  # batch normalization of one pooled pixel an image needs another
    if request.batch < least:
        raise ValueError(f'--batch {request.batch}: {needed} needs {least} or more')
    if not 0 < request.val_fraction < 1:
        raise ValueError(f'--val-fraction {request.val_fraction}: give a part between 0 and 1, such as 0.2')
    if request.masks and (request.val_annotations or request.format != 'coco' or request.boxes_only):
        raise ValueError('--val-annotations, --format and --boxes-only go with --annotations, and --masks was given')
    if request.annotations and (request.val_masks or request.ignore_zero):
        raise ValueError('--val-masks and --ignore-zero go with --masks, and --annotations was given')
    if request.val_images and not (request.val_annotations or request.val_masks):
        raise ValueError(f'--val-images needs --val-{"masks" if request.masks else "annotations"} as well')
    if request.seed < 0:
        raise ValueError(f'--seed {request.seed}: give 0 or more')
    if request.out is not None:
        if not request.out.endswith('.py'):
            raise ValueError(f'--out {request.out}: configs are Python files; end it in .py')
        check_free(request, [Path(request.out)])


def check_free(request: Request, paths: Sequence[Path]) -> None:
    """Refuses to write over files, unless it was asked for, and to write where nothing can be written."""
    there = [str(path) for path in paths if path.exists()]
    if there and not request.overwrite:
        raise ValueError(f'{", ".join(there)} is there already; give another --out FILE.py, or --overwrite')
    for path in paths:
        check_writable(str(path.parent), '--out')


def config_path(request: Request, method: str) -> Path:
    """Path of the config: as asked for, else by model and data."""
    if request.out is not None:
        return Path(request.out)
    folder = Path(request.images).resolve()
    while folder.name.lower() in _PLAIN and folder.parent.name:
        folder = folder.parent
    name = re.sub(r'\W+', '_', folder.name).strip('_').lower() or 'own'
    version = 'v2' if SIZES[request.size].v2 else ''
    out = Path(f'{method}_convnext{version}_{request.size}_{name}.py')
    check_free(request, [out])
    return out


def inspect(cfg: dict, loops: Sequence[str]) -> list[Report]:
    """Checks the data sets of a config, with the header of every image."""
    bar = ProgressBar()
    reports = inspect_data(Config(cfg), loops, headers=True, progress=bar)
    bar.clear()
    return reports


def raise_for_errors(request: Request, reports: Sequence[Report]) -> list[str]:
    """Raises with all faults if any is an error; gives the warnings back, as lines."""
    faults: list[Fault] = [found for report in reports for found in report.faults]
    if any(found.severity == 'error' for found in faults):
        coloured = next((found.file for found in faults if found.kind == 'label-coloured'), None)
        hint = '\n\nLabel maps in colours become label maps of numbers by\n  ' if coloured else ''
        if coloured:
            hint += tool_command(
                request, 'convert_data', 'colours', '--annotations', request.masks or '', '--out', 'NEW_FOLDER'
            )
        raise WrongData(describe(faults) + hint)
    return ['', describe(faults)] if faults else []


def number_of(classes: Sequence[str]) -> str:
    """How many classes there are, in words."""
    return f'{len(classes)} class{"es" if len(classes) != 1 else ""}'


def parting(request: Request, train: int, val: int, given: bool) -> str:
    """How many images train and validate, and how they were chosen, in words."""
    how = 'as given' if given else f'set aside with every class in it where possible, --seed {request.seed}'
    return f'{train:,} images to train on, {val:,} to validate ({how})'


def not_in(counts: dict[str, int], use: str) -> list[str]:
    """A line about classes that no image shows, if there are any."""
    absent = [name for name, count in counts.items() if not count]
    return [f'no image {use} shows: {", ".join(absent)}'] if absent else []


def same_images(train: Sequence[str], val: Sequence[str]) -> list[str]:
    """A line about images that both train and validate, if there are any."""
    both = {os.path.realpath(path) for path in train} & {os.path.realpath(path) for path in val}
    if not both:
        return []
    return [f'{len(both):,} images are both to train on and to validate, so that the scores come out too good']


def absolute(path: str | os.PathLike) -> str:
    """A path that holds from any folder; links stay as they are."""
    return os.path.abspath(path)


def tool_command(request: Request, name: str, *arguments: str) -> str:
    """A command, as it is to be typed."""
    folder = Path('tools') if Path.cwd() == request.checkout else request.checkout / 'tools'
    return shlex.join(['python', str(folder / f'{name}.py'), *arguments])
