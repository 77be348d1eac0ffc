"""A config for label maps of one's own: from the files to all that is written."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from densekit.data.checks import Report
from densekit.data.describe import class_table, images_by_class, map_picture, palette
from densekit.data.own_coco import choose
from densekit.data.own_maps import MapData, find_maps, label_problem
from densekit.data.own_recipe import Part, Recipe
from densekit.data.own_request import (
    Output,
    Request,
    WrongData,
    absolute,
    check_free,
    config_path,
    inspect,
    not_in,
    number_of,
    parting,
    raise_for_errors,
    same_images,
)
from densekit.report.progress import ProgressBar


def plan_segmentation(request: Request) -> Output:
    """Checks label maps, and parts the images.

    Args:
        request: what was asked for; :func:`densekit.data.own_request.check_request` found nothing wrong with it.

    Returns:
        What is to be written.

    Raises:
        WrongData: if the data has errors.
        FileNotFoundError: if a file or folder is not there.
        ValueError: if the data cannot be used as it was asked for.
    """
    bar = ProgressBar()
    data = find_maps(request.images, request.masks or '', bar)
    val = find_maps(request.val_images or request.images, request.val_masks, bar) if request.val_masks else None
    bar.clear()
    if val is not None and val.suffixes != data.suffixes:
        raise ValueError(
            f'images and label maps end in {" and ".join(data.suffixes)} to train on, and in '
            f'{" and ".join(val.suffixes)} to validate; save them alike'
        )
    classes = _map_classes(request, [data, *([val] if val else [])])
    warned = raise_for_errors(request, _check_maps(request, data, val, classes))
    out = config_path(request, 'upernet')
    validated = val or data
    train_names, val_names = data.names, validated.names
    files: dict[Path, str] = {}
    if val is None:
        chosen = choose([set(data.values.get(name, ())) for name in data.names], request.val_fraction, request.seed)
        train_names = [name for name, part in zip(data.names, chosen, strict=True) if not part]
        val_names = [name for name, part in zip(data.names, chosen, strict=True) if part]
    for part, names, kind in ((data, train_names, 'train'), (validated, val_names, 'val')):
        if val is None or part.together:
            files[out.with_name(f'{out.stem}_{kind}.txt')] = ''.join(f'{name}\n' for name in names)
    check_free(request, list(files))
    listed = {path.stem.rpartition('_')[2]: absolute(path) for path in files}
    recipe = Recipe(
        task='segmentation',
        size=request.size,
        classes=classes,
        palette=palette(classes),
        train=Part(len(train_names), absolute(data.images), absolute(data.maps), listed.get('train', '')),
        val=Part(len(val_names), absolute(validated.images), absolute(validated.maps), listed.get('val', '')),
        batch=request.batch,
        suffixes=data.suffixes,
        ignore_zero=request.ignore_zero,
        command=request.command,
    )
    lines = _map_lines(request, data, validated, train_names, val_names, classes)
    examples = [validated.image(name) for name in val_names[:3]]
    picture = lambda: map_picture(data, classes, recipe.palette, request.ignore_zero)  # noqa: E731
    return Output(out, recipe, files, [*lines, *warned], picture, examples)


def _map_classes(request: Request, parts: Sequence[MapData]) -> tuple[str, ...]:
    for data in parts:
        problem = label_problem(data, request.classes, request.ignore_zero, parts[0].all_values())
        if problem:
            raise WrongData(problem)
    first = int(request.ignore_zero)
    values = set().union(*(data.all_values() for data in parts)) - {255} - ({0} if first else set())
    if request.classes:
        return tuple(request.classes)
    return tuple(f'label {value}' for value in range(first, max(values, default=first) + 1))


def _check_maps(request: Request, data: MapData, val: MapData | None, classes: Sequence[str]) -> list[Report]:
    cfg: dict = {'default_scope': 'mmseg'}
    parts = {'train': data} if val is None else {'train': data, 'val': val}
    with tempfile.TemporaryDirectory() as folder:
        for loop, part in parts.items():
            listed = Path(folder, f'{loop}.txt')
            listed.write_text(''.join(f'{name}\n' for name in part.names), encoding='utf-8')
            dataset = {
                'type': 'BaseSegDataset',
                'ann_file': str(listed),
                'data_prefix': {'img_path': part.images, 'seg_map_path': part.maps},
                'metainfo': {'classes': tuple(classes)},
                'img_suffix': part.suffixes[0],
                'seg_map_suffix': part.suffixes[1],
                'reduce_zero_label': request.ignore_zero,
                'pipeline': [{'type': 'LoadImageFromFile'}, {'type': 'LoadAnnotations'}],
            }
            cfg[f'{loop}_dataloader'] = {'dataset': dataset}
        return inspect(cfg, tuple(parts))


def _map_lines(
    request: Request,
    data: MapData,
    val: MapData,
    train_names: Sequence[str],
    val_names: Sequence[str],
    classes: Sequence[str],
) -> list[str]:
    """What is in the data."""
    counts = {}
    for title, part, names in (('train', data, train_names), ('validation', val, val_names)):
        some = MapData(
            part.images, part.maps, [], part.suffixes, {n: part.values[n] for n in names if n in part.values}
        )
        counts[f'{title} images'] = images_by_class(some, classes, request.ignore_zero)
    lines = [f'{data.maps}: {len(data.names):,} label maps (*{data.suffixes[1]}), {number_of(classes)}']
    lines += [parting(request, len(train_names), len(val_names), bool(request.val_masks)), '', class_table(counts), '']
    if data.unused:
        lines.append(f'{data.unused:,} files in {data.maps} belong to no image, and are not used')
    if not request.classes:
        lines.append('the classes have no names yet: --classes NAME NAME ..., or write them into the config')
    if 255 in data.all_values():
        lines.append('pixels of label 255 are ignored')
    if request.ignore_zero:
        lines.append('pixels of label 0 are ignored, and the classes count from 1')
    elif not request.classes or request.classes[0] != 'background':
        lines.append('label 0 is a class as the others are; if it means "nothing known", add --ignore-zero')
    lines += same_images([data.image(n) for n in train_names], [val.image(n) for n in val_names])
    lines += not_in(counts['train images'], 'to train on') + not_in(counts['validation images'], 'to validate')
    return lines
