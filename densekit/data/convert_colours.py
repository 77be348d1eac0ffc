"""Label maps of colours, one colour a class, made into label maps of numbers."""

from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from densekit.data.convert import image_files

_MOST = 255  # classes; 255 itself is what is ignored


def convert_colours(folder: str, out: str) -> str:
    """Writes each label map with numbers in the place of colours.

    Args:
        folder: of images with few colours, and without losses: no JPEG. Grey is a colour as any other.
        out: folder to write PNG files of the same names to; it must not exist.

    Returns:
        The colours by number, in words: the most frequent is 0.

    Raises:
        FileNotFoundError: if there is no image.
        ValueError: if there are more than 255 colours, or a file is of a format with losses, or cannot be read.
    """
    if Path(out).exists():
        raise ValueError(f'--out {out} is there already; give the name of a new folder')
    paths = image_files(folder).paths
    names = [Path(path).with_suffix('.png').as_posix() for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f'two files of {folder} have one name but for the suffix')
    counts = Counter[int]()
    for path in paths:
        values, pixels = np.unique(_read(Path(folder, path)), return_counts=True)
        counts.update(dict(zip(values.tolist(), pixels.tolist(), strict=True)))
        if len(counts) > _MOST:
            raise ValueError(
                f'{Path(folder, path)}: with it there are {len(counts):,} colours, more than {_MOST} classes. Edges '
                'that were smoothed, or a file that was saved with losses in between, make colours of no class'
            )
    colours = [colour for colour, _ in counts.most_common()]
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
        rgb = (colour >> 16, colour >> 8 & 255, colour & 255)
        lines.append(f'  {label:3d}  was {rgb}, {100 * counts[colour] / total:.2f} % of the pixels')
    return '\n'.join(lines)


def _read(path: Path) -> np.ndarray:
    """The colour of each pixel as one number, (H, W) int64; red has the highest bits."""
    with Image.open(path) as image:
        if image.format in ('JPEG', 'WEBP'):
            raise ValueError(f'{path}: {image.format} files do not keep the colours that were written; labels need PNG')
        rgb = np.asarray(image.convert('RGB')).astype(np.int64)
    return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
