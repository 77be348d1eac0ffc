"""Label maps of colours, one colour a class, made into label maps of numbers."""

from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from densekit.data.convert import image_files
from densekit.data.image_files import probe

_MOST = 255  # classes; 255 itself is what is ignored


def convert_colours(folder: str, out: str) -> str:
    """Writes each label map with numbers in the place of colours.

    Args:
        folder: of images with few colours, and without losses: no JPEG. Grey is a colour as any other.
        out: folder to write PNG files of the same names to; it must not exist.

    Returns:
        The colours by number, in words: shades of grey from black on, other colours from the most frequent on.

    Raises:
        FileNotFoundError: if there is no image.
        ValueError: if there are more than 255 colours, or a file is of a format with losses, or cannot be read.
    """
    if Path(out).exists():
        raise ValueError(f'--out {out} is there already; give the name of a new folder')
    paths = image_files(folder, 'label maps').paths
    names = [Path(path).with_suffix('.png').as_posix() for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f'two files of {folder} have one name but for the suffix')
    counts = Counter[int]()
    deep = {_is_deep(Path(folder, path)) for path in paths}
    if len(deep) > 1:
        raise ValueError(f'some maps of {folder} have 16 or 32 bits, and others have not; convert them apart')
    for path in paths:
        values, pixels = np.unique(_read(Path(folder, path)), return_counts=True)
        counts.update(dict(zip(values.tolist(), pixels.tolist(), strict=True)))
        if len(counts) > _MOST:
            raise ValueError(
                f'{Path(folder, path)}: with it there are {len(counts):,} colours, more than {_MOST} classes. Edges '
                'that were smoothed, or a file that was saved with losses in between, make colours of no class'
            )
    colours = [colour for colour, _ in counts.most_common()]
    shades = all(colour % 0x10101 == 0 for colour in colours)  # red, green and blue are equal
    if shades or deep == {True}:  # the order was meant
        colours.sort()
    order = np.sort(np.array(colours, np.int64))
    labels = np.array([colours.index(colour) for colour in order.tolist()], np.uint8)
    for path, name in zip(paths, names, strict=True):
        target = Path(out, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        found = labels[np.searchsorted(order, _read(Path(folder, path)))]
        Image.fromarray(found).save(target)
    total = sum(counts.values())
    lines = [f'{out}: {len(paths):,} label maps, {len(colours)} classes; --classes takes their names in this order']
    for label, colour in enumerate(colours):
        was = colour if deep == {True} else (colour >> 16, colour >> 8 & 255, colour & 255)
        lines.append(f'  {label:3d}  was {was}, {100 * counts[colour] / total:.2f} % of the pixels')
    return '\n'.join(lines)


def _is_deep(path: Path) -> bool:
    """Whether an image has 16 or 32 bits a pixel, which are numbers and no colours."""
    found = probe(str(path), False)
    if found.problem or (found.bits > 8 and not found.mode.startswith('I')) or found.mode == 'F':
        why = found.problem or f'{found.bits or 32} bits and more than one channel or fractions ({found.mode})'
        raise ValueError(f'{path} cannot be read as a label map: {why}')
    return found.mode.startswith('I')


def _read(path: Path) -> np.ndarray:
    """The colour of each pixel as one number, (H, W) int64; red has the highest bits. Of deep images their numbers."""
    with Image.open(path) as image:
        if image.format in ('JPEG', 'WEBP'):
            raise ValueError(f'{path}: {image.format} files do not keep the colours that were written; labels need PNG')
        if image.mode.startswith('I'):  # as colours all from 256 on would become white
            return np.asarray(image).astype(np.int64)
        rgb = np.asarray(image.convert('RGB')).astype(np.int64)
    return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
