"""Whether image files are there, can be read, and of what size a loader gives them back."""

import os
import os.path as osp
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

Progress = Callable[[str, int, int], None]

SAMPLE = 64  # files that are opened in any case; a mistake of a whole data set shows in any of them
_ORIENTATION = 274  # EXIF's tag
_PNG = b'\x89PNG\r\n\x1a\n'
_END = {'JPEG': b'\xff\xd9', 'PNG': b'IEND\xaeB`\x82'}
_PNG_MODES = {0: 'L', 2: 'RGB', 3: 'P', 4: 'LA', 6: 'RGBA'}  # PIL's, by the format's colour types
_CHUNK = 256


@dataclass(frozen=True)
class Probe:
    """What is found in an image file.

    Attributes:
        problem: why it cannot be read; empty if it can.
        size: width and height as stored, in pixels.
        orientation: EXIF's, 1 for none; 5 to 8 swap width and height.
        format: PIL's name, such as 'JPEG'.
        mode: PIL's, such as 'RGB', 'L' or 'P'.
        bits: of a sample of a PNG, 0 for other formats.
        values: the values of a decoded one-channel image of integers, ascending.
    """

    problem: str = ''
    size: tuple[int, int] = (0, 0)
    orientation: int = 1
    format: str = ''
    mode: str = ''
    bits: int = 0
    values: tuple[int, ...] | None = None

    def loaded_size(self, oriented: bool) -> tuple[int, int]:
        """Width and height, by a loader that follows EXIF's orientation or does not."""
        return self.size[::-1] if oriented and self.orientation >= 5 else self.size


def evenly(count: int, number: int) -> list[int]:
    """At most ``number`` of the indices below ``count``, spread over all of them."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, number))}) if count else []


def missing(paths: Sequence[str]) -> list[int]:
    """The indices of paths that are no files; lists folders instead of asking for every file."""
    listings: dict[str, dict[str, bool]] = {}
    absent = []
    for index, path in enumerate(paths):
        folder, _, name = path.rpartition('/')
        if folder not in listings:
            listings[folder] = _listing(folder or '/' if path.startswith('/') else folder or '.')
        found = listings[folder].get(name)
        if found is None or (found and not osp.exists(path)):
            absent.append(index)
    return absent


def _listing(folder: str) -> dict[str, bool]:
    """The names in a folder, and whether each is a link, which may lead nowhere."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.is_symlink() for entry in entries}
    except OSError:
        return {}


@contextmanager
def _large_images() -> Iterator[None]:
    """PIL takes no image for an attack by its size alone, as the loaders of a training do not."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of odd metadata
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def probe_all(
    paths: Sequence[str],
    decode: Sequence[bool],
    *,
    title: str = '',
    progress: Progress | None = None,
    label_maps: bool = False,
) -> Iterator[Probe]:
    """Opens files on all cores.

    Args:
        paths: of images.
        decode: for each of them whether to decode it whole.
        title: for the progress.
        progress: called with the title, the files done and their number.
        label_maps: whether they are label maps, whose orientation no loader asks for.

    Yields:
        What is found, in the order of the paths.
    """
    look = _probe_label_map if label_maps else probe
    with _large_images(), ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(paths), _CHUNK):
            yield from pool.map(look, paths[start : start + _CHUNK], decode[start : start + _CHUNK])
            if progress is not None:
                progress(title, min(start + _CHUNK, len(paths)), len(paths))


def probe(path: str, decode: bool) -> Probe:
    """Reads the header of an image, and with ``decode`` all of it.

    A JPEG or PNG file that lacks its end is decoded in any case, as that is what cut-off files lack, and so is one of
    16 or 32 bits, whose values matter.
    """
    try:
        with open(path, 'rb') as file:
            bits = _png_bits(file.read(26))
            file.seek(0)
            with Image.open(file) as image:
                kind, size, mode = image.format or '', image.size, image.mode
                # Asked for its EXIF data, PIL decodes a PNG file, in case they come last.
                turned = kind != 'PNG' or 'exif' in image.info
                orientation = int(image.getexif().get(_ORIENTATION, 1)) if turned else 1
                values = None
                if decode or mode.startswith('I') or not _has_its_end(file, kind):
                    values = _values(image)
                return Probe('', size, orientation, kind, mode, bits, values)
    except UnidentifiedImageError:
        return _probe_with_opencv(path)
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, MemoryError) as error:  # what PIL's plugins raise
        return Probe(problem=str(error) or type(error).__name__)


def _probe_label_map(path: str, decode: bool) -> Probe:
    """As :func:`probe`, for a whole PNG file of at most 8 bits a tenth of its time."""
    try:
        with open(path, 'rb') as file:
            head = file.read(26)
            if decode or _png_bits(head) not in (1, 2, 4, 8) or not _has_its_end(file, 'PNG'):
                return probe(path, decode)
    except OSError as error:
        return Probe(problem=str(error))
    width, height, bits, colour = struct.unpack('>IIBB', head[16:])
    mode = '1' if (bits, colour) == (1, 0) else _PNG_MODES.get(colour, '')
    return Probe('', (width, height), 1, 'PNG', mode, bits)


def _png_bits(head: bytes) -> int:
    return head[24] if head[:8] == _PNG and len(head) == 26 else 0


def _has_its_end(file: BinaryIO, kind: str) -> bool:
    if kind not in _END:
        return True
    place = file.tell()
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - len(_END[kind])))
    end = file.read()
    file.seek(place)
    return end == _END[kind]


def _values(image: Image.Image) -> tuple[int, ...] | None:
    """Decodes an image; the values in it if it has one channel of integers."""
    image.load()
    if image.mode.startswith('I'):
        return tuple(np.unique(np.asarray(image)).tolist())
    if image.mode not in ('1', 'L', 'P'):
        return None
    pixels = np.asarray(image).astype(np.uint8)
    return tuple(np.flatnonzero(np.bincount(pixels.ravel(), minlength=256)).tolist())


def _probe_with_opencv(path: str) -> Probe:
    """For formats that only the loaders' other library knows, such as EXR and HDR."""
    size = osp.getsize(path)
    if size == 0:
        return Probe(problem='an empty file')
    try:
        pixels = cv2.imread(path, cv2.IMREAD_UNCHANGED)
    except cv2.error:
        pixels = None
    if pixels is None:
        return Probe(problem=f'no image of a known format ({size:,} bytes)')
    return Probe(size=(pixels.shape[1], pixels.shape[0]), format='OpenCV')
