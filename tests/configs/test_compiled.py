"""Under a compiled mmcv every recipe builds on mmcv's own ops, which densekit.ops leaves alone.

Under mmcv-lite the same recipes are built by test_configs.py, on its substitutes.
"""

import importlib.machinery

import densekit.ops

# isort: split
import mmcv
import pytest
from recipes import CONFIGS, RECIPES, recipe

from densekit.report.meta import build_on_meta

# Python's own search of mmcv's folder, which knows nothing of the substitutes.
COMPILED = importlib.machinery.PathFinder.find_spec('mmcv._ext', mmcv.__path__)

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(COMPILED is None, reason='needs a compiled mmcv; this one has no mmcv._ext of its own'),
]


def test_the_compiled_module_is_in_use():
    from mmcv.ops.nms import ext_module

    assert ext_module.__file__ == COMPILED.origin
    assert not [name for name, op in densekit.ops.SUBSTITUTES.items() if getattr(ext_module, name, None) is op]


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.relative_to(CONFIGS).with_suffix('').as_posix())
def test_recipe_builds(path):
    assert list(build_on_meta(recipe(path)).parameters())
