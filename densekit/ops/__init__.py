"""mmcv's compiled ops on torchvision and plain PyTorch, for an mmcv without compiled ops.

mmcv-lite ships all of mmcv's Python, ``mmcv/ops/*.py`` included, and lacks only the compiled module ``mmcv._ext`` that
those files call. Importing this module supplies one. It goes through a finder at the end of ``sys.meta_path``: the
regular search comes first, so a compiled mmcv is found and used as if this module did not exist, and neither mmcv nor
its absence matters until somebody imports ``mmcv.ops``.

The substitutes keep the calling convention of mmcv 2.x, outputs allocated by the caller included. They compute in
float32 (in float64 for float64 inputs) and round the result to the caller's dtype, so fp16 and bf16 work in and outside
autocast. To add one, write a function with the name and the arguments of the compiled op, decorate it with
``@substitute``, and import its file here.

Three that models of mmdet can be configured to call have none: torchvision's RoIPool rounds the RoIs where mmcv's does
not, the gradient of mmcv's DeformRoIPool is not the derivative of its forward at the border of the map, and torchvision
has no RoIAlign with max pooling.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

from densekit.ops import (  # noqa: F401  each adds its substitutes
    carafe,
    deform_attn,
    deform_conv,
    focal_loss,
    masked_conv,
    nms,
    psa_mask,
    roi_align,
)
from densekit.ops.registry import SUBSTITUTES, substitute, unsupported

EXT_NAME = 'mmcv._ext'


@substitute
def get_compiler_version() -> str:
    """Return what ``mmcv.utils.collect_env`` prints where nothing was compiled."""
    return 'n/a'


@substitute
def get_compiling_cuda_version() -> str:
    """Return what ``mmcv.utils.collect_env`` prints where nothing was compiled."""
    return 'n/a'


def _missing(name: str) -> Callable[..., Any]:
    """Answer for every op without a substitute, since mmcv asks for the names of all its ops on import."""
    if name.startswith('__'):  # Python's own questions, such as __file__ or __path__
        raise AttributeError(f'module {EXT_NAME!r} has no attribute {name!r}')

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        unsupported(f"mmcv's op '{name}'")

    return refuse


class _ExtFinder(MetaPathFinder, Loader):
    """Finds and loads the module of substitutes under the name of mmcv's compiled module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(EXT_NAME, self, origin='densekit.ops') if fullname == EXT_NAME else None

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(SUBSTITUTES, __getattr__=_missing)


if not any(type(finder).__name__ == _ExtFinder.__name__ for finder in sys.meta_path):
    # Last, so that a compiled module is found before.
    sys.meta_path.append(_ExtFinder())
