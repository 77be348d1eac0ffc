"""The module that densekit.ops puts in the place of mmcv's compiled one: when it is found, and when it is not."""

import importlib.machinery
import importlib.util
import os
import subprocess
import sys

import densekit.ops  # mmcv.ops can be imported after it only

# isort: split
import mmcv
import pytest
import torch
from mmcv.ops import roi_pool
from mmcv.utils import collect_env
from mmcv.utils.ext_loader import check_ops_exist
from mmengine.utils.dl_utils import mmcv_full_available


def run_python(code, **environment):
    """Run the code in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_module_is_found():
    assert importlib.util.find_spec('mmcv._ext').origin == 'densekit.ops'
    assert check_ops_exist() and mmcv_full_available()
    assert mmcv._ext is sys.modules['mmcv._ext']
    assert mmcv._ext.nms.__module__ == 'densekit.ops.nms'


def test_a_missing_op_says_so_when_called():
    op = mmcv._ext.some_op_forward  # asking for it is no error
    message = r'some_op_forward.*roi_align_forward.*setuptools<82.*--no-build-isolation mmcv==2\.1\.0'
    with pytest.raises(NotImplementedError, match=message):
        op(1, key=2)
    with pytest.raises(NotImplementedError, match='roi_pool_forward'):
        roi_pool(torch.rand(1, 1, 5, 5), torch.tensor([[0.0, 1, 1, 4, 4]]), 2)
    with pytest.raises(AttributeError, match='__file__'):
        _ = mmcv._ext.__file__


def test_installing_twice_is_harmless():
    finders = list(sys.meta_path)
    importlib.reload(densekit.ops)
    assert sys.meta_path == finders


def test_environment_report():
    assert collect_env()['MMCV Compiler'] == 'n/a'


def test_import_is_light_and_needs_no_mmcv():
    code = (
        'import sys, densekit.ops\n'
        "names = {'mmcv', 'mmdet', 'mmengine', 'mmseg', 'timm', 'cv2', 'backbones'}\n"
        'print(sorted(names.intersection(sys.modules)))\n'
        "sys.modules['mmcv'] = None  # as if it were not installed\n"
        'try:\n'
        '    import mmcv._ext\n'
        'except ModuleNotFoundError:\n'
        "    print('absent')"
    )
    assert run_python(code) == '[]\nabsent\n'


def test_a_compiled_mmcv_is_left_alone(tmp_path):
    package = tmp_path / 'mmcv'
    package.mkdir()
    (package / '__init__.py').write_text('')
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    # A compiled module that cannot be loaded (built for another torch, say) is not papered over either.
    (package / f'_ext{suffix}').write_bytes(b'')
    code = (
        'import importlib.util, densekit.ops\n'
        "print(importlib.util.find_spec('mmcv._ext').origin)\n"
        'try:\n'
        '    import mmcv._ext\n'
        'except ImportError as error:\n'
        '    print(type(error).__name__)'
    )
    assert run_python(code, PYTHONPATH=str(tmp_path)).split('\n')[:2] == [str(package / f'_ext{suffix}'), 'ImportError']

    (package / f'_ext{suffix}').unlink()
    (package / '_ext.py').write_text("nms = 'the compiled one'")
    code = 'import densekit.ops, mmcv._ext; print(mmcv._ext.nms)'
    assert run_python(code, PYTHONPATH=str(tmp_path)) == 'the compiled one\n'


def test_every_model_module_imports():
    failures = run_python(
        'import importlib, pkgutil, densekit.ops\n'
        "for root in ('mmdet.models', 'mmseg.models'):\n"
        '    path = importlib.import_module(root).__path__\n'
        "    names = [m.name for m in pkgutil.walk_packages(path, root + '.', onerror=lambda name: None)]\n"
        '    assert len(names) > 100, names\n'
        '    for name in names:\n'
        '        try:\n'
        '            importlib.import_module(name)\n'
        '        except Exception as error:\n'
        '            print(name, repr(error))'
    )
    assert failures == ''


def test_without_the_substitutes_no_model_imports():
    # A negative control of the test above.
    code = 'try:\n    import mmdet.models\nexcept ModuleNotFoundError as error:\n    print(error)'
    assert run_python(code) == "No module named 'mmcv._ext'\n"
