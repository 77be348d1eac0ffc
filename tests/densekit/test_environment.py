import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from densekit import doctor, environment
from densekit.environment import driver_in, origin, try_imports

NAMES = [
    *('Python', 'densekit', 'backbones', 'setuptools', 'torch', 'torchvision', 'CUDA', 'timm', 'pycocotools'),
    *('OpenCV', 'onedl forks', 'mmengine', 'mmcv', 'mmcv.ops', 'mmdet', 'ftfy', 'regex', 'mmseg'),
]


def run(*args, cwd, **env):
    """The doctor as a user starts it, from a folder that is not the checkout."""
    environ = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | env
    command = [sys.executable, '-m', 'densekit.doctor', *args]
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, check=False)


def stubs(folder, **sources):
    folder.mkdir()
    for name, source in sources.items():
        (folder / f'{name}.py').write_text(source)
    return str(folder)


@pytest.mark.parametrize(
    ('text', 'version'),
    [
        ('NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\n', '535.129.03'),
        ('NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build  (me)\n', '580.82.07'),
        ('something else', ''),
    ],
)
def test_driver_in_the_words_of_the_kernel(text, version):
    assert driver_in(text) == version


def test_imports_survive_whatever_a_package_does(tmp_path, monkeypatch):
    path = stubs(
        tmp_path / 'stubs',
        chatty="print('no end of line', end='')\n__version__ = '1.2'",
        aborts='import os\nos.abort()',
        exits='raise SystemExit(3)',
        vanishes='import os\nos._exit(5)',
        hangs='import time\ntime.sleep(600)',
        raises="raise RuntimeError('first line\\nsecond line')",
    )
    monkeypatch.setenv('PYTHONPATH', path)
    monkeypatch.setattr(environment, 'IMPORT_LIMIT', 3)
    told = try_imports(['chatty', 'aborts', 'exits', 'vanishes', 'hangs', 'raises', 'nowhere', 'json'])
    assert told['chatty'] == {'version': '1.2'}
    assert told['aborts'] == {'error': f'its import ended Python with {signal.SIGABRT.name}'}
    assert told['exits'] == {'error': 'SystemExit: 3'}
    assert told['vanishes'] == {'error': 'its import ended Python with status 5'}
    assert told['hangs'] == {'error': 'its import did not end within 3 s'}
    assert told['raises'] == {'error': 'RuntimeError: first line'}
    assert told['nowhere'] == {'error': "ModuleNotFoundError: No module named 'nowhere'"}
    assert 'error' not in told['json']


def test_origin_tells_a_package_from_a_folder_and_from_nothing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'bare_folder').mkdir()
    (tmp_path / 'package').mkdir()
    (tmp_path / 'package' / '__init__.py').touch()
    assert origin('bare_folder') == str(tmp_path / 'bare_folder')
    assert origin('package') == str(tmp_path / 'package' / '__init__.py')
    assert origin('neither') == ''


@pytest.mark.parametrize('module', [doctor, environment])
def test_only_the_standard_library_is_imported(module):
    names = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split('.')[0])
    assert names <= {*sys.stdlib_module_names, 'densekit'}


def test_this_environment_fits(tmp_path):
    done = run(cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [name for name in NAMES if f'\n{name} ' not in done.stdout] == []
    assert done.stdout.endswith('\nAll 18 checks passed.\n')
    assert done.stderr == ''


def test_a_ruined_environment_still_gets_its_table(tmp_path):
    ruined = dict.fromkeys(('mmengine', 'mmcv', 'mmdet', 'mmseg', 'timm'), "raise RuntimeError('ruined')")
    path = stubs(tmp_path / 'stubs', torch='import os\nos.abort()', cv2="raise ImportError('libGL.so.1')", **ruined)
    (tmp_path / 'backbones').mkdir()
    (tmp_path / 'backbones' / '__init__.py').touch()
    done = run('--json', cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 1
    rows = {row['name']: row for row in json.loads(done.stdout)}
    assert list(rows) == NAMES
    bad = {name for name, row in rows.items() if row['status'] != 'ok'}
    assert bad >= {'backbones', 'torch', 'OpenCV', 'mmengine', 'mmcv', 'mmcv.ops', 'mmdet', 'mmseg', 'timm'}
    assert 'SIGABRT' in rows['torch']['note']
    assert 'ruined' in rows['mmengine']['note']
    assert f'{tmp_path / "backbones"} hides ours' in rows['backbones']['note']
    assert all(row['fix'] for name, row in rows.items() if name in bad)
