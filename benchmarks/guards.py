"""What the guards of a run cost: a training step with and without, and the seeding of a sample.

    python benchmarks/guards.py [--steps 100]

Steps with and without guards take turns in one process, on batches that are loaded beforehand. Writes guards.md.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import densekit.ops  # noqa: F401

# isort: split
from densekit.cli import user_errors
from densekit.data.sampling import seed_everything, seeded
from densekit.data.shapes import generate_shapes
from densekit.engine.guards import FiniteGuard
from densekit.engine.launch import _build_runner, load_config

ROOT = Path(__file__).parents[1]
CONFIG = f"""
_base_ = '{ROOT}/configs/detection/mask_rcnn_convnext_mini_shapes.py'
data_root = '%s/'
dataset = dict(data_root=data_root, shapes=dict(num_train=16, num_val=4, size=128))
train_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False, dataset=dataset)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dataset)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'coco/annotations/instances_val.json')
test_evaluator = val_evaluator
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=100, help='of each kind')
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        generate_shapes(Path(folder, 'shapes'), num_train=16, num_val=4, size=128)
        Path(folder, 'config.py').write_text(CONFIG % f'{folder}/shapes')
        with user_errors():
            cfg = load_config(f'{folder}/config.py')
            cfg.work_dir = f'{folder}/run'
            runner = _build_runner(cfg)
            runner.prepare('train')
        without, with_guards, guard_alone = measure(runner, args.steps)
    model = runner.bare_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f'one thread of {os.cpu_count()} CPU cores'
    middle = statistics.median
    lines = [
        '# What guards cost',
        '',
        f'Medians of {args.steps} training steps with and as many without, taking turns in one process, on batches',
        'loaded beforehand; and the time that the guard itself takes, measured inside the same steps.',
        '',
        f'- Model: `mask_rcnn_convnext_mini_shapes.py`, 4 images of 128 x 128, {len(trained)} tensors of '
        f'{sum(p.numel() for p in trained) / 1e6:.1f} M parameters',
        f'- Device: {device} ({platform.machine()}), Python {platform.python_version()}, torch {torch.__version__}',
        f'- Command: `python benchmarks/guards.py --steps {args.steps}`',
        '',
        '| | ms |',
        '|---|---:|',
        f'| step without guards | {1000 * middle(without):.1f} |',
        f'| step with guards | {1000 * middle(with_guards):.1f} |',
        f'| of it, the guard itself | {1000 * middle(guard_alone):.3f} ({middle(guard_alone) / middle(without):.2%}) |',
        '',
        '| | microseconds |',
        '|---|---:|',
        f'| seeding a sample, and putting the generators back | {1e6 * once(lambda: use(seeded(3, 1, 7, 0))):.0f} |',
        f'| seeding a step | {1e6 * once(lambda: seed_everything(3, 100, 0, 1, 0)):.0f} |',
        '',
    ]
    print('\n'.join(lines))
    Path(__file__).with_suffix('.md').write_text('\n'.join(lines))
    return 0


def measure(runner, steps: int) -> tuple[list[float], list[float], list[float]]:
    """Seconds of steps without and with guards, and of what the guard itself does in one of the latter."""
    loader = runner.train_loop.dataloader
    stream = iter(loader)
    batches = [next(stream) for _ in range(4)]
    guard = next(hook for hook in runner.hooks if isinstance(hook, FiniteGuard))
    spent = [0.0]
    for name in ('_before_step', '_keep_losses', 'before_train_iter', 'after_train_iter'):
        setattr(guard, name, timed(getattr(guard, name), spent))
    without, with_guards, alone = [], [], []
    runner.model.train()
    for index in range(2 * (steps + 5)):
        batch, guarded = batches[index // 2 % 4], index % 2 == 1
        if guarded:
            guard.before_train(runner)
        spent[0] = 0.0
        before = now()
        if guarded:
            guard.before_train_iter(runner, index, batch)
        runner.model.train_step(batch, runner.optim_wrapper)
        if guarded:
            guard.after_train_iter(runner, index, batch)
        seconds = now() - before
        if guarded:
            guard.after_run(runner)
        if index >= 10:
            (with_guards if guarded else without).append(seconds)
            alone += [spent[0]] if guarded else []
    return without, with_guards, alone


def timed(function: Callable, spent: list[float]) -> Callable:
    def call(*args, **kwargs):
        before = now()
        try:
            return function(*args, **kwargs)
        finally:
            spent[0] += now() - before

    return call


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def use(context) -> None:
    with context:
        pass


def once(action: Callable[[], None], times: int = 2000) -> float:
    """The median of its duration in seconds."""
    durations = []
    for _ in range(times):
        before = time.perf_counter()
        action()
        durations.append(time.perf_counter() - before)
    return statistics.median(durations)


if __name__ == '__main__':
    sys.exit(main())
