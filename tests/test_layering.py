"""Imports go one way: layers <- kernels <- convnext, zoo <- checkpoint, backbones <- densekit <- tools."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ('backbones', 'densekit', 'tools')
MODELS = ['backbones.convnext', 'backbones.isotropic', 'backbones.roadmap']

# What a module and those below it may not import.
FORBIDDEN = {
    'backbones': ['mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'densekit', 'tools', 'tests'],
    'backbones.layers': ['backbones'],
    'backbones.kernels': MODELS,
    'backbones.layer_decay': MODELS,
    'backbones.checkpoint': MODELS,
    'backbones.formats': ['backbones.checkpoint', *MODELS],
    'backbones.files': ['backbones.checkpoint', 'backbones.formats', *MODELS],
    'backbones.zoo': ['backbones.checkpoint', 'backbones.formats', 'backbones.files', *MODELS],
    'densekit': ['tools', 'tests'],
    'tools': ['tests'],
}

# What a module may import besides the standard library, where that is little.
ALLOWED = {
    'densekit': [],  # its __init__, which importing densekit.ops runs as well
    'densekit.ops': ['torch', 'torchvision', 'densekit.ops'],  # and the files of the package
    'backbones.zoo': [],
}


def covers(name, module):
    return module == name or module.startswith(f'{name}.')


def imports(source):
    """What a file imports, at its top or in a function; ``from a import b`` counts as ``a`` and ``a.b``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = '.' * node.level + (node.module or '')
            found.update([base, *(f'{base}.{alias.name}' for alias in node.names)])
    return found


def wrong_arrows(source, module):
    """The imports that a module may not have, relative ones among them; a package goes by its own name."""
    found = imports(source)
    wrong = {used for used in found if used.startswith('.')}
    if covers('backbones', module) and module != 'backbones':
        wrong.update(found & {'backbones'})  # a name from the package's front page may come from any file behind it
    for name, targets in FORBIDDEN.items():
        if covers(name, module):
            wrong.update(used for used in found for target in targets if covers(target, used))
    room = next((name for name in ALLOWED if module == name or (name != 'densekit' and covers(name, module))), None)
    if room is not None:
        allowed = [*ALLOWED[room], *sys.stdlib_module_names]
        wrong.update(used for used in found if not any(covers(name, used) for name in allowed))
    return sorted(wrong)


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob('*.py'))


@pytest.mark.parametrize('path', FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_imports_go_one_way(path):
    assert wrong_arrows(path.read_text(encoding='utf-8'), module_name(path)) == []


def test_the_rooms_are_looked_into():
    assert {'backbones', 'backbones.convnext', 'densekit', 'densekit.ops'} <= {module_name(path) for path in FILES}


@pytest.mark.parametrize(
    ('module', 'source', 'wrong'),
    [
        ('backbones.convnext', 'import mmcv', ['mmcv']),
        ('backbones.kernels.block', 'def f():\n    from mmdet.models import FPN', ['mmdet.models', 'mmdet.models.FPN']),
        ('backbones', 'import densekit.ops', ['densekit.ops']),
        ('backbones.layers', 'import torch, backbones.kernels', ['backbones.kernels']),
        (
            'backbones.kernels',
            'from backbones.convnext import ARCHS',
            ['backbones.convnext', 'backbones.convnext.ARCHS'],
        ),
        ('backbones.layer_decay', 'from backbones import ConvNeXt', ['backbones']),
        ('backbones.layer_decay', 'from backbones import convnext', ['backbones', 'backbones.convnext']),
        ('backbones.checkpoint', 'import backbones.convnext as c', ['backbones.convnext']),
        ('backbones.zoo', 'import backbones.checkpoint', ['backbones.checkpoint']),
        ('backbones.convnext', 'from .layers import GRN', ['.layers', '.layers.GRN']),
        ('densekit.engine.runner', 'from tools import train', ['tools', 'tools.train']),
        ('densekit.ops', 'import os\nimport torch\nimport numpy as np', ['numpy']),
        ('densekit', 'import torch', ['torch']),
    ],
)
def test_a_wrong_arrow_is_seen(module, source, wrong):
    assert wrong_arrows(source, module) == wrong


@pytest.mark.parametrize(
    ('module', 'source'),
    [
        ('backbones.convnext', 'import torch, timm\nfrom backbones.layers import GRN\nfrom backbones.kernels import f'),
        ('backbones.checkpoint', 'from backbones.zoo import find'),
        ('backbones', 'from backbones.convnext import ConvNeXt'),
        ('densekit.engine.runner', 'import mmdet\nfrom backbones import ConvNeXt'),
        ('densekit.ops', 'import sys\nfrom importlib.abc import Loader\nimport torchvision.ops'),
        ('tools.train', 'from densekit.engine.runner import DensekitRunner'),
    ],
)
def test_a_right_arrow_passes(module, source):
    assert wrong_arrows(source, module) == []
