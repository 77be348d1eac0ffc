"""Which batch of a recipe fits in a GPU's memory, with which options.

Held at the end of a forward pass, when it is most: parameters and buffers, gradients (which come as activations go),
the optimizer's state, and what autograd keeps for the backward pass. The last is counted in three small training steps:
a part that does not depend on the batch (weights cast by autocast), a part per image (RoIs) and a part per pixel.
Heads that look at 512 RoIs of an image look at as many of a small one. Counted on a CPU the rules are those of the
CPU's autocast; CUDA's keep the results of LayerNorm in float32, which is more.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from backbones import ConvNeXt
from densekit.benchmark.case import Images, free
from densekit.benchmark.steps import Step, StepCase
from densekit.benchmark.stock import class_of
from densekit.benchmark.timing import why
from densekit.engine.config import load_config
from densekit.engine.config_check import accepted_keys
from densekit.report.image_size import Size, training_size
from densekit.report.memory import gradient_bytes, state_bytes, weight_bytes
from densekit.report.tables import format_table

RESERVE = 0.1
"""Share of the memory that is not planned with: the CUDA context, workspaces, gradients on their way, fragments."""

_GIB = 2**30
_UNITS = {'': 1, 'b': 1, 'k': 1e3, 'kb': 1e3, 'kib': 2**10, 'm': 1e6, 'mb': 1e6, 'mib': 2**20, 'g': 1e9, 'gb': 1e9}
_UNITS |= {'gib': 2**30, 't': 1e12, 'tb': 1e12, 'tib': 2**40}
_SIDES = (256, 384)  # of the small steps
_CHECKPOINTS = 'model.backbone.with_cp'

Checkpoints = bool | tuple[int, ...] | None
"""Of which stages blocks are computed anew in the backward pass: all, none, or these; None if there is no choice."""
_STAGES: tuple[Checkpoints, ...] = (False, (0,), (0, 1), True)
"""A block of an early stage keeps the most, and to compute it anew costs about what it costs in a late one."""


@dataclass(frozen=True)
class Need:
    """What training needs, in bytes.

    Attributes:
        dtype: 'bf16' or 'fp32'.
        with_cp: of which stages of the backbone blocks are computed anew in the backward pass.
        fixed: of parameters, gradients and optimizer.
        kept: by autograd, that does not depend on the batch.
        per_image: by autograd for an image of the size asked for.
    """

    dtype: str
    with_cp: Checkpoints
    fixed: int
    kept: float
    per_image: float

    def of_batch(self, number: int) -> float:
        """Bytes for so many images."""
        return self.fixed + self.kept + number * self.per_image

    def largest_batch(self, memory: float) -> int:
        """Images that fit; 0 if not even one does."""
        return max(0, int((memory * (1 - RESERVE) - self.fixed - self.kept) // self.per_image))


def parse_size(text: str) -> float:
    """Reads ``24GiB`` as bytes.

    Raises:
        ValueError: if it is no size.
    """
    match = re.fullmatch(r'([\d.]+)\s*([a-z]*)', text.strip().lower())
    try:
        size = float(match[1]) * _UNITS[match[2]]  # type: ignore[index]
    except (TypeError, ValueError, KeyError):
        raise ValueError(f'--fit {text}: give a size such as 24GiB or 16000MB') from None
    if size < 2**20:
        raise ValueError(f'--fit {text} is {size:g} bytes; give a size such as 24GiB')
    return size


def plan(config: str, size: Size | None, device: torch.device, options: Sequence[str] = ()) -> list[Need]:
    """What each choice of precision and checkpointing needs.

    Args:
        config: path.
        size: height and width of training images; by default the largest that the config makes.
        device: that the small steps run on.
        options: ``key=value`` texts that change the config.

    Raises:
        ValueError: if the config does not say how large its images are.
    """
    cfg = load_config(config, options)
    size = size or image_size(cfg)
    choices = _choices(cfg)
    return [_need(config, size, dtype, with_cp, device, options) for dtype in ('bf16', 'fp32') for with_cp in choices]


def image_size(cfg: Config) -> Size:
    """Height and width of the largest training image.

    Raises:
        ValueError: if the config does not tell.
    """
    size = training_size(cfg.train_dataloader.dataset, cfg.model.get('data_preprocessor'))
    if size is None:
        raise ValueError('the training pipeline sets no size of images; give one: --images 1x800x1333')
    return size


def report(config: str, memory: float, size: Size, needs: Sequence[Need]) -> str:
    """A table, and the options of the choice that trains fastest among those that fit.

    The precision of the recipe's paper comes first, then little checkpointing, which repeats the forward pass.
    """
    rows = []
    for need in needs:
        batch = need.largest_batch(memory)
        cells = [f'{need.fixed / _GIB:.2f}', f'{need.kept / _GIB:.2f}', f'{need.per_image / _GIB:.2f}']
        total = f'{need.of_batch(batch) / _GIB:.1f}' if batch else '-'
        rows.append([need.dtype, _stages(need.with_cp), *cells, str(batch), total])
    header = ['precision', 'with_cp', 'weights GiB', '+ kept GiB', '+ per image GiB', 'images', 'in all GiB']
    lines = [
        f'{config}, images of {size[0]} x {size[1]}, {memory / _GIB:.3g} GiB, {100 * RESERVE:.0f} % of it left free:',
        format_table(header, rows, align='<<>>>>>'),
    ]
    fitting = [need for need in needs if need.largest_batch(memory)]
    if not fitting:
        lines.append('Not one image fits. Shard the model over several GPUs (--shard), or train on smaller images.')
    for need in fitting:
        amp = 'bf16' if need.dtype == 'bf16' else 'off'
        given = f'train_dataloader.batch_size={need.largest_batch(memory)}'
        if need.with_cp is not None:
            given += f' "{_CHECKPOINTS}={_stages(need.with_cp)}"'
        lines.append(f'python tools/train.py {config} --amp {amp} --cfg-options {given}')
    return '\n\n'.join(lines[:2]) + '\n\n' + '\n'.join(lines[2:])


def verify(
    config: str, need: Need, memory: float, size: Size, device: torch.device, options: Sequence[str] = ()
) -> str:
    """Takes two training steps of the batch that is said to fit, and tells what they held at most.

    Args:
        config: path.
        need: the choice.
        memory: in bytes.
        size: height and width of the images.
        device: a CUDA GPU.
        options: ``key=value`` texts that change the config.
    """
    number = need.largest_batch(memory)
    name = f'{need.dtype}, with_cp={_stages(need.with_cp)}, {number} images'
    case = _case(config, (number, *size), need.dtype, need.with_cp, options)
    free(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        step = case.build(device)
        step()
        step()  # with the optimizer's state
    except torch.OutOfMemoryError as error:
        return f'{name}: {why(error)}'
    found = torch.cuda.max_memory_allocated(device)
    return f'{name}: {found / _GIB:.1f} GiB at most, planned {need.of_batch(number) / _GIB:.1f}'


def kept_bytes(step: Step) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of a training step.

    What is kept several times counts once; parameters and buffers do not count.
    """
    known = {StorageWeakRef(t.untyped_storage()) for t in [*step.model.parameters(), *step.model.buffers()]}
    kept: dict[StorageWeakRef, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        reference = StorageWeakRef(tensor.untyped_storage())
        if reference not in known:
            kept[reference] = tensor.untyped_storage().nbytes()
        return tensor

    found: list[int] = []

    def count() -> None:
        found.append(sum(size for reference, size in kept.items() if not reference.expired()))

    with _instead_of_backward(step, count), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return found[0]


@contextmanager
def _instead_of_backward(step: Step, action: Any) -> Iterator[None]:
    """Within this context a training step does something else where it would go backward and update."""
    wrapper: Any = step.wrapper
    wrapper.update_params = lambda loss, *args, **kwargs: action()
    try:
        yield
    finally:
        del wrapper.update_params


def _need(
    config: str, size: Size, dtype: str, with_cp: Checkpoints, device: torch.device, options: Sequence[str]
) -> Need:
    small, large = _SIDES
    points: list[Images] = [(2, small, small), (2, large, large), (3, small, small)]  # batch norms need two values
    kept = []
    for images in points:
        step = _case(config, images, dtype, with_cp, options).build(device)
        kept.append(kept_bytes(step))
    assert step.wrapper is not None
    fixed = weight_bytes(step.model) + gradient_bytes(step.model) + state_bytes(step.wrapper.optimizer)
    per_pixel = (kept[1] - kept[0]) / 2 / (large**2 - small**2)
    per_small_image = kept[2] - kept[0]
    once = kept[0] - 2 * per_small_image
    return Need(dtype, with_cp, fixed, max(0, once), per_small_image + per_pixel * (size[0] * size[1] - small**2))


def _case(config: str, images: Images, dtype: str, with_cp: Checkpoints, options: Sequence[str]) -> StepCase:
    changed = [*options, *([] if with_cp is None else [f'{_CHECKPOINTS}={_stages(with_cp)}'])]
    return StepCase(config, images, dtype, True, options=tuple(changed))


def _stages(with_cp: Checkpoints) -> str:
    """As an option has it: ``True``, ``[0,1]``."""
    return f'[{",".join(map(str, with_cp))}]' if isinstance(with_cp, tuple) else str(with_cp)


def _choices(cfg: Config) -> tuple[Checkpoints, ...]:
    """What a backbone takes as ``with_cp``; stages only ours does."""
    cls = class_of(cfg.model.backbone.type, cfg.get('default_scope', 'mmengine'), (MODELS,))
    if cls is not None and issubclass(cls, ConvNeXt):
        return _STAGES
    return (False, True) if cls is not None and 'with_cp' in accepted_keys(cls)[0] else (None,)
