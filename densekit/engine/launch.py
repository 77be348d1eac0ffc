"""What tools/train.py and tools/test.py do."""

import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.registry import RUNNERS, init_default_scope

from densekit.cli import user_errors
from densekit.engine.config import load_config, set_amp
from densekit.engine.distributed import prepare_launcher
from densekit.report.tables import metrics_table


def train(
    config: str,
    *,
    work_dir: str | None = None,
    load_from: str | None = None,
    resume: str | None = None,
    amp: str | None = None,
    options: Sequence[str] = (),
) -> None:
    """Trains and validates a recipe.

    Args:
        config: path of the config file.
        work_dir: folder of logs and checkpoints; default work_dirs/<name of the config>.
        load_from: checkpoint of a whole model to start from.
        resume: '' to go on from the newest checkpoint in the work folder, 'auto' the same but from the start if there
            is none, else the checkpoint to go on from.
        amp: 'bf16', 'fp16' or 'off'; default as in the config.
        options: ``key=value`` texts that change the config.

    Raises:
        UserError: if something given cannot be used.
    """
    with user_errors():
        cfg = load_config(config, options)
        if work_dir is not None:
            cfg.work_dir = work_dir
        if amp is not None:
            set_amp(cfg, amp)
        if load_from is not None and resume is not None:
            raise ValueError('--load-from starts a new run and --resume goes on with one; give one of them')
        _check_writable(cfg.work_dir)
        if load_from is not None:
            cfg.load_from = load_from
        if resume is not None:
            cfg.load_from = _checkpoint_to_resume(cfg.work_dir, resume)
            cfg.resume = cfg.load_from is not None
        runner = _build_runner(cfg)
        runner.prepare('train', 'val')
    runner.train()


def test(
    config: str,
    checkpoint: str,
    *,
    tta: bool = False,
    out: str | None = None,
    work_dir: str | None = None,
    options: Sequence[str] = (),
) -> dict[str, float]:
    """Evaluates a checkpoint on the test set of its recipe.

    Args:
        config: path of the config file.
        checkpoint: of a whole model.
        tta: test at several scales and flipped (segmentation).
        out: JSON file for the metrics.
        work_dir: folder of logs; default work_dirs/<name of the config>.
        options: ``key=value`` texts that change the config.

    Returns:
        The metrics, as the evaluators name them.

    Raises:
        UserError: if something given cannot be used.
    """
    with user_errors():
        cfg = load_config(config, options)
        if work_dir is not None:
            cfg.work_dir = work_dir
        _check_writable(cfg.work_dir)
        if out is not None:
            _check_writable(str(Path(out).parent))
        cfg.load_from = checkpoint
        cfg.resume = False
        if tta:
            _use_tta(cfg)
        runner = _build_runner(cfg)
        runner.prepare('test')
    metrics = runner.test()
    print_log(f'results of {checkpoint}\n{metrics_table(metrics)}', logger='current')
    if out is not None and runner.rank == 0:
        Path(out).write_text(json.dumps(metrics, indent=2, sort_keys=True) + '\n', encoding='utf-8')
    return metrics


def latest_checkpoint(work_dir: str) -> str | None:
    """The newest checkpoint of a run.

    mmengine's ``last_checkpoint`` file holds a path that is wrong once the folder has moved, so only its last part
    counts; where that file is missing, the highest epoch or iteration does.

    Args:
        work_dir: folder of the run.

    Returns:
        A path, or None if the folder has no checkpoint.
    """
    folder = Path(work_dir)
    pointer = folder / 'last_checkpoint'
    if pointer.is_file():
        named = folder / Path(pointer.read_text(encoding='utf-8').strip()).name
        if named.is_file():
            return str(named)
    numbered = {}
    for path in folder.glob('*.pth'):
        match = re.fullmatch(r'(?:epoch|iter)_(\d+)\.pth', path.name)
        if match:
            numbered[int(match[1])] = path
    return str(numbered[max(numbered)]) if numbered else None


def _build_runner(cfg: Config) -> Any:
    cfg.launcher = prepare_launcher()
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    return RUNNERS.build(cfg)


def _checkpoint_to_resume(work_dir: str, resume: str) -> str | None:
    if resume not in ('', 'auto'):
        return resume
    found = latest_checkpoint(work_dir)
    if found is None and resume == '':
        raise ValueError(
            f'--resume: no checkpoint in {work_dir}. Give --work-dir of the run, --resume=CHECKPOINT, or --resume=auto '
            'to start from the beginning when there is none.'
        )
    return found


def _check_writable(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f'folder {folder} cannot be written ({error.strerror}); give another one (--work-dir, --out)'
        ) from error


def _use_tta(cfg: Config) -> None:
    """Wraps the model for test-time augmentation, as mmseg's own test tool does."""
    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        raise ValueError(
            '--tta: this config has no tta_model and tta_pipeline. The segmentation recipes have; for detectors with '
            'masks the stack has no test-time augmentation.'
        )
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
