"""Weights from files into a backbone: read safely, rename, and load all of them or fail.

mmengine's ``Pretrained`` initializer loads with ``strict=False``: weights under other names, or in an official
``{'model': ...}`` file, leave the network at random values with no more than a warning. Here every parameter is
accounted for, or loading raises.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model.weight_init import update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from timm.models import adapt_input_conv
from torch import Tensor, nn

from backbones.files import read_checkpoint, some, state_dict_of
from backbones.formats import convert_state_dict, same_values

_STEMS = ('downsample_layers.0.0.weight', 'stem.weight')
_NOT_IN_CLASSIFIERS = r'norm\d\.|pyramid\.'
_OF_A_DETECTOR = r'norm[0-2]\.|pyramid\.'


@dataclass
class LoadReport:
    """What became of every key of a checkpoint and of every parameter of the backbone."""

    source: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f'{len(self.loaded)} tensors loaded ({self.source} names, {len(self.reshaped)} of them reshaped)']
        for what, keys in (
            ('adapted to the channels of the image', self.adapted),
            ('left at their initial values', self.missing),
            ('of another shape (file, model)', self.misshapen),
            ('not known to the backbone', self.unexpected),
            ('left out on purpose', self.dropped),
        ):
            if keys:
                parts.append(f'{what}: {some(keys)}')
        return '; '.join(parts)


def load_pretrained(
    backbone: nn.Module,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    *,
    prefix: str = '',
    strict: bool = True,
    trust_pickle: bool = False,
) -> LoadReport:
    """Loads weights into a backbone, all of them or none.

    The only parameters that may stay at their initial values are those that a classifier does not have (the norms of
    the stages; an isotropic model's pyramid), and those only where the weights are a classifier's. For images of other
    than three channels the weights of the stem are summed (one channel) or repeated and scaled, as timm does.

    Args:
        backbone: such as :class:`backbones.ConvNeXt`.
        checkpoint: a file, a folder with one, an ``https://`` address, a name of the catalogue, or a dictionary
            already read.
        prefix: take only the keys that begin so, without it (``'backbone.'`` for a trained detector).
        strict: raise where weights do not fit. Otherwise what fits is loaded, and report and log say what did not;
            names that belong to no known ConvNeXt, and weights of which nothing fits, are an error in any case.
        trust_pickle: see :func:`backbones.files.read_checkpoint`.

    Returns:
        What was loaded, missing, unexpected, misshapen, reshaped, adapted, and left out on purpose.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if keys or shapes do not fit, or values are not finite; the message lists them. The backbone is
            unchanged then.
    """
    if isinstance(checkpoint, Mapping):
        name, content = 'the given dictionary', checkpoint
    else:
        name = str(checkpoint)
        content = read_checkpoint(checkpoint, mmap=True, trust_pickle=trust_pickle)
    try:
        weights = with_prefix(state_dict_of(content), prefix)
        converted, source = convert_state_dict(weights)
    except ValueError as error:
        below = f' (behind the prefix {prefix!r})' if prefix else ''
        raise ValueError(f'checkpoint {name}{below}: {error}') from error

    report, fitting = _compare(converted, backbone, source)
    # A classifier has at most the last of these norms (OpenMMLab's files name it norm3), a detector has all.
    from_classifier = not any(re.match(_OF_A_DETECTOR, key) for key in converted)
    lacking = [
        key
        for key in report.missing
        if key not in converted and not (from_classifier and re.match(_NOT_IN_CLASSIFIERS, key))
    ]
    infinite = [key for key, value in fitting.items() if not torch.isfinite(value).all()]
    if infinite:
        raise ValueError(f'checkpoint {name} has values that are not finite: {some(infinite)}. Nothing was loaded.')
    if not fitting or (strict and (lacking or report.unexpected or report.misshapen)):
        raise ValueError(_refusal(name, backbone, report, lacking, converted))
    backbone.load_state_dict(fitting, strict=False)
    if not strict:
        print_log(f'{type(backbone).__name__} loaded as far as it fits from {name}: {report}', logger='current')
    return report


def _compare(
    converted: Mapping[str, Tensor | None], backbone: nn.Module, source: str
) -> tuple[LoadReport, dict[str, Tensor]]:
    """What becomes of each key, and the tensors that fit, in the shapes of the backbone."""
    own = backbone.state_dict()
    report = LoadReport(source)
    fitting: dict[str, Tensor] = {}
    for key, value in converted.items():
        if value is None or (key not in own and re.match(_NOT_IN_CLASSIFIERS, key)):  # norms of stages not emitted
            report.dropped.append(key)
            continue
        if key not in own:
            report.unexpected.append(key)
            continue
        if key in _STEMS and value.shape[1:2] == (3,) and own[key].shape[1] != 3:
            value = adapt_input_conv(own[key].shape[1], value)
            report.adapted.append(key)
        if value.is_floating_point() != own[key].is_floating_point():
            report.misshapen.append(f'{key} {value.dtype} for {own[key].dtype}')
            continue
        if not same_values(value, own[key]):
            report.misshapen.append(f'{key} {tuple(value.shape)} for {tuple(own[key].shape)}')
            continue
        if value.shape != own[key].shape:
            report.reshaped.append(key)
        fitting[key] = value.reshape(own[key].shape)
    report.loaded = list(fitting)
    report.missing = [key for key in own if key not in fitting]
    return report, fitting


@WEIGHT_INITIALIZERS.register_module()
class PretrainedBackbone:
    """Initializer for ``init_cfg``: :func:`load_pretrained`, with one line on what it loaded.

    Args:
        checkpoint: a file, a folder with one, an ``https://`` address, or a name of the catalogue such as
            ``'convnext_tiny.fb_in1k'``.
        prefix: take only the keys that begin so, such as ``'backbone.'``.
        map_location: accepted because mmengine's ``Pretrained`` has it; weights are read on the CPU.
        trust_pickle: see :func:`backbones.files.read_checkpoint`.
    """

    def __init__(
        self, checkpoint: str, prefix: str | None = None, map_location: Any = 'cpu', trust_pickle: bool = False
    ) -> None:
        self.checkpoint = checkpoint
        self.prefix = prefix or ''
        self.trust_pickle = trust_pickle

    def __call__(self, module: nn.Module) -> None:
        """Loads the weights into ``module``; raises on every rank if they do not fit."""
        report = load_pretrained(module, self.checkpoint, prefix=self.prefix, trust_pickle=self.trust_pickle)
        if hasattr(module, '_params_init_info'):  # mmengine's record of where each value comes from
            update_init_info(module, init_info=f'{type(self).__name__}: loaded from {self.checkpoint}')
        print_log(f'{type(module).__name__} initialized from {self.checkpoint}: {report}', logger='current')


def with_prefix(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with a prefix, without it; all of them where there is none.

    Raises:
        ValueError: if no name begins so.
    """
    if not prefix:
        return weights
    prefix = prefix.rstrip('.') + '.'
    part = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    if not part:
        raise ValueError(
            f'no key begins with the prefix {prefix!r}. The first keys are {some(weights)}; '
            'leave the prefix out for weights of a classifier or a whole detector.'
        )
    return part


def _refusal(
    name: str,
    backbone: nn.Module,
    report: LoadReport,
    lacking: list[str],
    converted: Mapping[str, Tensor | None],
) -> str:
    lines = [f'checkpoint {name} ({report.source} names) does not fit this {type(backbone).__name__}.']
    describe = getattr(backbone, 'describe_weights', None)
    if describe is not None:
        theirs = describe({key: value for key, value in converted.items() if value is not None})
        ours = describe(backbone.state_dict())
        if theirs != ours:
            lines.append(f'  The weights are of {theirs}; the model is {ours}.')
    for what, keys in (
        ('of another shape (file, model)', report.misshapen),
        ('missing in the file', lacking),
        ('unknown to the model', report.unexpected),
    ):
        if keys:
            lines.append(f'  {len(keys)} {what}: {some(keys)}')
    lines.append(
        'Nothing was loaded. Give the arch, use_grn, layer scale, kernel size and image channels of these weights, '
        'or other weights.'
    )
    return '\n'.join(lines)
