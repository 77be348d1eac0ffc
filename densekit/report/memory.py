"""How much memory a training step holds, found without data, without a GPU and without computing anything.

The tensors of parameters, gradients and optimizer are counted. Activations are those tensors which a forward pass made
and which are alive at its end: what autograd keeps for the backward pass (with activation checkpointing, only what it
keeps then), the images and the outputs. The pass runs in training mode under the autocast of the run, on tensors
without storage (PyTorch's FakeTensorMode). The rules of autocast are those of the model's device; CUDA's leave
LayerNorm in float32 where the CPU's do not, and keep more.
"""

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from mmengine.model import revert_sync_batchnorm
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from densekit.report.image_size import Size


@dataclass(frozen=True)
class Activations:
    """What a forward pass keeps.

    Attributes:
        size: bytes.
        parts: names of the parts of the model that were run.
        unreached: trainable parameters of these that no output depends on.
    """

    size: int
    parts: tuple[str, ...]
    unreached: tuple[str, ...]


class LiveTensors(TorchDispatchMode):
    """Within this context, notes every storage that an operation makes."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self._known = {StorageWeakRef(tensor.untyped_storage()) for tensor in known}
        self._made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference not in self._known:
                    self._made[reference] = storage.nbytes()
        return result

    def count(self) -> int:
        """Bytes of what was made and is alive; views and the tensors known before count nothing."""
        return sum(size for reference, size in self._made.items() if not reference.expired())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; shared ones count once."""
    return sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients of all trainable parameters."""
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of an optimizer's state after its first step.

    A copy of the optimizer takes that step on tensors of a few values. State that is shaped as its parameter counts as
    many times its bytes as the parameter has values; other state as it is. Exact for optimizers whose state is of one
    of these two kinds: SGD, Adam, AdamW and most others; factored ones (Adafactor) hold a little more.

    Args:
        optimizer: before its first step; not changed.
    """
    sizes: dict[Tensor, float] = {}
    memo: dict[int, Any] = {}
    for parameter in chain.from_iterable(group['params'] for group in optimizer.param_groups):
        probe = nn.Parameter(torch.zeros([2] * parameter.dim(), dtype=parameter.dtype), parameter.requires_grad)
        if parameter.requires_grad:
            probe.grad = torch.zeros_like(probe)
        sizes[probe] = parameter.numel() / probe.numel()
        memo[id(parameter)] = probe
    probes = copy.deepcopy(optimizer, memo)
    probes.step()
    total = 0.0
    for owner, state in probes.state.items():
        for value in state.values():
            if isinstance(value, Tensor):
                total += value.nbytes * (sizes[owner] if value.shape == owner.shape else 1)
    return round(total)


def activations(model: Any, batch: int, size: Size, dtype: torch.dtype = torch.float32) -> Activations:
    """What a forward pass of backbone, neck and dense heads keeps.

    Run are ``extract_feat`` and the heads that take its result and nothing else: those of segmentors and of one-stage
    detectors, and the RPN. Heads on proposals and on queries, and losses, are not.

    Args:
        model: a detector or segmentor, not wrapped; not changed.
        batch: number of images.
        size: of an image.
        dtype: that of autocast; float32 for none.
    """
    mode = FakeTensorMode()
    memo: dict[int, Any] = {id(tensor): mode.from_tensor(tensor) for tensor in _tensors(model)}
    fake = revert_sync_batchnorm(copy.deepcopy(model, memo)).train()
    heads = dict(_dense_heads(fake))
    device = next(fake.parameters()).device.type
    with mode:
        autocast = torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32)
        with LiveTensors(*_tensors(fake)) as live, autocast:
            images = torch.empty(batch, 3, *size, device=device)  # named, for a training step holds them too
            features = fake.extract_feat(images)
            outputs = [features, *(head(features) for head in heads.values())]
        kept = live.count()
        reached = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if reached:
            torch.stack([output.float().sum() for output in reached]).sum().backward()
    parts = [name for name in ('backbone', 'neck') if getattr(fake, name, None) is not None] + list(heads)
    unreached = [
        f'{part}.{name}'
        for part in parts
        for name, parameter in fake.get_submodule(part).named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    return Activations(kept, tuple(parts), tuple(unreached))


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())


def _dense_heads(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The heads that take all feature maps and nothing else."""
    for name in ('rpn_head', 'bbox_head', 'decode_head', 'auxiliary_head'):
        head = getattr(model, name, None)
        for part, module in [(name, head)] if not isinstance(head, nn.ModuleList) else _named(name, head):
            on_maps = name != 'bbox_head' or hasattr(module, 'prior_generator')
            if module is not None and on_maps and len(inspect.signature(module.forward).parameters) == 1:
                yield part, module


def _named(name: str, modules: nn.ModuleList) -> list[tuple[str, nn.Module]]:
    return [(f'{name}.{i}', module) for i, module in enumerate(modules)]
