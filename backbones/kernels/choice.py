"""Which form of a block runs: the eager one, or the one made of Triton kernels.

``auto`` takes Triton only where its results were compared with float64 on a device of that kind; elsewhere it is
eager and says so once. ``triton`` insists, and is an error where that cannot be. ``eager`` is the reference.
"""

import functools
import importlib.util
import logging
import os

import torch

KERNELS = ('auto', 'eager', 'triton')

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

PROVEN: frozenset[tuple[tuple[int, int], torch.dtype]] = frozenset()
"""Compute capability and dtype where ``make test-gpu`` passed; ``auto`` takes Triton there and nowhere else."""

OLDEST = (8, 0)
"""Compute capability: Ampere, the first with bfloat16."""

OLDEST_TRITON = (3, 6)
"""That of torch 2.11, with which the kernels are tested; older ones are untried."""


def check_kernels(kernels: str) -> str:
    """Returns ``kernels`` if a model can be built with it.

    Raises:
        ValueError: if it is no member of ``KERNELS``, or 'triton' and there is no CUDA device.
    """
    if kernels not in KERNELS:
        raise ValueError(f'kernels={kernels!r} is unknown; choose from {", ".join(KERNELS)}')
    if kernels == 'triton' and not (torch.cuda.is_available() or interpreted()):
        raise ValueError("kernels='triton' needs a CUDA device, and there is none here; 'auto' works everywhere")
    return kernels


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU, which is slow and meant for tests."""
    return os.environ.get('TRITON_INTERPRET') == '1'


def why_not(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why Triton kernels cannot run there, in words; None if they can.

    Args:
        device: of the tensors.
        dtype: of the products.
    """
    device = torch.device(device)
    version = _triton_version()
    if version is None:
        return 'Triton is not installed'
    if version < OLDEST_TRITON:
        return f'Triton {_dotted(version)} is older than {_dotted(OLDEST_TRITON)}'
    if dtype not in DTYPES and not (dtype == torch.float64 and interpreted()):
        return f'there are none for {dtype}'
    if device.type == 'cpu' and interpreted():
        return None
    if device.type != 'cuda' or torch.version.hip is not None:
        return f'there are none for {"ROCm" if device.type == "cuda" else device.type}'
    if interpreted():
        return 'TRITON_INTERPRET=1 takes tensors on the CPU'
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f'{torch.cuda.get_device_name(device)} has compute capability {_dotted(capability)}, below 8.0'
    return None


def available(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether Triton kernels can run on that device with products of that dtype."""
    return why_not(device, dtype) is None


def is_proven(device: torch.device, dtype: torch.dtype | None = None) -> bool:
    """Whether 'auto' takes Triton there; unlike :func:`choose`, says nothing in the log.

    Args:
        device: of the tensors.
        dtype: of the products; None for any.
    """
    dtypes = [d for d in DTYPES if dtype in (None, d) and device.type == 'cuda' and why_not(device, d) is None]
    return any((torch.cuda.get_device_capability(device), d) in PROVEN for d in dtypes)


@torch.compiler.assume_constant_result
def choose(kernels: str, device: torch.device, dtype: torch.dtype) -> str:
    """Decides which form runs.

    Args:
        kernels: a member of ``KERNELS``, as :func:`check_kernels` returns it.
        device: of the tensors.
        dtype: of the products: that of the activations, or autocast's.

    Returns:
        'eager' or 'triton'.

    Raises:
        RuntimeError: if 'triton' is asked for where it cannot run.
    """
    return 'eager' if kernels == 'eager' else _decide(kernels, device, dtype, interpreted())


@functools.cache  # asked by every block
def _decide(kernels: str, device: torch.device, dtype: torch.dtype, interpreted: bool) -> str:
    reason = why_not(device, dtype)
    if kernels == 'triton':
        if reason is not None:
            raise RuntimeError(f"kernels='triton' cannot run here: {reason}. Give kernels='auto' or 'eager'")
        return 'triton'
    if device.type != 'cuda':
        return 'eager'
    if is_proven(device, dtype):
        return 'triton'
    if reason is None:
        capability = _dotted(torch.cuda.get_device_capability(device))
        reason = (
            f'they are not proven on compute capability {capability} with {dtype} yet; '
            "kernels='triton' takes them all the same"
        )
    say_once(f"ConvNeXt runs without Triton kernels (kernels='auto'): {reason}")
    return 'eager'


def _dotted(version: tuple[int, ...]) -> str:
    return '.'.join(map(str, version))


@functools.cache  # asked by every block
def _triton_version() -> tuple[int, ...] | None:
    if importlib.util.find_spec('triton') is None:
        return None
    import triton

    return tuple(map(int, triton.__version__.split('.')[:2]))


@torch.compiler.assume_constant_result
def say_once(line: str) -> None:
    """A line of the log, the first time."""
    _say(line)


@functools.cache
def _say(line: str) -> None:
    logging.getLogger(__name__).warning(line)
