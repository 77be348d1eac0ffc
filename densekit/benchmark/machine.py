"""The machine that figures are measured on."""

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from densekit.environment import installed_version

_PACKAGES = (
    'torch',
    'torchvision',
    'timm',
    'transformers',
    'mmpretrain',
    'mmdet',
    'mmsegmentation',
    'mmcv',
    'mmcv-lite',
)


RESULTS = 'benchmarks/results'
"""In the root of a checkout; what a run writes there changes nothing that the next one measures."""


def choose(device: str | None) -> torch.device:
    """The device of a name; by default the first GPU if there is one.

    Raises:
        ValueError: if it is none, or not here.
    """
    if device is None:
        return torch.device('cuda', 0) if torch.cuda.is_available() else torch.device('cpu')
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f'--device {device} is no device; give cpu, cuda or cuda:N') from error
    if chosen.type == 'cuda' and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f'--device {device}: torch sees {torch.cuda.device_count()} CUDA devices; give cpu')
    if chosen.type not in ('cpu', 'cuda'):
        raise ValueError(f'--device {device}: measured are cpu and cuda')
    if chosen.type == 'cuda':
        chosen = torch.device('cuda', chosen.index or 0)
        torch.cuda.set_device(chosen)  # mmengine and autocast go by the current one
    return chosen


def name(device: torch.device) -> str:
    """What the device is called, with the number of threads of a CPU."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f'{_processor()}, {threads} thread{"s" * (threads != 1)}'


def slug(device: torch.device) -> str:
    """The name as a file is named."""
    return re.sub(r'[^a-z0-9]+', '-', name(device).lower()).strip('-')


def describe(device: torch.device) -> dict[str, Any]:
    """The name, and the versions that matter."""
    versions = {package: version for package in _PACKAGES if (version := installed_version(package))}
    versions['python'] = platform.python_version()
    if device.type == 'cuda':
        versions |= {'cuda': str(torch.version.cuda), 'cudnn': str(torch.backends.cudnn.version())}
    return {'device': name(device), 'kind': device.type, 'versions': versions}


def revision() -> str:
    """The commit of this checkout, with + where files but results differ from it or are new; '' outside of one."""
    root = Path(__file__).parents[2]
    try:
        head, changes = (
            subprocess.run(['git', *command], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for command in (['rev-parse', '--short', 'HEAD'], ['status', '--porcelain', '--', '.', f':!{RESULTS}'])
        )
    except (OSError, subprocess.SubprocessError):
        return ''
    return head + '+' * bool(changes)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def _processor() -> str:
    try:
        match = re.search(r'^model name\s*:\s*(.+)$', Path('/proc/cpuinfo').read_text(encoding='utf-8'), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or f'{platform.machine()}, {os.cpu_count()} cores'
