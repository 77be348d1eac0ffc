"""The focal losses, called through mmcv.ops, against the formula of the paper."""

import densekit.ops  # noqa: F401  mmcv.ops can be imported after it only

# isort: split
import pytest
import torch
from mmcv.ops import SigmoidFocalLoss, SoftmaxFocalLoss, sigmoid_focal_loss, softmax_focal_loss
from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss
from mmdet.models.losses.focal_loss import sigmoid_focal_loss as mmdet_focal_loss

HALF = [torch.float16, torch.bfloat16]
CLASSES = 4
# Every class, the background (4) and a row to ignore (-1).
TARGETS = torch.tensor([0, 1, 2, 3, 4, 0, -1])
WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.5])


def naive_sigmoid(logits, targets, gamma, alpha, weight):
    rows = []
    for row, target in zip(logits, targets.tolist(), strict=True):
        is_class = 0 <= target < CLASSES
        factor = weight[target] if weight is not None and is_class else 1.0
        for c, x in enumerate(row):
            p = 1 / (1 + torch.exp(-x))
            if c == target:
                loss = -alpha * (1 - p) ** gamma * torch.log(p)
            else:
                loss = -(1 - alpha) * p**gamma * torch.log(1 - p)
            rows.append(loss * factor)
    return torch.stack(rows).view(logits.shape)


def naive_softmax(logits, targets, gamma, alpha, weight):
    rows = []
    for row, target in zip(logits, targets.tolist(), strict=True):
        p = (row.exp() / row.exp().sum())[max(target, 0)]
        factor = 0.0 if target < 0 else alpha * (1.0 if weight is None else weight[target])
        rows.append(-factor * (1 - p) ** gamma * torch.log(p))
    return torch.stack(rows)


def logits_of(n, scale=2.0):
    return torch.randn(n, CLASSES, generator=torch.Generator().manual_seed(0)) * scale


def check(op, naive, logits, targets, gamma, alpha, weight, reduction):
    logits, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = op(logits, targets, gamma, alpha, weight, reduction)
    expected = naive(exact, targets, gamma, alpha, weight)
    if reduction != 'none':
        expected = expected.sum() / (len(targets) if reduction == 'mean' else 1)
    factor = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1))
    (loss * factor).sum().backward()
    (expected * factor).sum().backward()
    assert loss.dtype == logits.grad.dtype == torch.float32
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.grad, exact.grad.float(), rtol=1e-5, atol=1e-6)
    return logits.grad


@pytest.mark.parametrize('weight', [None, WEIGHT], ids=['unweighted', 'weighted'])
@pytest.mark.parametrize('reduction', ['none', 'mean', 'sum'])
@pytest.mark.parametrize(('gamma', 'alpha'), [(2.0, 0.25), (0.5, 0.75), (0.0, 0.5)])
def test_sigmoid_focal_loss_equals_the_formula(gamma, alpha, reduction, weight):
    grad = check(sigmoid_focal_loss, naive_sigmoid, logits_of(7), TARGETS, gamma, alpha, weight, reduction)
    # Background and ignored rows are all negatives; the class of weight 0 counts nothing.
    assert grad[4].all() and grad[6].all() and bool(grad[2].any()) == (weight is None)


@pytest.mark.parametrize('weight', [None, WEIGHT], ids=['unweighted', 'weighted'])
@pytest.mark.parametrize('reduction', ['mean', 'sum'])  # 'none' has no gradient in mmcv: shapes (N,) and (N, C) clash
@pytest.mark.parametrize(('gamma', 'alpha'), [(2.0, 0.25), (0.5, 0.75), (0.0, 0.5)])
def test_softmax_focal_loss_equals_the_formula(gamma, alpha, reduction, weight):
    rows = TARGETS != CLASSES  # a softmax has no background beside its classes
    grad = check(softmax_focal_loss, naive_softmax, logits_of(6), TARGETS[rows], gamma, alpha, weight, reduction)
    assert not grad[5].any() and grad[0].all() and bool(grad[2].any()) == (weight is None)
    assert softmax_focal_loss(logits_of(6), TARGETS[rows], gamma, alpha, weight, 'none').shape == (6,)


def test_alternatives_differ():
    # A negative control: gamma, alpha, weight and target all matter.
    logits, targets = logits_of(7), TARGETS.clamp(0, 3)
    for op in (sigmoid_focal_loss, softmax_focal_loss):
        losses = [
            op(logits, *settings, 'none')
            for settings in (
                (targets, 2.0, 0.25, None),
                (targets, 1.0, 0.25, None),
                (targets, 2.0, 0.5, None),
                (targets, 2.0, 0.25, WEIGHT),
                ((targets + 1) % 4, 2.0, 0.25, None),
            )
        ]
        assert all((a - b).abs().max() > 1e-2 for i, a in enumerate(losses) for b in losses[:i])


@pytest.mark.parametrize('logit', [12.0, 20.0, 80.0, 200.0])
def test_a_wrong_answer_that_is_certain(logit):
    # The probability rounds to 1 or to 0; the loss is still close to the logit, and its gradient finite.
    logits = torch.tensor([[logit, -logit]]).requires_grad_()
    loss = sigmoid_focal_loss(logits, torch.tensor([1]), 2.0, 0.25, None, 'none')
    assert loss[0].tolist() == pytest.approx([0.75 * logit, 0.25 * logit], rel=1e-4)
    loss.sum().backward()
    assert logits.grad[0].tolist() == pytest.approx([0.75, -0.25], rel=2e-3)

    logits.grad = None
    softmax_focal_loss(logits, torch.tensor([1]), 2.0, 0.25, None, 'sum').backward()
    assert logits.grad[0].tolist() == pytest.approx([0.25, -0.25], rel=2e-3)


@pytest.mark.parametrize('gamma', [0.0, 0.5, 1.0, 2.0])
def test_a_right_answer_that_is_certain(gamma):
    for op in (sigmoid_focal_loss, softmax_focal_loss):
        logits = torch.tensor([[200.0, -200.0]]).requires_grad_()
        loss = op(logits, torch.tensor([0]), gamma, 0.25, None, 'sum')
        loss.backward()
        assert loss == 0 and not logits.grad.any()


@pytest.mark.parametrize('loss', [SigmoidFocalLoss, SoftmaxFocalLoss])
def test_no_rows(loss):
    logits = torch.zeros(0, CLASSES, requires_grad=True)
    value = loss(2.0, 0.25, reduction='sum')(logits, torch.zeros(0, dtype=torch.int64))
    value.backward()
    assert value == 0 and logits.grad.shape == (0, CLASSES)


@pytest.mark.parametrize('op', [sigmoid_focal_loss, softmax_focal_loss])
def test_float64_is_not_rounded(op):
    naive = naive_sigmoid if op is sigmoid_focal_loss else naive_softmax
    logits, targets = logits_of(7).double().requires_grad_(), TARGETS.clamp(-1, 3)
    weight = WEIGHT.double() / 3
    expected = naive(logits, targets, 1.7, 0.3, weight).sum()
    torch.testing.assert_close(op(logits, targets, 1.7, 0.3, weight, 'sum'), expected, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: op(x, targets, 1.7, 0.3, weight, 'sum'), logits)


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('dtype', HALF)
def test_half_precision(dtype, amp):
    logits, targets = logits_of(7).to(dtype).requires_grad_(), TARGETS
    exact = logits.detach().float().requires_grad_()
    with torch.autocast('cpu', dtype, enabled=amp):
        loss = sigmoid_focal_loss(logits, targets, 2.0, 0.25, WEIGHT.to(dtype), 'none')
    expected = sigmoid_focal_loss(exact, targets, 2.0, 0.25, WEIGHT, 'none')
    loss.backward(torch.ones_like(loss))
    expected.backward(torch.ones_like(expected))
    assert loss.dtype == dtype and torch.equal(loss, expected.to(dtype))
    assert torch.equal(logits.grad, exact.grad.to(dtype))

    # mmcv takes the softmax in the dtype of the logits; the rest is computed in float32.
    targets = targets.clamp(-1, 3)
    with torch.autocast('cpu', dtype, enabled=amp):
        loss = softmax_focal_loss(logits, targets, 2.0, 0.25, None, 'none')
    expected = softmax_focal_loss(exact, targets, 2.0, 0.25, None, 'none')
    assert loss.dtype == dtype
    torch.testing.assert_close(loss.float(), expected, rtol=8 * torch.finfo(dtype).eps, atol=1e-3)


def test_mmdet_takes_the_same_loss_on_both_devices():
    # On the CPU mmdet's FocalLoss takes a function of its own, on CUDA the op.
    targets = TARGETS.clamp(0, CLASSES)
    logits = [logits_of(7).requires_grad_() for _ in range(2)]
    weight = torch.rand(7, generator=torch.Generator().manual_seed(2))
    on_cuda = mmdet_focal_loss(logits[0], targets, weight, avg_factor=3.0)
    one_hot = torch.nn.functional.one_hot(targets, CLASSES + 1)[:, :CLASSES]
    on_cpu = py_sigmoid_focal_loss(logits[1], one_hot, weight, avg_factor=3.0)
    torch.testing.assert_close(on_cuda, on_cpu)
    on_cuda.backward()
    on_cpu.backward()
    torch.testing.assert_close(logits[0].grad, logits[1].grad, rtol=1e-5, atol=1e-7)
