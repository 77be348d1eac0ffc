import importlib.metadata
import json
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from densekit import doctor
from densekit.doctor import MMCV_RANGE, PACKAGES, Row, examine, fits, release, remedies, report
from densekit.environment import Facts

VERSIONS = {
    'setuptools': '81.0.0',
    'torch': '2.11.0',
    'torchvision': '0.26.0',
    'timm': '1.0.31',
    'pycocotools': '2.0.11',
    'opencv-python': '5.0.0.93',
    'mmengine': '0.10.7',
    'mmcv-lite': '2.1.0',
    'mmdet': '3.3.0',
    'mmsegmentation': '1.2.2',
    'ftfy': '6.3.1',
    'regex': '2026.11.15',
}
GOOD = Facts(
    python=(3, 11, 7),
    executable='/env/bin/python',
    root=Path('/home/me/densekit'),
    checkout=True,
    backbones='/home/me/densekit/backbones/__init__.py',
    versions=VERSIONS,
    imports={module: {'version': ''} for module in doctor.MODULES} | {'torch': {'cuda': '13.0', 'available': False}},
    torch_pin='2.11.0',
    mmcv_ext='',
    driver='',
    gpus_hidden=False,
)
EXT = '/env/mmcv/_ext.so'
OPENMMLAB = ('mmengine', 'mmcv-lite', 'mmdet', 'mmsegmentation')
FORKS = {
    'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6',
    'onedl-mmdetection': '3.5.1',
    'onedl-mmsegmentation': '1.4.2',
}


def facts(without=(), versions=None, errors=None, torch=None, **fields):
    """GOOD, with distributions taken out or put in, imports that fail, and other fields replaced."""
    installed = {k: v for k, v in GOOD.versions.items() if k not in without} | (versions or {})
    imports = GOOD.imports | {module: {'error': error} for module, error in (errors or {}).items()}
    if torch:
        imports['torch'] = torch
    return GOOD._replace(versions=installed, imports=imports, **fields)


def absent(*modules):
    return {module: f"ModuleNotFoundError: No module named '{module.split('.')[0]}'" for module in modules}


def bare(**fields):
    return GOOD._replace(versions={}, imports={m: {'error': e} for m, e in absent(*doctor.MODULES).items()}, **fields)


def failures(seen):
    return {row.name: row for row in examine(seen) if row.status != 'ok'}


FINE = {
    'as installed': facts(),
    'compiled mmcv': facts(['mmcv-lite'], {'mmcv': '2.1.0'}, mmcv_ext=EXT),
    'the forks alone': facts(OPENMMLAB, FORKS, mmcv_ext=EXT),
    'headless OpenCV': facts(['opencv-python'], {'opencv-python-headless': '5.0.0'}),
    'OpenCV without a record of pip': facts(['opencv-python']),
    'the lighter mmengine': facts(['mmengine'], {'mmengine-lite': '0.10.7'}),
    'a build of torch from another index': facts((), {'torch': '2.11.0+cpu', 'torchvision': '0.26.0+cpu'}),
    'torchvision that asks for any torch': facts(torch_pin=''),
    'damaged record': facts((), {'timm': 'unknown'}),
    'GPU in use': facts(driver='580.82', torch={'cuda': '13.0', 'available': True, 'gpus': 2}),
    'GPU hidden on purpose': facts(driver='580.82', gpus_hidden=True),
    'old driver, new libraries': facts(driver='535.129', torch={'cuda': '13.0', 'available': True, 'gpus': 1}),
}


@pytest.mark.parametrize('seen', FINE.values(), ids=FINE.keys())
def test_nothing_is_found_where_nothing_is_wrong(seen):
    rows = examine(seen)
    assert [row for row in rows if row.status != 'ok'] == []
    assert report(rows, 'python').endswith('\nAll 18 checks passed.')


LITE = "pip install 'mmcv-lite>=2.0,<2.2'"
# what is wrong: the facts; the one row that fails, its status, a part of its note, the command
WRONG = {
    'Python too old': (facts(python=(3, 9, 2)), ('Python', 'misfit', '3.10 to 3.13', 'python3.11 -m venv .venv')),
    'Python too new': (facts(python=(3, 14, 0)), ('Python', 'misfit', '3.10 to 3.13', 'python3.11 -m venv .venv')),
    'backbones of the user': (
        facts(backbones='/home/me/job one/backbones/__init__.py'),
        (
            'backbones',
            'misfit',
            '/home/me/job one/backbones hides ours',
            "mv '/home/me/job one/backbones' '/home/me/job one/my_backbones'",
        ),
    ),
    'backbones of the user, without __init__.py': (
        facts(backbones='/job/backbones'),
        ('backbones', 'misfit', '/job/backbones hides ours', 'mv /job/backbones /job/my_backbones'),
    ),
    'backbones gone': (
        facts(backbones=''),
        (
            'backbones',
            'misfit',
            'is not where it was installed',
            'pip install --force-reinstall --no-deps /home/me/densekit',
        ),
    ),
    'setuptools 82': (
        facts((), {'setuptools': '82.0.0'}, absent('pkg_resources')),
        ('setuptools', 'misfit', 'pkg_resources', "pip install 'setuptools<82'"),
    ),
    'torch too old': (
        facts((), {'torch': '2.5.1'}, torch_pin=''),
        ('torch', 'misfit', '>=2.6', "pip install 'torch>=2.6'"),
    ),
    'torchvision for another torch': (
        facts(torch_pin='2.10.0'),
        (
            'torchvision',
            'misfit',
            'made for torch 2.10.0, but torch is 2.11.0',
            'pip install torch==2.11.0 torchvision',
        ),
    ),
    'torchvision without its operators': (
        facts(errors={'torchvision': 'RuntimeError: operator torchvision::nms does not exist'}),
        ('torchvision', 'broken', 'torchvision::nms', 'pip install --force-reinstall --no-deps torchvision==0.26.0'),
    ),
    'driver too old for CUDA 13': (
        facts(driver='535.129.03'),
        (
            'CUDA',
            'misfit',
            'CUDA 13.0 needs driver 580',
            "pip uninstall -y torch torchvision && pip install 'torch==2.10.0' 'torchvision==0.25.0'",
        ),
    ),
    'driver too old for anything': (
        facts(driver='470.82'),
        ('CUDA', 'misfit', 'CUDA 13.0 needs driver 580', 'install NVIDIA driver 580 or newer'),
    ),
    'torch without CUDA on a GPU': (
        facts(driver='580.82', torch={'cuda': None, 'available': False}),
        ('CUDA', 'misfit', 'built without CUDA', 'pip uninstall -y torch torchvision && pip install torch torchvision'),
    ),
    'GPU out of reach': (
        facts(driver='580.82', torch={'cuda': '13.0', 'available': False, 'reason': 'CUDA unknown error'}),
        ('CUDA', 'misfit', 'CUDA unknown error', 'nvidia-smi  # if that fails: reboot; in a container: --gpus all'),
    ),
    'timm missing': (facts(['timm'], errors=absent('timm')), ('timm', 'missing', '', "pip install 'timm>=1.0.15'")),
    'pycocotools without numpy': (
        facts(errors={'pycocotools.mask': "ModuleNotFoundError: No module named 'numpy'"}),
        ('pycocotools', 'broken', 'numpy', "pip install 'pycocotools>=2.0.8'"),
    ),
    'OpenCV without libGL': (
        facts(errors={'cv2': 'ImportError: libGL.so.1: cannot open shared object file: No such file or directory'}),
        (
            'OpenCV',
            'broken',
            'libGL.so.1',
            'pip uninstall -y opencv-python && pip install opencv-python-headless'
            '  # or, as root: apt-get install -y libgl1 libglib2.0-0',
        ),
    ),
    'OpenCV with its files overwritten': (
        facts((), {'opencv-python-headless': '4.9.0'}, {'cv2': 'ImportError: recursion is detected'}),
        (
            'OpenCV',
            'broken',
            'recursion',
            'pip uninstall -y opencv-python opencv-python-headless && pip install opencv-python',
        ),
    ),
    'OpenCV missing': (
        facts(['opencv-python'], errors=absent('cv2')),
        ('OpenCV', 'missing', '', 'pip install opencv-python'),
    ),
    'a fork beside its original': (
        facts((), {'onedl-mmengine': '0.10.12'}),
        (
            'onedl forks',
            'misfit',
            'overwrite',
            "pip uninstall -y onedl-mmengine mmengine && pip install 'mmengine>=0.10.7,<0.12'",
        ),
    ),
    'the fork of mmcv beside mmcv-lite': (
        facts((), {'onedl-mmcv': '2.3.6'}, mmcv_ext=EXT),
        ('onedl forks', 'misfit', 'overwrite', f'pip uninstall -y onedl-mmcv mmcv-lite && {LITE}'),
    ),
    'mmengine too old': (
        facts((), {'mmengine': '0.9.1'}),
        ('mmengine', 'misfit', '>=0.10.7', "pip install 'mmengine>=0.10.7,<0.12'"),
    ),
    'mmcv missing': (facts(['mmcv-lite'], errors=absent('mmcv')), ('mmcv', 'missing', '', LITE)),
    'two mmcv': (
        facts((), {'mmcv': '2.1.0'}, mmcv_ext=EXT),
        ('mmcv', 'misfit', 'overwrite', f'pip uninstall -y mmcv-lite mmcv && {LITE}'),
    ),
    'mmcv 2.2': (
        facts((), {'mmcv-lite': '2.2.0'}),
        ('mmcv', 'misfit', 'refuse', f'pip uninstall -y mmcv-lite && {LITE}'),
    ),
    'the mmcv of the forks under the original mmdet': (
        facts(['mmcv-lite', 'mmsegmentation'], {'onedl-mmcv': '2.3.6', 'onedl-mmsegmentation': '1.4.2'}, mmcv_ext=EXT),
        ('mmcv', 'misfit', 'refuse', f'pip uninstall -y onedl-mmcv && {LITE}'),
    ),
    'mmcv 1': (
        facts(['mmcv-lite'], {'mmcv-full': '1.7.2'}, mmcv_ext=EXT),
        ('mmcv', 'misfit', 'needs >=2.0', f'pip uninstall -y mmcv-full && {LITE}'),
    ),
    'mmcv that was not compiled': (
        facts(['mmcv-lite'], {'mmcv': '2.1.0'}),
        ('mmcv', 'misfit', 'build failed', f'pip uninstall -y mmcv && {LITE}'),
    ),
    'mmcv compiled for another torch': (
        facts(['mmcv-lite'], {'mmcv': '2.1.0'}, {'mmcv.ops': 'ImportError: undefined symbol: _ZN3c10'}, mmcv_ext=EXT),
        ('mmcv.ops', 'broken', 'undefined symbol', f'pip uninstall -y mmcv && {LITE}'),
    ),
    'mmdet 2': (facts((), {'mmdet': '2.28.2'}), ('mmdet', 'misfit', '>=3.3', "pip install 'mmdet>=3.3,<4'")),
    'mmdet without one of its requirements': (
        facts(errors={'mmdet.models': "ModuleNotFoundError: No module named 'shapely'"}),
        ('mmdet', 'broken', 'shapely', "pip install 'mmdet>=3.3,<4'"),
    ),
    'mmseg that crashes': (
        facts(errors={'mmseg.models': 'its import ended Python with SIGSEGV'}),
        ('mmseg', 'broken', 'SIGSEGV', 'pip install --force-reinstall --no-deps mmsegmentation==1.2.2'),
    ),
    'regex missing': (facts(['regex'], errors=absent('regex')), ('regex', 'missing', 'mmseg', 'pip install regex')),
}


@pytest.mark.parametrize(('seen', 'expected'), WRONG.values(), ids=WRONG.keys())
def test_a_misfit_is_named_with_its_remedy(seen, expected):
    name, status, note, fix = expected
    found = failures(seen)
    assert list(found) == [name]
    assert (found[name].status, found[name].fix) == (status, fix)
    assert note in found[name].note
    assert remedies(examine(seen)) == [fix]


def test_what_fails_for_want_of_another_takes_the_remedy_of_that_one():
    needy = ('torchvision', 'timm', 'mmcv.ops', 'mmdet.models', 'mmseg.models')
    seen = facts(
        ['torch'], errors=absent('torch') | dict.fromkeys(needy, "ModuleNotFoundError: No module named 'torch'")
    )
    found = failures(seen)
    assert list(found) == ['torch', 'torchvision', 'timm', 'mmcv.ops', 'mmdet', 'mmseg']
    assert all('mend torch first' in row.note for name, row in found.items() if name != 'torch')
    assert remedies(examine(seen)) == ["pip install 'torch>=2.6'"]


def test_an_unasked_torch_leaves_the_gpu_open():
    found = failures(facts(errors={'torch': 'its import ended Python with SIGABRT'}, driver='580.82'))
    assert found['CUDA'].status == 'broken'
    assert found['CUDA'].fix == found['torch'].fix


def test_an_empty_environment_takes_one_command():
    assert remedies(examine(bare())) == ["pip install -e '/home/me/densekit[lite]'"]
    (command,) = remedies(examine(bare(checkout=False)))
    wanted = {package.distributions[0] for package in PACKAGES.values()} | {'mmcv-lite', 'opencv-python'}
    assert {Requirement(word.strip("'")).name for word in command.split()[2:]} == wanted


def test_the_extra_is_not_proposed_over_an_mmcv_that_is_there():
    seen = facts(
        ['mmcv-lite', 'mmdet', 'mmengine'], {'mmcv': '2.1.0'}, absent('mmengine', 'mmdet.models'), mmcv_ext=EXT
    )
    assert remedies(examine(seen)) == ["pip install 'mmengine>=0.10.7,<0.12' 'mmdet>=3.3,<4'"]


def test_remedies_follow_the_table_and_do_not_repeat():
    rows = [
        Row('a', '', 'misfit', fix='first'),
        Row('b', '', 'missing', fix='pip install b'),
        Row('c', '', 'ok', fix='never'),
        Row('d', '', 'broken', fix='first'),
        Row('e', '', 'missing', fix='pip install e'),
        Row('f', '', 'broken', fix='pip install b'),
    ]
    assert remedies(rows) == ['first', 'pip install b e']
    assert report(rows, '/env/bin/python').endswith('\n  1. first\n  2. pip install b e\n\n5 of 6 checks failed.')


@pytest.mark.parametrize('seen', [GOOD, bare(), *(case[0] for case in WRONG.values())])
def test_the_table_fits_120_columns(seen):
    lines = report(examine(seen), 'python').split('\n\n')[0].splitlines()
    assert max(map(len, lines)) <= 120


def test_a_new_python_has_a_pip_of_its_own():
    assert '`.venv/bin/python -m pip`' in report(examine(facts(python=(3, 9, 2))), '/usr/bin/python3')
    assert '`/env/bin/python -m pip`' in report(examine(facts(['timm'], errors=absent('timm'))), '/env/bin/python')


def test_json_holds_the_rows(monkeypatch, capsys):
    monkeypatch.setattr(doctor, 'gather', lambda modules, distributions: facts(torch_pin='2.10.0'))
    assert doctor.main(['--json']) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row['name'] for row in rows if row['status'] != 'ok'] == ['torchvision']
    assert set(rows[0]) == {'name', 'found', 'status', 'note', 'fix'}
    monkeypatch.setattr(doctor, 'gather', lambda modules, distributions: GOOD)
    assert doctor.main([]) == 0


@pytest.mark.parametrize(
    ('version', 'specifier', 'expected'),
    [
        ('2.6.0', '>=2.6', True),
        ('2.5.9', '>=2.6', False),
        ('2.11.0+cu130', '>=2.6', True),
        ('2.2.0', '>=2.0,<2.2', False),
        ('2.2.0rc1', '>=2.0,<2.2', False),
        ('2.1.10', '>=2.0,<2.2', True),
        ('1.7.2', '>=2.0,<2.2', False),
        ('10.0', '', True),
    ],
)
def test_ranges(version, specifier, expected):
    assert fits(version, specifier) is expected


def test_release():
    assert release('2.11.0+cu130') == (2, 11, 0)
    assert release('unknown') == ()


def test_ranges_are_those_of_setup_py():
    ours = {package.distributions[0]: package.specifier for package in PACKAGES.values()} | {'mmcv-lite': MMCV_RANGE}
    lines = map(Requirement, importlib.metadata.requires('densekit'))
    theirs = {line.name: line.specifier for line in lines if not line.marker or line.marker.evaluate({'extra': 'lite'})}
    # What others of the list stop without needs no row of its own: numpy; safetensors of timm, pillow of torchvision,
    # filelock of torch.
    for name in ('numpy', 'safetensors', 'pillow', 'filelock'):
        theirs.pop(name)
    assert {name: set(filter(None, specifier.split(','))) for name, specifier in ours.items()} == {
        name: {str(part) for part in specifier} for name, specifier in theirs.items()
    }


@pytest.mark.parametrize(('version', 'warned'), [('2.9.1', True), ('2.10.0', False), ('2.11.0', False)])
def test_an_older_torch_is_told_of_pickles(version, warned):
    (row,) = [row for row in examine(facts(versions={'torch': version}, torch_pin=version)) if row.name == 'torch']
    assert row.status == 'ok'
    assert ('DENSEKIT_TRUST_PICKLE=1' in row.note) == warned
