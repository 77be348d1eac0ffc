"""Images with their ground truth beside what was predicted."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from densekit.report.page.markup import Html, note, picture, tag

SHOWN = 4  # worst, and best


@dataclass
class Shown:
    """An image of the gallery.

    Attributes:
        name: of its file.
        score: how well it was predicted, in words.
        truth: picture of the ground truth.
        predicted: picture of the prediction.
    """

    name: str
    score: str
    truth: np.ndarray
    predicted: np.ndarray


def gallery(title: str, images: Sequence[Shown]) -> Html:
    """Images below each other, ground truth on the left."""
    if not images:
        return tag('div', tag('h4', title), note('no image'))
    figures = [
        tag(
            'figure',
            tag(
                'div',
                _side('truth', shown.truth, f'Ground truth of {shown.name}'),
                _side('prediction', shown.predicted, f'Prediction for {shown.name}'),
                class_='pair',
            ),
            tag('figcaption', tag('b', shown.name), ' ', shown.score),
            class_='shown',
        )
        for shown in images
    ]
    return tag('div', tag('h4', title), tag('div', *figures, class_='columns'))


def _side(title: str, image: np.ndarray, alt: str) -> Html:
    enlarge = tag('button', picture(image, alt), type='button', class_='zoom', title='larger or smaller')
    return tag('div', tag('span', title), enlarge)


def worst_and_best(worst_first: Sequence[int]) -> tuple[list[int], list[int]]:
    """The ends of a ranking; no image is in both."""
    half = min(SHOWN, (len(worst_first) + 1) // 2)
    return list(worst_first[:half]), list(reversed(worst_first[max(half, len(worst_first) - SHOWN) :]))
