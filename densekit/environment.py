"""What this machine and environment hold, seen without importing anything here; `densekit.doctor` judges it.

Packages are imported by child processes: `python -m densekit.environment MODULE...` imports one after another and
reports each on a line of its own. Whatever ends the child is the answer for the module it was at, and the next child
goes on behind that.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, Iterable, NamedTuple  # noqa: UP035 - an old Python must get far enough to be told that it is

IMPORT_LIMIT = 60  # seconds for one child; torch on a cold network disk takes long
MARK = '@densekit@'  # tells our lines from what a package prints while it is imported


class Facts(NamedTuple):
    """What was seen."""

    python: tuple[int, int, int]
    executable: str
    root: Path  # the folder that holds densekit/ and should hold backbones/
    checkout: bool  # whether our setup.py lies there
    backbones: str  # what `import backbones` would load: a file, a folder without __init__.py, or ''
    versions: dict[str, str]  # distribution -> version, of those installed
    imports: dict[str, dict[str, Any]]  # module -> {'error': ...} or what it told
    torch_pin: str  # the torch that torchvision's metadata asks for, '' for any
    mmcv_ext: str  # the file of mmcv's compiled module, '' for none
    driver: str  # version of the NVIDIA driver, '' for none
    gpus_hidden: bool  # by CUDA_VISIBLE_DEVICES


def gather(modules: Iterable[str], distributions: Iterable[str]) -> Facts:
    """Look at everything; takes as long as importing `modules` once."""
    root = Path(__file__).resolve().parent.parent
    return Facts(
        python=sys.version_info[:3],
        executable=sys.executable,
        root=root,
        checkout=(root / 'setup.py').is_file(),
        backbones=origin('backbones'),
        versions={name: version for name in distributions for version in [installed_version(name)] if version},
        imports=try_imports(modules),
        torch_pin=torch_pin(),
        mmcv_ext=mmcv_ext(),
        driver=driver_version(),
        gpus_hidden=os.environ.get('CUDA_VISIBLE_DEVICES') in ('', '-1'),
    )


def origin(package: str) -> str:
    """Return the file a top-level package would be loaded from, or its folder if that has no __init__.py."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return ''
    return spec.origin or next(iter(spec.submodule_search_locations or []), '')


def installed_version(distribution: str) -> str:
    """Return the version that pip would report, 'unknown' where its record is damaged, '' where there is none."""
    try:
        return importlib.metadata.version(distribution) or 'unknown'
    except importlib.metadata.PackageNotFoundError:
        return ''
    except Exception:
        return 'unknown'


def torch_pin() -> str:
    """Return X of the line `torch==X` in torchvision's metadata."""
    try:
        lines = importlib.metadata.requires('torchvision') or []
    except importlib.metadata.PackageNotFoundError:
        return ''
    pins = [re.match(r'torch\s*\(?==\s*([\w.]+)', line) for line in lines]
    return next((pin[1] for pin in pins if pin), '')


def mmcv_ext() -> str:
    """Return the file of mmcv's compiled module."""
    spec = importlib.util.find_spec('mmcv')
    folders = spec.submodule_search_locations if spec else None
    files = [Path(folder, f'_ext{suffix}') for folder in folders or [] for suffix in EXTENSION_SUFFIXES]
    return next((str(file) for file in files if file.is_file()), '')


def driver_version() -> str:
    """Ask nvidia-smi for the driver, else the kernel."""
    query = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    try:
        answer = subprocess.run(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=20, check=True)
        match = re.match(rb'[\d.]+', answer.stdout)
    except (OSError, subprocess.SubprocessError):
        match = None
    if match:
        return match[0].decode()
    try:
        return driver_in(Path('/proc/driver/nvidia/version').read_text(encoding='utf-8'))
    except OSError:
        return ''


def driver_in(text: str) -> str:
    """Return the version in the kernel's description of its NVIDIA module."""
    match = re.search(r'Kernel Module\b.*?\s(\d+\.[\d.]+)\s', text)
    return match[1] if match else ''


def try_imports(modules: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Import the modules in children, in this order, and return what each told or how it failed."""
    told: dict[str, dict[str, Any]] = {}
    pending = list(modules)
    while pending:
        command = [sys.executable, '-m', 'densekit.environment', *pending]
        try:
            child = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=IMPORT_LIMIT, check=False
            )
            output, end = child.stdout, f'its import ended Python with {status_name(child.returncode)}'
        except subprocess.TimeoutExpired as expired:
            output, end = expired.stdout or b'', f'its import did not end within {IMPORT_LIMIT} s'
        for line in output.decode(errors='replace').splitlines():
            _, mark, answer = line.partition(MARK)
            if mark:
                told.update(json.loads(answer))
        pending = [module for module in pending if module not in told]
        if pending:
            told[pending.pop(0)] = {'error': end}
    return told


def status_name(status: int) -> str:
    """Name the signal in a negative exit status."""
    return signal.Signals(-status).name if status < 0 else f'status {status}'


def ask(module: str) -> dict[str, Any]:
    """Import a module in this process and return what the doctor wants to know of it."""
    try:
        if module in ('mmcv.ops', 'mmdet.models', 'mmseg.models'):
            importlib.import_module('densekit.ops')
        loaded = importlib.import_module(module)
        told: dict[str, Any] = {'version': str(getattr(sys.modules[module.split('.')[0]], '__version__', ''))}
        if module == 'torch':
            told.update(ask_torch(loaded))
        if module == 'torchvision':
            torch = importlib.import_module('torch')
            # Its operators are registered from C++; where that went wrong, the import may succeed all the same.
            loaded.ops.nms(torch.zeros(1, 4), torch.ones(1), 0.5)
        return told
    except BaseException as error:  # whatever a package raises is its answer, SystemExit included
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return {'error': ': '.join([type(error).__name__, *lines[:1]])}


def ask_torch(torch: Any) -> dict[str, Any]:
    """Return torch's CUDA release, whether it can use a GPU, and if not, why."""
    told = {'cuda': torch.version.cuda, 'available': torch.cuda.is_available(), 'gpus': torch.cuda.device_count()}
    if told['cuda'] and not told['available']:
        try:
            torch.cuda.init()
        except Exception as error:
            told['reason'] = str(error).splitlines()[0]
    return told


def main() -> None:
    """Report on the modules named on the command line."""
    for module in sys.argv[1:]:
        # On a line of its own, even where the package printed something without a line's end.
        sys.stdout.write(f'\n{MARK}{json.dumps({module: ask(module)})}\n')
        sys.stdout.flush()


if __name__ == '__main__':
    main()
