"""The state of a run beside weights and optimizer, as tensors and plain data, and back."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.logging import HistoryBuffer, MessageHub
from torch import Tensor, nn

from densekit.engine.sharding import part_of


def message_hub_state(hub: MessageHub) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """A message hub without the objects in it, which no safe reader builds.

    Returns:
        The part that mmengine can load, and the histories of what is logged, each as values, counts and the most that
        is kept.
    """
    state = hub.state_dict()
    scalars = state.pop('log_scalars')
    histories = {name: _history(buffer) for name, buffer in scalars.items()}
    resumed = {name: kept for name, kept in state['resumed_keys'].items() if name not in scalars}
    return {'log_scalars': {}, 'runtime_info': plain(state['runtime_info']), 'resumed_keys': resumed}, histories


def load_histories(hub: MessageHub, histories: Mapping[str, list[Any]]) -> None:
    """Puts histories of :func:`message_hub_state` back."""
    buffers = {
        name: HistoryBuffer(values.numpy(), counts.numpy(), most) for name, (values, counts, most) in histories.items()
    }
    hub.load_state_dict({'log_scalars': buffers, 'runtime_info': {}, 'resumed_keys': dict.fromkeys(buffers, True)})


def early_stopping_state(hooks: Iterable[Hook]) -> list[dict[str, Any]]:
    """How long each early stopping has waited and for what score, which mmengine does not save."""
    stopping = [hook for hook in hooks if isinstance(hook, EarlyStoppingHook)]
    return [plain({'wait_count': hook.wait_count, 'best_score': hook.best_score}) for hook in stopping]


def load_early_stopping(hooks: Iterable[Hook], states: Iterable[Mapping[str, Any]]) -> None:
    """Puts what :func:`early_stopping_state` gave back."""
    stopping = [hook for hook in hooks if isinstance(hook, EarlyStoppingHook)]
    for hook, state in zip(stopping, states, strict=False):
        hook.wait_count, hook.best_score = state['wait_count'], state['best_score']


def pending_gradients(model: nn.Module, optim_wrapper: Any) -> dict[str, Tensor]:
    """The gradients summed so far where a step of the optimizer takes several batches; empty right after a step."""
    if getattr(optim_wrapper, '_accumulative_counts', 1) == 1 or optim_wrapper.should_update():
        return {}
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def load_gradients(model: nn.Module, gradients: Mapping[str, Tensor]) -> None:
    """Puts gradients of :func:`pending_gradients` back."""
    for name, parameter in model.named_parameters():
        if name in gradients:
            parameter.grad = part_of(gradients[name].to(parameter.device), parameter)


def on_cpu(node: Any) -> Any:
    """Nested data with its tensors on the CPU."""
    if isinstance(node, Tensor):
        return node.detach().cpu()
    if isinstance(node, Mapping):
        copied = {key: on_cpu(value) for key, value in node.items()}
        return OrderedDict(copied) if isinstance(node, OrderedDict) else copied
    return type(node)(on_cpu(value) for value in node) if isinstance(node, list | tuple) else node


def plain(node: Any) -> Any:
    """Nested data with NumPy's numbers and arrays as Python's numbers and lists, and paths as texts."""
    if isinstance(node, np.generic):
        return node.item()
    if isinstance(node, np.ndarray):
        return node.tolist()
    if isinstance(node, Mapping):
        return {key: plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(plain(value) for value in node)
    if node is None or isinstance(node, bool | int | float | Tensor):
        return node
    return str(node)


def _history(buffer: HistoryBuffer) -> list[Any]:
    values, counts = buffer.data
    return [torch.from_numpy(np.array(values)), torch.from_numpy(np.array(counts)), buffer.max_length]
