"""The backbone alone: ours and the peers', forward, or forward and backward."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from densekit.benchmark.case import LAYOUTS, Candidate, Images, Record, Settings, measure_rows, written
from densekit.benchmark.peers import OURS, Builder, builders
from densekit.benchmark.roofline import FORMS, floor
from densekit.benchmark.timing import Call

SEED = 0
DROP_PATH = 0.4  # of the papers' detectors of T size


@dataclass(frozen=True)
class BackboneCase:
    """All peers on one batch of images.

    Attributes:
        arch: a name in ``ARCHS``.
        images: number, height, width.
        dtype: 'bf16', by autocast, or 'fp32'.
        training: forward and backward in training mode; else forward in evaluation mode without gradients.
        modes: of each candidate, of 'eager', 'compiled' and 'graphed'.
        layouts: of each candidate.
        peers: names of those to measure; all if empty.
        drop_path: rate of the last block, in training.
    """

    arch: str
    images: Images
    dtype: str = 'bf16'
    training: bool = True
    modes: tuple[str, ...] = ('eager',)
    layouts: tuple[str, ...] = LAYOUTS
    peers: tuple[str, ...] = ()
    drop_path: float = DROP_PATH

    @property
    def key(self) -> str:
        """Says all that matters."""
        parts = ['backbone', self.arch, written(self.images), self.dtype, 'train' if self.training else 'infer']
        parts.append('+'.join(self.modes))
        parts += ['+'.join(self.layouts)] if self.layouts != LAYOUTS else []
        parts += [f'drop path {self.drop_path:g}'] if self.drop_path != DROP_PATH else []
        parts += ['of', '+'.join(self.peers)] if self.peers else []
        return ' '.join(parts)

    def measure(self, settings: Settings) -> Record:
        """Measures all candidates in one interleaved run."""
        found, left_out = builders(settings.device, training=self.training)
        chosen = {name: build for name, build in found.items() if not self.peers or name in self.peers}
        torch.compiler.reset()  # the limit of recompilations is per function, and peers of other cases have used it up
        makers = {
            Candidate(name, layout, mode): lambda build=build, layout=layout, mode=mode: step(
                self, build, layout, mode, settings.device
            )
            for name, build in chosen.items()
            for layout in self.layouts
            for mode in self.modes
        }
        rates = settings.peaks.rates(self.dtype)
        value_bytes = 2 if self.dtype == 'bf16' else 4
        return {
            'kind': 'backbone',
            'title': self._title(),
            'images': self.images[0],
            'rows': measure_rows(makers, settings),
            'left_out': {name: why for name, why in left_out.items() if not self.peers},
            'floors': {
                form: floor(self.arch, self.images, rates, training=self.training, value_bytes=value_bytes, form=form)
                for form in FORMS
            },
        }

    def _title(self) -> str:
        number, height, width = self.images
        what = 'training' if self.training else 'inference'
        whose = f', {" and ".join(self.peers)}' if self.peers else ''
        return f'ConvNeXt {self.arch}, {what}, {number} x {height} x {width}, {self.dtype}{whose}'


def step(case: BackboneCase, build: Builder, layout: str, mode: str, device: torch.device) -> Call:
    """What is timed of one candidate.

    Training is the forward pass and the backward pass from random gradients of all four outputs, after which the
    parameters' gradients are dropped. Drop path draws anew in each step.
    """
    model, images = prepared(case, build, layout, device)
    if mode == 'compiled':
        model = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    if mode == 'graphed':
        return _graphed(case, model, images, device)
    return training_step(model, images, case.dtype) if case.training else inference_step(model, images, case.dtype)


def prepared(case: BackboneCase, build: Builder, layout: str, device: torch.device) -> tuple[nn.Module, Tensor]:
    """A model and images in a layout."""
    torch.manual_seed(SEED)
    memory_format = torch.channels_last if layout == 'nhwc' else torch.contiguous_format
    model = build(case.arch, case.drop_path).to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
    number, height, width = case.images
    images = torch.randn(number, 3, height, width).to(device=device, memory_format=memory_format)
    model.train(case.training)  # mmpretrain's returns None
    return model, images


def training_step(model: nn.Module, images: Tensor, dtype: str) -> Call:
    """Forward and backward."""
    upstream: list[Tensor] = []

    def run() -> None:
        with autocast(images.device, dtype):
            outputs = model(images)
        if not upstream:  # in the dtype and layout that the outputs have
            upstream.extend(torch.randn_like(output) for output in outputs)
        torch.autograd.backward(outputs, upstream)
        model.zero_grad(set_to_none=True)

    return run


def inference_step(model: nn.Module, images: Tensor, dtype: str) -> Call:
    """Forward."""

    def run() -> None:
        with torch.no_grad(), autocast(images.device, dtype):
            model(images)

    return run


@contextmanager
def autocast(device: torch.device, dtype: str, cache: bool = True) -> Iterator[None]:
    """Autocast to bfloat16 for 'bf16', nothing for 'fp32'."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == 'bf16', cache_enabled=cache):
        yield


def _graphed(case: BackboneCase, model: nn.Module, images: Tensor, device: torch.device) -> Call:
    """Replays CUDA graphs of what the eager step does."""
    if device.type != 'cuda':
        raise ValueError('CUDA graphs need CUDA')
    if case.training:
        with autocast(device, case.dtype, cache=False):  # cached casts would be of the capture
            graphed = torch.cuda.make_graphed_callables(model, (images,))
        return training_step(graphed, images, case.dtype)  # type: ignore[arg-type]
    call = inference_step(model, images, case.dtype)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad(), autocast(device, case.dtype, cache=False):
        model(images)
    return graph.replay


def best_forms(rows: Sequence[Record]) -> dict[str, Record]:
    """The fastest row of each candidate; what densekit can be told to do counts as densekit."""
    best: dict[str, Record] = {}
    for row in rows:
        if 'error' not in row:
            who = OURS if row['who'].partition(' ')[0] == OURS else row['who']
            if who not in best or median(row['rounds']) < median(best[who]['rounds']):
                best[who] = row
    return best
