"""Pictures of what was annotated or predicted in an image.

Images are RGB, (H, W, 3) uint8; those given are never changed.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError

from densekit.files import whole_file
from densekit.report.fonts import font, readable
from densekit.report.tags import Tag, around, inside, write_tags

Colour = Sequence[int]  # red, green, blue from 0 to 255

GREY = (150, 150, 150)
MASK_ALPHA, HATCH_ALPHA = 0.4, 0.6
MAX_CELL = 640  # pixels a picture may take in a sheet, in width and in height


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Read an image file as the models' pipelines do: upright, without transparency.

    Returns:
        RGB, (H, W, 3) uint8.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not an image that can be read in full.
    """
    accepted = 'Give a JPEG, PNG, WebP, BMP or TIFF file with 8 or 16 bits per channel.'
    if not os.path.isfile(path):
        problem = 'it is a folder' if os.path.isdir(path) else 'there is no such file'
        raise FileNotFoundError(f'Image {os.fspath(path)} cannot be read: {problem}. {accepted}')
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        problem = 'not a known image format' if isinstance(error, UnidentifiedImageError) else str(error)
        raise ValueError(f'Image {os.fspath(path)} cannot be read: {problem}. {accepted}') from error
    if image.mode in ('I', 'F'):
        raise ValueError(f'Image {os.fspath(path)} cannot be read: it has 32 bits per channel. {accepted}')
    if image.mode.startswith('I;16'):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.array(image.convert('RGB'))


def save_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Write a picture; whoever reads ``path`` meanwhile sees the old file or the new one, never a part.

    Raises:
        ValueError: if ``path`` does not end in ``.png``, or ``image`` is not RGB, (H, W, 3) uint8.
    """
    path = Path(path)
    if path.suffix.lower() != '.png':
        raise ValueError(f'Pictures are written as PNG, but the path given is {path}. End it in .png.')
    check_image(image)
    with whole_file(path) as draft:
        Image.fromarray(np.ascontiguousarray(image)).save(draft, format='PNG')


def draw_instances(
    image: np.ndarray,
    *,
    boxes: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    palette: Sequence[Colour],
    masks: np.ndarray | None = None,
    scores: np.ndarray | None = None,
    ignored: np.ndarray | None = None,
    min_side: int = 320,
) -> np.ndarray:
    """Draw objects over an image: a translucent mask, its outline, a box, and the class name with the score.

    Args:
        image: RGB, (H, W, 3) uint8.
        boxes: x1, y1, x2, y2 in pixels, (N, 4).
        labels: index into ``classes``, (N,).
        classes: names of the classes.
        palette: one colour per class.
        masks: boolean, (N, H, W).
        scores: confidence from 0 to 1, (N,).
        ignored: boolean, (N,); these, such as COCO's crowds, are drawn in grey and hatched.
        min_side: an image whose shorter side is less is enlarged by the smallest whole factor that reaches it.

    Returns:
        The picture, RGB uint8, of the image's size times that factor.

    Raises:
        ValueError: if shapes do not fit each other, or a label has no class or colour.
    """
    check_image(image)
    boxes, labels = np.asarray(boxes, np.float64).reshape(-1, 4), np.asarray(labels, np.int64)
    _check_instances(image, boxes, labels, masks=masks, scores=scores, ignored=ignored)
    _check_labels(labels, classes, palette)
    factor = max(1, -(-min_side // min(image.shape[:2])))
    picture = _enlarge(image, factor)
    grey = np.zeros(len(labels), bool) if ignored is None else np.asarray(ignored, bool)
    colours = [GREY if grey[i] else _rgb(palette[label]) for i, label in enumerate(labels)]
    width = _line_width(picture)
    if masks is not None:
        masks = np.asarray(masks, bool)
        for i in np.argsort(-masks.sum(axis=(1, 2)), kind='stable'):  # the small ones on top
            mask = _enlarge(masks[i].astype(np.uint8), factor).astype(bool)
            if grey[i]:
                _blend(picture, mask & _stripes(mask.shape, 4 * width), GREY, HATCH_ALPHA)
            else:
                _blend(picture, mask, colours[i], MASK_ALPHA)
            _outline(picture, mask, colours[i], width if factor > 1 else max(1, width // 2))
    names, tags = readable(tuple(classes)), []
    for i in range(len(labels)) if scores is None else np.argsort(-np.asarray(scores), kind='stable'):
        # x2, y2 is the far edge of the last pixel; the line is drawn on the pixels just inside.
        box = np.clip(np.rint(boxes[i] * factor) - (0, 0, 1, 1), 0, np.tile(picture.shape[1::-1], 2) - 1).astype(int)
        cv2.rectangle(picture, box[:2].tolist(), box[2:].tolist(), colours[i], width)
        text = names[labels[i]] + ('' if scores is None else f' {scores[i]:.2f}') + (' (ignored)' if grey[i] else '')
        tags.append(Tag(text, colours[i], around(box)))
    return write_tags(picture, tags)


def draw_label_map(
    image: np.ndarray,
    label_map: np.ndarray,
    *,
    classes: Sequence[str],
    palette: Sequence[Colour],
    ignore_index: int = 255,
    alpha: float = 0.6,
    min_side: int = 320,
) -> np.ndarray:
    """Colour the pixels of an image by class and write each class's name on its largest region.

    Args:
        image: RGB, (H, W, 3) uint8.
        label_map: index into ``classes`` or ``ignore_index``, (H, W).
        classes: names of the classes.
        palette: one colour per class.
        ignore_index: label of pixels that belong to no class; they are hatched in grey.
        alpha: weight of the colour, from 0 to 1.
        min_side: an image whose shorter side is less is enlarged by the smallest whole factor that reaches it.

    Returns:
        The picture, RGB uint8, of the image's size times that factor.

    Raises:
        ValueError: if shapes do not fit each other, or a label has no class or colour.
    """
    check_image(image)
    label_map = np.asarray(label_map)
    if label_map.shape != image.shape[:2]:
        raise ValueError(f'The label map is {label_map.shape}, the image {image.shape[:2]}; they have to be equal.')
    present = [int(label) for label in np.unique(label_map) if label != ignore_index]
    _check_labels(np.array(present), classes, palette)
    factor = max(1, -(-min_side // min(image.shape[:2])))
    picture = _enlarge(image, factor)
    label_map = _enlarge(label_map, factor)
    names, tags = readable(tuple(classes)), []
    for label in present:
        mask = label_map == label
        _blend(picture, mask, palette[label], alpha)
        tags.append((mask.sum(), Tag(names[label], _rgb(palette[label]), inside(mask))))
    stripes = _stripes(label_map.shape, 4 * _line_width(picture))
    _blend(picture, stripes & (label_map == ignore_index), GREY, HATCH_ALPHA)
    tags.sort(key=lambda tag: tag[0])  # a small region has fewer places for its name
    return write_tags(picture, [tag for _, tag in tags])


def comparison_sheet(
    rows: Sequence[Sequence[np.ndarray]], column_titles: Sequence[str], title: str | None = None
) -> np.ndarray:
    """Lay pictures out in a grid on white, fitted to cells of one width, as one RGB uint8 picture.

    Args:
        rows: pictures, as many in each row as there are column titles.
        column_titles: written above the columns; where they repeat, as in 'truth', 'prediction', 'truth',
            'prediction', a wider gap stands between the groups.
        title: written above all.

    Raises:
        ValueError: if there is nothing to lay out, or a row is shorter or longer than the titles.
    """
    columns = len(column_titles)
    if not rows or not columns or any(len(row) != columns for row in rows):
        raise ValueError(
            f'A sheet needs rows of one picture per column title; there are {columns} titles '
            f'and rows of {[len(row) for row in rows]} pictures.'
        )
    images = [image for row in rows for image in row]
    for image in images:
        check_image(image)
    cell = min(MAX_CELL, max(max(image.shape[:2]) for image in images))
    fitted = [[fit(image, cell) for image in row] for row in rows]
    size = max(16, cell // 24)
    gap, margin = size * 2 // 3, size
    column_width = max(image.shape[1] for row in fitted for image in row)
    period = next(p for p in range(1, columns + 1) if list(column_titles) == list(column_titles[:p]) * (columns // p))
    lefts = [margin + i * (column_width + gap) + (i // period if period > 1 else 0) * 2 * gap for i in range(columns)]
    heights = [max(image.shape[0] for image in row) for row in fitted]
    top = margin + (2 * size if title else 0)
    tops = np.cumsum([top + size + gap, *(height + gap for height in heights)]).tolist()

    sheet = Image.new('RGB', (lefts[-1] + column_width + margin, tops[-1] - gap + margin), 'white')
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((sheet.width / 2, margin), title, 'black', font(size * 5 // 4, title), anchor='ma')
    for left, text in zip(lefts, column_titles, strict=True):
        draw.text((left + column_width / 2, top), text, (60, 60, 60), font(size, text), anchor='ma')
    for y, height, pictures in zip(tops, heights, fitted, strict=False):
        for left, picture in zip(lefts, pictures, strict=True):
            x = left + (column_width - picture.shape[1]) // 2
            sheet.paste(Image.fromarray(picture), (x, y + (height - picture.shape[0]) // 2))
    return np.array(sheet)


def _rgb(colour: Colour) -> tuple[int, ...]:
    return tuple(int(value) for value in colour)


def _line_width(picture: np.ndarray) -> int:
    return max(1, round(min(picture.shape[:2]) / 240))


def _enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    """A copy, each pixel repeated ``factor`` times both ways: masks keep to the pixels they describe."""
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def fit(image: np.ndarray, cell: int) -> np.ndarray:
    """Resize so that the longer side is ``cell``."""
    height, width = image.shape[:2]
    scale = cell / max(height, width)
    if scale == 1:
        return image
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def _blend(picture: np.ndarray, mask: np.ndarray, colour: Colour, alpha: float) -> None:
    picture[mask] = np.rint((1 - alpha) * picture[mask] + alpha * np.array(colour)).astype(np.uint8)


def _outline(picture: np.ndarray, mask: np.ndarray, colour: Colour, width: int) -> None:
    """Trace a mask's border in a pale tint of its colour, which shows on an object of that very colour too."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    pale = [(int(value) + 255) // 2 for value in colour]
    cv2.drawContours(picture, contours, -1, pale, width, cv2.LINE_AA)


def hatch(image: np.ndarray, mask: np.ndarray, colour: Colour) -> np.ndarray:
    """A copy of an image (H, W, 3) with stripes over a mask (H, W)."""
    picture = image.copy()
    _blend(picture, mask & _stripes(mask.shape, 4 * _line_width(picture)), colour, HATCH_ALPHA)
    return picture


def _stripes(shape: tuple[int, ...], period: int) -> np.ndarray:
    """Diagonal stripes, boolean (H, W)."""
    ys, xs = np.ogrid[: shape[0], : shape[1]]
    return (xs + ys) // period % 2 == 0


def check_image(image: np.ndarray) -> None:
    """Raise ValueError unless ``image`` is RGB, (H, W, 3) uint8."""
    kind, shape = getattr(image, 'dtype', type(image).__name__), np.shape(image)
    if kind != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise ValueError(f'Pictures are RGB arrays, uint8 (H, W, 3) and not empty; given was {kind} {shape}.')


def _check_instances(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, **others) -> None:
    """Raise ValueError unless there is one of everything for each label."""
    wanted = {name: (len(labels),) for name in others} | {'masks': (len(labels), *image.shape[:2])}
    given = {name: np.shape(value) for name, value in others.items() if value is not None}
    wrong = [f'{name} {shape}' for name, shape in given.items() if shape != wanted[name]]
    if len(boxes) != len(labels):
        wrong.append(f'boxes {boxes.shape}')
    if wrong:
        raise ValueError(
            f'{len(labels)} labels on an image of {image.shape[:2]} do not go with {", ".join(wrong)}. '
            'Boxes are (N, 4), masks (N, H, W), scores and ignored (N,).'
        )


def _check_labels(labels: np.ndarray, classes: Sequence[str], palette: Sequence[Colour]) -> None:
    if len(palette) < len(classes):
        raise ValueError(f'There are {len(classes)} classes but {len(palette)} colours. Give one colour per class.')
    unknown = sorted(set(labels[(labels < 0) | (labels >= len(classes))].tolist())) if labels.size else []
    if unknown:
        raise ValueError(f'Labels {unknown} have no class; there are {len(classes)}, counted from 0.')
