"""Multi-scale deformable attention on grid_sample, one level at a time."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from densekit.ops.registry import compute_dtype, substitute


def _attend_to_level(value: Tensor, locations: Tensor, weights: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the part (N, Q, M * D) of deformable attention that one level contributes.

    Args:
        value: The level's features (N, H * W, M, D) for M heads.
        locations: (N, Q, M, P, 2) as x, y, from 0 at the map's left and upper edge to 1 at the others.
        weights: (N, Q, M, P).
        shape: H, W.
    """
    batch, _, heads, dims = value.shape
    queries, points = weights.shape[1], weights.shape[3]
    maps = value.permute(0, 2, 3, 1).reshape(batch * heads, dims, *shape)
    grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)
    sampled = F.grid_sample(maps, grid, mode='bilinear', padding_mode='zeros', align_corners=False)
    result = (sampled * weights.transpose(1, 2).reshape(batch * heads, 1, queries, points)).sum(dim=-1)
    return result.view(batch, heads * dims, queries).transpose(1, 2)


@substitute
def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention (Zhu et al., 2021), which mmcv calls on CUDA; for the CPU it has its own.

    Args:
        value: The features (N, S, M, D) of all levels, one after the other, for M heads.
        value_spatial_shapes: The height and width (L, 2) of each level.
        value_level_start_index: Where in S each level begins (L,).
        sampling_locations: (N, Q, M, L, P, 2) as x, y, from 0 at a map's left and upper edge to 1 at the others; beyond
            the edges the features are 0.
        attention_weights: (N, Q, M, L, P).
        im2col_step: Unused: how many images the compiled op takes at a time.

    Returns:
        (N, Q, M * D).
    """
    dtype = compute_dtype(value)
    value_, locations, weights = (t.to(dtype) for t in (value, sampling_locations, attention_weights))
    result = value_.new_zeros(*weights.shape[:2], value.shape[2] * value.shape[3])
    levels = zip(value_spatial_shapes.tolist(), value_level_start_index.tolist(), strict=True)
    for i, ((h, w), start) in enumerate(levels):
        result += _attend_to_level(value_[:, start : start + h * w], locations[:, :, :, i], weights[:, :, :, i], (h, w))
    return result.to(value.dtype)


@substitute
def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Gradients of multi-scale deformable attention.

    Args:
        value: As in the forward.
        value_spatial_shapes: As in the forward.
        value_level_start_index: As in the forward.
        sampling_locations: As in the forward.
        attention_weights: As in the forward.
        grad_output: (N, Q, M * D).
        grad_value: Filled in place, as are the next two; each is shaped as what it is the gradient of.
        grad_sampling_loc: Of ``sampling_locations``.
        grad_attn_weight: Of ``attention_weights``.
        im2col_step: Unused.
    """
    dtype = compute_dtype(value)
    levels = zip(value_spatial_shapes.tolist(), value_level_start_index.tolist(), strict=True)
    # The levels are summed, so one at a time will do, at a fraction of the memory.
    for i, ((h, w), start) in enumerate(levels):
        keys = slice(start, start + h * w)
        parts = value[:, keys], sampling_locations[:, :, :, i], attention_weights[:, :, :, i]
        with torch.enable_grad():
            leaves = [part.detach().to(dtype).requires_grad_() for part in parts]
            result = _attend_to_level(leaves[0], leaves[1], leaves[2], (h, w))
        grads = torch.autograd.grad(result, leaves, grad_output.to(dtype))
        grad_value[:, keys], grad_sampling_loc[:, :, :, i], grad_attn_weight[:, :, :, i] = grads
