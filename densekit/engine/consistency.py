"""Whether the parts of a model, and the model and its data, fit together: found before the first step."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from densekit.data.checks import HEADS


def check_channels(model: Any) -> None:
    """Compares what a backbone emits with what its neck, or its heads, expect.

    Args:
        model: a detector or segmentor. One whose backbone does not tell its ``channels`` passes.

    Raises:
        ValueError: if they differ.
    """
    channels = getattr(getattr(model, 'backbone', None), 'channels', None)
    if channels is None:
        return
    if getattr(model, 'neck', None) is not None:
        expected = getattr(model.neck, 'in_channels', None)
        if isinstance(expected, list | tuple) and list(expected) != list(channels):
            raise _channels_error('neck', expected, channels)
        return
    for name in ('decode_head', 'auxiliary_head'):
        for head in _heads(model, name):
            if getattr(head, 'input_transform', None) == 'resize_concat' or not hasattr(head, 'in_index'):
                continue  # in_channels is a sum there; Mask2Former has neither
            several = isinstance(head.in_channels, list | tuple)
            expected = head.in_channels if several else [head.in_channels]
            indices = head.in_index if several else [head.in_index]
            if max(indices) >= len(channels):
                raise ValueError(f'model.{name} reads output {max(indices)}, and the backbone has {len(channels)}')
            emitted = [channels[i] for i in indices]
            if list(expected) != emitted:
                raise _channels_error(name, expected, emitted)


def check_classes(model: nn.Module, classes: Sequence[str] | None, where: str) -> None:
    """Compares the number of classes of every head with that of a data set.

    Heads of a model that reads the names of classes (``language_model``) fit any, and are passed over.

    Args:
        model: a detector or segmentor.
        classes: names; without them nothing is checked.
        where: the data set, for the message.

    Raises:
        ValueError: if a head has another number; in training that fails or, for a segmentor, passes unnoticed.
    """
    if not classes:
        return
    reading = [f'{name}.' if name else '' for name, part in model.named_modules() if hasattr(part, 'language_model')]
    stuff = getattr(getattr(model, 'panoptic_fusion_head', None), 'num_stuff_classes', 0)
    misfits = {
        name: head.num_classes
        for name, head in model.named_modules()
        if HEADS.search(name)
        and isinstance(getattr(head, 'num_classes', None), int)
        and not getattr(head, 'class_agnostic', False)
        and head.num_classes not in (len(classes), len(classes) - stuff)  # heads of boxes know things only
        and not name.startswith(tuple(reading))  # a place per word there, whatever the number of classes
        and type(head).__name__ != 'STDCHead'  # tells edges from the rest
    }
    if misfits:
        heads = ', '.join(f'model.{name} {number}' for name, number in misfits.items())
        names = ', '.join(classes[:5]) + (', ...' if len(classes) > 5 else '')
        raise ValueError(
            f'the {where} data set has {len(classes)} classes ({names}), but num_classes is: {heads}. Set '
            'num_classes of these heads, or metainfo.classes of the data set.'
        )


def _heads(model: Any, name: str) -> list[Any]:
    head = getattr(model, name, None)
    if head is None:
        return []
    return list(head) if isinstance(head, nn.ModuleList) else [head]


def _channels_error(part: str, expected: Sequence[int], emitted: Sequence[int]) -> ValueError:
    return ValueError(
        f'model.{part}.in_channels is {list(expected)}, but the backbone emits {list(emitted)} channels. '
        f'Set model.{part}.in_channels to that, or choose the arch (and out_indices) it is made for.'
    )
