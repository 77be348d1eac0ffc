"""What a run needs around a model; importing it registers runner, loops, hooks, optimizer wrapper, safe readers."""

from densekit.engine import safe_files as safe_files
from densekit.engine.amp import AutocastOptimWrapper as AutocastOptimWrapper
from densekit.engine.runner import DensekitRunner as DensekitRunner
