"""How often the host waits for the device in a step, and for whose sake; counted without a GPU.

A GPU that waits for its host computes nothing. PyTorch makes the host wait when a number on the device decides what it
does next (``item()``, ``nonzero``, selection by a mask) and when it copies from or to memory that is not pinned.

Here a model runs on a pretended CUDA device: its tensors say that they are on one, so that code takes the ways it takes
there, and are computed on the CPU. Copies between both, and the operations of which the size of the result depends on
numbers, are counted by the rules of PyTorch's CUDA code.

A copy to the device that does not block (``non_blocking=True``) is counted if it is of more than 64 KiB of memory that
is not pinned: CUDA then may wait for the work before it. torch.cuda.set_sync_debug_mode does not report these. What is
smaller CUDA takes into a buffer of its own, and the host goes on (CUDA C++ Programming Guide, "Concurrent Execution
between Host and Device"): such are the boxes and labels of an image. Images are pinned, as a run's data loader does it
(:meth:`densekit.engine.runner.DensekitRunner.build_dataloader`); mmengine's data samples it leaves as they are.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from mmengine.config import Config
from mmengine.hooks import RuntimeInfoHook
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data._utils.pin_memory import pin_memory

from densekit.benchmark.case import Images
from densekit.benchmark.peers import OURS
from densekit.benchmark.steps import STOCK, Step, StepCase
from densekit.benchmark.stock import stock_form

DEVICE = torch.device('cuda', 0)
_BENEATH = torch.device('meta')  # what PyTorch's C++ code takes the pretended device for: it has no driver to ask
_STAGED_BYTES = 64 * 1024  # up to which CUDA copies from memory that is not pinned without waiting
_ROOT = Path(__file__).parents[2]
_NOT_COUNTED = str(Path(__file__).parent)  # what the benchmark itself waits for
_PLUMBING = ('/torch/', '/mmcv/ops/', '/densekit/ops/', '/mmengine/structures/')  # asks on somebody's behalf

# By names of operations, without overloads. They size their result by numbers on the device.
_SIZED_BY_NUMBERS = {
    'aten::_local_scalar_dense',
    'aten::nonzero',
    'aten::masked_select',
    'aten::_unique',
    'aten::_unique2',
    'aten::unique_dim',
    'aten::unique_consecutive',
    'aten::bincount',
    'aten::equal',
    'torchvision::nms',
}
_INDEXING = {'aten::index', 'aten::index_put', 'aten::index_put_', 'aten::_index_put_impl_'}
_MADE_ON_THE_HOST: tuple[Any, ...] = (torch.tensor, torch.as_tensor, Tensor.new_tensor)


class Waits(Counter[tuple[str, str]]):
    """How often: ``{(the line that asked, the operation): number}``."""

    def add(self, operation: str) -> None:
        """Counts one, for the sake of the innermost line outside of PyTorch and what only passes calls on."""
        if (line := _asked_by()) is not None:
            self[line, operation] += 1


class Pinned(dict[int, Tensor]):
    """Memory on the host that was pinned: ``{its address: a tensor that keeps it}``."""

    def pin(self, tensor: Tensor) -> Tensor:
        """A copy in pinned memory; the tensor itself if it is there."""
        if tensor in self:
            return tensor
        pinned = tensor.clone()
        self[pinned.untyped_storage().data_ptr()] = pinned
        return pinned

    def __contains__(self, tensor: object) -> bool:
        """Whether a tensor lies in such memory, maybe as a part of another."""
        return isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() in self.keys()


class PretendedTensor(Tensor):
    """A tensor that is computed on the CPU and says that it is on :data:`DEVICE`."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> 'PretendedTensor':
        """A tensor with the values of ``host``, and its memory."""
        made = Tensor._make_wrapper_subclass(
            cls, host.shape, host.stride(), host.storage_offset(), dtype=host.dtype, device=_BENEATH
        )
        made.host = host
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where it says it is."""
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        """As of :attr:`device`."""
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        """As of :attr:`device`."""
        return False

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError(f'{func} is computed outside of pretended_cuda()')


@contextmanager
def pretended_cuda() -> Iterator[Waits]:
    """Within this context tensors can be on :data:`DEVICE`, and what makes the host wait for it is counted."""
    waits, pinned = Waits(), Pinned()
    with mock.patch.object(InstanceData, '__getitem__', _chosen), _Beneath(waits, pinned), _Calls(waits, pinned):
        yield waits


_getitem = InstanceData.__getitem__


def _chosen(instances: InstanceData, item: Any) -> InstanceData:
    """``instances[item]``: mmengine looks at the exact class of a tensor."""
    if not isinstance(item, PretendedTensor):
        return _getitem(instances, item)
    chosen = type(instances)(metainfo=instances.metainfo)
    for name, value in instances.items():
        chosen[name] = value[item]
    return chosen


class _Calls(TorchFunctionMode):
    """Calls of PyTorch's functions: gives them the device that they know, and makes from Python's numbers tensors."""

    def __init__(self, waits: Waits, pinned: Pinned) -> None:
        super().__init__()
        self.waits = waits
        self.pinned = pinned

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(torch.device, _beneath, (args, kwargs or {}))
        if isinstance(kwargs.get('device'), str | int):
            kwargs['device'] = _beneath(torch.device(kwargs['device']))
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], str):
            args = (args[0], _beneath(torch.device(args[1])), *args[2:])
        if func in _MADE_ON_THE_HOST:
            return self._made_on_the_host(func, args, kwargs)
        if func is Tensor.tolist and isinstance(args[0], PretendedTensor):
            self.waits.add('tolist')
            return args[0].host.tolist()
        if func is Tensor.pin_memory:
            return self.pinned.pin(args[0])
        if func is Tensor.is_pinned:
            return args[0] in self.pinned
        return func(*args, **kwargs)

    def _made_on_the_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        device = kwargs.pop('device', None)
        if func is Tensor.new_tensor:
            device = device or (_BENEATH if isinstance(args[0], PretendedTensor) else None)
            kwargs.setdefault('dtype', args[0].dtype)
            func, args = torch.tensor, args[1:]
        data = args[0] if args else kwargs.pop('data')
        if isinstance(data, Tensor):
            return data.to(device=device, dtype=kwargs.get('dtype'))
        made = func(data, **kwargs)
        if device is None or device.type == 'cpu':
            return made
        self.waits.add('copy to the device')
        return PretendedTensor(made)


class _Beneath(TorchDispatchMode):
    """Operations, forward and backward: computes them on the CPU."""

    def __init__(self, waits: Waits, pinned: Pinned) -> None:
        super().__init__()
        self.waits = waits
        self.pinned = pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        pretended = any(isinstance(tensor, PretendedTensor) for tensor in tensors)
        target = kwargs.get('device')
        if pretended or target == _BENEATH:
            for operation in self._waits_of(func, args, kwargs, target):
                self.waits.add(operation)
        given = kwargs | ({'device': torch.device('cpu')} if target is not None else {})
        host_args, host_kwargs = tree_map_only(PretendedTensor, lambda tensor: tensor.host, (args, given))
        result = func(*host_args, **host_kwargs)
        if not (pretended if target is None else target == _BENEATH):
            return result.clone() if target is not None and pretended and func is torch.ops.aten._to_copy else result
        result = tree_map_only(Tensor, PretendedTensor, result)
        return return_and_correct_aliasing(func, args, kwargs, result) if pretended and target is None else result

    def _waits_of(self, func: Any, args: Any, kwargs: Mapping[str, Any], target: torch.device | None) -> Iterator[str]:
        """The names of the waits of an operation, as PyTorch 2.11 has it on CUDA."""
        name = func._schema.name
        if name in _SIZED_BY_NUMBERS:
            yield name.partition('::')[2].strip('_')
        elif name == 'aten::repeat_interleave' and kwargs.get('output_size') is None:
            yield 'repeat_interleave'
        elif name == 'aten::_to_copy' and target is not None:
            yield from self._copy(args[0], target == _BENEATH, kwargs.get('non_blocking', False))
        elif name == 'aten::copy_':
            to_device, from_device = (isinstance(part, PretendedTensor) for part in args[:2])
            if to_device != from_device:
                non_blocking = args[2] if len(args) > 2 else kwargs.get('non_blocking', False)
                yield from self._copy(args[1], to_device, non_blocking)
        elif name in _INDEXING:
            yield from _indexing(name, args)

    def _copy(self, source: Tensor, to_device: bool, non_blocking: bool) -> Iterator[str]:
        if isinstance(source, PretendedTensor):
            if not to_device:
                yield 'copy to the host'  # also if not blocking: who reads it has to wait
        elif to_device and not non_blocking:
            yield 'copy to the device'
        elif to_device and source.nbytes > _STAGED_BYTES and source not in self.pinned:
            yield 'copy of unpinned memory'


def _beneath(device: torch.device) -> torch.device:
    return _BENEATH if device.type == 'cuda' else device


def _indexing(name: str, args: Any) -> Iterator[str]:
    """A mask is turned to numbers by nonzero, numbers on the host are copied, and so is a scalar to be put."""
    indices = [index for index in args[1] if index is not None]
    masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
    scalar = name != 'aten::index' and args[2].ndim == 0
    if scalar and len(masks) == len(indices):
        return  # PyTorch fills instead
    yield from ['selection by a mask'] * len(masks)
    yield from ['copy to the device'] * sum(not isinstance(index, PretendedTensor) for index in indices)
    if scalar:
        yield 'copy to the device'


def _asked_by() -> str | None:
    """``mmdet/models/losses/iou_loss.py:23 name``; None if the benchmark asked."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_filename != __file__ and not any(part in code.co_filename for part in _PLUMBING):
            if code.co_filename.startswith(_NOT_COUNTED):
                return None
            return f'{_short(code.co_filename)}:{frame.f_lineno} {code.co_name}'
        frame = frame.f_back
    return None


def _short(path: str) -> str:
    return path.rpartition('/site-packages/')[2].removeprefix(f'{_ROOT}/')


def waits_of_step(case: StepCase, cfg: Config, *, ours: bool) -> Waits:
    """The waits of one step after the first, and of writing down its losses.

    Args:
        case: what to do.
        cfg: of the model.
        ours: with :class:`densekit.engine.guards.FiniteGuard`, as a run of ours has it.
    """
    with pretended_cuda() as waits:
        step = Step(case, cfg, 'nchw', DEVICE, guarded=ours)
        step.batch = pin_memory(step.batch)
        for _ in range(2):
            waits.clear()
            outputs = step()
            if case.training:
                _write_down(outputs)
    return waits


def _write_down(losses: dict[str, Any]) -> None:
    runner = SimpleNamespace(message_hub=MessageHub(f'waits{id(losses)}'))
    RuntimeInfoHook().after_train_iter(runner, 0, None, losses)


def report(config: str, images: Images, options: tuple[str, ...] = ()) -> str:
    """The waits of training and inference, stock beside ours, and who asked for ours.

    Args:
        config: path.
        images: number, height, width.
        options: ``key=value`` texts that change the config.
    """
    lines = []
    for training in (True, False):
        case = StepCase(config, images, 'fp32', training, options=options)
        cfg = case.ours()
        ours = waits_of_step(case, cfg, ours=True)
        stock = waits_of_step(case, stock_form(cfg)[0], ours=False)
        what = 'training step' if training else 'inference'
        lines += [
            f'{what} of {images[0]} x {images[1]} x {images[2]}: {stock.total()} waits stock, {ours.total()} ours'
        ]
        for name, found in ((STOCK, stock), (OURS, ours)):
            lines += [
                f'  {number:4d}  {name:8s}  {operation:23s}  {line}'
                for (line, operation), number in found.most_common()
            ]
    return '\n'.join(lines)
