"""Paints the pictures of the generated "shapes" data set.

A picture is painted from back to front: clouds, perhaps a crowd, objects, perhaps a bar. An object that would hide too
much of an earlier one, or punch a hole into it, is placed anew, so every object that was painted stays visible.
"""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass, field

import cv2
import numpy as np

CLASSES = ('circle', 'square', 'triangle', 'star', 'cross')
PALETTE = ((220, 70, 50), (60, 110, 220), (60, 170, 80), (235, 190, 50), (170, 80, 200))

EMPTY_EVERY, CROWD_EVERY, BAR_EVERY = 25, 20, 10
MAX_OBJECTS = 4
DIAMETERS = (0.20, 0.60)  # of the image side
MIN_VISIBLE = 0.6  # of an object's pixels, after others were painted over it
MIN_AREA = 0.008  # of the image: what is smaller after the image border cut it is not painted
ATTEMPTS = 10
OVERSAMPLING = 4


def _regular(corners: int, inner: float = 1.0) -> np.ndarray:
    """Corners of a regular polygon of circumradius 1, (2 * corners, 2).

    Every second one lies at radius ``inner``: cos(pi / corners) gives straight edges, less gives a star.
    """
    angles = np.arange(2 * corners) * np.pi / corners
    radii = np.where(np.arange(2 * corners) % 2 == 0, 1.0, inner)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _cross(arm: float = 0.36) -> np.ndarray:
    """Corners of an upright cross of circumradius 1 whose arms are ``2 * arm`` wide, (12, 2)."""
    reach = np.sqrt(1 - arm**2)
    quarter = np.array([[reach, -arm], [reach, arm], [arm, arm]])
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])


def _wave(x: np.ndarray, periods: float) -> np.ndarray:
    return np.sin(np.pi * periods * x)


@dataclass(frozen=True)
class _Look:
    """How a class looks: outline about 2 across, hue on the colour circle, texture in object coordinates."""

    outline: np.ndarray
    hue: float
    texture: Callable[[np.ndarray, np.ndarray], np.ndarray]


_LOOKS = (
    _Look(_regular(24), 0.02, lambda u, v: _wave(np.hypot(u, v) - 0.25, 2.5)),  # circle: rings
    _Look(_regular(4, 0.5**0.5), 0.61, lambda u, v: 2 * _wave(u + v, 1.8) * _wave(u - v, 1.8)),  # square: checks
    _Look(1.2 * _regular(3, 0.5), 0.36, lambda u, v: _wave(u, 3.5)),  # triangle: stripes
    _Look(_regular(5, 0.5), 0.14, lambda u, v: 0.7 - np.hypot(u, v)),  # star: plain, brighter inside
    _Look(_cross(), 0.80, lambda u, v: 1.2 - 2.5 * np.abs(_wave(u, 2.2) * _wave(v, 2.2))),  # cross: dots
)


@dataclass
class Item:
    """What one annotation describes: an object or a crowd; ``category`` None is the bar, which has no annotation."""

    category: int | None
    crowd: bool = False
    area: int = 0


@dataclass
class Scene:
    """A picture while it is painted.

    Attributes:
        picture: RGB in 0 to 1, (H, W, 3).
        owner: per pixel, 0 for background or the number of the item seen there, counted from 1, (H, W).
        mixed: pixels that two things share, (H, W).
        items: the items in the order they were painted.
    """

    picture: np.ndarray
    owner: np.ndarray
    mixed: np.ndarray
    items: list[Item] = field(default_factory=list)

    def visible(self, number: int) -> np.ndarray:
        """Pixels of an item that nothing covers, boolean (H, W)."""
        return self.owner == number

    def paint(self, coverage: np.ndarray, colour: np.ndarray, item: Item) -> bool:
        """Paint ``item`` over what is there unless that would hide too much of it; tell whether it was painted.

        Args:
            coverage: share of each pixel that the item covers, (H, W).
            colour: RGB in 0 to 1, (H, W, 3).
            item: a new item, or the one painted last to add to it.
        """
        mask = coverage >= 0.5
        if not item.crowd and (mask.mean() < MIN_AREA or _has_hole(mask)):
            return False
        for number in np.unique(self.owner[mask]):
            under = self.items[number - 1] if number else item
            if under is item:
                continue
            rest = self.visible(number) & ~mask
            # A polygon cannot have a hole; run lengths, which crowds use, can.
            if rest.sum() < MIN_VISIBLE * under.area or (not under.crowd and _has_hole(rest)):
                return False
        if not self.items or self.items[-1] is not item:
            self.items.append(item)
        self.picture += coverage[..., None] * (colour - self.picture)
        self.owner[mask] = len(self.items)
        self.mixed = np.where((coverage > 0.1) & (coverage < 0.9), True, self.mixed & (coverage <= 0.1))
        item.area = int(self.visible(len(self.items)).sum())
        return True


def _has_hole(mask: np.ndarray) -> bool:
    _, hierarchy = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return hierarchy is not None and bool((hierarchy[0, :, 3] >= 0).any())


def _coverage(corners: np.ndarray, size: int) -> np.ndarray:
    """Share of each pixel inside a polygon of corners (N, 2) in pixels, (size, size) float32."""
    fine = np.zeros((size * OVERSAMPLING,) * 2, np.uint8)
    bits = 4
    points = np.rint((corners * OVERSAMPLING - 0.5) * 2**bits).astype(np.int32)
    cv2.fillPoly(fine, [points], 255, shift=bits)
    return cv2.resize(fine, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _rotate(points: np.ndarray, angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]])


def _colour(rng: np.random.Generator, hue: float, saturation: tuple, value: tuple) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(*saturation), rng.uniform(*value)), np.float32)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A gradient between two muted colours under soft clouds, RGB (size, size, 3)."""
    grid = (np.arange(size) + 0.5) / size - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.clip(0.5 + np.cos(angle) * grid[None, :] + np.sin(angle) * grid[:, None], 0, 1)[..., None]
    first, second = (_colour(rng, rng.uniform(), (0.05, 0.35), (0.25, 0.85)) for _ in range(2))
    clouds = np.zeros((size, size), np.float32)
    for cells, strength in ((4, 0.07), (12, 0.05)):
        noise = rng.normal(0, strength, (cells, cells)).astype(np.float32)
        clouds += cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
    return (first + ramp * (second - first) + clouds[..., None]).astype(np.float32)


def _paint_shape(
    scene: Scene, rng: np.random.Generator, item: Item, look: _Look, centre: np.ndarray, radius: float
) -> bool:
    """Paint one textured shape of a random rotation and colour; tell whether there was room for it."""
    size = len(scene.owner)
    angle = rng.uniform(0, 2 * np.pi)
    tone = _colour(rng, look.hue + rng.uniform(-0.04, 0.04), (0.55, 0.9), (0.65, 0.95))
    dark = tone * rng.uniform(0.5, 0.65)
    ys, xs = np.mgrid[:size, :size] + 0.5
    local = _rotate(np.stack([xs - centre[0], ys - centre[1]], axis=-1) / radius, -angle)
    weave = np.clip(0.5 + 1.5 * look.texture(local[..., 0], local[..., 1]), 0, 1)[..., None]
    corners = centre + radius * _rotate(look.outline, angle)
    return scene.paint(_coverage(corners, size), dark + weave * (tone - dark), item)


def _paint_objects(scene: Scene, rng: np.random.Generator) -> None:
    size = len(scene.owner)
    for _ in range(rng.integers(1, MAX_OBJECTS + 1)):
        category = int(rng.integers(len(CLASSES)))
        for _ in range(ATTEMPTS):
            low, high = np.log(DIAMETERS)
            radius = size / 2 * np.exp(rng.uniform(low, high))
            centre = rng.uniform(0.15, 0.85, 2) * size
            if _paint_shape(scene, rng, Item(category), _LOOKS[category], centre, radius):
                break


def _paint_crowd(scene: Scene, rng: np.random.Generator) -> None:
    """Paint several small shapes of one class close together, as one item."""
    size = len(scene.owner)
    category = int(rng.integers(len(CLASSES)))
    item = Item(category, crowd=True)
    middle = rng.uniform(0.3, 0.7, 2) * size
    for angle in np.arange(7) * 2.4:  # the golden angle spreads them evenly
        centre = middle + 0.06 * size * np.sqrt(angle) * np.array([np.cos(angle), np.sin(angle)])
        centre += rng.uniform(-0.015, 0.015, 2) * size
        _paint_shape(scene, rng, item, _LOOKS[category], centre, rng.uniform(0.065, 0.085) * size)


def _paint_bar(scene: Scene, rng: np.random.Generator) -> None:
    """Paint a grey bar across the whole picture that belongs to no class."""
    size = len(scene.owner)
    for _ in range(ATTEMPTS):
        width = rng.uniform(0.03, 0.06) * size
        bar = np.array([[-2 * size, -width], [2 * size, -width], [2 * size, width], [-2 * size, width]])
        corners = rng.uniform(0.2, 0.8, 2) * size + _rotate(bar, rng.uniform(0, np.pi))
        grey = np.full((size, size, 3), rng.uniform(0.1, 0.25), np.float32)
        if scene.paint(_coverage(corners, size), grey, Item(None)):
            return


def render(seed: int, split: int, index: int, size: int) -> Scene:
    """Paint one picture.

    Args:
        seed: seed of the data set.
        split: number of the split.
        index: position within the split; together with ``seed`` and ``split`` it decides everything random.
        size: height and width in pixels.
    """
    rng = np.random.default_rng([seed, split, index])
    scene = Scene(_background(rng, size), np.zeros((size, size), np.int32), np.zeros((size, size), bool))
    if index % EMPTY_EVERY != EMPTY_EVERY - 1:
        if index % CROWD_EVERY == CROWD_EVERY // 2:
            _paint_crowd(scene, rng)
        _paint_objects(scene, rng)
        if index % BAR_EVERY == BAR_EVERY // 3:
            _paint_bar(scene, rng)
    scene.picture += rng.normal(0, 0.02, scene.picture.shape)
    return scene
