"""A config for COCO files of one's own: from the files to all that is written."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from densekit.data.checks import Report
from densekit.data.convert import convert
from densekit.data.describe import class_table, coco_picture, palette, size_lines
from densekit.data.faults import describe
from densekit.data.own_coco import CocoData, choose, load_coco
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
    tool_command,
)
from densekit.files import write_whole


def plan_detection(request: Request) -> Output:
    """Checks COCO files, or files that are converted to such, and parts the images.

    Args:
        request: what was asked for; :func:`densekit.data.own_request.check_request` found nothing wrong with it.

    Returns:
        What is to be written.

    Raises:
        WrongData: if the data has errors.
        FileNotFoundError: if a file or folder is not there.
        ValueError: if the data cannot be used as it was asked for.
    """
    paths = [request.annotations or '', request.val_annotations]
    folders = [request.images, request.val_images or request.images]
    if request.format == 'coco':
        return _plan(request, paths, folders)
    paths = _convert(request, paths, folders)
    try:
        return _plan(request, paths, folders)
    except BaseException as error:
        for path in filter(None, paths):
            Path(path).unlink(missing_ok=True)
        if not isinstance(error, WrongData):
            raise
        options = ['--annotations', request.annotations or '', '--images', request.images, '--out', 'FILE.json']
        keep = tool_command(request, 'convert_data', request.format, *options)
        raise WrongData(f'{error}\n\nThe converted file is gone again; to look into it:\n  {keep}') from error


def _plan(request: Request, paths: Sequence[str | None], folders: Sequence[str]) -> Output:
    """As :func:`plan_detection`, for COCO files."""
    data, val = _load(paths[0] or '', folders[0]), _load(paths[1], folders[1]) if paths[1] else None
    classes = _used_classes(data, request)
    learned = data.of_classes(classes)
    masks = learned.with_masks() and not request.boxes_only
    out = config_path(request, 'mask_rcnn' if masks else 'faster_rcnn')
    reports = _check_coco(data, val, classes, masks)
    try:
        warned = raise_for_errors(request, reports)
    except WrongData as error:
        if all(found.kind != 'mask-missing' for report in reports for found in report.faults):
            raise
        hint = 'To learn from the boxes of all objects and from no masks, add --boxes-only.'
        raise WrongData(f'{error}\n\n{hint}') from error
    files: dict[Path, str] = {}
    if val is None:
        chosen = choose(learned.of_images(), request.val_fraction, request.seed)
        train, val = data.part([not part for part in chosen]), data.part(chosen)
        for part, kind in ((train, 'train'), (val, 'val')):
            part.path = str(out.with_name(f'{out.stem}_{kind}.json'))
            files[Path(part.path)] = json.dumps(part.content, ensure_ascii=False)
    else:
        train = data
    check_free(request, list(files))
    lines = _coco_lines(request, data, train, val, classes, masks)
    shown = sum(bool(labels) for labels in train.of_classes(classes).of_images())
    recipe = Recipe(
        task='detection',
        size=request.size,
        classes=classes,
        palette=palette(classes),
        train=Part(shown, absolute(train.images), absolute(train.path)),
        val=Part(len(val.content['images']), absolute(val.images), absolute(val.path)),
        batch=request.batch,
        masks=masks,
        command=request.command,
    )
    examples = [f'{val.images}/{image["file_name"]}' for image in val.content['images'][:3]]
    return Output(
        out, recipe, files, [*lines, *warned], lambda: coco_picture(learned, classes, recipe.palette, masks), examples
    )


def _convert(request: Request, paths: Sequence[str | None], folders: Sequence[str]) -> list[str | None]:
    """Makes COCO files beside the config of files in other formats."""
    contents = [
        convert(request.format, p, f, request.classes) if p else None for p, f in zip(paths, folders, strict=True)
    ]
    assert contents[0] is not None
    masks = CocoData('', '', contents[0][0]).with_masks() and not request.boxes_only
    out = config_path(request, 'mask_rcnn' if masks else 'faster_rcnn')
    written = {
        out.with_name(f'{out.stem}_{kind}.json'): found
        for found, kind in zip(contents, ('annotations', 'val_annotations'), strict=True)
        if found
    }
    check_free(request, list(written))
    for path, (content, remarks) in written.items():
        sys.stdout.write(''.join(f'{remark}\n' for remark in remarks))
        write_whole(path, json.dumps(content, ensure_ascii=False))
    return [*map(str, written), None][:2]


def _load(path: str, images: str) -> CocoData:
    data, faults = load_coco(path, images)
    if data is None:
        raise WrongData(describe(faults))
    return data


def _used_classes(data: CocoData, request: Request) -> tuple[str, ...]:
    if request.classes:
        return tuple(request.classes)
    used = set().union(*data.of_images())
    return tuple(dict.fromkeys(name for number, name in data.names.items() if number in used)) or tuple(
        dict.fromkeys(data.names.values())
    )


def _check_coco(data: CocoData, val: CocoData | None, classes: Sequence[str], masks: bool) -> list[Report]:
    parts = {'train': data} if val is None else {'train': data, 'val': val}
    cfg: dict = {'default_scope': 'mmdet'}
    for loop, part in parts.items():
        dataset = {
            'type': 'CocoDataset',
            'ann_file': os.path.abspath(part.path),
            'data_prefix': {'img': os.path.abspath(part.images)},
            'metainfo': {'classes': tuple(classes)},
            'filter_cfg': {'filter_empty_gt': True, 'min_size': 32},  # as the base config has it
            'pipeline': [{'type': 'LoadImageFromFile'}, {'type': 'LoadAnnotations', 'with_mask': masks}],
        }
        cfg[f'{loop}_dataloader'] = {'dataset': dataset}
        # Also of a file that is going to be parted: what an evaluator asks of it holds for the parts.
        metric = ['bbox', 'segm'] if masks else 'bbox'
        cfg[f'{loop}_evaluator'] = {'type': 'CocoMetric', 'ann_file': os.path.abspath(part.path), 'metric': metric}
    return inspect(cfg, tuple(parts))


def _coco_lines(
    request: Request, data: CocoData, train: CocoData, val: CocoData, classes: Sequence[str], masks: bool
) -> list[str]:
    """What is in the data."""
    counts = {}
    for title, part in (('train', train), ('validation', val)):
        counts[f'{title} boxes'] = dict.fromkeys(classes, 0)
        counts[f'{title} images'] = dict.fromkeys(classes, 0)
        for annotation in part.content.get('annotations', []):
            name = part.names.get(annotation['category_id'], '')
            if name in classes and not annotation.get('iscrowd'):
                counts[f'{title} boxes'][name] += 1
        for labels in part.of_images():
            for name in {part.names[label] for label in labels if part.names.get(label) in classes}:
                counts[f'{title} images'][name] += 1
    kind = 'boxes and masks' if masks else 'boxes' + (' (its masks are not used)' if data.with_masks() else '')
    lines = [f'{data.path}: {len(data.content["images"]):,} images, {kind}, {number_of(classes)}']
    lines += [parting(request, len(train.content['images']), len(val.content['images']), bool(request.val_annotations))]
    lines += ['', class_table(counts), '', *size_lines(data.of_classes(classes))]
    empty = sum(not labels for labels in train.of_classes(classes).of_images())
    if empty:
        lines.append(f'images to train on that show none of the classes, which training leaves out: {empty:,}')
    left_out = [name for name in dict.fromkeys(data.names.values()) if name not in classes]
    if left_out:
        why = 'not asked for' if request.classes else 'nothing is annotated as it'
        lines.append(f'categories that do not become classes ({why}): {", ".join(left_out)}')
    lines += same_images(
        [f'{train.images}/{image["file_name"]}' for image in train.content['images']],
        [f'{val.images}/{image["file_name"]}' for image in val.content['images']],
    )
    lines += not_in(counts['train boxes'], 'to train on') + not_in(counts['validation boxes'], 'to validate')
    return lines
