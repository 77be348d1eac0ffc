import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGES = ('backbones', 'densekit')
# Neither the caller's path nor his pip settings, such as a target folder, may reach a fresh environment.
ENVIRON = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'PIP_', 'VIRTUAL_ENV'))}


def run(*command, **kwargs):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=ENVIRON, check=False, **kwargs)


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A copy to build from, so that the build leaves nothing in the tree; with neighbours that must stay out."""
    folder = tmp_path_factory.mktemp('source')
    for name in ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, folder)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('tests', 'tools', 'configs', 'benchmarks'):
        (folder / name).mkdir()
        (folder / name / '__init__.py').touch()
    return folder


@pytest.fixture(scope='module')
def wheel(source, tmp_path_factory):
    out = tmp_path_factory.mktemp('wheel')
    built = run(sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', out, cwd=source)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.iterdir()
    return path


def environment(folder, wheel):
    """Make an environment that holds the wheel and nothing else, and return its Python."""
    made = run(sys.executable, '-m', 'venv', '--without-pip', folder)
    assert made.returncode == 0, made.stderr
    python = folder / 'bin' / 'python'
    put = run(sys.executable, '-m', 'pip', '--python', python, 'install', '--no-deps', '--no-index', wheel)
    assert put.returncode == 0, put.stdout + put.stderr
    return python


@pytest.fixture(scope='module')
def bare(wheel, tmp_path_factory):
    return environment(tmp_path_factory.mktemp('bare'), wheel)


@pytest.fixture(scope='module')
def supplied(wheel, tmp_path_factory):
    """With the dependencies of the running environment behind it, whose editable densekit has no hook there."""
    folder = tmp_path_factory.mktemp('supplied')
    python = environment(folder, wheel)
    (site_packages,) = folder.glob('lib/python*/site-packages')
    (site_packages / 'dependencies.pth').write_text(sysconfig.get_path('purelib') + '\n')
    return python


@pytest.fixture(scope='module')
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith('.dist-info/METADATA'))
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_holds_the_two_packages_and_all_of_them(source, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if '.dist-info/' not in name}
    files = (path for package in PACKAGES for path in (source / package).rglob('*') if path.is_file())
    assert names == {path.relative_to(source).as_posix() for path in files}


def test_the_metadata_names_the_extras(metadata):
    assert set(metadata.get_all('Provides-Extra')) == {'lite', 'fast', 'dev', 'test'}
    required = [Requirement(line) for line in metadata.get_all('Requires-Dist')]
    plain = {requirement.name for requirement in required if not requirement.marker}
    assert plain == {'torch', 'torchvision', 'timm', 'numpy', 'pycocotools', 'safetensors', 'pillow', 'filelock'}


def test_every_requirement_has_a_pin_that_satisfies_it(metadata):
    lines = (ROOT / 'constraints.txt').read_text().splitlines()
    pins = dict(re.fullmatch(r'([\w.-]+)==(\S+)', line).groups() for line in lines if line and line[0] != '#')
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    required = [Requirement(line) for line in metadata.get_all('Requires-Dist')]
    assert {'torch', 'mmcv-lite', 'pytest'} <= {requirement.name for requirement in required}
    unmet = [str(r) for r in required if not r.specifier.contains(pins.get(canonicalize_name(r.name), '0'))]
    assert unmet == []


def test_without_dependencies_the_doctor_says_what_to_install(bare, tmp_path):
    done = run(bare, '-m', 'densekit.doctor', cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == ''
    assert re.search(r'^backbones +ok +ours ', done.stdout, re.MULTILINE)
    assert re.search(r'^torch +missing +not installed', done.stdout, re.MULTILINE)
    assert re.search(r"^  1\. pip install .*'torch>=2.6' .*'mmcv-lite>=2.0,<2.2'", done.stdout, re.MULTILINE)
    assert re.search(r'^\d+ of \d+ checks failed\.$', done.stdout, re.MULTILINE)


def test_without_dependencies_densekit_imports_and_backbones_says_what_is_missing(bare, tmp_path):
    assert run(bare, '-c', 'import densekit', cwd=tmp_path).returncode == 0
    done = run(bare, '-c', 'import backbones', cwd=tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('ImportError: ')
    assert 'pip install' in last


def test_with_dependencies_the_wheel_works_from_any_folder(supplied, tmp_path):
    code = 'import backbones, densekit.ops, mmcv.ops; print(backbones.__file__, backbones.ConvNeXt.__name__)'
    done = run(supplied, '-c', code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path, name = done.stdout.split()
    assert Path(path).is_relative_to(supplied.parent.parent)
    assert name == 'ConvNeXt'
    done = run(supplied, '-m', 'densekit.doctor', cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
