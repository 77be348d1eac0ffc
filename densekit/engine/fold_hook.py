"""A test with the ConvNeXt blocks folded."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from backbones import folding
from densekit.engine.sharding import is_sharded


class FoldHook(Hook):
    """Puts a folded copy into the model's place while a test runs."""

    priority = 'LOWEST'  # after averaged weights have taken the model's place

    def before_test_epoch(self, runner: Any) -> None:
        """Folds a copy: other hooks hold on to the model itself."""
        self._model = runner.model
        runner.model = folding.fold(_unwrapped(runner.model))

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Puts the model back."""
        runner.model = self._model


def fold_for_test(runner: Any) -> None:
    """Has a runner test with folded blocks.

    Args:
        runner: prepared for a test.

    Raises:
        ValueError: if that cannot be, or would not be faster.
    """
    if is_sharded(runner.bare_model()):
        raise ValueError('--fold: a sharded model cannot be folded; test without sharding (sharding=None)')
    if getattr(runner.test_loop, 'fp16', False):
        raise ValueError('--fold: test_cfg.fp16 would lose the layer scales; give test_cfg.fp16=False')
    if reason := folding.why_not(_unwrapped(runner.model)):
        raise ValueError(f'--fold: this model cannot be folded: {reason}')
    if folding.runs_on_triton(_unwrapped(runner.model)):
        raise ValueError('--fold: folded blocks do without the Triton kernels that this model runs on; leave it out')
    runner.register_hook(FoldHook())


def _unwrapped(model: Any) -> Any:
    """The model without what distributes it; with what augments it."""
    while is_model_wrapper(model):
        model = model.module
    return model
