"""What a model consists of, and how an optimizer groups its parameters, as tables."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from densekit.report.tables import format_table

_NAME_WIDTH = 44  # leaves the table within 120 columns


def parts_table(model: nn.Module) -> str:
    """Shows the parts of a model with their numbers of parameters; shared ones count where they come first.

    Args:
        model: a detector or segmentor, not wrapped.
    """
    seen: set[int] = set()
    rows = [[name, type(part).__name__, *_counts(part, seen)] for name, part in _parts(model)]
    rest = _counts(model, seen)
    if rest[0]:
        rows.append(['elsewhere', '', *rest])
    rows.append(['in all', '', *_counts(model, set())])
    table = [[*row[:2], *(f'{count:,}' for count in row[2:])] for row in rows]
    return format_table(['part', 'type', 'parameters', 'trainable', 'frozen'], table, align='<<>>>')


def groups_table(model: nn.Module, optimizer: Optimizer, base_lr: float) -> str:
    """Shows the groups of an optimizer.

    Those of layer decay go by their name and depth. Groups without a name are shown as one where learning rate and
    weight decay agree, by the first of their parameters.

    Args:
        model: whose names the parameters have.
        optimizer: of the model.
        base_lr: what a group with a scale of 1 has.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    merged: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for group in optimizer.param_groups:
        scale = group.get('lr_scale', group['lr'] / base_lr if base_lr else 1.0)
        key = group.get('group_name', ''), f'{scale:.5f}', f'{group["lr"]:.4g}', f'{group.get("weight_decay", 0):g}'
        merged.setdefault(key, []).extend(group['params'])
    rows = []
    for (name, *rates), parameters in merged.items():
        depth = re.search(r'(?:^|\.)layer_(\d+)_', name)
        first = names.get(id(parameters[0]), 'not of the model') + (', ...' if len(parameters) > 1 else '')
        values = sum(parameter.numel() for parameter in parameters)
        rows.append([_short(name or first), depth[1] if depth else '-', *rates, len(parameters), f'{values:,}'])
    header = ['group', 'depth', 'lr scale', 'learning rate', 'weight decay', 'tensors', 'values']
    return format_table(header, rows, align='<>>>>>>')


def ungrouped(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Names of the trainable parameters that an optimizer does not hold."""
    grouped = {id(parameter) for group in optimizer.param_groups for parameter in group['params']}
    return [name for name, value in model.named_parameters() if value.requires_grad and id(value) not in grouped]


def _parts(module: nn.Module, prefix: str = '') -> Iterator[tuple[str, nn.Module]]:
    """Backbone, neck and each head; one that consists of heads gives these."""
    for name, child in module.named_children():
        path = f'{prefix}{name}'
        heads = isinstance(child, nn.ModuleList) or any(inner.endswith('head') for inner, _ in child.named_children())
        if name.endswith('head') and heads:
            yield from _parts(child, f'{path}.')
        elif next(child.parameters(), None) is not None:
            yield path, child


def _counts(module: nn.Module, seen: set[int]) -> list[int]:
    """Values in the parameters of a module that were not seen: all, trainable, frozen."""
    fresh = [parameter for parameter in module.parameters() if id(parameter) not in seen]
    seen.update(map(id, fresh))
    total = sum(parameter.numel() for parameter in fresh)
    trainable = sum(parameter.numel() for parameter in fresh if parameter.requires_grad)
    return [total, trainable, total - trainable]


def _short(name: str) -> str:
    return name if len(name) <= _NAME_WIDTH else f'{name[: _NAME_WIDTH - 3]}...'
