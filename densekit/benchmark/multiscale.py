"""A detector's training sizes: eleven short sides, forward and backward, all once in a pass.

The first pass (cold) meets each size for the first time: libraries choose and compile plans, compilers recompile. Since
they keep what they found for the whole process, and compilers on disk too, it is measured in a fresh process with empty
caches for each candidate. The passes after it (warm) are one interleaved run.
"""

import math
import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from densekit.benchmark.backbone import BackboneCase, prepared, training_step
from densekit.benchmark.case import LAYOUTS, Candidate, Images, Record, Settings, measure_rows
from densekit.benchmark.peers import builders
from densekit.benchmark.roofline import FORMS, floor
from densekit.benchmark.timing import Call, timed, why

SHORT_SIDES = tuple(range(480, 801, 32))
_LONG = 1333 / 800
_DIVISOR = 32
_CACHES = ('TRITON_CACHE_DIR', 'TORCHINDUCTOR_CACHE_DIR')


@dataclass(frozen=True)
class MultiScaleCase:
    """All peers on many sizes.

    Attributes:
        arch: a name in ``ARCHS``.
        number: of images.
        dtype: 'bf16', by autocast, or 'fp32'.
        short_sides: in pixels; the long side is 1333 / 800 of it, both are padded to a multiple of 32.
        layouts: of each candidate.
        peers: names of those to measure; all if empty.
    """

    arch: str
    number: int
    dtype: str = 'bf16'
    short_sides: tuple[int, ...] = SHORT_SIDES
    layouts: tuple[str, ...] = LAYOUTS
    peers: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Says all that matters."""
        sides = f'{self.short_sides[0]}-{self.short_sides[-1]}x{len(self.short_sides)}'
        parts = ['multi-scale', self.arch, str(self.number), sides, self.dtype]
        parts += ['+'.join(self.layouts)] if self.layouts != LAYOUTS else []
        return ' '.join([*parts, *self.peers])

    def measure(self, settings: Settings) -> Record:
        """Measures warm passes in one interleaved run, then a cold pass of each in a process of its own."""
        found, left_out = builders(settings.device)
        candidates = [Candidate(name, layout) for name in found for layout in self.layouts if self._wanted(name)]
        makers = {one: (lambda one=one: one_pass(self, one, settings.device)) for one in candidates}
        rows = measure_rows(makers, settings)
        for candidate, row in zip(candidates, rows, strict=True):
            if 'error' not in row:
                try:
                    row['cold'] = _cold(self, candidate, settings.device)
                except Exception as error:  # in the other process
                    row['cold_error'] = why(error)
        rates, value_bytes = settings.peaks.rates(self.dtype), 2 if self.dtype == 'bf16' else 4
        floors = {
            form: sum(
                floor(self.arch, images, rates, training=True, value_bytes=value_bytes, form=form)
                for images in sizes(self.number, self.short_sides)
            )
            for form in FORMS
        }
        sides = f'{self.short_sides[0]} to {self.short_sides[-1]}'
        return {
            'kind': 'multi-scale',
            'title': f'ConvNeXt {self.arch}, training, {self.number} x {len(self.short_sides)} sizes, short sides '
            f'{sides}, {self.dtype}',
            'images': self.number * len(self.short_sides),
            'rows': rows,
            'left_out': left_out,
            'floors': floors,
        }

    def _wanted(self, name: str) -> bool:
        return not self.peers or name in self.peers


def sizes(number: int, short_sides: Sequence[int]) -> list[Images]:
    """The batches of a pass."""
    return [
        (number, *(math.ceil(side / _DIVISOR) * _DIVISOR for side in (short, short * _LONG)))  # type: ignore[misc]
        for short in short_sides
    ]


def one_pass(case: MultiScaleCase, candidate: Candidate, device: torch.device) -> Call:
    """A training step on each size, with one model."""
    build = builders(device)[0][candidate.who]
    batches = sizes(case.number, case.short_sides)
    model, _ = prepared(BackboneCase(case.arch, batches[0], case.dtype), build, candidate.layout, device)
    memory_format = torch.channels_last if candidate.layout == 'nhwc' else torch.contiguous_format
    steps = [
        training_step(model, torch.randn(n, 3, h, w).to(device=device, memory_format=memory_format), case.dtype)
        for n, h, w in batches
    ]

    def run() -> None:
        for step in steps:
            step()

    return run


def _cold(case: MultiScaleCase, candidate: Candidate, device: torch.device) -> float:
    context = multiprocessing.get_context('spawn')
    with _empty_caches(), ProcessPoolExecutor(1, mp_context=context) as fresh:
        return fresh.submit(_first_pass, case, candidate, str(device), torch.get_num_threads()).result()


@contextmanager
def _empty_caches() -> Iterator[None]:
    """Processes that start within this context find nothing that Triton and inductor compiled before."""
    before = {name: os.environ.get(name) for name in _CACHES}
    with tempfile.TemporaryDirectory(prefix='densekit-cold-', ignore_cleanup_errors=True) as folder:
        os.environ.update({name: os.path.join(folder, name.lower()) for name in _CACHES})
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def _first_pass(case: MultiScaleCase, candidate: Candidate, device: str, threads: int) -> float:
    torch.set_num_threads(threads)
    on = torch.device(device)
    call = one_pass(case, candidate, on)
    warm = torch.ones(64, 3, 8, 8, device=on, requires_grad=True)  # starts the libraries themselves
    torch.nn.functional.conv2d(warm, torch.ones(8, 3, 3, 3, device=on, requires_grad=True)).sum().backward()
    return timed(call, on)
