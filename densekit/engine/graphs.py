"""Backbone and neck as CUDA graphs in training, for a few sizes of images.

With few images a fast GPU waits for the host, which starts hundreds of kernels one by one. A CUDA graph starts them all
at once: :func:`torch.cuda.make_graphed_callables` records the forward and the backward pass of one size on fixed
memory. All sizes share one pool, so that their activations together take as much as those of the largest; gradients of
the weights and features are each size's own.

Recorded kernels read and write the same addresses each time, which nothing checks. What follows keeps that harmless:

- features and gradients are handed out as copies: what a recording writes next is not what somebody still holds
  (accumulated gradients, features of the step before);
- a recording is replayed only between a forward pass and its backward pass, one at a time: a second forward pass in
  between, which would overwrite activations of the first, runs as it is;
- a recording belongs to the shape, layout and dtype of the images, autocast, the modes of all modules, what is
  trainable and where the weights lie; if weights have moved, all recordings are made anew;
- random numbers and buffers (running statistics) are after a recording what they were before.

What remains: a Python number that a module reads, such as the rate of drop path, is that of the recording.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

Capture = Callable[[Callable[..., Any], tuple[Tensor, ...]], Callable[..., Any]]
"""Records a function, given arguments like those to come; these, the images apart, are always the same tensors."""

_ADVICE = 'Train without compile.graphs.'


def check_capturable(model: nn.Module, *, processes: int) -> None:
    """Finds out whether backbone and neck can be CUDA graphs.

    Args:
        model: on its device, without a wrapper.
        processes: that train together.

    Raises:
        ValueError: if they cannot; the message says why.
    """
    if not hasattr(model, 'extract_feat') or not isinstance(getattr(model, 'backbone', None), nn.Module):
        raise ValueError(f'compile.graphs: {type(model).__name__} has no backbone and extract_feat. {_ADVICE}')
    for name, module in _parts(model):
        if reason := _cannot(module):
            raise ValueError(f'compile.graphs: {name} ({type(module).__name__}) {reason}. {_ADVICE}')
    if processes > 1:
        raise ValueError(f'compile.graphs: this is for one process so far, and there are {processes}. {_ADVICE}')
    if next(model.parameters()).device.type != 'cuda':
        raise ValueError(f'compile.graphs: CUDA graphs need a CUDA GPU, and the model is on the CPU. {_ADVICE}')


def use_graphs(model: Any, max_shapes: int, capture: Capture | None = None) -> None:
    """Has a model compute its features by CUDA graphs in training.

    Args:
        model: with ``extract_feat``, which :func:`check_capturable` has looked at; changed in place.
        max_shapes: how many sizes of images get a graph; others run as they are.
        capture: what records; another one for tests.
    """
    if capture is None:
        capture = partial(_capture, pool=torch.cuda.graph_pool_handle())
    model.extract_feat = GraphedFeatures(model, max_shapes, capture)
    print_log(
        f'Backbone and neck run as CUDA graphs in training, for up to {max_shapes} sizes of images; the first step of '
        'each size takes longer. Validation runs without.',
        logger='current',
    )


def _capture(function: Callable[..., Any], arguments: tuple[Tensor, ...], pool: Any) -> Callable[..., Any]:
    """Records as PyTorch does, and leaves other threads alone.

    torch 2.11 records in the mode 'global', in which a call of CUDA by any other thread breaks the recording: that of
    the thread which pins batches of the next steps, for one. The mode is no argument of make_graphed_callables, which
    looks up ``torch.cuda.graph`` as it records.
    """
    graph = partial(torch.cuda.graph, capture_error_mode='thread_local')
    with mock.patch.object(torch.cuda, 'graph', graph):
        return torch.cuda.make_graphed_callables(function, arguments, pool=pool)


class GraphedFeatures:
    """Stands in the place of a model's ``extract_feat``.

    Args:
        model: of mmdet or mmseg.
        max_shapes: how many recordings there are at most.
        capture: what records.
    """

    def __init__(self, model: Any, max_shapes: int, capture: Capture) -> None:
        self.model = model
        self.eager: Callable[[Tensor], Any] = model.extract_feat
        self.max_shapes = max_shapes
        self.capture = capture
        self.graphs: dict[tuple[Any, ...], _Recording] = {}
        self._addresses: list[int] = []
        self._said: set[str] = set()
        self._last: weakref.ref[_Pass] | None = None

    def __call__(self, images: Tensor) -> Any:
        """Features of images, ``(N, C, H, W)``, as the model's own ``extract_feat`` gives them."""
        if not (self.model.training and torch.is_grad_enabled()):
            return self.eager(images)
        if reason := self._reason_against(images):
            self._say(f'Backbone and neck run without CUDA graphs: {reason}')
            return self.eager(images)
        if (recording := self._recording_for(images)) is None:
            return self.eager(images)
        step = _Pass()
        self._last = weakref.ref(step)
        return recording.replay(images, step)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model has weights of its own, which nothing is recorded for."""
        return type(self.model).extract_feat.__get__(memo[id(self.model)])

    def _reason_against(self, images: Tensor) -> str | None:
        last = None if self._last is None else self._last()
        if last is not None and not last.done:
            return 'a forward pass before this one waits for its backward pass'
        if images.requires_grad:
            return 'the images need gradients'
        reasons = (reason for _, module in _parts(self.model) if (reason := _cannot(module)))
        return next((f'a part of the model {reason}' for reason in reasons), None)

    def _recording_for(self, images: Tensor) -> '_Recording | None':
        modules = [module for _, module in _parts(self.model)]
        tensors = [tensor for module in modules for tensor in (*module._parameters.values(), *module._buffers.values())]
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        if addresses != self._addresses:
            self.graphs.clear()
            self._addresses = addresses
        signature = (
            *(images.shape, images.stride(), images.dtype, images.device, *_autocast(images)),
            tuple(module.training for module in modules),
            tuple(tensor is not None and tensor.requires_grad for tensor in tensors),
        )
        if signature not in self.graphs:
            if len(self.graphs) >= self.max_shapes:
                self._say(
                    f'Images of {tuple(images.shape)}, and of further sizes, run without CUDA graphs: compile.graphs '
                    f'allows {self.max_shapes}. A larger model.data_preprocessor.pad_size_divisor makes fewer sizes.'
                )
                return None
            self.graphs[signature] = self._record(images)
        return self.graphs[signature]

    def _record(self, images: Tensor) -> '_Recording':
        sample = images.detach().clone()
        enabled, dtype = _autocast(images)
        # Casts of weights that autocast has kept are of one step; a recording is to cast anew.
        no_cache = torch.autocast(images.device.type, dtype=dtype, enabled=enabled, cache_enabled=False)
        try:
            with _undisturbed(self.model, images.device), no_cache:
                parameters = self._parameters_of(self.eager(sample))
                return _Recording(self.capture(lambda x, *_: self.eager(x), (sample, *parameters)), parameters)
        except RuntimeError as error:
            said = str(error).partition('\n')[0]
            raise RuntimeError(
                f'CUDA graphs of backbone and neck cannot be recorded for images of {tuple(images.shape)}: {said} '
                f'{_ADVICE}'
            ) from error

    def _parameters_of(self, features: Any) -> tuple[nn.Parameter, ...]:
        """The parameters that features were computed from, which must all be of backbone and neck."""
        used = _leaves(features)
        known = [parameter for _, module in _parts(self.model) for parameter in module._parameters.values()]
        parameters = {id(parameter): parameter for parameter in known if parameter is not None}
        if not used <= set(parameters):
            raise RuntimeError(f'{type(self.model).__name__}.extract_feat uses more than backbone and neck.')
        return tuple(parameter for key, parameter in parameters.items() if key in used)

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            print_log(line, logger='current', level=30)


class _Pass:
    """A forward pass; it is there as long as a backward pass may follow."""

    done = False


class _Recording:
    """A function that was recorded, and the parameters that it reads."""

    def __init__(self, recorded: Callable[..., Any], parameters: tuple[nn.Parameter, ...]) -> None:
        self.recorded = recorded
        self.parameters = parameters

    def replay(self, images: Tensor, step: _Pass) -> Any:
        parameters = _CopiedGradients.apply(*self.parameters) if self.parameters else ()
        leaves, structure = tree_flatten(self.recorded(images, *parameters))
        return tree_unflatten(list(_CopiedOutputs.apply(step, *leaves)), structure)


class _CopiedGradients(torch.autograd.Function):
    """Parameters as they are; their gradients as copies, since autograd keeps what it is given as ``.grad``."""

    @staticmethod
    def forward(_ctx: Any, *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(parameter.detach() for parameter in parameters)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        copies = [torch.empty_like(gradient) for gradient in gradients]
        torch._foreach_copy_(copies, list(gradients))
        return tuple(copies)


class _CopiedOutputs(torch.autograd.Function):
    """Copies of the features; notes when the backward pass begins."""

    @staticmethod
    def forward(ctx: Any, step: _Pass, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.step = step
        return tuple(output.clone() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.step.done:
            raise RuntimeError(f'a second backward pass through a CUDA graph would give wrong gradients. {_ADVICE}')
        ctx.step.done = True
        return (None, *gradients)


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules of backbone and neck, by their names."""
    for part in ('backbone', 'neck'):
        if isinstance(child := getattr(model, part, None), nn.Module):
            yield from child.named_modules(prefix=part)


def _cannot(module: nn.Module) -> str | None:
    """In words why a module by itself cannot be recorded, or would compute something else from then on."""
    if isinstance(module, nn.SyncBatchNorm):
        return 'synchronizes its statistics with other processes'
    if getattr(module, 'with_cp', False):
        return 'computes its activations once more in the backward pass (with_cp)'
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks) or any(p is not None and p._backward_hooks for p in module._parameters.values()):
        return 'has a hook, which a recording would pass over'
    return None


def _autocast(images: Tensor) -> tuple[bool, torch.dtype]:
    kind = images.device.type
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Puts back random numbers and buffers, which recording draws and updates several times."""
    buffers = [buffer for _, module in _parts(model) for buffer in module._buffers.values() if buffer is not None]
    before = [buffer.clone() for buffer in buffers]
    with torch.random.fork_rng(devices=[] if device.type == 'cpu' else [device]):
        yield
    with torch.no_grad():
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


def _leaves(features: Any) -> set[int]:
    """Identities of the tensors, without a history of their own, that some features depend on."""
    tensors, _ = tree_flatten(features)
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise RuntimeError('features are to be tensors.')
    seen, leaves = set(), set()
    todo = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, 'variable'):
            leaves.add(id(node.variable))
        todo += [parent for parent, _ in node.next_functions if parent is not None]
    return leaves
