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

    bfloat16 has the range of float32, so there is no loss scaler and no check for overflow, which costs a
    synchronization per step. mmengine's AmpOptimWrapper refuses to run without a GPU; this one does not. Clipping
    gradients does not wait for their norm: it is logged after the step.

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

    def step(self, **kwargs: Any) -> None:
        """Clips the gradients if asked to, and steps."""
        norm = None
        if self.clip_grad_kwargs:
            params = [p for group in self.optimizer.param_groups for p in group['params'] if p.grad is not None]
            norm = self.clip_func(params, **self.clip_grad_kwargs) if params else None
        self.optimizer.step(**kwargs)
        if norm is not None:  # clipping by value has none
            self.message_hub.update_scalar(f'train/{self.grad_name}', float(norm))
