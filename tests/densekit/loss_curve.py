"""The losses of the demo's detector in its first 20 steps, and a digest of the weights after them.

    python tests/densekit/loss_curve.py

writes loss_curve.json anew: after a change that is meant to alter results, or on another torch or processor.
"""

import hashlib
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from densekit.engine.config import load_config
from densekit.engine.runner import DensekitRunner

HERE = Path(__file__).parent
GOLDEN = HERE / 'loss_curve.json'
DEMO = HERE.parents[1] / 'configs/detection/mask_rcnn_convnext_mini_shapes.py'
STEPS = 20

# Twice through 20 pictures, at the learning rate of the middle of the demo's warm-up.
SMALL = """
_base_ = '{base}'
data_root = '{folder}/shapes/'
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root, shapes=dict(num_train=20, num_val=1, size=64)))
val_cfg = val_dataloader = val_evaluator = None
model = dict(backbone=dict(drop_path_rate=0.2))
train_cfg = dict(max_iters={steps})
param_scheduler = None
optim_wrapper = dict(optimizer=dict(lr=0.0003))
default_hooks = dict(checkpoint=dict(interval=1000, save_last=False))
randomness = dict(seed={seed}, deterministic={deterministic})
work_dir = '{folder}/run'
"""


class NoteLosses(Hook):
    """Keeps every loss of every step."""

    def __init__(self) -> None:
        self.losses: dict[str, list[float]] = {}

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        for name, value in outputs.items():
            if 'loss' in name:
                self.losses.setdefault(name, []).append(torch.as_tensor(value).item())


def train(
    folder: Path, steps: int = STEPS, seed: int = 0, deterministic: bool = False
) -> tuple[dict[str, list[float]], str]:
    """Trains in an empty folder.

    Returns:
        The losses of each step by name, and the sha256 of the weights at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A name of its own: mmengine's loggers and message hubs go by the name of the config and the second.
    path = folder / f'{folder.name}.py'
    path.write_text(SMALL.format(base=DEMO, folder=folder, steps=steps, seed=seed, deterministic=deterministic))
    runner = DensekitRunner.from_cfg(load_config(str(path)))
    notes = NoteLosses()
    runner.register_hook(notes)
    with DefaultScope.overwrite_default_scope('mmdet'):
        runner.train()
    digest = hashlib.sha256()
    for name, value in runner.bare_model().state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return notes.losses, digest.hexdigest()


def machine() -> dict[str, str]:
    """What decides in which order floating-point numbers are added up, other than the code and its threads.

    The instruction set alone does not: libraries choose their blocks by the caches of a processor as well.
    """
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.partition(':')[2].strip() for line in lines if line.startswith('model name')), 'unknown')
    return {'torch': torch.__version__, 'processor': model, 'capability': torch.backends.cpu.get_cpu_capability()}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        losses, digest = train(Path(folder, 'curve'))
    curve = {name: [repr(value) for value in values] for name, values in losses.items()}
    GOLDEN.write_text(json.dumps({**machine(), 'weights': digest, 'losses': curve}, indent=1) + '\n')
    print(f'{GOLDEN}: total loss from {losses["loss"][0]:.4f} to {losses["loss"][-1]:.4f}')


if __name__ == '__main__':
    warnings.simplefilter('ignore')
    main()
