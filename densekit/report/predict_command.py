"""What tools/predict.py does."""

import glob
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from densekit.cli import UserError, check_writable, user_errors
from densekit.predictor import Detections, Predictor, draw
from densekit.report import video
from densekit.report.coco_results import CocoResults
from densekit.report.pictures import read_image, save_png
from densekit.report.progress import ProgressBar

IMAGE_SUFFIXES = frozenset({'.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp'})


@dataclass
class Run:
    """What the parts of a command share.

    Attributes:
        images: how many images and frames were predicted.
        objects: how many were drawn.
        unreadable: a text for everything given that could not be read.
        remarks: texts for the end.
    """

    predictor: Predictor
    out: Path
    score_thr: float
    batch_size: int
    info: dict[str, Any]
    bar: ProgressBar = field(default_factory=ProgressBar)
    images: int = 0
    objects: int = 0
    unreadable: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def predict(
        self, named: Iterable[tuple[str, np.ndarray]]
    ) -> Iterator[tuple[str, np.ndarray, Detections | np.ndarray, np.ndarray]]:
        """Yields name, image, what was found and its picture; no more than a batch of images is in memory."""
        for batch in _batches(named, self.batch_size):
            results = self.predictor.batch([image for _, image in batch], drawn=False)
            batch.reverse()
            results.reverse()
            while batch:  # let go of each once it is written
                name, image = batch.pop()
                found = results.pop()
                self.images += 1
                self.objects += 0 if isinstance(found, np.ndarray) else int((found.scores >= self.score_thr).sum())
                yield name, image, found, draw(image, found, self.predictor, self.score_thr)


def predict(
    config: str,
    checkpoint: str,
    inputs: Sequence[str],
    *,
    out: str,
    score_thr: float = 0.3,
    batch_size: int = 1,
    device: str | None = None,
    options: Sequence[str] = (),
    fold: bool = True,
) -> None:
    """Writes a picture per image and a video per video, with results as JSON, to a folder.

    Results of the images are in ``results.json``, those of a video in a file of its name; see :class:`CocoResults`.

    Args:
        config: path of the config file.
        checkpoint: of the whole model.
        inputs: images, videos, folders of them (not of folders in them) and patterns such as ``'data/**/*.jpg'``.
        out: folder, made if missing.
        score_thr: draw objects from this score on; the JSON has all of them.
        batch_size: images that go through the model together, if of one size.
        device: see :class:`Predictor`.
        options: ``key=value`` texts that change the config.
        fold: see :class:`Predictor`.

    Raises:
        UserError: if something given cannot be used. What cannot be read is left out, the others are written before
            the error is raised.
    """
    start = time.monotonic()
    with user_errors():
        if batch_size < 1:
            raise ValueError(f'--batch-size {batch_size}: give 1 or more')
        if not 0 <= score_thr <= 1:
            raise ValueError(f'--score-thr {score_thr:g}: scores are from 0 to 1')
        check_writable(out, '--out')
        paths, problems = find_files(inputs)
        names = _output_names(paths)
        _check_overwriting(paths, [Path(out, name) for name in names.values()])
        predictor = Predictor(config, checkpoint, device=device, options=options, fold=fold)
    run = Run(predictor, Path(out), score_thr, batch_size, {'config': config, 'checkpoint': checkpoint})
    videos = [path for path in paths if Path(path).suffix.lower() in video.SUFFIXES]
    with user_errors():  # a disk that is full, a model that gives something else
        _predict_images(run, {path: name for path, name in names.items() if path not in videos})
        for path in videos:
            _predict_video(run, path, names[path])
    run.bar.clear()
    _tell(run, len(paths), problems, time.monotonic() - start)


def find_files(inputs: Sequence[str]) -> tuple[list[str], list[str]]:
    """The images and videos that files, folders and patterns stand for, each once.

    Returns:
        Paths in the order given, those of a folder or pattern sorted; and a text for each folder and pattern without
        any. A path that is no folder is kept as it is: it may be missing, or an image of any name.
    """
    paths: list[str] = []
    problems: list[str] = []
    for given in inputs:
        if Path(given).is_dir():
            try:
                found = sorted(str(path) for path in Path(given).iterdir() if _is_known(path))
            except OSError as error:
                raise ValueError(f'Folder {given} cannot be read: {error.strerror}') from error
            problem = f'Folder {given} holds no image or video; for those in folders below it, give {given}/**/*.jpg'
        elif not Path(given).exists() and glob.has_magic(given):
            found = sorted(path for path in glob.glob(given, recursive=True) if _is_known(Path(path)))
            problem = f'Pattern {given} fits no image or video'
        else:
            found, problem = [given], ''
        paths += found
        if not found:
            problems.append(problem)
    return list(dict.fromkeys(paths)), problems


def _is_known(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES | video.SUFFIXES and path.is_file()


def _output_names(paths: Sequence[str]) -> dict[str, str]:
    """A file name for each path: .png, or .mp4 of a video; those of one name from several folders are numbered."""
    names: dict[str, str] = {}
    taken = {'results'}  # of the images
    for path in paths:
        stem, number = Path(path).stem, 1
        while stem in taken:
            number += 1
            stem = f'{Path(path).stem}_{number}'
        taken.add(stem)
        names[path] = stem + ('.mp4' if Path(path).suffix.lower() in video.SUFFIXES else '.png')
    return names


def _check_overwriting(paths: Sequence[str], outputs: Sequence[Path]) -> None:
    given = {Path(path).resolve() for path in paths}
    lost = [str(path) for path in outputs if path.resolve() in given]
    if lost:
        raise ValueError(f'--out would overwrite {lost[0]}, which is one of the images given; give another folder')


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _predict_images(run: Run, names: dict[str, str]) -> None:
    with CocoResults(run.out / 'results.json', run.predictor.classes, run.info) as results:
        for path, image, found, picture in run.predict(readable(run, list(names))):
            save_png(run.out / names[path], picture)
            results.add(found, image.shape[:2], file_name=path, picture=names[path])


def readable(run: Run, paths: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Reads images one by one; those that cannot be read are noted in ``run``."""
    for number, path in enumerate(paths):
        run.bar('Images', number, len(paths))
        try:
            image = read_image(path)
        except (OSError, ValueError) as error:
            run.unreadable.append(str(error))
            continue
        yield path, image
        del image  # not to be kept while the next one is read


def _predict_video(run: Run, path: str, name: str) -> None:
    try:
        reader = video.VideoReader(path)
    except (OSError, ValueError) as error:
        run.unreadable.append(str(error))
        return
    frames = ((path, frame) for frame in reader)
    with (
        CocoResults((run.out / name).with_suffix('.json'), run.predictor.classes, run.info) as results,
        video.VideoWriter(run.out / name, reader.rate) as writer,
    ):
        for number, (_, image, found, picture) in enumerate(run.predict(frames)):
            run.bar(Path(path).name, number, max(reader.announced, number + 1) if reader.announced else 0)
            writer.write(picture)
            seconds = round(number / reader.rate, 3)
            results.add(found, image.shape[:2], file_name=path, frame=number, seconds=seconds)
    read = len(results.images)
    if not read:
        run.unreadable.append(f'Video {path} cannot be read: not one frame could be decoded.')
    elif read < reader.announced:
        run.remarks.append(f'Of {path} {read} frames could be read; the file says that it has {reader.announced}.')


def _tell(run: Run, given: int, problems: Sequence[str], seconds: float) -> None:
    """Prints what was done; raises UserError if something could not be read."""
    if run.images:
        objects = '' if run.predictor.is_segmentor else f', {run.objects:,} objects of score {run.score_thr:g} and more'
        lines = [f'{run.images:,} images and frames{objects}, in {seconds:.1f} s: {run.out}', *run.remarks]
        sys.stdout.write('\n'.join(lines) + '\n')
    lines = [*run.unreadable, *problems]
    if lines:
        what = f'{len(lines)} of {given + len(problems)} images could not be read.'
        if not run.unreadable:
            what = f'Folders and patterns given without an image: {len(problems)}.'
        done = f'The other {given - len(run.unreadable)} are in {run.out}.' if run.images else 'Nothing was predicted.'
        raise UserError('\n'.join([f'{what} {done}', *lines]))
