"""Models, gradients and optimizer states that are cut into as many parts as there are processes (FSDP2).

``torch.distributed.fsdp.fully_shard`` works in place: modules, parameter names and therefore layer decay stay as they
are, while each parameter becomes a DTensor of which every process keeps its part. A checkpoint has whole tensors, the
same as without sharding, so a run may go on with DDP, with FSDP2 or in one process.

The order is: build the model, give it its first weights, :func:`shard`, build the optimizer, load a checkpoint.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from backbones.files import some


def shard(
    model: nn.Module,
    *,
    param_dtype: str | None = None,
    activation_checkpointing: bool = False,
) -> nn.Module:
    """Cuts a model into the parts that the processes keep; all of them must call it.

    Every block of the backbone is a group of its own, put together right before it computes and freed behind it, in
    the backward pass once more. All else is one group: mmdet and mmseg call methods of their heads (``loss``), and
    FSDP2 puts together what is called as a module. Outside forward and backward pass every parameter is cut.

    The weights and buffers of the first process count, as under DDP. Frozen parameters are cut as well, without
    gradients. Buffers are whole in every process, and BN's differ as under DDP; SyncBN synchronizes as it does there.

    A trainable parameter that one process did not use has a zero gradient there, as under DDP with
    ``find_unused_parameters``. Gradients of accumulated batches are summed up cut: each batch communicates, and none
    needs memory for a whole gradient.

    Precision: parameters, their gradients and the optimizer's state remain float32. ``param_dtype`` is what the
    blocks are sent and computed in: they run under autocast of that type on rounded copies of their weights, in
    training and validation, while the residual stream stays as it comes in. The rest follows the optimizer wrapper
    (``AutocastOptimWrapper`` or float32); boxes and losses have no place in bfloat16. Without ``param_dtype`` autocast
    by the wrapper works as in one process, but keeps its copies of all weights until the end of the forward pass.

    Args:
        model: with its first weights, on any device, before the optimizer is built; changed in place.
        param_dtype: None for float32, or 'bfloat16', which halves what is sent of the weights. Gradients are added up
            in float32.
        activation_checkpointing: have the blocks compute their activations once more in the backward pass.

    Returns:
        The model.

    Raises:
        ValueError: if there are no processes, the model is sharded already, or FSDP2 cannot take it.
    """
    _check_shardable(model, param_dtype)
    blocks = blocks_of(getattr(model, 'backbone', model))
    if not blocks:
        print_log('No blocks were found in the backbone: the model is sharded as one group.', 'current', level=30)
    if activation_checkpointing:
        _recompute(blocks)
    mesh = init_device_mesh('cuda' if torch.cuda.is_available() else 'cpu', (dist.get_world_size(),))
    _same_in_every_process(model, mesh)
    policy = MixedPrecisionPolicy()
    if param_dtype is not None:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in blocks:
        if param_dtype is not None:
            block.forward = torch.autocast(mesh.device_type, dtype=torch.bfloat16)(block.forward)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    _fill_missing_gradients(model, blocks)
    # FSDP2 by itself keeps the last group whole behind a forward pass, so also after validation, where averaged
    # weights are about to be exchanged for the model's.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    _take_whole_tensors(model)
    model.__deepcopy__ = partial(_copied_weights, model)  # type: ignore[assignment]
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard` was applied."""
    return isinstance(model, FSDPModule)


def gathered(state: Any) -> Any:
    """A state with whole tensors on the CPU where it had parts, as it would be without sharding.

    A collective operation: all processes call it, with the same structure. One tensor at a time is put together on
    the device, so it needs no memory there to speak of.

    Args:
        state: dictionaries, lists and tuples of anything; a model's ``state_dict()``, or all of a checkpoint.

    Returns:
        A copy in the first process, empty in the others.
    """
    known: dict[int, Tensor] = {}  # shared parameters stay shared
    whole = mapped(state, lambda _, value: _gathered(value, known))
    return whole if dist.get_rank() == 0 else type(whole)()


def load_full_optimizer_state(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Loads what an unsharded optimizer's ``state_dict()`` has; each process keeps its part.

    Args:
        optimizer: torch's, or mmengine's wrapper of one, of a sharded model or not.
        state: whole, in every process; the optimizer may go on to use its tensors, as torch does it.

    Raises:
        ValueError: if the groups of parameters are others.
    """
    groups = getattr(optimizer, 'optimizer', optimizer).param_groups  # mmengine's wrapper adds one of its own
    params = [param for group in groups for param in group['params']]
    indices = [index for group in state['param_groups'] for index in group['params']]
    if len(params) != len(indices):
        raise ValueError(f'the optimizer has {len(params)} parameters and the state is one of {len(indices)}')
    of_index = dict(zip(indices, params, strict=True))
    parts = {
        index: {key: part_of(value, of_index[index]) for key, value in entry.items()}
        for index, entry in state['state'].items()
    }
    optimizer.load_state_dict({**state, 'state': parts})


def part_of(value: Any, like: Tensor) -> Any:
    """This process' part of a whole tensor, cut as ``like`` is; other things, and other shapes, stay as they are."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor) or not isinstance(value, Tensor):
        return value
    if value.shape != like.shape:
        return value
    mesh, (placement,) = like.device_mesh, like.placements
    assert isinstance(placement, Shard)
    parts = value.chunk(mesh.size(), placement.dim)  # as torch cuts parameters: fewer parts than processes may be
    rank = mesh.get_local_rank()
    part = parts[rank] if rank < len(parts) else value.narrow(placement.dim, 0, 0)
    local = part.to(like.device, copy=True).contiguous()
    return DTensor.from_local(local, mesh, like.placements, shape=like.shape, stride=like.stride())


def mapped(state: Any, function: Callable[[str, Any], Any], path: str = '') -> Any:
    """A copy of nested dictionaries, lists and tuples with a function applied to what they hold.

    Args:
        state: nested data.
        function: of the keys that lead to a value, such as ``state_dict/neck.0.bias``, and the value.
        path: the keys that lead to ``state``.
    """
    if isinstance(state, Mapping):
        return {key: mapped(value, function, f'{path}/{key}'.lstrip('/')) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(mapped(value, function, f'{path}/{i}'.lstrip('/')) for i, value in enumerate(state))
    return function(path, state)


class WeightsOnly(nn.Module):
    """Parameters and buffers of a sharded model under their names, cut alike; what averages weights works on it."""

    def forward(self, *_args: Any, **_kwargs: Any) -> None:
        """Refuses: a copy of a sharded model has no layers."""
        raise RuntimeError('this copy of a sharded model holds its weights alone; load them into the model to run it')


def _check_shardable(model: nn.Module, param_dtype: str | None) -> None:
    if param_dtype not in (None, 'bfloat16'):
        raise ValueError(
            f"param_dtype={param_dtype!r}: give 'bfloat16', or None for float32 (float16 would need a loss scaler)"
        )
    if not dist.is_initialized():
        raise ValueError('a model is sharded among processes, and there is one alone: start with torchrun or srun')
    if is_sharded(model):
        raise ValueError('the model is sharded already')
    scalars = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise ValueError(
            f'{len(scalars)} parameters are single numbers, which FSDP2 cannot cut: {some(scalars)}. '
            'Train this model without sharding (DDP).'
        )


def blocks_of(module: nn.Module, name: str = '') -> list[nn.Module]:
    """The blocks of a backbone, in its order.

    They are the outermost children, with parameters and children of their own, of ``nn.Sequential`` (ResNet and all of
    ours) or of a list called ``blocks`` (Swin): these are called as modules, one after the other.
    """
    if isinstance(module, nn.Sequential) or (isinstance(module, nn.ModuleList) and name == 'blocks'):
        blocks = [child for child in module.children() if any(child.children()) and _has_parameters(child)]
        if blocks:
            return blocks
    return [block for name, child in module.named_children() for block in blocks_of(child, name)]


def _has_parameters(module: nn.Module) -> bool:
    """Whether a module has parameters."""
    return next(module.parameters(), None) is not None


def _recompute(blocks: list[nn.Module]) -> None:
    unable = sorted({type(block).__name__ for block in blocks if not hasattr(block, 'with_cp')})
    if unable or not blocks:
        raise ValueError(
            'activation_checkpointing=True needs a backbone whose blocks have the switch with_cp'
            f'{", and these have not: " if unable else ""}{", ".join(unable)}'
        )
    for block in blocks:
        block.with_cp = True  # type: ignore[assignment]


def _same_in_every_process(model: nn.Module, mesh: DeviceMesh) -> None:
    """Without it parts of differing models would make up one; FSDP2 does not look."""
    model.to(mesh.device_type)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor, 0)


def _fill_missing_gradients(model: nn.Module, blocks: list[nn.Module]) -> None:
    """Gives zeros to what a process did not use, at the end of a backward pass and before FSDP2 adds gradients up.

    FSDP2 lays the gradients that there are one behind the other. Where processes have others, a head of one is added
    to a head of another, or they wait for each other for ever. Blocks are used in every process.
    """
    in_blocks = {id(module) for block in blocks for module in block.modules()}
    others = [module for module in model.modules() if id(module) not in in_blocks]

    def fill() -> None:
        for parameter in (parameter for module in others for parameter in module.parameters(recurse=False)):
            if parameter.requires_grad and parameter.grad is None and not isinstance(parameter, DTensor):
                parameter.grad = torch.zeros_like(parameter)

    def fill_at_the_end(_grad: Tensor) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(fill)

    def watch(_path: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(fill_at_the_end)

    def watch_outputs(_module: nn.Module, _args: Any, output: Any) -> None:
        mapped(output, watch)

    model.register_forward_hook(watch_outputs)


def _gathered(value: Any, known: dict[int, Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    if id(value) not in known:
        whole = value.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        known[id(value)] = whole.to('cpu', copy=True) if dist.get_rank() == 0 else torch.empty(0)
    return known[id(value)]


def _take_whole_tensors(model: nn.Module) -> None:
    """Has ``load_state_dict``, torch's and mmengine's, take whole tensors for parameters that are cut."""
    for module in model.modules():
        if any(isinstance(parameter, DTensor) for parameter in module.parameters(recurse=False)):
            module.register_load_state_dict_pre_hook(_cut_before_loading)


def _cut_before_loading(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if f'{prefix}{name}' in state:
            state[f'{prefix}{name}'] = part_of(state[f'{prefix}{name}'], parameter)


def _copied_weights(model: nn.Module, memo: dict[int, Any]) -> WeightsOnly:
    """What ``copy.deepcopy`` gives, which FSDP2 refuses; mmengine's averaged models begin as such a copy."""

    def copied(module: nn.Module) -> WeightsOnly:
        if id(module) not in memo:
            memo[id(module)] = copy = WeightsOnly()
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in memo:
                    memo[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                copy.register_parameter(name, memo[id(parameter)])
            for name, buffer in module.named_buffers(recurse=False):
                persistent = name not in module._non_persistent_buffers_set
                copy.register_buffer(name, buffer.detach().clone(), persistent)
            for name, child in module.named_children():
                copy.add_module(name, copied(child))
        return memo[id(module)]

    copy = copied(model)
    _take_whole_tensors(copy)
    return copy
