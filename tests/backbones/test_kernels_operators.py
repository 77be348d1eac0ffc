"""Every operator that is registered, at random shapes: all is written, the same each time, and as compilers expect."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_helpers import noise, poisoned_memory
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from backbones.kernels import block, depthwise, grn, mlp, pointwise  # noqa: F401  (which registers them)

OPS = torch.ops.densekit
EPS = 1e-6


class Case:
    """Random tensors of one shape, whose values follow from the order in which they are asked for."""

    def __init__(self, seed: int, device: str) -> None:
        rng = random.Random(seed)
        self.num, self.height, self.width = rng.randint(1, 3), rng.randint(1, 4), rng.randint(1, 5)
        self.channels = rng.choice((3, 12, 17))
        self.dtype = rng.choice((torch.float32, torch.float16))
        self.device, self.made = device, 0

    def vector(self, size: int) -> Tensor:
        self.made += 1
        return noise(size, seed=self.made, device=self.device)

    def last(self, channels: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """``(N, H, W, C)``."""
        shape = self.num, self.height, self.width, channels or self.channels
        return self.vector(torch.Size(shape).numel()).view(shape).to(dtype or self.dtype)

    def first(self, dtype: torch.dtype | None = None) -> Tensor:
        """``(N, C, H, W)`` in channels_last."""
        return self.last(dtype=dtype).permute(0, 3, 1, 2)

    def filter(self) -> Tensor:
        return self.vector(9 * self.channels).view(self.channels, 1, 3, 3)

    def linear(self, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        return (self.vector(rows * columns).view(rows, columns) / columns**0.5).to(dtype or self.dtype)


def add_branch(case: Case) -> tuple[Any, ...]:
    c = case.channels
    bias, scale, factor = case.vector(c), case.vector(c), case.vector(case.num)
    return case.last(dtype=torch.float32), case.last(), bias, scale, factor, torch.float32


def grn_backward(case: Case) -> tuple[Any, ...]:
    x, weight, bias = case.last(), case.vector(case.channels), case.vector(case.channels)
    return case.last(), x, OPS.grn(x, weight, bias, EPS)[1], weight, EPS


def mlp_arguments(case: Case) -> tuple[Any, ...]:
    c = case.channels
    w1, b1, w2 = case.linear(4 * c, c), case.vector(4 * c).to(case.dtype), case.linear(c, 4 * c)
    return case.last(), w1, b1, w2, case.vector(4 * c), case.vector(4 * c), EPS, True


def mlp_backward(case: Case) -> tuple[Any, ...]:
    arguments = mlp_arguments(case)
    y, h, energy = OPS.mlp(*arguments)
    return y, *arguments[:6], h, energy, EPS


def block_arguments(case: Case) -> tuple[Any, ...]:
    c, full = case.channels, torch.float32
    w1, w2 = case.linear(4 * c, c, full), case.linear(c, 4 * c, full)
    return (
        *(case.first(full), case.filter(), case.vector(c), 1 + case.vector(c), case.vector(c), w1, case.vector(4 * c)),
        *(case.vector(4 * c), case.vector(4 * c), w2, case.vector(c), case.vector(c), case.vector(case.num)),
        *(EPS, EPS, case.dtype, full, True),
    )


def block_backward(case: Case) -> tuple[Any, ...]:
    arguments = block_arguments(case)
    x, dw, _, norm, norm_bias, w1, _, grn_weight, grn_bias, w2, b2, gamma, factor = arguments[:13]
    out, *kept, y = OPS.convnext_block(*arguments)
    parameters = (x, dw, norm, norm_bias, w1, grn_weight, grn_bias, w2, b2, gamma, factor)
    return out, *parameters, *kept, y if y.numel() else None, EPS, True, True


ARGUMENTS: dict[str, Callable[[Case], tuple[Any, ...]]] = {
    'depthwise_conv2d': lambda c: (c.first(), c.filter(), c.vector(c.channels), c.dtype),
    'depthwise_conv2d_input_grad': lambda c: (c.first(), c.filter(), torch.float32),
    'depthwise_conv2d_weight_grad': lambda c: (c.first(), c.first(), c.filter(), True),
    'depthwise_norm': lambda c: (c.first(), c.filter(), c.vector(c.channels), EPS, c.dtype),
    'normalize': lambda c: (c.last(), EPS, torch.float32),
    'normalize_backward': lambda c: (*OPS.normalize(c.last(), EPS, c.dtype), c.last(), torch.float32),
    'gelu': lambda c: (c.last(),),
    'gelu_backward': lambda c: (c.last(), c.last()),
    'add_branch': add_branch,
    'add_branch_backward': lambda c: (*add_branch(c)[:-1], c.dtype),
    'grn': lambda c: (c.last(), c.vector(c.channels), c.vector(c.channels), EPS),
    'grn_backward': grn_backward,
    'mlp': mlp_arguments,
    'mlp_backward': mlp_backward,
    'convnext_block': block_arguments,
    'convnext_block_backward': block_backward,
}


def run(name: str, arguments: tuple[Any, ...]) -> list[Tensor]:
    """The operator's results, in memory that was full of NaN."""
    with poisoned_memory(), torch.no_grad():
        return tree_leaves(getattr(OPS, name)(*arguments))


def test_no_operator_is_left_out():
    registered = {
        name.split('::')[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith('densekit::')
    }
    assert registered == set(ARGUMENTS)


@pytest.mark.parametrize('seed', range(2))
@pytest.mark.parametrize('name', ARGUMENTS)
def test_everything_is_written_and_the_same_each_time(name, seed, device):
    case = ARGUMENTS[name](Case(seed, device))
    before = tree_map_only(Tensor, Tensor.clone, case)
    first, second = run(name, case), run(name, case)
    assert any(out.numel() for out in first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))  # which NaN would not be
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(case), tree_leaves(before), strict=True) if a is not b)


# To which a user's own tensors go; the others get what these have made.
GIVEN = ('depthwise_conv2d', 'depthwise_norm', 'normalize', 'gelu', 'add_branch', 'grn', 'mlp')


def spread(tensor: Tensor) -> Tensor:
    """The same numbers with NaN between them in memory."""
    return torch.stack([tensor, tensor.new_full((), torch.nan).expand(tensor.shape)], -1)[..., 0]


@pytest.mark.parametrize('name', GIVEN)
def test_numbers_may_lie_apart_in_memory(name, device):
    case = ARGUMENTS[name](Case(3, device))
    usual, apart = run(name, case), run(name, tree_map_only(Tensor, spread, case))
    assert all(torch.equal(a, b) for a, b in zip(usual, apart, strict=True))


@pytest.mark.parametrize('seed', range(4, 7))
@pytest.mark.parametrize('name', ARGUMENTS)
def test_results_are_as_compilers_are_told(name, seed, device):
    assert_as_told(name, ARGUMENTS[name](Case(seed, device)))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('scaled', [False, True])
def test_a_block_of_transposed_weights_is_as_compilers_are_told(scaled, dtype, device):
    case = list(block_arguments(Case(4, device)))
    case[5], case[9] = (w.t().contiguous().t() for w in (case[5], case[9]))
    case[11], case[15] = case[11] if scaled else None, dtype
    assert_as_told('convnext_block', tuple(case))


def assert_as_told(name: str, case: tuple[Any, ...]) -> None:
    mode = FakeTensorMode()
    fake = tree_map_only(Tensor, mode.from_tensor, case)
    with mode:
        told = tree_leaves(getattr(OPS, name)(*fake))
    for real, expected in zip(run(name, case), told, strict=True):
        assert (real.shape, real.dtype, real.device) == (expected.shape, expected.dtype, expected.device)
        assert real.numel() < 2 or real.stride() == expected.stride()
