"""What the tests of the kernels share: random maps and blocks, a float64 reference with gradients, poisoned memory."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from backbones.convnext import ConvNeXtBlock
from backbones.kernels.block import convnext_block

# (N, H, W, C): a usual one; one pixel; no image; odd sides; a tail of channels; more channels than a tile.
SHAPES = [(2, 5, 7, 24), (1, 1, 1, 8), (0, 4, 3, 16), (3, 1, 9, 40), (2, 13, 1, 100), (1, 3, 2, 600)]

# Of the rounding of a result, relative to its norm; and of several one behind another, as in a block. Triton's
# interpreter, which runs where there is no GPU, cuts bfloat16 off instead of rounding it.
ROUNDED = torch.cuda.is_available()
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 4e-3 if ROUNDED else 1.6e-2}
IN_SERIES = {torch.float16: 4e-3, torch.bfloat16: 1.6e-2 if ROUNDED else 3.2e-2}

Function = Callable[..., Tensor]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = 'cpu') -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def results(function: Function, *tensors: Tensor, grad_dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The function's result, and its gradient by each tensor for one fixed random gradient of the result."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    out = function(*leaves)
    grad = noise(*out.shape, seed=99, dtype=grad_dtype, device=str(out.device)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_close(ours: Sequence[Tensor], reference: Sequence[Tensor], tolerance: float) -> None:
    """Compares norms of differences, so that one wrong or unwritten element shows, and NaN always does."""
    assert len(ours) == len(reference)
    for i, (a, b) in enumerate(zip(ours, reference, strict=True)):
        assert a.shape == b.shape
        error = (a.double() - b.double()).norm()
        limit = tolerance * b.double().norm()
        assert error <= limit, f'result {i}: differs by {error:.3g}, where {limit:.3g} is allowed'


def check(ours: Function, reference: Function, *tensors: Tensor, tolerance: float | None = None) -> None:
    """Compares result and gradients with those of a reference computed in float64 from the same numbers."""
    dtype = tensors[0].dtype
    with poisoned_memory():
        got = results(ours, *tensors, grad_dtype=dtype)
    wanted = results(reference, *(t.double() for t in tensors), grad_dtype=dtype)
    assert_close(got, wanted, TOLERANCE[dtype] if tolerance is None else tolerance)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills memory that is asked for, and not set to anything, with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of cuBLAS, which wants a setting of its own
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def build(channels=16, drop_path=0.0, layer_scale=1.0, use_grn=False, kernel_size=3, kernels='eager'):
    block = ConvNeXtBlock(
        channels,
        drop_path=drop_path,
        layer_scale=layer_scale,
        use_grn=use_grn,
        eps=1e-6,
        act=nn.GELU(),
        with_cp=False,
        kernel_size=kernel_size,
        kernels=kernels,
    )
    for i, (name, parameter) in enumerate(block.named_parameters()):
        values = noise(*parameter.shape, seed=i)
        with torch.no_grad():
            if name == 'gamma':
                parameter.mul_(1 + 0.2 * values)
            elif parameter.squeeze().ndim <= 1:
                parameter.add_(0.2 * values)
            else:
                parameter.copy_(values / parameter[0].numel() ** 0.5)
    return block


def fused(block, recompute=False):
    return lambda x: convnext_block(
        x, block.dwconv, block.norm, block.pwconv1, block.grn, block.pwconv2, block.gamma, block.drop_path, recompute
    )


def step(forward, block, x, amp=None, seed=0):
    """Result and all gradients of a block, for one fixed random gradient of the result."""
    block.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    with torch.autocast(x.device.type, amp or torch.bfloat16, enabled=amp is not None):
        out = forward(x)
    out.backward(noise(*out.shape, seed=99, dtype=torch.float32, device=str(x.device)).to(out.dtype))
    return [out.detach(), x.grad, *(p.grad.clone() for p in block.parameters())]
