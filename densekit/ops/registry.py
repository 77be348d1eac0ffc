"""What is substituted, and what the substitutes share."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

SUBSTITUTES: dict[str, Callable[..., Any]] = {}


def substitute(function: Callable[..., Any]) -> Callable[..., Any]:
    """Take a function for the op of its name."""
    SUBSTITUTES[function.__name__] = function
    return function


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if any of the tensors has it, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def unsupported(what: str) -> NoReturn:
    """Raise NotImplementedError for what has no substitute, and say how to get it."""
    raise NotImplementedError(
        f'{what} needs a compiled mmcv. This mmcv has no compiled ops, and densekit.ops substitutes only '
        f'{", ".join(sorted(SUBSTITUTES))}. To compile mmcv, with torch already installed and a compiler at hand: '
        "pip uninstall mmcv-lite; pip install 'setuptools<82' wheel ninja; "
        'pip install --no-build-isolation mmcv==2.1.0'
    )
