"""``torch.compile`` for the parts of a model where it pays.

mmengine's ``compile=True`` compiles the whole step of training: preprocessing, assignment of boxes, losses, with their
lists of any length and Python objects. Here each part is compiled for itself, its forward pass and what follows from it
backward; everything between the parts stays as it is. A part keeps its parameters, names and hooks, so that
checkpoints, averaged weights, freezing and DistributedDataParallel do not notice.

Only training is compiled. Validation and tests meet other sizes and a module in evaluation mode, for which all would be
compiled anew.
"""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from densekit.engine.graphs import check_capturable, use_graphs

_DEFAULT_PARTS = ('backbone', 'neck', 'decode_head', 'auxiliary_head', 'rpn_head')
"""Tensors in, tensors out, computed once for each image. Heads on proposals or queries compile if they are named."""

_FIXED_SIZES = ('LeanUPerHead',)
"""Its own gradient of resizing takes no sizes that are symbols (torch 2.11)."""

_KEYS = ('parts', 'dynamic', 'graphs')


@dataclass(frozen=True)
class CompilePlan:
    """What ``compile`` in a config comes to for a model.

    Attributes:
        parts: names of submodules that are compiled, such as ``'roi_head.mask_head'``; none with ``graphs``.
        dynamic: compile once for images of all sizes (True), for each size by itself (False), or first for one size
            and for all when a second one comes (None).
        graphs: CUDA graphs of backbone and neck for so many sizes of images, instead of compiling; 0 for none.
    """

    parts: tuple[str, ...]
    dynamic: bool | None
    graphs: int = 0


def read_plan(setting: Any, model: nn.Module) -> CompilePlan | None:
    """Reads ``compile`` of a config.

    Args:
        setting: None, a bool, or ``dict(parts=..., dynamic=...)`` or ``dict(graphs=...)``. Without ``parts``, backbone,
            neck, dense heads and RPN, as far as the model has them. Without ``dynamic``, False where the preprocessor
            brings all images to one size (``data_preprocessor.size``), else True.
        model: without a wrapper.

    Returns:
        The plan; None for no compilation.

    Raises:
        ValueError: if the setting has other keys or values, or names what the model does not have.
    """
    if setting is None or setting is False:
        return None
    given: Mapping[str, Any] = {} if setting is True else setting
    if not isinstance(given, Mapping) or not set(given) <= set(_KEYS):
        raise ValueError(
            f'compile={setting!r}: give True, False, dict(parts=[...], dynamic=True or False) to compile parts of the '
            "model, or dict(graphs=8) for CUDA graphs. (mmengine's options of torch.compile are not taken: they are of "
            'a whole step.)'
        )
    if 'graphs' in given:
        return _graphs_plan(given)
    dynamic = given.get('dynamic', getattr(getattr(model, 'data_preprocessor', None), 'size', None) is None)
    if dynamic not in (True, False, None):
        raise ValueError(f'compile.dynamic={dynamic!r}: give True, False or None')
    parts = given.get('parts')
    if parts is None:
        parts = [name for name in _DEFAULT_PARTS if _takes_maps_alone(getattr(model, name, None))]
    _check_parts(parts, model)
    fixed = [name for name in parts if type(model.get_submodule(name)).__name__ in _FIXED_SIZES]
    if fixed and dynamic is not False:
        raise ValueError(
            f'compile.dynamic={dynamic}: {", ".join(fixed)} is a {type(model.get_submodule(fixed[0])).__name__}, which '
            'compiles for images of one size only; give compile.dynamic=False, or take another part'
        )
    return CompilePlan(tuple(parts), dynamic)


def check_plan(plan: CompilePlan, cfg: Mapping[str, Any], model: nn.Module, *, processes: int) -> None:
    """Finds out whether a plan can be carried out, by compiling a line of code among others.

    Args:
        plan: of the model.
        cfg: config of the run.
        model: on its device, without a wrapper.
        processes: that train together.

    Raises:
        ValueError: if it cannot; the message says why and what to do.
    """
    if cfg.get('sharding') is not None:
        raise ValueError(
            'compile (--compile) and sharding (--shard) do not go together: what gathers the weights of a block runs '
            'within the part that is compiled. Leave out one of the two.'
        )
    if cfg.get('activation_checkpointing') is not None:
        raise ValueError(
            'compile and activation_checkpointing do not go together, since mmengine wraps what is to be compiled. '
            'Use model.backbone.with_cp=True, which is compiled too.'
        )
    if plan.graphs:
        check_capturable(model, processes=processes)
    else:
        _check_compiler(next(model.parameters()).device)


def carry_out(plan: CompilePlan, model: nn.Module) -> None:
    """Changes a model in place, for training; nothing is compiled before the first step.

    Args:
        plan: of this model, checked.
        model: without a wrapper; it may have one already.
    """
    if plan.graphs:
        use_graphs(model, plan.graphs)
        return
    compile_parts(model, plan)
    sizes = {True: 'for images of all sizes', False: 'for each size of images', None: 'for the sizes that come'}
    print_log(
        f'Compiled in training, {sizes[plan.dynamic]} (dynamic={plan.dynamic}): {", ".join(plan.parts)}. The first '
        'steps take minutes. Validation is not compiled.',
        logger='current',
    )


def compile_parts(model: nn.Module, plan: CompilePlan, backend: str = 'inductor') -> None:
    """Compiles parts of a model in place.

    Args:
        model: without a wrapper.
        plan: with parts.
        backend: of ``torch.compile``; another one for tests.
    """
    options: dict[str, Any] | None = None
    if backend == 'inductor':
        # The random numbers of the eager form: the same paths are dropped. For sizes that are not known, torch 2.11
        # cannot sort the strides that its own choice of layouts leads to; parts are given channels_last anyway.
        options = {'fallback_random': True, 'layout_optimization': plan.dynamic is False}
    for name in plan.parts:
        part = model.get_submodule(name)
        for module in part if isinstance(part, nn.ModuleList) else [part]:
            module.forward = CompiledForward(module, plan.dynamic, backend, options)


class CompiledForward:
    """Stands in the place of a module's ``forward``: compiled in training, what it was elsewhere.

    ``nn.Module.compile`` would not do: it is for calls of the module, and mmseg's heads call their own ``forward``.

    Args:
        module: whose forward pass this is.
        dynamic: see :class:`CompilePlan`.
        backend: of ``torch.compile``.
        options: of the backend.
    """

    def __init__(self, module: nn.Module, dynamic: bool | None, backend: str, options: dict[str, Any] | None) -> None:
        self.module = module
        self.eager = module.forward
        self.compiled = torch.compile(self.eager, dynamic=dynamic, backend=backend, options=options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Computes what the module does."""
        if not (self.module.training and torch.is_grad_enabled()):
            return self.eager(*args, **kwargs)
        return self.compiled(*tree_map(_channels_last, args), **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the module computes with weights of its own, which nothing is compiled for."""
        return copy.deepcopy(self.eager, memo)


def _channels_last(value: Any) -> Any:
    """Images and maps in the layout that convolutions are fast in; whatever else as it is."""
    is_map = isinstance(value, Tensor) and value.ndim == 4
    return value.contiguous(memory_format=torch.channels_last) if is_map else value


def _graphs_plan(given: Mapping[str, Any]) -> CompilePlan:
    graphs = given['graphs']
    if isinstance(graphs, bool) or not isinstance(graphs, int) or graphs < 1:
        raise ValueError(f'compile.graphs={graphs!r}: give the number of sizes of images to make CUDA graphs for')
    if set(given) != {'graphs'}:
        raise ValueError('compile.graphs goes alone: what is replayed as a CUDA graph is not compiled')
    return CompilePlan((), None, graphs)


def _takes_maps_alone(part: Any) -> bool:
    """Whether a part is there, and its forward pass does not take labels too, as that of Mask2Former's head does."""
    return isinstance(part, nn.Module) and len(inspect.signature(part.forward).parameters) == 1


def _check_parts(parts: Any, model: nn.Module) -> None:
    allowed = _possible_parts(model)
    if isinstance(parts, str) or not all(isinstance(name, str) for name in parts) or not parts:
        raise ValueError(f'compile.parts={parts!r}: give a list of {", ".join(allowed)}')
    unknown = [name for name in parts if name not in allowed]
    if unknown or len(set(parts)) < len(parts):
        wrong = f'there is no {", ".join(unknown)} to compile' if unknown else 'a part is named twice'
        raise ValueError(f'compile.parts={list(parts)}: {wrong}; {type(model).__name__} has {", ".join(allowed)}')


def _possible_parts(model: nn.Module) -> list[str]:
    """Submodules whose forward pass is part of training. That of a RoI head is not, those of its own heads are."""
    names = []
    for name, child in model.named_children():
        if name == 'roi_head':
            names += [f'{name}.{head}' for head in ('bbox_head', 'mask_head') if hasattr(child, head)]
        elif next(child.parameters(), None) is not None:
            names.append(name)
    return names


def _check_compiler(device: torch.device) -> None:
    """Compiles a sum: what a compiler needs of a machine shows in its doing."""
    probe = torch.zeros(64, device=device)
    try:
        # From the cache of an earlier run it would come without a compiler.
        torch.compile(_three_times, dynamic=False, options={'fx_graph_cache': False})(probe)
    except Exception as error:  # of dynamo, inductor, Triton, a compiler or a linker
        needs = "a C++ compiler (g++, or the variable CXX) and Python's headers"
        if device.type == 'cuda':
            needs = "Triton, a C compiler (gcc, or the variable CC) and Python's headers"
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
        raise ValueError(
            f'compile (--compile): torch.compile does not work on this machine: {said}\nIt needs {needs}. Install '
            'them, or train without: the results are equal within rounding.'
        ) from error


def _three_times(x: Tensor) -> Tensor:
    return x * 3
