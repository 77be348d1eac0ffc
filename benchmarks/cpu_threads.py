"""Time per CPU training step of the demo's detector, by how OpenMP's threads wait, alone and beside a busy process.

    python benchmarks/cpu_threads.py

Runs of the settings alternate; cpu_threads.md has what was measured.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIG = 'configs/detection/mask_rcnn_convnext_mini_shapes.py'
SETTINGS = {
    'default': {},
    'passive': {'OMP_WAIT_POLICY': 'PASSIVE'},
    'spin 1000': {'GOMP_SPINCOUNT': '1000'},
    'spin 10000': {'GOMP_SPINCOUNT': '10000'},
}
ROUNDS = 3
STEPS = 12


def seconds_per_step(setting: dict[str, str]) -> float:
    """Median over the steps of one run, without the first two."""
    with tempfile.TemporaryDirectory() as work_dir:
        options = [f'train_cfg.max_iters={STEPS}', 'train_cfg.val_interval=1000', 'default_hooks.logger.interval=1']
        options += ['log_processor.window_size=1']
        # tools/train.py chooses a setting itself; calling what it calls leaves the choice to us.
        code = (
            'import sys; from densekit.engine.launch import train; '
            'train(sys.argv[1], work_dir=sys.argv[2], options=sys.argv[3:])'
        )
        command = [sys.executable, '-c', code, CONFIG, work_dir, *options]
        env = {key: value for key, value in os.environ.items() if key not in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')}
        subprocess.run(
            command, env={**env, **setting}, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        log = next(Path(work_dir).glob('*/vis_data/scalars.json'))
        times = [json.loads(line)['time'] for line in log.read_text().splitlines() if '"loss"' in line]
        return statistics.median(times[2:])


def measure(title: str) -> None:
    times: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(ROUNDS):
        for name, setting in SETTINGS.items():
            times[name].append(seconds_per_step(setting))
    for name, values in times.items():
        each = ', '.join(f'{value:.3f}' for value in values)
        print(f'{title:<22} {name:<12} median {statistics.median(values):.3f} s per step ({each})', flush=True)


def main() -> None:
    measure('alone')
    busy = subprocess.Popen([sys.executable, '-c', 'while True: pass'])
    try:
        measure('beside a busy process')
    finally:
        busy.kill()


if __name__ == '__main__':
    main()
