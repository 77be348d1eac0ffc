"""Focal loss of a sigmoid and of a softmax."""

import torch
import torch.nn.functional as F
from torch import Tensor

from densekit.ops.registry import compute_dtype, substitute


def _focal_terms(
    input: Tensor, target: Tensor, weight: Tensor, alpha: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return, each (N, C): the factor of the loss, 1 at the target and -1 elsewhere, the logit of the right answer."""
    positive = (target[:, None] == torch.arange(input.shape[1], device=input.device)).to(dtype)
    factor = positive * alpha + (1 - positive) * (1 - alpha)
    if len(weight):
        is_class = (target >= 0) & (target < len(weight))
        of_row = weight.to(dtype)[target.clamp(0, len(weight) - 1)]
        factor = factor * torch.where(is_class, of_row, 1)[:, None]
    sign = 2 * positive - 1
    return factor, sign, sign * input.to(dtype)


@substitute
def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss of a sigmoid for each class (Lin et al., 2017).

    With p the probability of the right answer (of the class where it is the target, else of its absence) it is
    -alpha_t (1 - p)^gamma log p. The compiled op takes the log of p rounded to float32, so that a wrong logit of 15 has
    the log 14.84 and one of 17 that of the smallest float32, 87.3; here the log is exact.

    Args:
        input: Logits (N, C).
        target: Classes (N,), int64. Whatever is not one of the C classes is the background: no class is the target.
        weight: (C,), by which the losses of a row are multiplied according to its target, or (0,) for none. Rows of the
            background have the weight 1; the compiled op reads past the end of the weights.
        output: (N, C), filled in place.
        gamma: The exponent.
        alpha: alpha_t where the class is the target; elsewhere it is 1 - alpha.
    """
    factor, _, logit = _focal_terms(input, target, weight, alpha, compute_dtype(input))
    output.copy_(-factor * torch.sigmoid(-logit) ** gamma * F.logsigmoid(logit))


@substitute
def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Derivative of each loss of the sigmoid focal loss with respect to its logit.

    Args:
        input: As in the forward.
        target: As in the forward.
        weight: As in the forward.
        grad_input: (N, C), filled in place.
        gamma: As in the forward.
        alpha: As in the forward.
    """
    factor, sign, logit = _focal_terms(input, target, weight, alpha, compute_dtype(input))
    wrong = torch.sigmoid(-logit)
    slope = wrong - gamma * torch.sigmoid(logit) * F.logsigmoid(logit)
    grad_input.copy_(-factor * sign * wrong**gamma * slope)


def _softmax_focal_terms(softmax: Tensor, target: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return, each (N,): the factor of the loss, which is 0 for rows to ignore, and the target's probability."""
    index = target.clamp(min=0)
    probability = softmax.gather(1, index[:, None])[:, 0]
    factor = alpha * (target >= 0).to(softmax.dtype)
    if len(weight):
        factor = factor * weight.to(softmax.dtype)[index]
    # The smallest float32, as in mmcv: the log stays finite.
    return factor, probability.clamp(min=torch.finfo(torch.float32).tiny)


@substitute
def softmax_focal_loss_forward(
    softmax: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss of a softmax: -alpha (1 - p)^gamma log p, with p the probability of the target.

    Args:
        softmax: Probabilities (N, C), which mmcv computes from the logits.
        target: Classes (N,), int64, below C; rows with a negative one have no loss.
        weight: (C,), by which the loss is multiplied according to the target, or (0,) for none.
        output: (N,), filled in place.
        gamma: The exponent.
        alpha: The factor, the same for all classes.
    """
    softmax = softmax.to(compute_dtype(softmax))
    factor, p = _softmax_focal_terms(softmax, target, weight, alpha)
    output.copy_(-factor * (1 - p) ** gamma * p.log())


@substitute
def softmax_focal_loss_backward(
    softmax: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Gradient of the softmax focal loss with respect to the logits.

    Args:
        softmax: As in the forward.
        target: As in the forward.
        weight: As in the forward.
        buff: Unused, scratch of the compiled op.
        grad_input: (N, C), filled in place.
        gamma: As in the forward.
        alpha: As in the forward.
    """
    softmax = softmax.to(compute_dtype(softmax))
    factor, p = _softmax_focal_terms(softmax, target, weight, alpha)
    wrong = (1 - p).clamp(min=torch.finfo(torch.float32).tiny)  # else 0 * inf at p = 1 and gamma < 1
    slope = factor * (gamma * wrong ** (gamma - 1) * p * p.log() - wrong**gamma)
    is_target = target[:, None] == torch.arange(softmax.shape[1], device=softmax.device)
    grad_input.copy_(slope[:, None] * (is_target.to(softmax.dtype) - softmax))
