"""Video files: frames in, pictures out. Frames are RGB, (H, W, 3) uint8."""

import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from densekit.files import draft_of

SUFFIXES = frozenset({'.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm', '.wmv'})


class VideoReader:
    """The frames of a video file, upright, one in memory at a time.

    Args:
        path: of the file.

    Attributes:
        announced: frames that the file says it has, 0 if it does not; containers may be off by a few.
        rate: frames a second, 25 if the file does not say.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if OpenCV cannot read it.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(f'Video {os.fspath(path)} cannot be read: there is no such file.')
        self._capture = cv2.VideoCapture(os.fspath(path))
        if not self._capture.isOpened():
            raise ValueError(
                f'Video {os.fspath(path)} cannot be read: not a format, or a codec, that this OpenCV knows. '
                'Convert it to H.264 in an .mp4 file.'
            )
        self.announced = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if np.isfinite(rate) and rate > 0 else 25.0

    def __iter__(self) -> Iterator[np.ndarray]:
        try:
            while True:
                more, frame = self._capture.read()
                if not more:
                    return
                yield np.ascontiguousarray(frame[..., ::-1])
        finally:
            self._capture.release()


class VideoWriter:
    """Writes pictures of one size as an .mp4 file, MPEG-4 Part 2, which OpenCV writes everywhere.

    A picture with an odd side gets its last row or column twice, as the codec halves colours. As a context, the file is
    complete and under its name at the end, also when that comes early.

    Args:
        path: of the file; it and its folder are made with the first picture.
        rate: pictures a second.
    """

    def __init__(self, path: str | os.PathLike, rate: float) -> None:
        self.path, self.rate = Path(path), rate
        self._draft = draft_of(self.path)
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)

    def write(self, picture: np.ndarray) -> None:
        """Adds a picture.

        Raises:
            ValueError: if it is not as large as the first one, or the file cannot be written.
        """
        height, width = picture.shape[:2]
        if self._writer is None:
            self._size = height, width
            self._writer = self._opened(width + width % 2, height + height % 2)
        if (height, width) != self._size:
            raise ValueError(f'{self.path}: a picture is {height} x {width}, those before it {self._size}.')
        even = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode='edge')
        self._writer.write(np.ascontiguousarray(even[..., ::-1]))

    def _opened(self, width: int, height: int) -> cv2.VideoWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        code = cv2.VideoWriter.fourcc(*'mp4v')
        writer = cv2.VideoWriter(os.fspath(self._draft), code, self.rate, (width, height))
        if not writer.isOpened():
            raise ValueError(f'Video {self.path} cannot be written: this OpenCV has no MPEG-4 encoder.')
        return writer

    def __enter__(self) -> 'VideoWriter':
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.release()
            try:
                self._draft.replace(self.path)
            finally:
                self._draft.unlink(missing_ok=True)
