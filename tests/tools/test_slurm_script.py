"""tools/slurm_train.sh with a srun and a scontrol that note how they are called; no SLURM."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'tools/slurm_train.sh'
CONFIG = 'configs/segmentation/upernet_convnext_t_ade20k.py'
JOB = {'SLURM_JOB_ID': '4812345', 'SLURM_CPUS_PER_TASK': '6'}

NOTE = '#!/bin/sh\nprintf "%s\\n" "$@" >> "$NOTES/{name}"\n{then}\n'
NOTE_ENVIRONMENT = 'printf "%s" "$OMP_NUM_THREADS" > "$NOTES/threads"; echo begun; exit ${SRUN_STATUS:-0}'

# Stops its own run after two iterations, as SLURM would, unless this is the second attempt.
STOP = """
import os
import signal
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class TimeIsUp(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 1 and 'SLURM_RESTART_COUNT' not in os.environ:
            os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.fixture
def cluster(tmp_path):
    """The environment of a job, with a folder of notes in it."""
    programs = tmp_path / 'programs'
    programs.mkdir()
    for name, then in {'srun': NOTE_ENVIRONMENT, 'scontrol': 'exit ${SCONTROL_STATUS:-0}'}.items():
        path = programs / name
        path.write_text(NOTE.format(name=name, then=then))
        path.chmod(0o755)
    environ = {key: value for key, value in os.environ.items() if not key.startswith(('SLURM_', 'OMP_NUM'))}
    return {**environ, **JOB, 'PATH': f'{programs}{os.pathsep}{environ["PATH"]}', 'NOTES': str(tmp_path)}


def run(cluster, *argv, cwd=ROOT, **more):
    return subprocess.run([SCRIPT, *argv], env={**cluster, **more}, cwd=cwd, capture_output=True, text=True)


def notes(cluster, program):
    path = Path(cluster['NOTES'], program)
    return path.read_text().splitlines() if path.exists() else None


def sbatch_options():
    """As sbatch reads them: comments before the first command."""
    head = re.split(r'^(?!#|$)', SCRIPT.read_text(), maxsplit=1, flags=re.MULTILINE)[0]
    return dict(re.findall(r'^#SBATCH --([\w-]+)(?:=(\S+))?$', head, re.MULTILINE))


def test_what_sbatch_is_told():
    options = sbatch_options()
    assert len(options) == SCRIPT.read_text().count('\n#SBATCH')
    assert options['ntasks-per-node'] == options['gpus-per-node']
    assert options['signal'] == 'TERM@120'  # to the tasks; with B: it would be the shell's alone
    assert options['open-mode'] == 'append' and 'requeue' in options


def test_the_line_that_srun_gets(cluster):
    argv = [CONFIG, '--shard', '--work-dir', 'work dirs/a', '--cfg-options', 'load_from=a.pth', 'randomness.seed=1']
    done = run(cluster, *argv, PYTHON='my python')
    assert done.returncode == 0, done.stderr
    line = notes(cluster, 'srun')
    assert line[:5] == ['--cpus-per-task=6', '--kill-on-bad-exit=0', '--wait=60', 'my python', 'tools/train.py']
    assert line[5:] == [*argv, '--resume=auto']
    spec = importlib.util.spec_from_file_location('train_tool', ROOT / 'tools/train.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    args = tool.parse_args(line[5:])
    assert (args.config, args.resume, args.shard, args.work_dir) == (CONFIG, 'auto', True, 'work dirs/a')
    assert args.cfg_options == ['load_from=a.pth', 'randomness.seed=1']


def test_the_number_of_threads_can_be_given(cluster):
    run(cluster, CONFIG)
    assert notes(cluster, 'threads') == ['1']
    run(cluster, CONFIG, OMP_NUM_THREADS='4')
    assert notes(cluster, 'threads') == ['4']


def test_a_saved_run_goes_back_into_the_queue(cluster):
    done = run(cluster, CONFIG, SRUN_STATUS='75')
    assert done.returncode == 75
    assert notes(cluster, 'scontrol') == ['requeue', '4812345']
    assert 'goes back into the queue' in done.stdout


# Success; a crash; a user's mistake; a run that stopped itself; killed, by hand or for memory.
@pytest.mark.parametrize('status', [0, 1, 2, 3, 137, 143])
def test_any_other_run_does_not(cluster, status):
    done = run(cluster, CONFIG, SRUN_STATUS=str(status))
    assert done.returncode == status
    assert notes(cluster, 'scontrol') is None
    assert notes(cluster, 'srun') is not None


def test_a_queue_that_does_not_take_it_back(cluster):
    done = run(cluster, CONFIG, SRUN_STATUS='75', SCONTROL_STATUS='1')
    assert done.returncode == 75
    assert 'submit the same command again' in done.stderr


def test_a_cancelled_job_stays_cancelled(cluster):
    """Scancel signals the shell as well, which must not live long enough to requeue."""
    srun = Path(cluster['PATH'].partition(os.pathsep)[0], 'srun')
    srun.write_text(NOTE.format(name='srun', then='trap "exit 75" TERM; while :; do sleep 0.1; done'))
    process = subprocess.Popen([SCRIPT, CONFIG], env=cluster, cwd=ROOT, start_new_session=True)
    while notes(cluster, 'srun') is None or len(notes(cluster, 'srun')) < 7:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM
    assert notes(cluster, 'scontrol') is None


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        ([], 'no config'),
        ([CONFIG, '--resume'], '--resume: a job always resumes'),
        ([CONFIG, '--resume=x.pth'], '--resume=x.pth: a job always resumes'),
        ([CONFIG, '--load-from', 'x.pth'], 'load_from=CKPT'),
    ],
    ids=['no config', 'resume', 'resume from', 'load from'],
)
def test_what_cannot_be_asked_for(cluster, argv, message):
    done = run(cluster, *argv)
    assert done.returncode == 2
    assert message in done.stderr
    assert notes(cluster, 'srun') is None


def test_outside_of_a_job_or_of_the_repository(cluster, tmp_path):
    assert 'start it with sbatch' in run(cluster, CONFIG, SLURM_JOB_ID='').stderr
    done = run(cluster, CONFIG, cwd=tmp_path)
    assert done.returncode == 2 and 'submit from the folder' in done.stderr
    assert notes(cluster, 'srun') is None


def test_a_run_goes_on_in_the_next_job(cluster, tiny, tmp_path):
    (tmp_path / 'time_is_up.py').write_text(STOP)
    config = tmp_path / 'config.py'
    config.write_text(
        f"_base_ = '{tiny.seg}'\ncustom_imports = dict(imports=_base_.custom_imports.imports + ['time_is_up'])\n"
        "custom_hooks = [dict(type='TimeIsUp')]\n"
    )
    srun = Path(cluster['PATH'].partition(os.pathsep)[0], 'srun')
    srun.write_text(NOTE.format(name='srun', then='shift 3\nexec "$@"'))
    job = {'PYTHON': sys.executable, 'PYTHONPATH': f'{tmp_path}{os.pathsep}{cluster.get("PYTHONPATH", "")}'}
    argv = [str(config), '--work-dir', str(tmp_path / 'run')]

    stopped = run(cluster, *argv, **job)
    assert stopped.returncode == 75, stopped.stderr
    assert notes(cluster, 'scontrol') == ['requeue', '4812345']
    assert (tmp_path / 'run/last_checkpoint').read_text().endswith('iter_2.pth')
    finished = run(cluster, *argv, **job, SLURM_RESTART_COUNT='1')
    assert finished.returncode == 0, finished.stderr
    assert 'resumed epoch: 0, iter: 2' in finished.stdout
    assert notes(cluster, 'scontrol') == ['requeue', '4812345']  # not again


@pytest.mark.skipif(shutil.which('shellcheck') is None, reason='shellcheck is not installed')
def test_shellcheck():
    done = subprocess.run(['shellcheck', SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
