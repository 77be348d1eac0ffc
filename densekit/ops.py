"""mmcv's compiled ops on torchvision and plain PyTorch, for an mmcv without compiled ops.

mmcv-lite ships all of mmcv's Python, ``mmcv/ops/*.py`` included, and lacks only the compiled module ``mmcv._ext`` that
those files call. Importing this module supplies one. It goes through a finder at the end of ``sys.meta_path``: the
regular search comes first, so a compiled mmcv is found and used as if this module did not exist, and neither mmcv nor
its absence matters until somebody imports ``mmcv.ops``.

The substitutes keep the calling convention of mmcv 2.x, outputs allocated by the caller included. They compute in
float32 (in float64 for float64 inputs) and round the result to the caller's dtype, so fp16 and bf16 work in and outside
autocast. To add one, write a function with the name and the arguments of the compiled op and decorate it with
``@_substitute``.
"""

import ctypes
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

import torch
import torchvision
from torch import Tensor

EXT_NAME = 'mmcv._ext'
SUBSTITUTES: dict[str, Callable[..., Any]] = {}


def _substitute(function: Callable[..., Any]) -> Callable[..., Any]:
    SUBSTITUTES[function.__name__] = function
    return function


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if any of the tensors has it, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _unsupported(what: str) -> NoReturn:
    raise NotImplementedError(
        f'{what} needs a compiled mmcv. This mmcv has no compiled ops, and densekit.ops substitutes only '
        f'{", ".join(sorted(SUBSTITUTES))}. To compile mmcv, with torch already installed and a compiler at hand: '
        "pip uninstall mmcv-lite; pip install 'setuptools<82' wheel ninja; "
        'pip install --no-build-isolation mmcv==2.1.0'
    )


@_substitute
def get_compiler_version() -> str:
    """Return what ``mmcv.utils.collect_env`` prints where nothing was compiled."""
    return 'n/a'


@_substitute
def get_compiling_cuda_version() -> str:
    """Return what ``mmcv.utils.collect_env`` prints where nothing was compiled."""
    return 'n/a'


@_substitute
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Non-maximum suppression.

    Args:
        boxes: (N, 4) as x1, y1, x2, y2 in pixels.
        scores: (N,).
        iou_threshold: Of two boxes whose IoU is larger, the one with the higher score stays.
        offset: 1 where x2 and y2 are the last pixels inside the box (widths are x2 - x1 + 1), else 0.

    Returns:
        The int64 indices of the boxes that stay, by descending score.
    """
    dtype = _compute_dtype(boxes, scores)
    boxes = boxes.to(dtype)
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    if dtype == torch.float32:
        # A float32 IoU is to be compared with the float32 threshold, as mmcv and torchvision's CUDA kernel do;
        # torchvision's CPU kernel takes the double, for which an IoU of 0.3f is above 0.3.
        iou_threshold = ctypes.c_float(iou_threshold).value
    return torchvision.ops.nms(boxes, scores.to(dtype), iou_threshold)


def _iou_of_one(box: Tensor, boxes: Tensor, offset: int) -> Tensor:
    """Return the IoU of one box (4,) with the boxes (N, 4); 0 where they do not meet or have no area."""
    inter = torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2]) + offset
    inter = inter.clamp(min=0).prod(dim=-1)
    area = (box[2:] - box[:2] + offset).prod()
    areas = (boxes[:, 2:] - boxes[:, :2] + offset).prod(dim=-1)
    return torch.where(inter > 0, inter / (area + areas - inter), 0)


@_substitute
def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft non-maximum suppression (Bodla et al., 2017).

    The box with the highest score is taken, the scores of the others are lowered by their IoU with it, and so on. Boxes
    whose score falls below ``min_score`` are out; the very first is never tested.

    Args:
        boxes: (N, 4) as x1, y1, x2, y2 in pixels.
        scores: (N,).
        dets: (N, 5), filled in place: the first K rows get the boxes that stay and their lowered scores; the other rows
            are left as they are.
        iou_threshold: Methods 0 and 1 lower the score of a box if its IoU is at least this.
        sigma: The width of method 2.
        min_score: The lowest score to stay.
        method: The factor on the score: 0 (naive) zero, 1 (linear) 1 - IoU, 2 (gaussian) exp(-IoU^2 / sigma).
        offset: 1 where x2 and y2 are the last pixels inside the box (widths are x2 - x1 + 1), else 0.

    Returns:
        The int64 indices (K,) of the boxes that stay, in the order of ``dets``.
    """
    dtype = _compute_dtype(boxes, scores)
    rest, scores = boxes.to(dtype), scores.to(dtype)
    order = torch.arange(len(boxes), device=boxes.device)
    kept: list[int] = []
    while len(order):
        top = int(scores.argmax())
        dets[len(kept), :4] = rest[top]
        dets[len(kept), 4] = scores[top]
        kept.append(int(order[top]))

        iou = _iou_of_one(rest[top], rest, offset)
        if method == 2:
            factor = torch.exp(-(iou * iou) / sigma)
        else:
            factor = torch.where(iou >= iou_threshold, 1 - iou if method == 1 else torch.zeros_like(iou), 1)
        scores = scores * factor
        stays = ~(scores < min_score)
        stays[top] = False
        rest, scores, order = rest[stays], scores[stays], order[stays]
    return torch.tensor(kept, dtype=torch.int64, device=boxes.device)


def _check_roi_align(rois: Tensor, pool_mode: int, aligned: bool) -> None:
    """Refuse what has no substitute, and RoIs that would read outside of the feature map's memory.

    Raises:
        NotImplementedError: For max pooling.
        ValueError: For a RoI that is not finite, or that ends before it begins while ``aligned`` (legacy RoIAlign gives
            such a RoI the size 1). Checked on the CPU only: on CUDA the check would wait for the device.
    """
    if pool_mode != 1:
        _unsupported("RoIAlign with pool_mode='max'")
    if rois.device.type != 'cpu':
        return
    bad = ~rois.isfinite().all(dim=1)
    if aligned:
        bad |= (rois[:, 3:] < rois[:, 1:3]).any(dim=1)
    if bad.any():
        i = int(bad.nonzero()[0])
        raise ValueError(
            f'RoI {i} of {len(rois)} is {rois[i].tolist()}. RoIs are (image, x1, y1, x2, y2) with finite numbers, '
            'x1 <= x2 and y1 <= y2. Look for a loss that is NaN or Inf, or for boxes in another format.'
        )


@_substitute
def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign (He et al., 2017).

    Args:
        input: The feature map (N, C, H, W).
        rois: (K, 5) as image, x1, y1, x2, y2 in pixels of the image; the dtype may differ from the feature map's.
        output: (K, C, aligned_height, aligned_width), filled in place.
        argmax_y: Unused, of max pooling.
        argmax_x: Unused, of max pooling.
        aligned_height: Rows of the output.
        aligned_width: Columns of the output.
        spatial_scale: Pixels of the feature map per pixel of the image.
        sampling_ratio: Samples per bin and axis; 0 takes one per pixel of the feature map.
        pool_mode: 1, the average of a bin's samples.
        aligned: Whether pixel centres lie at half-integers; False is the legacy form, half a pixel off.

    Raises:
        NotImplementedError: For ``pool_mode`` 0 (max pooling).
        ValueError: For RoIs on the CPU that are not finite or end before they begin.
    """
    _check_roi_align(rois, pool_mode, aligned)
    dtype = _compute_dtype(input)
    # Not torchvision.ops.roi_align: with deterministic algorithms that one turns to slow Python, even for the forward.
    result = torch.ops.torchvision.roi_align(
        input.to(dtype), rois.to(dtype), spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
    )
    output.copy_(result)


@_substitute
def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of RoIAlign with respect to the feature map, added to ``grad_input`` in place.

    Args:
        grad_output: (K, C, aligned_height, aligned_width).
        rois: As in the forward.
        argmax_y: Unused, of max pooling.
        argmax_x: Unused, of max pooling.
        grad_input: (N, C, H, W), which the caller has filled with zeros.
        aligned_height: As in the forward.
        aligned_width: As in the forward.
        spatial_scale: As in the forward.
        sampling_ratio: As in the forward.
        pool_mode: As in the forward.
        aligned: As in the forward.

    Raises:
        NotImplementedError: For ``pool_mode`` 0 (max pooling).
    """
    _check_roi_align(rois, pool_mode, aligned)
    dtype = _compute_dtype(grad_input)
    grad = torch.ops.torchvision._roi_align_backward(
        grad_output.to(dtype),
        rois.to(dtype),
        spatial_scale,
        aligned_height,
        aligned_width,
        *grad_input.shape,
        sampling_ratio,
        aligned,
    )
    grad_input.add_(grad)


def _missing(name: str) -> Callable[..., Any]:
    """Answer for every op without a substitute, since mmcv asks for the names of all its ops on import."""
    if name.startswith('__'):  # Python's own questions, such as __file__ or __path__
        raise AttributeError(f'module {EXT_NAME!r} has no attribute {name!r}')

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        _unsupported(f"mmcv's op '{name}'")

    return refuse


class _ExtFinder(MetaPathFinder, Loader):
    """Finds and loads the module of substitutes under the name of mmcv's compiled module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(EXT_NAME, self, origin='densekit.ops') if fullname == EXT_NAME else None

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(SUBSTITUTES, __getattr__=_missing)


if not any(type(finder).__name__ == _ExtFinder.__name__ for finder in sys.meta_path):
    # Last, so that a compiled module is found before.
    sys.meta_path.append(_ExtFinder())
