"""A tiny run that faults can be put into, and a process that starts such runs at once.

Importing torch, mmdet and all the rest takes seconds. ``serve`` does it once and forks: what it starts has signals,
groups, exit statuses and ends like a process of its own, and below torchrun's agent likewise.
"""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS
from mmengine.structures import BaseDataElement
from timm.layers import DropPath
from torch import nn

from densekit.engine.guards import FiniteGuard, StopSignalHook

CONFIG = """
custom_imports = dict(imports=['densekit.engine', 'fault_run'])
model = dict(type='FaultNet', drop=0.5)
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(type='FaultData'),
    sampler=dict(type='InfiniteSampler', shuffle=True))
val_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(type='FaultData'),
    sampler=dict(type='DefaultSampler', shuffle=False))
val_evaluator = dict(type='CountMetric')
train_cfg = dict(type='IterBasedTrainLoop', max_iters=12, val_interval=6)
val_cfg = dict(type='ValLoop')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.05))
param_scheduler = [dict(type='CosineAnnealingLR', T_max=12, by_epoch=False)]
default_hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=4, max_keep_ckpts=1))
custom_hooks = [dict(type='Fault', kind='none', step=0, rank=0, at='train')]
env_cfg = dict(dist_cfg=dict(timeout=60))
randomness = dict(seed=3)
"""


@DATASETS.register_module()
class FaultData(BaseDataset):
    """Sixteen vectors; the transform adds noise. One index may hang, kill its process or be unreadable."""

    METAINFO = {'classes': ('a', 'b')}

    def __init__(self, fault=None, index=-1):
        self.fault, self.index = fault, index
        super().__init__(pipeline=[self.load], serialize_data=False)

    def load_data_list(self):
        return [{'number': i, 'img_path': f'images/{i:03}.jpg'} for i in range(16)]

    def load(self, results):
        number = results['number']
        if number == self.index and self.fault == 'hang':
            Path('hanging').touch()
            time.sleep(1000)
        if number == self.index and self.fault == 'kill':
            time.sleep(0.2)  # the other worker gets going
            os.kill(os.getpid(), signal.SIGKILL)
        if number == self.index and self.fault == 'corrupt':
            raise OSError('image file is truncated')
        noise = np.random.rand() + torch.rand(()).item()
        sample = BaseDataElement(metainfo={'img_path': results['img_path'], 'img_id': number})
        return {'x': torch.tensor([number / 16, noise]), 'data_samples': sample}


@MODELS.register_module()
class FaultNet(BaseModel):
    """Two layers with drop path."""

    def __init__(self, drop=0.5):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 1)
        self.drop = DropPath(drop) if drop else nn.Identity()
        self.poison = 1.0

    def forward(self, x, data_samples=None, mode='tensor'):
        y = self.second(self.drop(self.norm(self.first(torch.stack(x)))))
        return {'loss_a': y.square().mean() * self.poison, 'loss_b': y.abs().mean()} if mode == 'loss' else list(y)


@METRICS.register_module()
class CountMetric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += data_samples

    def compute_metrics(self, results):
        return {'count': len(results)}


@HOOKS.register_module()
class Fault(Hook):
    """Does harm in one process, right before the model gets batch number ``step`` (counted from 1)."""

    priority = 'VERY_LOW'  # after the guards have begun, before a signal is looked for

    def __init__(self, kind, step, rank, at, unguarded=False):
        self.kind, self.step, self.rank, self.at, self.unguarded = kind, step, rank, at, unguarded

    def before_train(self, runner):
        Path(runner.work_dir, f'begun_at_{runner.iter}.{runner.rank}').touch()
        at_exit = Path(runner.work_dir, f'at_exit.{runner.rank}.pt')
        atexit.register(lambda: torch.save(runner.bare_model().state_dict(), at_exit))

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if self.unguarded:
            for hook in runner.hooks:
                if isinstance(hook, FiniteGuard | StopSignalHook):
                    hook.after_run(runner)
        with Path(runner.work_dir, f'seen.{runner.rank}').open('a') as file:
            print(runner.iter + 1, *sorted(s.img_path for s in data_batch['data_samples']), file=file)
        if runner.iter + 1 == self.step and runner.rank == self.rank and self.at == 'train':
            self.strike(runner)
        elif self.kind == 'nan':
            runner.bare_model().poison = 1.0

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if batch_idx == 1 and runner.iter == self.step and runner.rank == self.rank and self.at == 'val':
            self.strike(runner)

    def strike(self, runner):
        kill = {'kill': signal.SIGKILL, 'term': signal.SIGTERM, 'stop': signal.SIGSTOP}
        if self.kind == 'nan':
            torch.save(runner.bare_model().state_dict(), Path(runner.work_dir, 'before.pt'))
            runner.bare_model().poison = float('nan')
        elif self.kind == 'term agent':
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(0.5)
        elif self.kind == 'term group':
            os.killpg(0, signal.SIGTERM)
        elif self.kind == 'int':
            signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
            os.killpg(0, signal.SIGINT)
        elif self.kind == 'term twice':
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(2.2)
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.kind == 'kill worker':
            (task,) = Path('/proc/self/task').glob(str(os.getpid()))
            os.kill(int((task / 'children').read_text().split()[0]), signal.SIGKILL)
            time.sleep(1)
        elif self.kind == 'raise':
            raise RuntimeError('a bug in one process')
        elif self.kind in kill:
            os.kill(os.getpid(), kill[self.kind])


class Forked:
    """What torchrun's agent uses of a ``subprocess.Popen``, started without importing anything again."""

    def __init__(self, args, env):
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.setsid()
            os.environ.clear()
            os.environ.update(env)
            script = args.index(str(SCRIPT))
            leave(lambda: run_script(args[script + 1 :]))

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout=None):
        until = time.monotonic() + (1e9 if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired('forked', timeout)
            time.sleep(0.02)
        return self.returncode


SCRIPT = Path(__file__).parents[2] / 'tools' / 'train.py'


def run_script(argv):
    """tools/train.py in this process."""
    import runpy

    sys.argv = [str(SCRIPT), *argv]
    runpy.run_path(str(SCRIPT), run_name='__main__')


def run_torchrun(argv):
    """``torchrun tools/train.py`` in this process, its workers forked; five seconds of grace, not thirty."""
    from torch.distributed.elastic.multiprocessing.api import PContext
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
    from torch.distributed.run import main

    SubprocessHandler._popen = lambda self, args, env: Forked(args, env)
    PContext.close.__defaults__ = (None, 5)
    options = ['--nproc-per-node=2', '--rdzv-backend=c10d', '--rdzv-endpoint=localhost:0', '--monitor-interval=0.05']
    main([*options, str(SCRIPT), *argv])


def leave(main):
    """Runs a program and ends as Python does."""
    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def serve():
    """Reads runs as lines of JSON from standard input, starts them, and writes ``<folder>/status`` when they end."""
    import torch.distributed.run
    from mmengine.config import config

    import densekit.engine.launch  # noqa: F401

    config.FormatCode = lambda text, **_: (text, True)  # half the time of a run
    torch.set_num_threads(1)
    running = {}
    pending = b''
    print('ready', flush=True)
    while True:
        if select.select([0], [], [], 0.02)[0]:
            read = os.read(0, 65536)
            if not read:
                os._exit(0)  # taking all of it down takes seconds
            *lines, pending = (pending + read).split(b'\n')
            for order in map(json.loads, lines):
                pid = os.fork()
                if pid == 0:
                    _become(order)
                running[pid] = order['folder']
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            path = Path(running.pop(pid), 'status')
            path.with_suffix('.new').write_text(str(os.waitstatus_to_exitcode(status)))
            path.with_suffix('.new').rename(path)


def _become(order):
    os.setsid()
    os.chdir(order['folder'])
    with open('output', 'ab', buffering=0) as output:
        for number in (1, 2):
            os.dup2(output.fileno(), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    leave(lambda: (run_torchrun if order['processes'] == 2 else run_script)(order['argv']))
