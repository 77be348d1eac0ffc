"""What tools/inspect_features.py does: sheets of pictures of what a backbone emits."""

import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from densekit.cli import check_writable, user_errors
from densekit.predictor import Predictor
from densekit.report import features
from densekit.report.features import Maps, NetworkInput
from densekit.report.pictures import draw_instances, read_image, save_png
from densekit.report.sheets import as_colours, contact_sheet, stretched

LONG_SIDE = 480  # pixels of a picture in a sheet
SHARES = (0.5, 0.95)  # of the gradient, drawn as squares


def inspect(
    config: str,
    checkpoint: str,
    path: str,
    *,
    out: str,
    detection: int | None = None,
    pixel: tuple[int, int] | None = None,
    device: str | None = None,
    options: Sequence[str] = (),
) -> None:
    """Writes energy.png, components.png, receptive_field.png and cam.png to a folder.

    Args:
        config: path of the config file.
        checkpoint: of the whole model.
        path: of the image.
        out: folder, made if missing.
        detection: whose score the class-activation map explains, best first; default 0. Of detectors.
        pixel: x and y of the pixel whose class it explains; default the centre. Of segmentors.
        device: see :class:`Predictor`.
        options: ``key=value`` texts that change the config.

    Raises:
        UserError: if something given cannot be used.
    """
    with user_errors():
        check_writable(out, '--out')
        predictor = Predictor(config, checkpoint, device=device, options=options)
        _check_target(predictor, detection, pixel)
        image = read_image(path)
        given = features.network_input(predictor, image)
        view = View(image, given)
        sheets = {}
        if predictor.is_segmentor:
            x, y = pixel or (image.shape[1] // 2, image.shape[0] // 2)
            sheets['cam'] = _pixel_sheet(view, features.pixel_maps(predictor, given, x, y), (x, y), predictor)
        else:
            sheets['cam'] = _detection_sheet(view, predictor, given, detection or 0)
        with features.torch.no_grad():
            maps = features.feature_maps(predictor.model.backbone, given.tensor)
        sheets['energy'] = _energy_sheet(view, maps)
        sheets['components'] = _components_sheet(view, maps)
        sheets['receptive_field'] = _fields_sheet(view, features.receptive_fields(predictor.model.backbone, given))
    for name, sheet in sheets.items():
        save_png(Path(out, f'{name}.png'), sheet)
        sys.stdout.write(f'{Path(out, name)}.png\n')


class View:
    """The image at the size at which it is shown, and maps fitted to it."""

    def __init__(self, image: np.ndarray, given: NetworkInput) -> None:
        self.given = given
        self.scale = LONG_SIDE / max(image.shape[:2])
        self.height, self.width = (max(1, round(side * self.scale)) for side in image.shape[:2])
        self.image = stretched(image, self.height, self.width, smooth=True)

    def fitted(self, values: np.ndarray, smooth: bool = False) -> np.ndarray:
        """A map ``(h, w)`` or ``(h, w, 3)`` of the padded input, without the padding, at the image's size here."""
        rows, columns = features.visible(values if values.ndim == 2 else values[..., 0], self.given)
        return stretched(values[:rows, :columns], self.height, self.width, smooth)

    def over(self, heat: np.ndarray) -> np.ndarray:
        """Heat ``(height, width)`` from 0 to 1 over the image in grey: what is cold stays visible."""
        grey = cv2.cvtColor(self.image, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32)
        weight = np.clip(heat, 0, 1)[..., None] ** 0.5 * 0.85
        return np.rint((1 - weight) * (0.4 * grey + 60) + weight * as_colours(heat, 0, 1)).astype(np.uint8)


def _check_target(predictor: Predictor, detection: int | None, pixel: tuple[int, int] | None) -> None:
    kind = 'segmentor' if predictor.is_segmentor else 'detector'
    wrong = detection if predictor.is_segmentor else pixel
    if wrong is not None:
        given, right = ('--detection N', '--pixel X Y') if predictor.is_segmentor else ('--pixel X Y', '--detection N')
        raise ValueError(f'{given} does not go with a {kind}; give {right}')


def _caption(number: int, maps: Sequence[np.ndarray] | Sequence, given: NetworkInput) -> str:
    height, width = maps[number].shape[-2:]
    stride = given.tensor.shape[2] / height
    return f'map {number + 1} of {len(maps)}: {width} x {height}, one in {stride:g} pixels'


def _energy_sheet(view: View, maps: list) -> np.ndarray:
    pictures, captions = [view.image], ['image']
    for what, values in (('energy', features.energy), ('contrast', features.contrast)):
        if what == 'contrast':
            pictures.append(view.image)
            captions.append('image')
        for number, emitted in enumerate(maps):
            rows, columns = features.visible(emitted, view.given)
            shown = values(emitted[..., :rows, :columns])
            pictures.append(stretched(as_colours(shown, shown.min(), shown.max()), view.height, view.width))
            captions.append(
                f'{_caption(number, maps, view.given)}\n'
                f'{what}, {emitted.shape[1]} channels: dark {shown.min():.3g}, bright {shown.max():.3g}'
            )
    title = 'Energy: root mean square over channels. Below, of the difference from the mean over the picture'
    return contact_sheet(pictures, captions, columns=1 + len(maps), title=title, cell=LONG_SIDE)


def _components_sheet(view: View, maps: list) -> np.ndarray:
    pictures, captions = [view.image], ['image']
    for number, emitted in enumerate(maps):
        rows, columns = features.visible(emitted, view.given)
        along, shares = features.principal_components(emitted[..., :rows, :columns])
        low, high = np.percentile(along, (1, 99), axis=(0, 1))
        levels = np.clip((along - low) / np.maximum(high - low, 1e-12), 0, 1)
        pictures.append(stretched(np.rint(levels * 255).astype(np.uint8), view.height, view.width))
        parts = ', '.join(f'{name} {share:.0%}' for name, share in zip(('red', 'green', 'blue'), shares, strict=True))
        captions.append(f'{_caption(number, maps, view.given)}\nof the variance {parts}')
    title = 'First three principal components of the features, in red, green and blue'
    return contact_sheet(pictures, captions, columns=1 + len(maps), title=title, cell=LONG_SIDE)


def _fields_sheet(view: View, fields: list[tuple[np.ndarray, tuple[float, float]]]) -> np.ndarray:
    pictures, captions = [view.image], ['image']
    for number, (field, (x, y)) in enumerate(fields):
        scale = view.width / view.given.width
        # Shares of a small picture's pixels: the field of fine maps is smaller than a pixel of the sheet otherwise.
        heat = cv2.resize(
            field, (view.width, view.height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
        )
        picture = view.over((heat / max(heat.max(), 1e-30)) ** 0.5)
        sides = [features.reach(field, (x, y), share) for share in SHARES]
        for side, colour in zip(sides, ((255, 255, 255), (120, 200, 255)), strict=True):
            corners = [round((value + half) * scale) for half in (-side / 2, side / 2) for value in (x, y)]
            cv2.rectangle(picture, corners[:2], corners[2:], colour, 1, cv2.LINE_AA)
        pictures.append(picture)
        captions.append(
            f'map {number + 1} of {len(fields)}\n'
            f'{SHARES[0]:.0%} within {sides[0]} pixels (white), {SHARES[1]:.0%} within {sides[1]} (blue)'
        )
    title = (
        'Effective receptive field: how much each pixel changes the unit at the centre (square root). '
        f'The network sees {view.given.width} x {view.given.height} pixels'
    )
    return contact_sheet(pictures, captions, columns=1 + len(fields), title=title, cell=LONG_SIDE)


def _detection_sheet(view: View, predictor: Predictor, given: NetworkInput, number: int) -> np.ndarray:
    maps = features.detection_maps(predictor, given, number)
    assert maps.box is not None
    shown = draw_instances(
        view.image,
        boxes=maps.box[None] * view.scale,
        labels=np.array([maps.label]),
        scores=np.array([maps.score]),
        classes=predictor.classes,
        palette=predictor.palette,
        min_side=1,
    )
    corners = np.rint(maps.box * view.scale).astype(int).tolist()
    title = f'Where detection {number}, {predictor.classes[maps.label]} {maps.score:.2f}, comes from'
    return _cam_sheet(
        view, maps, shown, title, lambda picture: cv2.rectangle(picture, corners[:2], corners[2:], (255, 255, 255), 1)
    )


def _pixel_sheet(view: View, maps: Maps, pixel: tuple[int, int], predictor: Predictor) -> np.ndarray:
    place = [round((value + 0.5) * view.scale) for value in pixel]

    def mark(picture: np.ndarray) -> None:
        cv2.drawMarker(picture, place, (0, 0, 0), cv2.MARKER_CROSS, 19, 5)
        cv2.drawMarker(picture, place, (255, 255, 255), cv2.MARKER_CROSS, 17, 2)

    shown = view.image.copy()
    mark(shown)
    title = f'Where {predictor.classes[maps.label]} at pixel {pixel[0]}, {pixel[1]} comes from (logit {maps.score:.2f})'
    return _cam_sheet(view, maps, shown, title, mark)


def _cam_sheet(view: View, maps: Maps, shown: np.ndarray, title: str, mark) -> np.ndarray:
    pictures, captions = [], []
    for name, cams in (('Grad-CAM', maps.pooled), ('HiResCAM', maps.local)):
        pictures.append(shown)
        captions.append(
            'Grad-CAM: everything alike in the picture'
            if name == 'Grad-CAM'
            else 'HiResCAM: what this score is made of'
        )
        for number, cam in enumerate(cams):
            peak = float(cam.max())
            picture = view.over(view.fitted(cam / peak if peak else cam, smooth=True))
            mark(picture)
            pictures.append(picture)
            captions.append(
                f'{name}, map {number + 1} of {len(cams)}'
                + (f', at most {peak:.2g}' if peak else ': nothing raises the score')
            )
    return contact_sheet(pictures, captions, columns=1 + len(maps.pooled), title=title, cell=LONG_SIDE)
