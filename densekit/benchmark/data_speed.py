"""How fast a processor reads and augments the training images of a config, transform by transform."""

import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from densekit.report.tables import format_table

_REDUCED = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4}


def report(cfg: Config, gpu_rates: Sequence[float], number: int = 64) -> str:
    """Measures on one core, and says how many worker processes a GPU needs.

    Args:
        cfg: with a ``train_dataloader`` whose data is there.
        gpu_rates: images per second that GPUs train on.
        number: of images.
    """
    with DefaultScope.overwrite_default_scope(cfg.default_scope), one_core():
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
        seconds = per_transform(dataset, number)
        reading = decoding(_files(dataset, number))
    whole = sum(seconds.values())
    rows = [
        [name, f'{1e3 * each:.2f}', f'{1 / each:.0f}', f'{100 * each / whole:.0f} %'] for name, each in seconds.items()
    ]
    rows.append(['all', f'{1e3 * whole:.2f}', f'{1 / whole:.1f}', '100 %'])
    cores = os.cpu_count()
    parts = [
        f'{number} images of {type(dataset).__name__}, on one of {cores} cores',
        format_table(['transform', 'ms', 'images/s', 'share'], rows, align='<>>>'),
    ]
    if reading:
        known = [[name, f'{1e3 * each:.2f}', f'{1 / each:.0f}'] for name, each in reading.items()]
        parts.append(
            'Decoding alone; at a half or a quarter of the size pixels are others than those of decoding and resizing, '
            'so no recipe does it:\n' + format_table(['decoding', 'ms', 'images/s'], known, align='<>>')
        )
    parts.append(
        format_table(
            ['GPU images/s', 'workers'],
            [[f'{rate:g}', str(workers_for(rate, 1 / whole))] for rate in gpu_rates],
            align='>>',
        )
    )
    return '\n\n'.join(parts)


def workers_for(gpu_rate: float, core_rate: float) -> int:
    """Worker processes, a core each, that keep up with a GPU."""
    return int(-(-gpu_rate // core_rate))


def per_transform(dataset: Any, number: int) -> dict[str, float]:
    """Seconds per image of each transform, in the order of the pipeline.

    Of a choice between lists of transforms the mean over what was drawn; a transform of which there are several is
    numbered.

    Args:
        dataset: with a ``pipeline`` of transforms.
        number: of images; drawn evenly from all, again from the start if there are fewer.

    Raises:
        ValueError: if there are no images, or the data set is of another kind.
    """
    transforms = getattr(getattr(dataset, 'pipeline', None), 'transforms', None)
    if not transforms:
        raise ValueError(
            f'{type(dataset).__name__} has no pipeline of its own; --data measures data sets that have one'
        )
    if len(dataset) == 0:
        raise ValueError('the training data set has no images')
    names = _numbered([type(transform).__name__ for transform in transforms])
    totals: dict[str, float] = defaultdict(float)
    done = 0
    for index in _indices(len(dataset), number):
        results: Any = dataset.get_data_info(index)
        spent = dict.fromkeys(names, 0.0)
        for name, transform in zip(names, transforms, strict=True):
            start = time.perf_counter()
            results = transform(results)
            spent[name] = time.perf_counter() - start
            if results is None:  # an image that a transform refuses is drawn anew in training
                break
        else:
            done += 1
            for name, each in spent.items():
                totals[name] += each
    if not done:
        raise ValueError('the pipeline gave no sample from any image')
    return {name: totals[name] / done for name in names}


def decoding(paths: Sequence[Path]) -> dict[str, float]:
    """Seconds per image of decoding files that are in memory: whole, and JPEGs at a half and a quarter."""
    files = [path.read_bytes() for path in paths if path.suffix.lower() in ('.jpg', '.jpeg')]
    if not files:
        return {}
    ways = {'JPEG whole': cv2.IMREAD_COLOR, **{f'JPEG 1/{scale}': flag for scale, flag in _REDUCED.items()}}
    buffers = [torch.frombuffer(bytearray(data), dtype=torch.uint8).numpy() for data in files]
    found = {}
    for name, flag in ways.items():
        start = time.perf_counter()
        for buffer in buffers:
            cv2.imdecode(buffer, flag)
        found[name] = (time.perf_counter() - start) / len(buffers)
    return found


@contextmanager
def one_core() -> Iterator[None]:
    """One thread for torch and OpenCV, as each worker process has."""
    threads, of_opencv = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cv2.setNumThreads(of_opencv)


def _files(dataset: Any, number: int) -> list[Path]:
    infos = [dataset.get_data_info(index) for index in _indices(len(dataset), number)]
    return [Path(info['img_path']) for info in infos if 'img_path' in info]


def _indices(available: int, number: int) -> list[int]:
    step = max(1, available // number)
    return [(i * step) % available for i in range(number)]


def _numbered(names: Sequence[str]) -> list[str]:
    return [
        name if names.count(name) == 1 else f'{name} {names[: place + 1].count(name)}'
        for place, name in enumerate(names)
    ]
