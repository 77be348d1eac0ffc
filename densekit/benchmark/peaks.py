"""What the machine does in a second: copies and matrix products, measured.

The best of several tries, since these are limits. Matrix products are 4096 x 4096 on CUDA and 1024 x 1024 on a CPU;
copies are of 1 GiB and of 256 MiB. The numbers are random: equal ones draw less power, and a GPU at its limit of power
clocks higher with them than in any work. Float32 multiply-adds are counted at the rate of float32 matrix products
without TF32, which keep the multiply-add units busy: on CUDA somewhat below the data sheet.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from densekit.benchmark.roofline import Rates
from densekit.benchmark.timing import Call, timed

_TRIES = 7


@dataclass(frozen=True)
class Peaks:
    """Measured rates, per second.

    Attributes:
        copy: bytes read and written.
        fp32: FLOP of float32 matrix products, without TF32.
        bf16: FLOP of bfloat16 matrix products.
    """

    copy: float
    fp32: float
    bf16: float

    def rates(self, dtype: str) -> Rates:
        """Those that hold in a dtype, 'fp32' or 'bf16'."""
        return Rates(self.copy, self.bf16 if dtype == 'bf16' else self.fp32, self.fp32)

    def as_dict(self) -> dict[str, float]:
        """For the results file."""
        return asdict(self)


def measure(device: torch.device, *, side: int | None = None, size: int | None = None) -> Peaks:
    """Measures the rates of a device; a few seconds.

    Args:
        device: to measure.
        side: of the matrices.
        size: of a copy, in bytes.
    """
    on_gpu = device.type == 'cuda'
    side = side or (4096 if on_gpu else 1024)
    size = size or (2**30 if on_gpu else 2**28)
    generator = torch.Generator(device).manual_seed(0)
    source = torch.randn(size // 4, device=device, generator=generator)
    target = torch.empty_like(source)

    def product(dtype: torch.dtype) -> float:
        a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return 2.0 * side**3 / _best(lambda: torch.mm(a, b, out=out), device)

    with torch.no_grad(), _without_tf32():
        copy = 2.0 * size / _best(lambda: target.copy_(source), device)
        return Peaks(copy, product(torch.float32), product(torch.bfloat16))


@contextmanager
def _without_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _best(call: Call, device: torch.device) -> float:
    timed(call, device)
    repeats = max(1, round(0.05 / max(timed(call, device), 1e-9)))
    return min(timed(call, device, repeats) for _ in range(_TRIES))
