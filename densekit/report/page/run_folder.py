"""What a run left in its work folder, but for its predictions."""

import ast
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backbones.files import read_checkpoint
from densekit.engine.store import newest_valid
from densekit.report.curves import read_scalars

COMMAND = 'command.txt'  # in the folder of the run's log


@dataclass
class Run:
    """A work folder.

    Attributes:
        title: what it is called in the page.
        name: of the folder.
        folder: its path.
        training: records, see :func:`densekit.report.curves.read_scalars`.
        validation: likewise.
        config: file of the run's config, if it left one.
        checkpoint: the newest that is whole, or the one asked for.
        groups: of the optimizer in that checkpoint: name, rates, number of tensors.
        iteration: of the checkpoint.
        environment: as logged.
        commands: with which it was started, and started again.
        remarks: what could not be read, and why.
    """

    title: str
    name: str
    folder: Path
    training: list[dict] = field(default_factory=list)
    validation: list[dict] = field(default_factory=list)
    config: Path | None = None
    checkpoint: Path | None = None
    groups: list[dict[str, Any]] = field(default_factory=list)
    iteration: int | None = None
    environment: str = ''
    commands: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def read_run(folder: Path, title: str, name: str, checkpoint: str | None = None) -> Run:
    """Reads what there is; what is missing or damaged is told in the remarks.

    Args:
        folder: work folder.
        title: what it is called in the page.
        name: of the folder.
        checkpoint: file; default the newest of the folder that is whole.

    Raises:
        FileNotFoundError: if there is no such folder or checkpoint, or the folder is of no run.
    """
    if not folder.is_dir():
        problem = 'is a file' if folder.exists() else 'does not exist'
        raise FileNotFoundError(f'work folder {folder} {problem}; give the --work-dir of a run of tools/train.py')
    if checkpoint is not None and not Path(checkpoint).exists():
        raise FileNotFoundError(f'--checkpoint {checkpoint} does not exist; {folder} has {_checkpoints(folder)}')
    run = Run(title, name, folder)
    try:
        run.training, run.validation = read_scalars(folder)
    except ValueError as error:
        run.remarks.append(str(error))
    run.config = _config(folder)
    run.environment = _environment(folder)
    run.commands = [path.read_text(encoding='utf-8').strip() for path in sorted(folder.glob(f'*/{COMMAND}'))]
    run.checkpoint, skipped = (Path(checkpoint), []) if checkpoint is not None else newest_valid(folder)
    run.remarks += [f'A checkpoint was passed over: {line}' for line in skipped]
    if not run.training and run.config is None and run.checkpoint is None:
        raise FileNotFoundError(
            f'{folder} is no work folder: it has no log of a training, no config and no checkpoint. Give the '
            '--work-dir of a run of tools/train.py'
        )
    _read_optimizer(run)
    return run


def batch(run: Run) -> int | None:
    """Images of one iteration in all processes, as far as config and log say."""
    processes = re.search(r'GPU number: (\d+)', run.environment)
    loader = _assigned(config_text(run), 'train_dataloader')
    sizes = [k.value for k in loader.keywords if k.arg == 'batch_size'] if isinstance(loader, ast.Call) else []
    size = sizes[0].value if sizes and isinstance(sizes[0], ast.Constant) else None
    return int(processes[1]) * size if processes and isinstance(size, int) else None


def config_text(run: Run) -> str:
    """The config with everything that it inherits, as the run wrote it down."""
    return run.config.read_text(encoding='utf-8') if run.config is not None else ''


def _assigned(text: str, name: str) -> ast.expr | None:
    """What a config that a run wrote assigns to a name; it is read, not run."""
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            return statement.value
    return None


def names_of(folders: Sequence[Path]) -> list[str]:
    """Names of folders, with as many of their parents as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):  # two checkpoints of one run
        return [f'{part[-1]} ({i + 1})' for i, part in enumerate(parts)]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ['/'.join(part[-depth:]) for part in parts]


def _config(folder: Path) -> Path | None:
    """The newest; mmengine writes it to the folder of each log and to the work folder."""
    found = sorted(folder.glob('*/vis_data/config.py')) or sorted(folder.glob('*.py'), key=lambda p: p.stat().st_mtime)
    return found[-1] if found else None


def _environment(folder: Path) -> str:
    for path in sorted(folder.glob('*/*.log'), reverse=True):
        block = re.search(
            r'^System environment:\n(.*?)^-{20,}$', path.read_text('utf-8', errors='replace'), re.MULTILINE | re.DOTALL
        )
        if block:
            return textwrap.dedent(block[1]).rstrip()
    return ''


def _checkpoints(folder: Path) -> str:
    return ', '.join(sorted(path.name for path in folder.glob('*.pth'))) or 'none'


def _read_optimizer(run: Run) -> None:
    if run.checkpoint is None:
        return
    try:
        content = read_checkpoint(run.checkpoint, mmap=True)
        run.iteration = content.get('meta', {}).get('iter')
        groups = (content.get('optimizer') or {}).get('param_groups', [])
        run.groups = [
            {
                'name': str(group.get('group_name', f'group {i}')),
                'tensors': len(group.get('params', ())),
                'initial_lr': float(group.get('initial_lr', group['lr'])),
                'lr': float(group['lr']),
            }
            for i, group in enumerate(groups)
        ]
    except (ValueError, OSError, TypeError, KeyError, AttributeError) as error:
        run.remarks.append(f'The optimizer in {run.checkpoint.name} cannot be read: {error}')
