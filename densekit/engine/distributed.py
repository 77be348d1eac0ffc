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
    # sbatch's own shell has SLURM_NTASKS too; a step id exists only below srun.
    if int(env.get('SLURM_NTASKS', '1')) > 1 and 'SLURM_STEP_ID' in env:
        return 'slurm'
    return 'none'


def slurm_as_torchrun(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that torchrun would have set, from those that srun did.

    Args:
        env: the environment variables below srun.

    Returns:
        RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
    """
    address = env.get('MASTER_ADDR')
    if address is None:
        hosts = subprocess.run(
            ['scontrol', 'show', 'hostnames', env['SLURM_STEP_NODELIST']], capture_output=True, text=True, check=True
        )
        address = hosts.stdout.split()[0]
    # Jobs that share a node must not share a port; the job's number keeps them apart.
    port = env.get('MASTER_PORT', str(20000 + int(env.get('SLURM_JOB_ID', '0')) % 20000))
    return {
        'RANK': env['SLURM_PROCID'],
        'WORLD_SIZE': env['SLURM_NTASKS'],
        'LOCAL_RANK': env['SLURM_LOCALID'],
        'MASTER_ADDR': address,
        'MASTER_PORT': port,
    }


def prepare_launcher() -> str:
    """Makes the environment look like torchrun's where SLURM started the process.

    Returns:
        The launcher to give to mmengine: 'pytorch' or 'none'.
    """
    launcher = detect_launcher(os.environ)
    if launcher == 'slurm':
        os.environ.update(slurm_as_torchrun(os.environ))
        launcher = 'pytorch'
    return launcher


def init_cpu_process_group() -> None:
    """Starts gloo below torchrun on a machine without CUDA, where mmengine's own route calls torch.cuda."""
    if not torch.cuda.is_available() and not dist.is_initialized():
        dist.init_process_group('gloo')
