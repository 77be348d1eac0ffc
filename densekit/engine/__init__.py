"""What a run needs around a model; importing this registers the runner and the optimizer wrapper."""

from densekit.engine.amp import AutocastOptimWrapper as AutocastOptimWrapper
from densekit.engine.runner import DensekitRunner as DensekitRunner
