"""What tools/train.py and tools/test.py do."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.registry import RUNNERS, init_default_scope

from densekit.cli import RunStopped, UserError, check_writable, user_errors
from densekit.data.loader import WorkerError
from densekit.data.sampling import SampleError
from densekit.engine.config import load_config, set_amp
from densekit.engine.distributed import end_process_group, prepare_launcher
from densekit.engine.dry_run import rehearse
from densekit.engine.fold_hook import fold_for_test
from densekit.engine.log_backends import add_backends, check_backends
from densekit.engine.runner import DensekitRunner
from densekit.engine.store import CheckpointNotSaved
from densekit.evaluation.result_files import write_results
from densekit.report.scores import by_class, scores_json, scores_table


def train(
    config: str,
    *,
    work_dir: str | None = None,
    load_from: str | None = None,
    resume: str | None = None,
    amp: str | None = None,
    dry_run: bool = False,
    allow_changed: Sequence[str] = (),
    shard: bool = False,
    compile: bool = False,
    log: Sequence[str] = (),
    options: Sequence[str] = (),
) -> list[str]:
    """Trains and validates a recipe.

    Args:
        config: path of the config file.
        work_dir: folder of logs and checkpoints; default work_dirs/<name of the config>.
        load_from: checkpoint of a whole model to start from, of whatever classes.
        resume: '' to go on from the newest checkpoint of the work folder that can be used, 'auto' the same but from
            the start if there is none, else the checkpoint to go on from.
        amp: 'bf16', 'fp16' or 'off'; default as in the config.
        dry_run: build and check all that training needs and show what it is; do not train.
        allow_changed: in what a resumed run may differ from what it was; see :data:`densekit.engine.contract.PARTS`.
        shard: cut model, gradients and optimizer among the processes (FSDP2), as ``sharding`` in the config says.
        compile: compile parts of the model, as ``compile`` in the config says.
        log: where numbers go besides the work folder: 'tensorboard', 'wandb'.
        options: ``key=value`` texts that change the config.

    Returns:
        What a dry run found inconsistent; empty after training.

    Raises:
        UserError: if something given cannot be used.
        RunStopped: if the run ended itself, or was told to.
    """
    with user_errors():
        if load_from is not None and resume is not None:
            raise ValueError('--load-from starts a new run and --resume goes on with one; give one of them')
        check_backends(log)
        cfg = _load(config, options, work_dir)
        add_backends(cfg, log)
        if amp is not None:
            set_amp(cfg, amp)
        if load_from is not None:
            cfg.load_from, cfg.resume = load_from, False
        elif resume is None and cfg.get('resume') and not cfg.get('load_from'):
            resume = 'auto'  # what these keys of a config mean to mmengine
        if resume in ('', 'auto'):
            cfg.resume = resume or 'required'
        elif resume is not None:
            cfg.load_from, cfg.resume = resume, True
        if shard:
            cfg.setdefault('sharding', {})
        if compile:
            cfg.compile = cfg.get('compile') or True
        if allow_changed:
            cfg.allow_changed = list(allow_changed)
        runner = _build_runner(cfg)
        problems: list[str] = []
        if dry_run:
            problems = rehearse(runner)
        else:
            runner.prepare('train', 'val')
    if not dry_run:
        with run_errors():
            runner.train()
    end_process_group()
    return problems


def test(
    config: str,
    checkpoint: str,
    *,
    tta: bool = False,
    fold: bool = False,
    out: str | None = None,
    results: str | None = None,
    format_only: str | None = None,
    work_dir: str | None = None,
    options: Sequence[str] = (),
) -> dict[str, float]:
    """Evaluates a checkpoint on the test set of its recipe.

    Args:
        config: path of the config file.
        checkpoint: of a whole model.
        tta: test at several scales and flipped.
        fold: fold the ConvNeXt blocks; see :mod:`backbones.folding`.
        out: JSON file for the metrics, those of each class as well.
        results: folder for files of the results: detections for COCO's test server, label maps for ADE20K's.
        format_only: the same, and nothing is scored; for a test set without ground truth.
        work_dir: folder of logs; default work_dirs/<name of the config>.
        options: ``key=value`` texts that change the config.

    Returns:
        The metrics, as the evaluators name them.

    Raises:
        UserError: if something given cannot be used.
    """
    with user_errors():
        if out is not None:
            _check_file(out)
        cfg = _load(config, options, work_dir)
        cfg.load_from, cfg.resume = checkpoint, False
        if tta:
            _use_tta(cfg)
        if results is not None or format_only is not None:
            write_results(cfg, results, format_only)
        runner = _build_runner(cfg)
        runner.prepare('test')
        if fold:
            fold_for_test(runner)
    with run_errors():
        metrics = {name: float(value) for name, value in runner.test().items()}  # mmseg's are NumPy scalars
    classes = by_class(runner.test_loop.evaluator.metrics)
    if format_only is None:
        print_log(f'results of {checkpoint}\n{scores_table(metrics, classes)}', logger='current')
    if out is not None and runner.rank == 0:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(scores_json(metrics, classes), encoding='utf-8')
    end_process_group()
    return metrics


@contextmanager
def run_errors() -> Iterator[None]:
    """Within this context, what a run may meet on its way is told in a line, not in a traceback."""
    try:
        yield
    except SampleError as error:
        raise UserError(str(error)) from error
    except (WorkerError, CheckpointNotSaved) as error:
        raise RunStopped(str(error)) from error
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and '/gloo/' not in str(error):
            raise
        said = str(error).partition('\n')[0]
        raise RunStopped(
            f'another process does not answer: it ended, hangs, or the network does ({said}). Its own message says '
            'why; the last checkpoint is good. How long processes wait: env_cfg.dist_cfg.timeout, in seconds.'
        ) from error


def _load(config: str, options: Sequence[str], work_dir: str | None) -> Config:
    if work_dir is not None:
        check_writable(work_dir, '--work-dir')
    cfg = load_config(config, options)
    if work_dir is not None:
        cfg.work_dir = work_dir
    check_writable(cfg.work_dir, '--work-dir')
    return cfg


def _build_runner(cfg: Config) -> DensekitRunner:
    cfg.launcher = prepare_launcher()
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    runner = RUNNERS.get(cfg.runner_type)
    if runner is None or not issubclass(runner, DensekitRunner):
        raise ValueError(f'runner_type is {cfg.runner_type!r} in this config; only DensekitRunner can be used here')
    built = runner.from_cfg(cfg)
    if built.rank == 0:
        Path(built.log_dir, 'command.txt').write_text(f'{shlex.join(["python", *sys.argv])}\n', encoding='utf-8')
    return built


def _check_file(path: str) -> None:
    if Path(path).is_dir():
        raise ValueError(f'--out {path} is a folder; give the name of a file for the metrics')
    check_writable(str(Path(path).parent), '--out')


def _use_tta(cfg: Config) -> None:
    """Wraps the model for test-time augmentation, as mmseg's own test tool does."""
    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        raise ValueError(
            '--tta: this config has no tta_model and tta_pipeline. The recipes of Mask R-CNN, Cascade Mask R-CNN and '
            'UperNet have; copy theirs.'
        )
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
