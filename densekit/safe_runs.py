"""densekit's runs for any MMDetection or MMSegmentation config, under the projects' own tools as well.

    custom_imports = dict(imports=['densekit.safe_runs'])

in a config is all: importing this makes mmengine's ``Runner.from_cfg`` build a
:class:`~densekit.engine.runner.DensekitRunner` (mmdet 3.3.0 tools/train.py and tools/test.py call it). A config that
names a ``runner_type`` of its own keeps it. mmengine has no setting that an import could change, so this is a patch.
"""

from typing import Any

from mmengine.runner import Runner

import densekit.data  # noqa: F401  classes by name in mmdet's COCO data sets as well
from densekit.engine.runner import DensekitRunner

_from_cfg = Runner.from_cfg.__func__


def _safe_from_cfg(cls: type[Runner], cfg: Any) -> Runner:
    return _from_cfg(DensekitRunner if cls is Runner else cls, cfg)


Runner.from_cfg = classmethod(_safe_from_cfg)
