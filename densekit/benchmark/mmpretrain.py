"""mmpretrain's ConvNeXt, which the stock recipes take; also where the package as a whole does not import."""

import functools
import importlib
import sys
import types
from importlib.util import find_spec
from pathlib import Path

from torch import nn

_PARENTS = ('mmpretrain', 'mmpretrain.models', 'mmpretrain.models.backbones', 'mmpretrain.models.utils')


@functools.cache
def convnext_class() -> type[nn.Module]:
    """The class, registered as ``mmpretrain.ConvNeXt`` where the import of mmpretrain succeeds.

    mmpretrain 1.2 asks for versions of transformers and mmcv that are long gone and may fail to import; the three files
    that its ConvNeXt needs do import by themselves.

    Raises:
        ImportError: if it is not installed, or these files fail too.
    """
    try:
        return importlib.import_module('mmpretrain.models.backbones.convnext').ConvNeXt
    except Exception as error:  # of old code on new packages: of any kind
        reason = error
    for module in [name for name in sys.modules if name.partition('.')[0] == 'mmpretrain']:
        del sys.modules[module]
    spec = find_spec('mmpretrain')
    if spec is None or not spec.submodule_search_locations:
        raise ImportError('mmpretrain is not installed')
    try:
        return _from_files(Path(next(iter(spec.submodule_search_locations))))
    except Exception as error:
        raise ImportError(
            f'mmpretrain does not import ({type(reason).__name__}: {reason}), nor its ConvNeXt'
        ) from error


def _from_files(root: Path) -> type[nn.Module]:
    for name in _PARENTS:
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split('.')[1:]))]
        sys.modules[name] = package
    norm = importlib.import_module('mmpretrain.models.utils.norm')
    vars(sys.modules['mmpretrain.models.utils']).update(GRN=norm.GRN, build_norm_layer=norm.build_norm_layer)
    return importlib.import_module('mmpretrain.models.backbones.convnext').ConvNeXt
