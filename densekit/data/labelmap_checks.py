"""The faults of label maps and of the images they belong to."""

import os
import os.path as osp
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from densekit.data.faults import Fault, fault
from densekit.data.image_files import SAMPLE, Probe, Progress, evenly, missing, probe_all

# Of more label maps than this, not every header is read unless asked for.
HEADERS = 50_000


@dataclass(frozen=True)
class LabelMapUse:
    """How a config uses label maps.

    Attributes:
        where: the part of the config, such as 'train_dataloader'.
        training: whether they are learned from, not only scored.
        ignored: the label that the loss, or the score, passes over.
        opencv: whether they are decoded by OpenCV and not by PIL.
        oriented: whether the loader turns images as EXIF says.
        unopened: why no file is to be opened, for a remark.
    """

    where: str
    training: bool = False
    ignored: int = 255
    opencv: bool = False
    oriented: bool = True
    unopened: str = ''


@dataclass
class LabelMapFindings:
    """What the checks of a data set found.

    Attributes:
        faults: all of them.
        images: number of images.
        maps: number of label maps that are there.
        decoded: number of those that were decoded.
        classes: in how many of the decoded each class is.
        remarks: why something was not checked.
    """

    faults: list[Fault] = field(default_factory=list)
    images: int = 0
    maps: int = 0
    decoded: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def loaded_labels(dataset: Any) -> np.ndarray:
    """The label that each value of an 8-bit map becomes, (256,), as mmseg's LoadAnnotations computes it."""
    labels = np.arange(256)
    if dataset.reduce_zero_label:
        labels = np.where(labels == 0, 255, labels) - 1
        labels[labels == 254] = 255
    known = labels.copy()
    for old, new in (dataset.label_map or {}).items():
        labels[known == old] = new
    return labels


def check_label_maps(
    dataset: Any,
    use: LabelMapUse,
    *,
    headers: bool = False,
    decode: bool = False,
    progress: Progress | None = None,
) -> LabelMapFindings:
    """The faults of a data set of label maps.

    The headers of the label maps are read, and some of the maps spread over all are decoded, with their images.

    Args:
        dataset: of mmseg, or mmdet's of the same kind; its pipeline is not used.
        use: how it is used.
        headers: read the header of every image and of every label map, whatever their number.
        decode: decode every image and every label map.
        progress: see :func:`densekit.data.image_files.probe_all`.

    Returns:
        The faults, and counts.
    """
    items = dataset.data_list
    found = LabelMapFindings(images=len(items))
    if not items:
        found.faults.append(_no_images(dataset, use))
        return found
    absent = set(missing([item['img_path'] for item in items]))
    for i in sorted(absent):
        path = items[i]['img_path']
        found.faults.append(fault('image-missing', path, _name(items[i]), f'no such file, for {use.where}'))
    items = [item for i, item in enumerate(items) if i not in absent]
    if any('seg_map_path' not in item for item in items):
        return found  # a test set
    there = _with_label_map(dataset, items, use, found)
    if use.unopened:
        found.maps = len(there)
        found.remarks.append(use.unopened)
    else:
        _open(dataset, there, use, found, headers, decode, progress)
    return found


def _with_label_map(dataset: Any, items: Sequence[dict], use: LabelMapUse, found: LabelMapFindings) -> list[dict]:
    """The items whose label map is there; of the others a fault each, or one if it is all of them."""
    absent = set(missing([item['seg_map_path'] for item in items]))
    if items and len(absent) == len(items):
        first = items[0]
        text = (
            f'none of the {len(items):,} images of {use.where} has a label map: {first["img_path"]} should have '
            f'{first["seg_map_path"]}. {_files_of(osp.dirname(first["seg_map_path"]))}; see data_prefix.seg_map_path, '
            f'img_suffix ({dataset.img_suffix!r}) and seg_map_suffix ({dataset.seg_map_suffix!r})'
        )
        found.faults.append(fault('labels-none', osp.dirname(first['seg_map_path']), None, text))
        return []
    for i in sorted(absent):
        text = f'no such file, the label map of {items[i]["img_path"]}'
        found.faults.append(fault('label-missing', items[i]['seg_map_path'], _name(items[i]), text))
    return [item for i, item in enumerate(items) if i not in absent]


def _name(item: dict) -> str:
    """The id of an image and its label map: the image's name without its suffix."""
    return osp.splitext(osp.basename(item['img_path']))[0]


def _no_images(dataset: Any, use: LabelMapUse) -> Fault:
    folder = dataset.ann_file or dataset.data_prefix.get('img_path') or ''
    text = f'no image that ends in {dataset.img_suffix!r} for {use.where}. {_files_of(folder)}; see img_suffix'
    return fault('images-none', folder, None, text)


def _files_of(folder: str) -> str:
    """What kinds of files are in a folder, in words."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError:
        return f'{folder} is no folder'
    kinds = Counter(osp.splitext(name)[1] or 'no suffix' for name in names)
    held = ', '.join(f'{count:,} with {suffix}' for suffix, count in kinds.most_common(3)) or 'nothing'
    return f'In {folder} is {held}' + (f', such as {names[0]}' if names else '')


def _open(
    dataset: Any,
    items: Sequence[dict],
    use: LabelMapUse,
    found: LabelMapFindings,
    headers: bool,
    decode: bool,
    progress: Progress | None,
) -> None:
    """Opens label maps and images, and adds what is wrong with them."""
    found.maps = len(items)
    sample = set(evenly(len(items), SAMPLE))
    every = headers or decode
    chosen = list(range(len(items))) if every or len(items) <= HEADERS else sorted(sample)
    pictured = chosen if every else sorted(sample)
    probes = probe_all(
        [items[i]['seg_map_path'] for i in chosen],
        [decode or i in sample for i in chosen],
        title=f'{use.where}: label maps',
        progress=progress,
        label_maps=True,
    )
    labels, seen = loaded_labels(dataset), Counter[int]()
    sizes: dict[int, tuple[int, int]] = {}
    for i, probe in zip(chosen, probes, strict=True):
        faults = list(_map_faults(items[i], probe, dataset, use, labels))
        found.faults += faults
        if probe.values is not None and (decode or i in sample):
            found.decoded += 1
            seen.update({int(label) for label in labels[[value for value in probe.values if 0 <= value < 256]]})
        if not probe.problem:
            sizes[i] = probe.size
    pictures = probe_all(
        [items[i]['img_path'] for i in pictured],
        [decode or i in sample for i in pictured],
        title=f'{use.where}: images',
        progress=progress,
    )
    for i, picture in zip(pictured, pictures, strict=True):
        found.faults += _pair_faults(items[i], picture, sizes.get(i), use)
    classes = dataset.metainfo['classes']
    found.classes = {str(name): seen[label] for label, name in enumerate(classes)}
    if decode and use.training and found.decoded:
        for name in (name for name, count in found.classes.items() if not count):
            folder = osp.dirname(items[0]['seg_map_path'])
            found.faults.append(
                fault('class-unseen', folder, name, f'class {name!r} is in no label map of {use.where}')
            )


def _pair_faults(item: dict, picture: Probe, map_size: tuple[int, int] | None, use: LabelMapUse) -> Iterator[Fault]:
    path, name = item['img_path'], _name(item)
    if picture.problem:
        yield fault('image-unreadable', path, name, picture.problem)
    elif map_size is not None and picture.loaded_size(use.oriented) != map_size:
        width, height = picture.loaded_size(use.oriented)
        text = f'{map_size[0]} x {map_size[1]} pixels, and its image {path} {width} x {height}'
        yield fault('label-size-differs', item['seg_map_path'], name, text)


def _map_faults(item: dict, probe: Probe, dataset: Any, use: LabelMapUse, labels: np.ndarray) -> Iterator[Fault]:
    """What is wrong with one label map."""
    path, name = item['seg_map_path'], _name(item)
    if probe.problem:
        yield fault('label-unreadable', path, name, probe.problem)
    elif misread := _misread(probe, use.opencv):
        yield fault(misread[0], path, name, misread[1])
    elif probe.values is not None:
        values = np.array(probe.values)
        loaded = labels[values]
        wrong = values[(loaded != use.ignored) & (loaded >= len(dataset.metainfo['classes']))]
        if len(wrong):
            yield fault('label-out-of-range', path, name, _out_of_range(wrong.tolist(), probe.values, dataset, use))
        elif (loaded == use.ignored).all():
            yield fault('label-all-ignored', path, name, f'all pixels are ignored: the values are {list(probe.values)}')


def _misread(probe: Probe, opencv: bool) -> tuple[str, str] | None:
    """Kind and text of the fault of a map whose values do not survive loading."""
    reader = 'OpenCV' if opencv else 'PIL'
    if probe.format == 'JPEG':
        return 'label-lossy', 'a JPEG file, whose values are not those that were written; labels need PNG'
    if probe.mode == 'F':
        return 'label-float', 'fractions, of which loading keeps the whole part; labels need 8-bit integers'
    if probe.mode.startswith('I'):
        high = [value for value in probe.values or () if not 0 <= value < 256]
        text = f'{probe.mode} values up to {max(high)} wrap at 256: {high[-1]} becomes {high[-1] % 256}' if high else ''
        return ('label-deep', text) if high else None
    if probe.mode == 'P' and opencv:
        return 'label-coloured', "a palette, of which imdecode_backend='cv2' makes colours; 'pillow' reads the labels"
    if probe.mode not in ('1', 'L', 'P', ''):
        return 'label-coloured', f'{probe.mode} pixels; labels need one channel, or a palette'
    if probe.mode in ('1', 'L') and probe.bits in ((1, 2, 4) if opencv else (2, 4)):
        return 'label-scaled', f'a grey PNG of {probe.bits} bits, whose values {reader} stretches to 255; save 8 bits'
    return None


def _out_of_range(wrong: list[int], values: Sequence[int], dataset: Any, use: LabelMapUse) -> str:
    count = len(dataset.label_map or dataset.metainfo['classes'])
    first = 1 if dataset.reduce_zero_label else 0
    ignored = 'and 0 and 255 are ignored' if dataset.reduce_zero_label else f'and {use.ignored} is ignored'
    shown = ', '.join(map(str, wrong[:8])) + (f' and {len(wrong) - 8} more' if len(wrong) > 8 else '')
    hint = ''
    if not dataset.reduce_zero_label and wrong == [count]:
        hint = '. If 0 is no class and the classes count from 1, set reduce_zero_label=True of the data set'
    return f'values {shown}; the {count} classes are {first} to {count - 1 + first}, {ignored}{hint}'
