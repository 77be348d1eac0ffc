"""Where the time of a step goes, part by part, forward and backward.

At each border between parts a clock is read: on CUDA an event in the stream, so that nothing waits; on a CPU the time.
Borders in the backward pass are identities in the graph whose gradients say that a part is done or begins. A nested
part is not counted in the one around it. What the backward pass of a loss takes counts for the head that it is in.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from densekit.benchmark.machine import synchronize
from densekit.benchmark.timing import Call

OTHER = 'other'
_STEPS = 3

# Attribute of a detector or segmentor, its methods, the part.
_PARTS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ('data_preprocessor', ('forward',), 'data'),
    ('backbone', ('forward',), 'backbone'),
    ('neck', ('forward',), 'neck'),
    ('rpn_head', ('loss_and_predict', 'loss', 'predict'), 'RPN'),
    ('roi_head', ('loss', 'predict'), 'RoI heads'),
    ('bbox_head', ('loss', 'predict'), 'head'),
    ('panoptic_head', ('loss', 'predict'), 'head'),
    ('decode_head', ('loss', 'predict'), 'decode head'),
    ('auxiliary_head', ('loss',), 'auxiliary head'),
)
_NESTED = (('get_targets', 'mask targets'), ('loss_by_feat', 'losses'), ('loss_and_target', 'losses'))


class Clock:
    """Adds up the time of parts.

    Args:
        device: whose time is taken.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        self.current = OTHER

    def start(self) -> None:
        """Forgets what was, and begins in no part."""
        self._marks = []
        self.current = OTHER
        self.switch(OTHER)

    def switch(self, part: str) -> None:
        """From now on the time is that of another part."""
        self._marks.append((part, self._now()))
        self.current = part

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within this context the time is that of a part; afterwards of the one before."""
        before = self.current
        self.switch(name)
        try:
            yield
        finally:
            self.switch(before)

    def stop(self) -> dict[str, float]:
        """Seconds of each part since the start."""
        marks = [*self._marks, (OTHER, self._now())]
        synchronize(self._device)
        totals: dict[str, float] = {}
        for (name, begin), (_, end) in itertools.pairwise(marks):
            totals[name] = totals.get(name, 0.0) + self._between(begin, end)
        return totals

    def _now(self) -> Any:
        if self._device.type != 'cuda':
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1e3 if self._device.type == 'cuda' else end - begin


class _Border(torch.autograd.Function):
    """The identity; when its gradients have come, the clock switches."""

    @staticmethod
    def forward(ctx: Any, clock: Clock, part: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.clock, ctx.part = clock, part
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        ctx.clock.switch(ctx.part)
        return None, None, *gradients


def parts_of(step: Call, model: nn.Module, wrapper: Any, device: torch.device) -> dict[str, float]:
    """Seconds of each part of a step, the mean of three.

    Args:
        step: a training or inference step of the model; it has run before.
        model: a detector or segmentor; its methods are wrapped for a while.
        wrapper: its optimizer wrapper, or None for inference.
        device: that all is on.
    """
    clock = Clock(device)
    undo: list[Callable[[], None]] = []
    try:
        for owner, method, part in _methods(model, wrapper):
            undo.append(_wrap(owner, method, part, clock))
        totals: dict[str, float] = {}
        for _ in range(_STEPS):
            synchronize(device)
            clock.start()
            step()
            for part, seconds in clock.stop().items():
                totals[part] = totals.get(part, 0.0) + seconds / _STEPS
    finally:
        for put_back in undo:
            put_back()
    return {part: totals[part] for part in sorted(totals, key=_order)}


def _methods(model: nn.Module, wrapper: Any) -> Iterator[tuple[Any, str, str]]:
    for attribute, methods, part in _PARTS:
        owner = getattr(model, attribute, None)
        for module in owner if isinstance(owner, nn.ModuleList) else [owner]:
            for method in methods:
                if hasattr(module, method):
                    yield module, method, part
    for name, module in model.named_modules():
        for method, part in _NESTED:
            on_masks = part != 'mask targets' or 'mask_head' in name
            if on_masks and hasattr(module, method) and ('head' in name):
                yield module, method, part
    if wrapper is not None:
        yield wrapper, 'backward', OTHER
        yield wrapper, 'step', 'optimizer'
        yield wrapper, 'zero_grad', 'optimizer'


def _wrap(owner: Any, method: str, part: str, clock: Clock) -> Callable[[], None]:
    """Puts a timed method in the place of a method of an object; returns what takes it away."""
    original = getattr(owner, method)

    @functools.wraps(original)
    def timed(*args: Any, **kwargs: Any) -> Any:
        before = clock.current
        if part == before:  # a method of the same part that another one calls
            return original(*args, **kwargs)
        args, kwargs = _bordered((args, kwargs), clock, before)
        with clock.part(part):
            result = original(*args, **kwargs)
        return _bordered(result, clock, part)

    setattr(owner, method, timed)
    return lambda: delattr(owner, method)


def _bordered(tree: Any, clock: Clock, part: str) -> Any:
    """The same, with a border in all tensors that have gradients."""
    leaves, spec = tree_flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not places or not torch.is_grad_enabled():
        return tree
    for place, tensor in zip(places, _Border.apply(clock, part, *[leaves[i] for i in places]), strict=True):
        leaves[place] = tensor
    return tree_unflatten(leaves, spec)


def _order(part: str) -> tuple[int, str]:
    names = [*dict.fromkeys(part for *_, part in _PARTS), *dict.fromkeys(part for _, part in _NESTED), 'optimizer']
    return (names.index(part) if part in names else len(names), part)
