import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from backbones.files import read_checkpoint
from densekit.engine.distributed import detect_launcher, prepare_launcher, slurm_as_torchrun

ROOT = Path(__file__).parents[2]

SRUN = {
    'SLURM_JOB_ID': '4812345',
    'SLURM_NTASKS': '16',
    'SLURM_STEP_ID': '0',
    'SLURM_STEP_NUM_TASKS': '16',
    'SLURM_STEP_NODELIST': 'gpu[07-08]',
    'SLURM_PROCID': '11',
    'SLURM_LOCALID': '3',
}

# Notes what this rank ended with, and which pictures it saw.
HOOK = """
import hashlib
import os
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class NoteRank(Hook):
    def before_run(self, runner):
        self.seen = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.seen += [sample.img_path for sample in data_batch['data_samples']]

    def after_train(self, runner):
        digest = hashlib.sha256()
        for name, value in runner.model.module.state_dict().items():  # the statistics of BN as well
            digest.update(name.encode() + value.detach().numpy().tobytes())
        with open(f'{runner.work_dir}/rank{runner.rank}.txt', 'w') as file:
            print(digest.hexdigest(), *sorted(set(self.seen)), sep='\\n', file=file)
"""

# One linear layer below one convolution with SyncBN, as in the Cascade recipes.
SYNC_BN_HEAD = """
model = dict(roi_head=dict(bbox_head=dict(
    _delete_=True, type='ConvFCBBoxHead', num_shared_convs=1, num_shared_fcs=1, in_channels=64, conv_out_channels=16,
    fc_out_channels=32, roi_feat_size=7, num_classes=5, reg_decoded_bbox=True,
    bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2]),
    norm_cfg=dict(type='SyncBN', requires_grad=True), loss_bbox=dict(type='GIoULoss', loss_weight=10.0),
    loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False))))
"""


def test_the_launcher_is_found_out():
    assert detect_launcher({}) == 'none'
    assert detect_launcher(SRUN) == 'slurm'
    assert detect_launcher({**SRUN, 'RANK': '0', 'WORLD_SIZE': '2'}) == 'pytorch'  # torchrun below srun
    assert detect_launcher({**SRUN, 'SLURM_STEP_NUM_TASKS': '1'}) == 'none'  # srun --ntasks=1 in a larger job


def test_sbatchs_own_shell_is_not_srun():
    own_shell = {key: value for key, value in SRUN.items() if not key.startswith('SLURM_STEP')}
    assert own_shell['SLURM_NTASKS'] == '16'
    assert detect_launcher(own_shell) == 'none'


def scontrol(folder, script):
    path = folder / 'scontrol'
    path.write_text(f'#!/bin/sh\n{script}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {'PATH': f'{folder}{os.pathsep}{os.environ["PATH"]}'}


def test_sruns_variables_become_torchruns(tmp_path, monkeypatch):
    for key, value in scontrol(tmp_path, '[ "$*" = "show hostnames gpu[07-08]" ] && printf "gpu07\\ngpu08\\n"').items():
        monkeypatch.setenv(key, value)
    expected = {'RANK': '11', 'WORLD_SIZE': '16', 'LOCAL_RANK': '3', 'MASTER_ADDR': 'gpu07', 'MASTER_PORT': '32345'}
    assert slurm_as_torchrun(SRUN, num_gpus=8) == expected
    assert slurm_as_torchrun(SRUN, num_gpus=0) == expected
    # --gpus-per-task=1: each task sees one GPU, number 0.
    assert slurm_as_torchrun(SRUN, num_gpus=1) == {**expected, 'LOCAL_RANK': '0'}
    given = {'MASTER_ADDR': 'other', 'MASTER_PORT': '1234'}
    assert slurm_as_torchrun({**SRUN, **given}, num_gpus=8) == {**expected, **given}


@pytest.mark.parametrize('script', ['exit 1', None], ids=['fails', 'missing'])
def test_a_node_that_cannot_be_found_out(tmp_path, monkeypatch, script):
    monkeypatch.setenv('PATH', str(tmp_path))
    if script:
        scontrol(tmp_path, script)
    with pytest.raises(ValueError, match=r'nodes gpu\[07-08\].*Set MASTER_ADDR'):
        slurm_as_torchrun(SRUN, num_gpus=8)


def test_the_environment_is_made_torchruns(monkeypatch):
    environ = {}
    monkeypatch.setattr(os, 'environ', environ)
    assert prepare_launcher() == 'none'
    assert environ == {}
    environ.update(SRUN, MASTER_ADDR='gpu07')
    assert prepare_launcher() == 'pytorch'
    assert environ['RANK'] == '11'
    assert environ['WORLD_SIZE'] == '16'


def free_port():
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


def config(folder, base, text=''):
    (folder / 'note_rank.py').write_text(HOOK)
    path = folder / 'parallel.py'
    imports = ['densekit.ops', 'backbones', 'densekit.engine', 'densekit.models', 'densekit.data']
    imports += ['densekit.models.slide', 'densekit.models.uper_head', 'densekit.models.label_maps']
    imports += ['densekit.evaluation', 'densekit.evaluation.coco', 'note_rank']
    path.write_text(
        f"_base_ = '{base}'\n{text}\ncustom_imports = dict(imports={imports})\ncustom_hooks = [dict(type='NoteRank')]\n"
    )
    return str(path)


def environment(folder, **more):
    path = os.pathsep.join([str(folder), os.environ.get('PYTHONPATH', '')]).rstrip(os.pathsep)
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path, **more}


def check(work_dir, metric):
    """Both ranks trained, on different pictures, to the same weights, and validated once."""
    ranks = [(work_dir / f'rank{rank}.txt').read_text().split() for rank in range(2)]
    assert ranks[0][0] == ranks[1][0]
    assert len(ranks[0]) == len(ranks[1]) == 5
    assert not set(ranks[0][1:]) & set(ranks[1][1:])
    (log,) = (path.read_text() for path in work_dir.glob('*/*.log'))
    assert log.count('SyncBN layers become BN: gloo cannot synchronize them') == 1
    assert 'The global batch is 4 and the recipe was made for 8' in log
    assert metric in log.rpartition('Iter(val)')[2]
    weights = read_checkpoint(work_dir / 'iter_2.pth')['state_dict']
    assert all(value.isfinite().all() for value in weights.values())


OPTIONS = ['--cfg-options', 'train_cfg.max_iters=2', 'train_cfg.val_interval=2']


def test_two_processes_below_torchrun(tiny, tmp_path):
    command = ['-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-port', str(free_port())]
    tool = [str(ROOT / 'tools/train.py'), config(tmp_path, tiny.seg), '--work-dir', str(tmp_path / 'run')]
    done = subprocess.run(
        [sys.executable, *command, *tool, *OPTIONS], env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    check(tmp_path / 'run', 'mIoU')


def test_two_processes_below_srun(tiny, tmp_path):
    """Two processes with srun's variables, which differ in their numbers alone."""
    job = {**SRUN, 'SLURM_NTASKS': '2', 'SLURM_STEP_NUM_TASKS': '2', **scontrol(tmp_path, 'echo 127.0.0.1')}
    job['MASTER_PORT'] = str(free_port())
    tool = [str(ROOT / 'tools/train.py'), config(tmp_path, tiny.det, SYNC_BN_HEAD), '--work-dir', str(tmp_path / 'run')]
    started = [
        subprocess.Popen(
            [sys.executable, *tool, '--amp', 'bf16', *OPTIONS],
            env=environment(tmp_path, **{**job, 'SLURM_PROCID': rank, 'SLURM_LOCALID': rank}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in '01'
    ]
    outputs = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    check(tmp_path / 'run', 'segm_mAP')
