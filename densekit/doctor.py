"""Examine this machine and environment: one table, and for every misfit the command that mends it.

`python -m densekit.doctor [--json]` exits with status 1 when something does not fit. It uses the standard library
alone; `densekit.environment` looks at the rest from outside, so that nothing found broken can bring this down.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import textwrap
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Callable, NamedTuple  # noqa: UP035 - an old Python must get far enough to be told that it is

from densekit import __version__
from densekit.environment import Facts, gather


class Package(NamedTuple):
    """What to import, the range to be in (as in setup.py), the distributions that may bring it, what it is for."""

    module: str
    specifier: str
    distributions: tuple[str, ...]
    why: str = ''


PACKAGES = {
    'setuptools': Package('pkg_resources', '<82', ('setuptools',), 'mmengine uses pkg_resources, gone from 82 on'),
    'torch': Package('torch', '>=2.6', ('torch',)),
    'torchvision': Package('torchvision', '>=0.21', ('torchvision',)),
    'timm': Package('timm', '>=1.0.15', ('timm',)),
    'pycocotools': Package('pycocotools.mask', '>=2.0.8', ('pycocotools',)),
    'mmengine': Package('mmengine', '>=0.10.7,<0.12', ('mmengine', 'mmengine-lite', 'onedl-mmengine')),
    'mmdet': Package('mmdet.models', '>=3.3,<4', ('mmdet', 'onedl-mmdetection')),
    'ftfy': Package('ftfy', '', ('ftfy',), 'mmseg imports it without requiring it'),
    'regex': Package('regex', '', ('regex',), 'mmseg imports it without requiring it'),
    'mmseg': Package('mmseg.models', '>=1.2.2,<2', ('mmsegmentation', 'onedl-mmsegmentation')),
}
MMCV = ('mmcv-lite', 'mmcv', 'mmcv-full', 'onedl-mmcv')
MMCV_RANGE = '>=2.0,<2.2'
OPENCV = ('opencv-python', 'opencv-python-headless', 'opencv-contrib-python', 'opencv-contrib-python-headless')
# The maintained forks install the files of the originals under other names, which pip cannot see.
FORKS = {
    'onedl-mmengine': ('mmengine', 'mmengine-lite'),
    'onedl-mmcv': ('mmcv-lite', 'mmcv', 'mmcv-full'),
    'onedl-mmdetection': ('mmdet',),
    'onedl-mmsegmentation': ('mmsegmentation',),
}
MODULES = ('cv2', *(p.module for p in PACKAGES.values()), 'mmcv', 'mmcv.ops')

# A failed import is put down to the first of these rows that failed itself.
BASIS = ('torch', 'torchvision', 'OpenCV', 'onedl forks', 'mmengine', 'mmcv')
NEEDS = {
    'torchvision': BASIS[:1],
    'CUDA': BASIS[:1],
    'timm': BASIS[:2],
    'mmengine': BASIS[:4],
    'mmcv': BASIS[:5],
    'mmcv.ops': BASIS,
    'mmdet': (*BASIS, 'mmcv.ops', 'pycocotools'),
    'mmseg': (*BASIS, 'mmcv.ops', 'ftfy', 'regex'),
}
# CUDA's major version -> the oldest driver that runs it (NVIDIA, CUDA Compatibility, minor version compatibility).
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
CUDA_12_PAIR = "'torch==2.10.0' 'torchvision==0.25.0'"  # the newest whose default wheels are CUDA 12


class Row(NamedTuple):
    """One line of the table; `status` is ok, missing, misfit, or broken (installed, but its import fails)."""

    name: str
    found: str
    status: str = 'ok'
    note: str = ''
    fix: str = ''


def release(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: '2.11.0+cu130' gives (2, 11, 0)."""
    match = re.match(r'\d+(\.\d+)*', version)
    return tuple(int(part) for part in match[0].split('.')) if match else ()


def fits(version: str, specifier: str) -> bool:
    """Tell whether a version lies in a range written with '>=' and '<' alone; an unknown one is taken to."""
    if not release(version):
        return True
    bounds = [(part.lstrip('<>='), part.startswith('>=')) for part in specifier.split(',') if part]
    return all((release(version) >= release(bound)) == lower for bound, lower in bounds)


def install(facts: Facts, requirement: str) -> str:
    """Return the command for a missing package, or for all of them where nothing of OpenMMLab is there yet."""
    # Never [lite] beside an mmcv that is there: it would overwrite a compiled one.
    if facts.checkout and not set(facts.versions).intersection(chain(FORKS, *FORKS.values())):
        return f'pip install -e {shlex.quote(f"{facts.root}[lite]")}'
    return f'pip install {shlex.quote(requirement)}'


def only_lite(facts: Facts) -> str:
    """Return the command that leaves mmcv-lite as the one mmcv."""
    there = [name for name in MMCV if name in facts.versions]
    remove = f'pip uninstall -y {" ".join(there)} && ' if there else ''
    return f"{remove}pip install 'mmcv-lite{MMCV_RANGE}'"


def check_python(facts: Facts) -> Row:
    """3.14 dropped pkgutil.find_loader, which mmengine 0.10 calls when it builds an optimizer."""
    found = '.'.join(map(str, facts.python))
    if (3, 10) <= facts.python < (3, 14):
        return Row('Python', found, note=facts.executable)
    note = 'needs 3.10 to 3.13: make a new environment and install there'
    return Row('Python', found, 'misfit', note, 'python3.11 -m venv .venv')


def check_densekit(facts: Facts) -> Row:
    """Say which densekit this is."""
    return Row('densekit', __version__, note=str(facts.root / 'densekit'))


def check_backbones(facts: Facts) -> Row:
    """A folder of that name in the working folder or on PYTHONPATH hides ours."""
    ours = facts.root / 'backbones' / '__init__.py'
    if not facts.backbones:
        source = shlex.quote(f'{facts.root}') if facts.checkout else '<the wheel or checkout of densekit>'
        fix = f'pip install --force-reinstall --no-deps {source}'
        return Row('backbones', 'not found', 'misfit', f'{ours} is not where it was installed', fix)
    path = Path(facts.backbones)
    if path.resolve() == ours.resolve():
        return Row('backbones', 'ours', note=str(path))
    other = path.parent if path.name == '__init__.py' else path
    fix = f'mv {shlex.quote(str(other))} {shlex.quote(str(other.with_name("my_" + other.name)))}'
    return Row('backbones', 'not ours', 'misfit', f'{other} hides ours: rename it, or run from another folder', fix)


def check_package(facts: Facts, name: str) -> Row:
    """Check that a package is installed, in its range, and can be imported."""
    module, specifier, distributions, why = PACKAGES[name]
    told = facts.imports[module]
    installed = [d for d in distributions if d in facts.versions]
    if not installed and 'error' in told:
        return Row(name, 'not installed', 'missing', why, install(facts, distributions[0] + specifier))
    distribution = installed[0] if installed else distributions[0]
    version = facts.versions.get(distribution) or told['version']
    found = version if distribution == distributions[0] else f'{distribution} {version}'
    wanted = f'pip install {shlex.quote(distribution + specifier)}'
    if not fits(version, specifier):
        return Row(name, found, 'misfit', f'needs {specifier}' + (f': {why}' if why else ''), wanted)
    if 'error' not in told:
        return Row(name, found, note='with pkg_resources' if module == 'pkg_resources' else '')
    # Another module is absent: pip, asked for a package that is there, installs what that one still requires.
    absent = re.search(r"No module named '(\w+)", told['error'])
    if absent and absent[1] != module.split('.')[0]:
        return Row(name, found, 'broken', told['error'], wanted)
    anew = f'pip install --force-reinstall --no-deps {distribution}=={version.split("+")[0]}'
    return Row(name, found, 'broken', told['error'], anew)


def check_torch(facts: Facts) -> Row:
    """Before 2.10 a pickle can corrupt memory even under weights_only=True (CVE-2026-24747)."""
    row = check_package(facts, 'torch')
    version = facts.versions.get('torch', '')
    if row.status != 'ok' or not version or fits(version, '>=2.10'):
        return row
    return row._replace(note='.pth files need DENSEKIT_TRUST_PICKLE=1 below 2.10; .safetensors do not')


def check_torchvision(facts: Facts) -> Row:
    """Every torchvision is compiled for one torch; its metadata says which."""
    row = check_package(facts, 'torchvision')
    torch = facts.versions.get('torch', '').split('+')[0]
    if row.status == 'missing' or not facts.torch_pin or not torch:
        return row
    if release(facts.torch_pin) == release(torch):
        return row._replace(note=row.note or f'made for torch {facts.torch_pin}')
    note = f'made for torch {facts.torch_pin}, but torch is {torch}'
    return Row('torchvision', row.found, 'misfit', note, f'pip install torch=={torch} torchvision')


def check_cuda(facts: Facts) -> Row:
    """Compare the CUDA that torch was built with to what the driver can run."""
    torch, driver = facts.imports['torch'], facts.driver
    runtime = torch.get('cuda') or ''
    found = ', '.join([runtime or 'no runtime', f'driver {driver}' if driver else 'no driver'])
    if torch.get('available'):
        return Row('CUDA', found, note=f'{torch["gpus"]} GPU(s)')
    if not driver:
        return Row('CUDA', found, note='no GPU: everything runs on the CPU')
    if 'error' in torch:
        return Row('CUDA', found, 'broken', 'torch cannot be asked')
    if facts.gpus_hidden:
        return Row('CUDA', found, note='CUDA_VISIBLE_DEVICES hides the GPU: everything runs on the CPU')
    major, oldest = release(driver)[0], OLDEST_DRIVER.get((*release(runtime), 0)[0], 0)
    if runtime and major >= oldest:
        note = f'torch finds no GPU: {torch.get("reason") or "no reason given"}'
        return Row('CUDA', found, 'misfit', note, 'nvidia-smi  # if that fails: reboot; in a container: --gpus all')
    note = (
        f'CUDA {runtime} needs driver {oldest} or newer' if runtime else 'a GPU, but this torch is built without CUDA'
    )
    if major < OLDEST_DRIVER[12]:
        return Row('CUDA', found, 'misfit', note, f'install NVIDIA driver {OLDEST_DRIVER[13]} or newer')
    pair = 'torch torchvision' if major >= OLDEST_DRIVER[13] else CUDA_12_PAIR
    return Row('CUDA', found, 'misfit', note, f'pip uninstall -y torch torchvision && pip install {pair}')


def check_opencv(facts: Facts) -> Row:
    """Slim containers lack the libraries of the desktop that OpenCV is linked with."""
    installed = [d for d in OPENCV if d in facts.versions]
    error = facts.imports['cv2'].get('error', '')
    if not installed and error:
        return Row('OpenCV', 'not installed', 'missing', '', install(facts, 'opencv-python'))
    version = facts.imports['cv2'].get('version', '')
    found = ', '.join(f'{d} {facts.versions[d]}' for d in installed) or version
    if not error:
        return Row('OpenCV', found, note='its system libraries are there')
    remove = f'pip uninstall -y {" ".join(installed)}'
    if 'cannot open shared object' in error:
        fix = f'{remove} && pip install opencv-python-headless  # or, as root: apt-get install -y libgl1 libglib2.0-0'
        return Row('OpenCV', found, 'broken', error, fix)
    return Row('OpenCV', found, 'broken', error, f'{remove} && pip install {installed[0]}')


def check_forks(facts: Facts) -> Row:
    """A fork alone is fine; a fork and its original have overwritten each other's files."""
    forks = [f for f in FORKS if f in facts.versions]
    clashes = {f: [o for o in FORKS[f] if o in facts.versions] for f in forks}
    both = [name for fork, originals in clashes.items() if originals for name in (fork, *originals)]
    if not both:
        return Row('onedl forks', ', '.join(forks) or 'none', note='' if forks else 'nothing beside the originals')
    wanted = {p.distributions[0]: p.specifier for p in PACKAGES.values()}
    wanted['mmcv-lite'] = MMCV_RANGE
    again = ' '.join(shlex.quote(FORKS[f][0] + wanted[FORKS[f][0]]) for f in forks if clashes[f])
    fix = f'pip uninstall -y {" ".join(both)} && pip install {again}'
    return Row('onedl forks', ' + '.join(both), 'misfit', "they overwrite each other's files", fix)


def check_mmcv(facts: Facts) -> Row:
    """One mmcv only, below 2.2, and compiled unless it is the lite one."""
    told = facts.imports['mmcv']
    installed = [d for d in MMCV if d in facts.versions]
    if not installed and 'error' in told:
        return Row('mmcv', 'not installed', 'missing', '', install(facts, 'mmcv-lite' + MMCV_RANGE))
    found = ' + '.join(f'{d} {facts.versions[d]}' for d in installed) or told['version']
    wrong = partial(Row, 'mmcv', found, 'misfit', fix=only_lite(facts))
    if len([d for d in installed if d not in FORKS]) > 1:
        return wrong("they overwrite each other's files: keep one")
    # The forks of mmdet and mmseg take any mmcv; the originals stop at import with 2.2.
    originals = {'mmdet', 'mmsegmentation'} & set(facts.versions)
    version = facts.versions[installed[0]] if installed else told['version']
    if not fits(version, MMCV_RANGE if originals or installed != ['onedl-mmcv'] else '>=2.0'):
        return wrong(f'needs {MMCV_RANGE}: mmdet 3.x and mmseg 1.x refuse others at import')
    if 'mmcv-lite' not in installed and not facts.mmcv_ext:
        return wrong('without its compiled module mmcv._ext: the build failed')
    if 'error' in told:
        return Row('mmcv', found, 'broken', told['error'], only_lite(facts))
    return Row('mmcv', found, note='compiled' if facts.mmcv_ext else 'lite, without compiled ops')


def check_mmcv_ops(facts: Facts) -> Row:
    """Say where NMS, RoIAlign and the like come from."""
    error = facts.imports['mmcv.ops'].get('error')
    source = 'compiled' if facts.mmcv_ext else 'densekit.ops'
    if not error:
        return Row('mmcv.ops', source, note=facts.mmcv_ext or 'on torchvision, put in place by `import densekit.ops`')
    return Row('mmcv.ops', source, 'broken', error, only_lite(facts))


CHECKS: list[Callable[[Facts], Row]] = [
    check_python,
    check_densekit,
    check_backbones,
    partial(check_package, name='setuptools'),
    check_torch,
    check_torchvision,
    check_cuda,
    partial(check_package, name='timm'),
    partial(check_package, name='pycocotools'),
    check_opencv,
    check_forks,
    partial(check_package, name='mmengine'),
    check_mmcv,
    check_mmcv_ops,
    partial(check_package, name='mmdet'),
    partial(check_package, name='ftfy'),
    partial(check_package, name='regex'),
    partial(check_package, name='mmseg'),
]


def examine(facts: Facts) -> list[Row]:
    """Run every check; what only fails because something under it does, takes that one's remedy."""
    rows: dict[str, Row] = {}
    for check in CHECKS:
        row = check(facts)
        roots = [rows[n] for n in NEEDS.get(row.name, ()) if rows[n].status != 'ok']
        if row.status == 'broken' and roots:
            row = row._replace(note=f'{row.note}; mend {roots[0].name} first', fix=roots[0].fix)
        rows[row.name] = row
    return list(rows.values())


def remedies(rows: list[Row]) -> list[str]:
    """List the commands in the order of the table, each once, and all that is missing in one."""
    missing = dict.fromkeys(row.fix for row in rows if row.status == 'missing')
    together = ' '.join(['pip install', *(fix.replace('pip install ', '', 1) for fix in missing)])
    return list(dict.fromkeys(together if row.fix in missing else row.fix for row in rows if row.status != 'ok'))


def table(rows: list[Row]) -> list[str]:
    """Lay the rows out in columns, 120 wide; long cells go on in the next line."""
    head = Row('check', 'found', 'status', 'note')
    name, status = (max(len(row[i]) for row in [head, *rows]) for i in (0, 2))
    found = min(30, max(len(row.found) for row in [head, *rows]))
    note = 120 - name - status - found - 6
    lines = []
    for row in [head, Row('-' * name, '-' * found, '-' * status, '-' * note), *rows]:
        cells = (fold(row.name, name), fold(row.status, status), fold(row.found, found), fold(row.note, note))
        for a, b, c, d in zip_longest(*cells, fillvalue=''):
            lines.append(f'{a:{name}}  {b:{status}}  {c:{found}}  {d}'.rstrip())
    return lines


def fold(text: str, width: int) -> list[str]:
    """Break a cell at spaces; a path stays whole, to be copied."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def report(rows: list[Row], executable: str) -> str:
    """Return the table, the remedies and the closing line as one text."""
    failed = sum(row.status != 'ok' for row in rows)
    if not failed:
        return '\n'.join([*table(rows), '', f'All {len(rows)} checks passed.'])
    steps = [f'  {number}. {fix}' for number, fix in enumerate(remedies(rows), 1)]
    python = executable if rows[0].status == 'ok' else '.venv/bin/python'  # the new one, where this one is of no use
    title = f'To mend, in this order (pip is `{python} -m pip`):'
    return '\n'.join([*table(rows), '', title, *steps, '', f'{failed} of {len(rows)} checks failed.'])


def main(argv: list[str] | None = None) -> int:
    """Print the table, or the rows as JSON; return 1 if anything does not fit, else 0."""
    parser = argparse.ArgumentParser('python -m densekit.doctor', description='Check what densekit runs on.')
    parser.add_argument('--json', action='store_true', help='print the rows as JSON')
    args = parser.parse_args(argv)
    packages = chain.from_iterable(package.distributions for package in PACKAGES.values())
    facts = gather(MODULES, [*packages, *MMCV, *OPENCV, *FORKS])
    rows = examine(facts)
    print(json.dumps([row._asdict() for row in rows], indent=2) if args.json else report(rows, facts.executable))
    return int(any(row.status != 'ok' for row in rows))


if __name__ == '__main__':
    sys.exit(main())
