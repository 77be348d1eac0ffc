"""Real processes and real signals: what is killed, stopped or poisoned ends, says why, and goes on to the same bits."""

import hashlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from backbones.files import read_checkpoint

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BOUND = 60  # seconds, for everything; most of it takes two

sys.path.insert(0, str(HERE))


def environment():
    path = os.pathsep.join([str(HERE), str(ROOT), os.environ.get('PYTHONPATH', '')]).rstrip(os.pathsep)
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path}


ARGUMENTS = ['config.py', '--work-dir', 'run', '--resume=auto']


def write_config(folder, lines):
    import fault_run

    folder.mkdir(exist_ok=True)
    (folder / 'config.py').write_text('\n'.join([fault_run.CONFIG, *lines]))


class Launch:
    """``tools/train.py`` in one process or below torchrun in two, in a folder of its own."""

    def __init__(self, folder):
        self.folder = folder

    def ended(self):
        return (self.folder / 'status').exists()

    def status(self):
        """Waits for its end; the exit status, negative for a signal."""
        wait_for(self.ended, lambda: f'{self.folder} goes on\n{self.text()}')
        return int((self.folder / 'status').read_text())

    def text(self):
        return (self.folder / 'output').read_text() if (self.folder / 'output').exists() else ''


class Server:
    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, '-c', 'import fault_run; fault_run.serve()'],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert select.select([self.process.stdout], [], [], BOUND)[0]
        assert self.process.stdout.readline() == b'ready\n'

    def launch(self, folder, *lines, processes=1, argv=()):
        """Starts a run; ``lines`` are added to its config. One in the same folder goes on with what is there."""
        write_config(folder, lines)
        for name in ('status', 'output'):
            (folder / name).unlink(missing_ok=True)
        order = {'folder': str(folder), 'argv': [*ARGUMENTS, *argv], 'processes': processes}
        self.process.stdin.write(json.dumps(order).encode() + b'\n')
        self.process.stdin.flush()
        return Launch(folder)


@pytest.fixture(scope='module')
def server():
    server = Server()
    yield server
    server.process.stdin.close()
    try:
        server.process.wait(10)
    finally:
        server.process.kill()


@pytest.fixture
def launch(server, tmp_path):
    """Starts runs below this test's folder; none of their processes may be left when it ends."""
    try:
        yield lambda *lines, name='run', **kwargs: server.launch(tmp_path / name, *lines, **kwargs)
    finally:
        for pid in alive(tmp_path):
            os.kill(pid, signal.SIGKILL)


def wait_for(condition, otherwise=lambda: ''):
    until = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < until, otherwise()
        time.sleep(0.02)


def alive(folder):
    """The processes that were started in a folder, however far from their parents."""
    found = []
    for entry in Path('/proc').iterdir():
        if entry.name.isdigit():
            try:
                if Path(os.readlink(entry / 'cwd')).is_relative_to(folder):
                    found.append(int(entry.name))
            except OSError:  # it has ended, or is another user's
                continue
    return found


def no_orphans(folder):
    until = time.monotonic() + 5  # the kernel takes a moment to clear a killed process away
    while alive(folder) and time.monotonic() < until:
        time.sleep(0.02)
    return not alive(folder)


def digest(path):
    """Of weights, optimizer and schedulers of a checkpoint."""
    checkpoint = read_checkpoint(path)
    sha = hashlib.sha256()

    def feed(node):
        if isinstance(node, torch.Tensor):
            sha.update(node.contiguous().numpy().tobytes())
        elif isinstance(node, dict):
            for key in sorted(node, key=str):
                sha.update(str(key).encode())
                feed(node[key])
        elif isinstance(node, list | tuple):
            for value in node:
                feed(value)
        else:
            sha.update(repr(node).encode())

    feed([checkpoint.get(key) for key in ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers')])
    return sha.hexdigest()


def fault(kind, step, rank=0, at='train', **more):
    return f'custom_hooks[0].update({dict(kind=kind, step=step, rank=rank, at=at, **more)})'


@pytest.fixture(scope='module')
def undisturbed(server, tmp_path_factory):
    """The last checkpoint of a run that nothing happens to."""
    known = {}

    def get(*lines, processes=1):
        key = (lines, processes)
        if key not in known:
            run = server.launch(tmp_path_factory.mktemp('undisturbed'), *lines, processes=processes)
            assert run.status() == 0, run.text()
            known[key] = run.folder / 'run/iter_12.pth'
        return known[key]

    return get


def last(run):
    return run.folder / 'run/iter_12.pth'


def saved(run):
    """The iterations whose checkpoints are there."""
    return sorted(int(path.stem.removeprefix('iter_')) for path in (run.folder / 'run').glob('iter_*.pth'))


def begun_at(run):
    """Where this run and those before it in the folder began."""
    return sorted({int(path.stem.removeprefix('begun_at_')) for path in (run.folder / 'run').glob('begun_at_*')})


WORKERS = 'train_dataloader.update(num_workers=2, persistent_workers=True)'
EMA = "default_hooks.update(ema=dict(type='EMAHook', update_buffers=True))"
ACCUMULATE = 'optim_wrapper.update(accumulative_counts=3)'  # checkpoints after 4, 8: amid accumulated batches
NO_DROP = 'model.update(drop=0.0)'


def test_a_process_killed_again_and_again(launch, undisturbed):
    for step in (4, 5, 7, 10):
        run = launch(fault('kill', step, rank=step % 2), WORKERS, processes=2)
        assert run.status() == 1
        assert no_orphans(run.folder)
    run = launch(WORKERS, processes=2)
    assert run.status() == 0, run.text()
    assert begun_at(run) == [0, 4, 8]
    assert digest(last(run)) == digest(undisturbed(processes=2))


def test_a_bug_in_one_process(launch):
    run = launch(fault('raise', 6, rank=1), WORKERS, processes=2)
    assert run.status() == 1
    assert 'a bug in one process' in run.text()
    assert no_orphans(run.folder)
    assert saved(run) == [4]


def test_a_stopped_process(launch):
    """One process hangs; the other waits for as long as it is told to, and the launcher ends both."""
    run = launch(fault('stop', 6, rank=1), 'env_cfg.update(dist_cfg=dict(timeout=3))', WORKERS, processes=2)
    assert run.status() == 1
    assert no_orphans(run.folder)
    assert saved(run) == [4]


def test_sigterm_to_torchrun_in_validation(launch, undisturbed):
    run = launch(fault('term agent', 6, at='val'), WORKERS, processes=2)
    assert run.status() == 1
    check_stopped(run, launch, undisturbed)


def test_sigterm_to_torchrun(tmp_path, launch, undisturbed):
    """In the middle of training, with nothing of torchrun's replaced."""
    write_config(tmp_path / 'run', [fault('term agent', 6), WORKERS])
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        port = found.getsockname()[1]
    torchrun = ['-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-port', str(port)]
    with (tmp_path / 'run/output').open('w') as output:
        done = subprocess.run(
            [sys.executable, *torchrun, str(ROOT / 'tools/train.py'), *ARGUMENTS],
            cwd=tmp_path / 'run',
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=2 * BOUND,
        )
    assert done.returncode == 1
    check_stopped(Launch(tmp_path / 'run'), launch, undisturbed)


def check_stopped(run, launch, undisturbed):
    """A run that was told to stop at iteration 6 saved a checkpoint then or one step later, and goes on from there."""
    assert no_orphans(run.folder)
    assert saved(run) in ([4, 6], [4, 7]), run.text()
    at = saved(run)[-1]
    assert run.text().count(f'error: stopped by SIGTERM after iteration {at}; the checkpoint is in') == 2
    again = launch(WORKERS, processes=2)
    assert again.status() == 0, again.text()
    assert begun_at(again) == [0, at]
    assert digest(last(run)) == digest(undisturbed(processes=2))


@pytest.mark.parametrize(
    ('kind', 'at', 'lines'), [('term', 'train', ()), ('term', 'val', (EMA,)), ('term group', 'train', (WORKERS,))]
)
def test_sigterm_to_a_process(launch, undisturbed, kind, at, lines):
    run = launch(fault(kind, 6, at=at), *lines)
    assert run.status() == 75, run.text()
    assert run.text().splitlines()[-1].startswith('error: stopped by SIGTERM after iteration 6; the checkpoint is in')
    assert saved(run) == [4, 6]
    assert no_orphans(run.folder)
    again = launch(*lines)
    assert again.status() == 0, again.text()
    assert begun_at(again) == [0, 6]
    assert digest(last(run)) == digest(undisturbed(*lines))


def test_a_second_sigterm_and_ctrl_c_end_at_once(launch):
    twice, ctrl_c = launch(fault('term twice', 6), name='twice'), launch(fault('int', 6), WORKERS, name='ctrl_c')
    assert twice.status() == -signal.SIGTERM
    assert ctrl_c.status() not in (0, 2, 3, 75)
    for run in (twice, ctrl_c):
        assert saved(run) == [4]
        assert no_orphans(run.folder)


def test_sigterm_without_the_hook(launch):
    """The negative control: all since the last checkpoint is lost."""
    run = launch(fault('term', 6, unguarded=True))
    assert run.status() == -signal.SIGTERM
    assert saved(run) == [4]


def weights(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_nan_in_one_process(launch):
    run = launch(fault('nan', 6, rank=1), processes=2)
    unguarded = launch(fault('nan', 6, unguarded=True), name='unguarded')
    assert run.status() == 1
    text = run.text()
    for rank in (0, 1):
        assert f'error: iteration 6, process {rank}: a gradient is NaN or infinite' in text
        assert same(weights(run.folder / f'run/at_exit.{rank}.pt'), weights(run.folder / 'run/before.pt'))
    _, at_fault, images = (run.folder / 'run/seen.1').read_text().splitlines()[5].split()
    assert f'losses of this process: loss_a is nan\n  its images: {at_fault}, {images}\n' in text
    assert text.count('the losses of this process are finite') == 1
    assert 'exitcode  : 3' in text
    assert saved(run) == [4]
    assert no_orphans(run.folder)
    # Without the guard such a run ends well, with weights that are worth nothing.
    assert unguarded.status() == 0
    assert any(value.isnan().any() for value in read_checkpoint(last(unguarded))['state_dict'].values())


@pytest.mark.parametrize('loader', ['train', 'val'])
def test_a_bad_sample(launch, loader):
    """A worker that is killed, one that hangs, and a file that cannot be read; the message names the file."""
    expected = {'kill': 3, 'hang': 3, 'corrupt': 2}
    runs = {
        kind: launch(
            f"{loader}_dataloader['dataset'].update(fault='{kind}', index=5)",
            f'{loader}_dataloader.update(num_workers=2, timeout=2)',
            name=kind,
        )
        for kind in expected
    }
    for kind, run in runs.items():
        assert run.status() == expected[kind], run.text()
        message = run.text().rpartition('error: ')[2]
        assert 'sample 5 (images/005.jpg)' in message
        assert 'Traceback' not in run.text()
        assert ('OSError: image file is truncated' in message) == (kind == 'corrupt')
        assert ('a data worker died or hangs' in message) == (kind != 'corrupt')
        assert no_orphans(run.folder)


def test_a_bad_sample_without_workers(launch):
    run = launch("train_dataloader['dataset'].update(fault='corrupt', index=5)")
    assert run.status() == 2
    assert run.text().endswith('error: sample 5 (images/005.jpg) cannot be used: OSError: image file is truncated\n')


def test_a_hanging_worker_of_a_killed_process(launch):
    """It does not come round to noticing; the kernel ends it."""
    run = launch("train_dataloader['dataset'].update(fault='hang', index=5)", 'train_dataloader.update(num_workers=2)')
    wait_for((run.folder / 'hanging').exists, run.text)
    os.kill(min(alive(run.folder)), signal.SIGKILL)
    assert run.status() == -signal.SIGKILL
    assert no_orphans(run.folder)


def test_a_worker_killed_while_nobody_waits_for_it(launch):
    """torch raises that from a signal handler, in the middle of whatever the main process does."""
    run = launch(fault('kill worker', 6), WORKERS)
    assert run.status() == 3, run.text()
    assert 'error: a data worker died or hangs' in run.text()
    assert 'images/' in run.text().rpartition('worker 0: ')[2]
    assert no_orphans(run.folder)


@pytest.mark.parametrize(('line', 'processes'), [(ACCUMULATE, 1), (ACCUMULATE, 2), (EMA, 1)])
def test_accumulated_and_averaged(launch, undisturbed, line, processes):
    run = launch(fault('kill', 7), line, processes=processes)
    assert run.status() != 0
    again = launch(line, processes=processes)
    assert again.status() == 0, again.text()
    assert begun_at(again) == [0, 4]
    assert digest(last(again)) == digest(undisturbed(line, processes=processes))


def test_two_processes_then_one(launch, undisturbed):
    whole = undisturbed(NO_DROP, processes=2)
    run = launch(fault('kill', 7), NO_DROP, processes=2)
    assert run.status() == 1
    alone = (NO_DROP, 'train_dataloader.update(batch_size=4)')
    refused = launch(*alone)
    assert refused.status() == 2
    assert 'world_size: 2 there, 1 here' in refused.text()
    assert '--allow-changed world_size' in refused.text()
    assert begun_at(refused) == [0]
    again = launch(*alone, argv=['--allow-changed', 'world_size'])
    assert again.status() == 0, again.text()
    assert begun_at(again) == [0, 4]
    steps = [images(whole.parent, rank) for rank in (0, 1)]
    # Of this file, the lines of the run that was killed come first.
    assert images(run.folder / 'run', 0)[-8:] == [sorted(a + b) for a, b in zip(*steps, strict=True)][4:]
    for name, value in read_checkpoint(whole)['state_dict'].items():
        assert torch.allclose(read_checkpoint(last(run))['state_dict'][name], value, rtol=1e-4, atol=1e-5)


def images(folder, rank):
    """Those of each step that a process has seen."""
    return [line.split()[1:] for line in (folder / f'seen.{rank}').read_text().splitlines()]
