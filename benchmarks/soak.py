"""Trains the demo's detector while it is killed at random, again and again; the weights must come out the same.

    python benchmarks/soak.py [--minutes 15] [--processes 1] [--seed 0]

A run that nothing happens to comes first. Then runs are started, hit by a random fault at a random moment and resumed
with ``--resume=auto`` until each is complete, as many as there is time for. One checkpoint is kept. Results are added
to soak.md; the status is 1 if any run came out different or left a process behind.
"""

import argparse
import hashlib
import os
import platform
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from backbones.files import read_checkpoint
from densekit.data.shapes import generate_shapes

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_suffix('.md')
ITERATIONS = 40
CONFIG = f"""
_base_ = '{ROOT}/configs/detection/mask_rcnn_convnext_mini_shapes.py'
data_root = '%s/'
dataset = dict(data_root=data_root, shapes=dict(num_train=32, num_val=4, size=96))
train_dataloader = dict(batch_size=2, num_workers=2, persistent_workers=True, dataset=dataset)
val_dataloader = dict(num_workers=1, persistent_workers=False, dataset=dataset)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'coco/annotations/instances_val.json')
test_evaluator = val_evaluator
train_cfg = dict(max_iters={ITERATIONS}, val_interval={ITERATIONS // 2})
default_hooks = dict(checkpoint=dict(interval=4, max_keep_ckpts=1))
"""
FAULTS = ('kill -9', 'SIGTERM', 'SIGTERM to all', 'worker kill -9', 'disk full')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=15)
    parser.add_argument('--processes', type=int, default=1, help='more than one: below torchrun')
    parser.add_argument('--seed', type=int, default=0, help='of the faults')
    args = parser.parse_args()
    dice = random.Random(args.seed)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), args.processes, dice)
        print(f'undisturbed: {soak.expected[:16]} after {soak.seconds:.0f} s', flush=True)
        while time.monotonic() < begun + 60 * args.minutes:
            soak.run_disturbed(until=begun + 60 * args.minutes)
        soak.report(time.monotonic() - begun, args)
    return int(bool(soak.failures))


class Soak:
    """The runs so far.

    Args:
        folder: for data and runs.
        processes: of each run.
        dice: choose faults and moments.
    """

    def __init__(self, folder: Path, processes: int, dice: random.Random) -> None:
        self.folder, self.processes, self.dice = folder, processes, dice
        self.faults: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        self.failures: list[str] = []
        self.runs = 0
        self.pack: list[str] = []
        generate_shapes(folder / 'shapes', num_train=32, num_val=4, size=96)
        (folder / 'config.py').write_text(CONFIG % (folder / 'shapes'))
        before = time.monotonic()
        assert self.attempt('undisturbed', None) == 0, (folder / 'undisturbed/output').read_text()[-3000:]
        self.seconds = time.monotonic() - before
        self.expected = digest(folder / 'undisturbed')

    def run_disturbed(self, until: float) -> None:
        """One training, from its first start to its end."""
        self.runs += 1
        name = f'run{self.runs}'
        while True:
            fault = self.next_fault() if time.monotonic() < until else None
            status = self.attempt(name, fault)
            if status == 0:
                break
            if fault is None:
                self.failures.append(f'{name} ended with status {status} by itself')
                print((self.folder / name / 'output').read_text()[-3000:])
                return
        if digest(self.folder / name) != self.expected:
            self.failures.append(f'{name}: other weights')
        print(f'{name}: {"the same bits" if not self.failures else self.failures}; {dict(self.faults)}', flush=True)

    def next_fault(self) -> str:
        """As from a pack of cards, so that each comes up."""
        self.pack = self.pack or self.dice.sample(FAULTS, len(FAULTS))
        return self.pack.pop()

    def attempt(self, name: str, fault: str | None) -> int:
        """Starts or resumes a run, has a fault befall it, and returns the status it ends with."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={self.processes}']
        command = [sys.executable, *(torchrun if self.processes > 1 else []), str(ROOT / 'tools/train.py')]
        with (folder / 'output').open('a') as output:
            process = subprocess.Popen(
                [*command, str(self.folder / 'config.py'), '--work-dir', 'run', '--resume=auto'],
                cwd=folder,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=small_disk if fault == 'disk full' else None,
                env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)},
            )
        if fault not in (None, 'disk full'):
            try:
                process.wait(self.dice.uniform(0.1, 1.0) * self.seconds)
            except subprocess.TimeoutExpired:
                strike(process, fault, folder, self.dice)
        status = process.wait(600)
        if fault is not None and status != 0:
            self.faults[fault] += 1
            self.statuses[f'{fault}: {status}'] += 1
        if left := survivors(folder):
            self.failures.append(f'{name}: processes left after {fault}: {left}')
        return status

    def report(self, seconds: float, args: argparse.Namespace) -> None:
        """Prints and adds a section to soak.md."""
        faults = ', '.join(f'{self.faults[fault]} {fault}' for fault in FAULTS)
        statuses = ', '.join(f'{name} ({count})' for name, count in sorted(self.statuses.items()))
        outcome = '; '.join(self.failures) or 'all ended with the bits of the undisturbed run, no process was left'
        lines = [
            f'## {time.strftime("%Y-%m-%d")}, {seconds / 60:.0f} minutes',
            '',
            f'- Command: `python benchmarks/soak.py --minutes {args.minutes:g} --processes {args.processes} '
            f'--seed {args.seed}`',
            f'- Device: {os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}, torch '
            f'{torch.__version__}',
            f'- Runs of {ITERATIONS} iterations: {self.runs}; faults: {self.faults.total()} ({faults})',
            f'- Status after each fault: {statuses}',
            f'- Result: {outcome}',
            '',
        ]
        print('\n'.join(lines))
        before = RESULTS.read_text() if RESULTS.exists() else f'# Soak\n\n{SOAK_PAGE}\n'
        RESULTS.write_text(f'{before.rstrip()}\n\n' + '\n'.join(lines))


SOAK_PAGE = """The demo's detector (`configs/detection/mask_rcnn_convnext_mini_shapes.py`, shortened, one checkpoint
kept) is trained while random faults befall it at random moments, and resumed with `--resume=auto` after each. Weights
and optimizer at the end are compared by SHA-256 with those of a run that nothing happened to."""


def strike(process: subprocess.Popen, fault: str, folder: Path, dice: random.Random) -> None:
    """Does one of the things that happen to processes."""
    if fault == 'kill -9':
        os.kill(process.pid, signal.SIGKILL)
    elif fault == 'SIGTERM':
        os.kill(process.pid, signal.SIGTERM)
    elif fault == 'SIGTERM to all':
        os.killpg(process.pid, signal.SIGTERM)
    else:
        workers = [pid for pid in members(folder) if comm(pid) == 'pt_data_worker']
        os.kill(dice.choice(workers) if workers else process.pid, signal.SIGKILL)


def small_disk() -> None:
    """Lets a process write files of up to a megabyte: logs, but no checkpoint."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


def digest(folder: Path) -> str:
    """The SHA-256 of weights and optimizer at the end of a run."""
    checkpoint = read_checkpoint(folder / 'run' / f'iter_{ITERATIONS}.pth')
    sha = hashlib.sha256()
    for name, value in checkpoint['state_dict'].items():
        sha.update(name.encode() + value.numpy().tobytes())
    for index, entry in checkpoint['optimizer']['state'].items():
        for name, value in sorted(entry.items()):
            sha.update(f'{index}{name}'.encode() + value.numpy().tobytes())
    return sha.hexdigest()


def members(folder: Path) -> list[int]:
    """The processes that were started in a folder, however far from their parents."""
    found = []
    for entry in Path('/proc').glob('[0-9]*'):
        try:
            if Path(os.readlink(entry / 'cwd')).is_relative_to(folder):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def comm(pid: int) -> str:
    try:
        return Path(f'/proc/{pid}/comm').read_text().strip()
    except OSError:
        return ''


def survivors(folder: Path) -> list[int]:
    """The processes that are left ten seconds after the end of a run. They are killed."""
    until = time.monotonic() + 10
    while members(folder) and time.monotonic() < until:
        time.sleep(0.1)
    left = members(folder)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return left


if __name__ == '__main__':
    sys.exit(main())
