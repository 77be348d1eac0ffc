"""What a backbone emits for an image, and what a prediction came from: arrays, no pictures.

Sources: effective receptive field, Luo et al. 2016 (arXiv 1701.04128); Grad-CAM, Selvaraju et al. 2017 (1610.02391);
HiResCAM, Draelos and Carin 2020 (2011.08891).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from densekit.predictor import Predictor, best_first


@dataclass
class NetworkInput:
    """An image as it enters the network.

    Attributes:
        tensor: ``(1, 3, H, W)``, normalized and padded.
        sample: the data sample that goes with it.
        height: of the image in it, without padding, in pixels.
        width: likewise.
    """

    tensor: Tensor
    sample: Any
    height: int
    width: int


@dataclass
class Maps:
    """Class-activation maps of a score, one for each map of the backbone.

    Attributes:
        pooled: Grad-CAM: channels weighted by their mean gradient, ``(h, w)`` each.
        local: HiResCAM: gradient times activation at each place, ``(h, w)`` each.
        label: of the class.
        score: of the detection from 0 to 1, or the class's logit at the pixel.
        box: of the detection, x1, y1, x2, y2 in pixels of the image; None for a pixel.
    """

    pooled: list[np.ndarray]
    local: list[np.ndarray]
    label: int
    score: float
    box: np.ndarray | None


def network_input(predictor: Predictor, image: np.ndarray) -> NetworkInput:
    """What the test pipeline and the model's preprocessor make of an image ``(H, W, 3)`` uint8, RGB."""
    loaded = predictor.load(image)
    data = {'inputs': [loaded['inputs']], 'data_samples': [loaded['data_samples']]}
    ready = predictor.model.data_preprocessor(data, False)
    sample = ready['data_samples'][0]
    height, width = sample.img_shape[:2]
    return NetworkInput(ready['inputs'], sample, height, width)


def feature_maps(backbone: nn.Module, inputs: Tensor) -> list[Tensor]:
    """The maps that a backbone emits, finest first: ``(1, C, h, w)`` each.

    Raises:
        ValueError: if it emits anything else.
    """
    return _as_maps(backbone(inputs), type(backbone).__name__)


def energy(features: Tensor) -> np.ndarray:
    """Root mean square over the channels of ``(1, C, h, w)``: ``(h, w)``."""
    return features[0].detach().double().square().mean(0).sqrt().cpu().numpy()


def contrast(features: Tensor) -> np.ndarray:
    """How far each place's features ``(1, C, h, w)`` are from the picture's mean, root mean square: ``(h, w)``.

    Behind a LayerNorm all places have about the same energy; this tells them apart all the same.
    """
    return energy(features - features.mean(dim=(2, 3), keepdim=True))


def principal_components(features: Tensor, number: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """The features ``(1, C, h, w)`` of each place along the directions in which they differ most.

    Returns:
        ``(h, w, number)``, and the share of the variance in each, ``(number,)``. Each direction's sign is that of its
        largest entry, so that the same features give the same picture.
    """
    channels, height, width = features.shape[1:]
    rows = features[0].detach().double().cpu().reshape(channels, -1).T
    rows = rows - rows.mean(0)
    variances, directions = torch.linalg.eigh(rows.T @ rows)
    variances, directions = variances.flip(0).clamp(min=0)[:number], directions.flip(1)[:, :number]
    largest = directions.abs().argmax(0)
    directions = directions * directions[largest, torch.arange(directions.shape[1])].sign()
    along = np.zeros((height, width, number))
    shares = np.zeros(number)
    along[..., : directions.shape[1]] = (rows @ directions).reshape(height, width, -1).numpy()
    shares[: len(variances)] = (variances / rows.square().sum().clamp(min=1e-30)).numpy()
    return along, shares


def receptive_fields(
    backbone: nn.Module, given: NetworkInput, projections: int = 4
) -> list[tuple[np.ndarray, tuple[float, float]]]:
    """How much each pixel of an image changes the unit at its centre, for each map of the backbone.

    That is the norm of the unit's derivatives over its channels and the pixel's colours. It is estimated from the
    gradients of random sums of the channels with signs, the same ones each time. (The plain sum of all channels, which
    is often taken, is constant behind a LayerNorm.)

    Args:
        backbone: in eval mode.
        given: the image.
        projections: number of random sums.

    Returns:
        For each map ``(height, width)`` of the image without padding, at the network's scale, and the centre of the
        unit (x, y) in pixels.
    """
    inputs = given.tensor.detach().clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    fields = []
    with torch.enable_grad():
        maps = feature_maps(backbone, inputs)
        for features in maps:
            rows, columns = visible(features, given)
            y, x = rows // 2, columns // 2
            total = torch.zeros_like(inputs[0, 0])
            for _ in range(projections):
                signs = torch.randint(0, 2, (features.shape[1],), generator=generator) * 2.0 - 1
                value = (features[0, :, y, x] * signs.to(features)).sum()
                (gradient,) = torch.autograd.grad(value, inputs, retain_graph=True)
                total += gradient[0].float().square().sum(0)
            field = (total / projections).sqrt()[: given.height, : given.width].cpu().numpy()
            stride = (inputs.shape[3] / features.shape[3], inputs.shape[2] / features.shape[2])
            fields.append((field, ((x + 0.5) * stride[0], (y + 0.5) * stride[1])))
    return fields


def reach(field: np.ndarray, centre: tuple[float, float], share: float) -> int:
    """The side, in pixels, of the smallest square around ``centre`` (x, y) with ``share`` of what is in ``field``."""
    ys, xs = np.indices(field.shape)
    distance = np.maximum(np.abs(xs + 0.5 - centre[0]), np.abs(ys + 0.5 - centre[1]))
    order = np.argsort(distance, axis=None, kind='stable')
    sums = np.cumsum(field.ravel()[order])
    return round(2 * (distance.ravel()[order][np.searchsorted(sums, share * sums[-1])] + 0.5))


def detection_maps(predictor: Predictor, given: NetworkInput, number: int) -> Maps:
    """Which places raise the score of a detection.

    Args:
        predictor: a detector.
        given: the image.
        number: of the detection, best first, from 0.

    Raises:
        ValueError: if there are not as many detections, or the model's scores have no gradient.
    """
    with torch.enable_grad(), _Emitted(predictor.model.backbone) as emitted:
        inputs = given.tensor.detach().clone().requires_grad_()
        found = predictor.model(inputs, [given.sample.clone()], mode='predict')[0].pred_instances
        if not 0 <= number < len(found.scores):
            raise ValueError(f'there is no detection {number}; the image has {len(found.scores)}, counted from 0')
        if not found.scores.requires_grad:
            raise ValueError(f'the scores of {type(predictor.model).__name__} have no gradient, so no map can be made')
        index = int(best_first(found.scores)[number])
        pooled, local = _class_activation(found.scores[index], emitted.maps)
    box = found.bboxes[index].detach().cpu().numpy()
    return Maps(pooled, local, int(found.labels[index]), float(found.scores[index].detach()), box)


def pixel_maps(predictor: Predictor, given: NetworkInput, x: int, y: int) -> Maps:
    """Which places raise the logit of the class that a segmentor gives to a pixel of the image.

    The whole image goes through the network at once, also where the config has windows slide over it.

    Raises:
        ValueError: if the pixel is not in the image.
    """
    height, width = given.sample.ori_shape[:2]
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f'pixel {x} {y} is not in the image, which is {width} wide and {height} high')
    with torch.enable_grad(), _Emitted(predictor.model.backbone) as emitted:
        inputs = given.tensor.detach().clone().requires_grad_()
        logits = predictor.model.encode_decode(inputs, [given.sample.metainfo])
        row, column = int((y + 0.5) * given.height / height), int((x + 0.5) * given.width / width)
        there = logits[0, :, row, column]
        label = int(there.argmax())
        pooled, local = _class_activation(there[label], emitted.maps)
    return Maps(pooled, local, label, float(there[label].detach()), None)


def visible(features: Tensor | np.ndarray, given: NetworkInput) -> tuple[int, int]:
    """Rows and columns of a map ``(..., h, w)`` that show the image; the others show padding."""
    height, width = features.shape[-2:]
    rows, columns = given.height * height / given.tensor.shape[2], given.width * width / given.tensor.shape[3]
    return min(height, int(np.ceil(rows))), min(width, int(np.ceil(columns)))


class _Emitted:
    """A context in which the maps that a backbone emits are kept."""

    def __init__(self, backbone: nn.Module) -> None:
        self.maps: list[Tensor] = []
        self._backbone = backbone

    def __enter__(self) -> '_Emitted':
        self._handle = self._backbone.register_forward_hook(self._keep)
        return self

    def _keep(self, module: nn.Module, _inputs: Any, outputs: Any) -> None:
        self.maps = _as_maps(outputs, type(module).__name__)

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def _as_maps(outputs: Any, name: str) -> list[Tensor]:
    maps = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if not maps or not all(isinstance(part, Tensor) and part.ndim == 4 for part in maps):
        raise ValueError(f'{name} emits no feature maps (N, C, H, W), so there is nothing to show of it')
    return maps


def _class_activation(score: Tensor, maps: list[Tensor]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    gradients = torch.autograd.grad(score, maps, allow_unused=True)
    pooled, local = [], []
    for features, gradient in zip(maps, gradients, strict=True):
        # A map that the head does not use has no part in the score.
        slopes = torch.zeros_like(features) if gradient is None else gradient
        weights = slopes.mean(dim=(2, 3), keepdim=True)
        pooled.append((weights * features).sum(1)[0].detach().float().relu().cpu().numpy())
        local.append((slopes * features).sum(1)[0].detach().float().relu().cpu().numpy())
    return pooled, local
