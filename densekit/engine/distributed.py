"""Processes: which launcher started this one, and the process group on machines without CUDA."""

import os
import subprocess
from collections.abc import Mapping

import torch
import torch.distributed as dist


def detect_launcher(env: Mapping[str, str]) -> str:
    """Tells who started this process.

    Args:
        env: the environment variables.

    Returns:
        'pytorch' below torchrun, 'slurm' below srun with more than one task, else 'none'.
    """
    if 'RANK' in env and 'WORLD_SIZE' in env:
        return 'pytorch'
    # The number of tasks of this step, set by srun only: sbatch's own shell has SLURM_NTASKS as well.
    if int(env.get('SLURM_STEP_NUM_TASKS', '1')) > 1:
        return 'slurm'
    return 'none'


def slurm_as_torchrun(env: Mapping[str, str], num_gpus: int) -> dict[str, str]:
    """The variables that torchrun would have set, from those that srun did.

    Args:
        env: the environment variables below srun.
        num_gpus: that this process sees; where SLURM gives each task its own it sees one, whatever its number.

    Returns:
        RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Raises:
        ValueError: if the name of the first node cannot be found out.
    """
    local = int(env['SLURM_LOCALID'])
    # Jobs that share a node must not share a port; the job's number keeps them apart.
    port = 20000 + int(env['SLURM_JOB_ID']) % 20000
    return {
        'RANK': env['SLURM_PROCID'],
        'WORLD_SIZE': env['SLURM_STEP_NUM_TASKS'],
        'LOCAL_RANK': str(local % num_gpus if num_gpus else local),
        'MASTER_ADDR': env.get('MASTER_ADDR') or _first_host(env['SLURM_STEP_NODELIST']),
        'MASTER_PORT': env.get('MASTER_PORT') or str(port),
    }


def prepare_launcher() -> str:
    """Makes the environment look like torchrun's where SLURM started the process.

    Returns:
        The launcher to give to mmengine: 'pytorch' or 'none'.
    """
    launcher = detect_launcher(os.environ)
    if launcher == 'slurm':
        os.environ.update(slurm_as_torchrun(os.environ, torch.cuda.device_count()))
        launcher = 'pytorch'
    return launcher


def _first_host(nodes: str) -> str:
    """The first of SLURM's list of nodes, such as ``gpu[07-09]``."""
    try:
        listed = subprocess.run(['scontrol', 'show', 'hostnames', nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f'scontrol does not tell the first of the nodes {nodes} ({error}). Set MASTER_ADDR to its name before srun.'
        ) from error
    return listed.stdout.split()[0]


def init_cpu_process_group() -> None:
    """Starts gloo below torchrun on a machine without CUDA, where mmengine's own route calls torch.cuda."""
    if not torch.cuda.is_available() and not dist.is_initialized():
        dist.init_process_group('gloo')


def end_process_group() -> None:
    """Leaves the group, if there is one; NCCL warns of processes that end without."""
    if dist.is_initialized():
        dist.destroy_process_group()
