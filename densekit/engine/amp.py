"""Mixed precision in bfloat16, on the CPU as well."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(OptimWrapper):
    """Runs the forward pass under bfloat16 autocast.

    bfloat16 has the range of float32, so there is no loss scaler. mmengine's AmpOptimWrapper refuses to run without a
    GPU; this one does not.

    Args:
        dtype: only 'bfloat16'; float16 needs the loss scaler of mmengine's AmpOptimWrapper.
        **kwargs: of mmengine's OptimWrapper.

    Raises:
        ValueError: if another dtype is asked for.
    """

    def __init__(self, dtype: str = 'bfloat16', **kwargs: Any) -> None:
        if dtype != 'bfloat16':
            raise ValueError(
                f"dtype={dtype!r}: AutocastOptimWrapper has no loss scaler and takes 'bfloat16' only. "
                "For float16 on a GPU use type='AmpOptimWrapper', dtype='float16'."
            )
        super().__init__(**kwargs)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """The context of the forward pass: autocast, and mmengine's own for gradient accumulation."""
        with super().optim_context(model), torch.autocast(get_device(), dtype=torch.bfloat16):
            yield
