"""Processes: which launcher started this one, and the process group on machines without CUDA."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


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


def init_cpu_process_group(timeout: float | None = None) -> None:
    """Starts gloo below torchrun on a machine without CUDA, where mmengine's own route calls torch.cuda.

    Args:
        timeout: seconds after which processes that wait for another one give up; default torch's.
    """
    if not torch.cuda.is_available() and not dist.is_initialized():
        dist.init_process_group('gloo', timeout=None if timeout is None else timedelta(seconds=timeout))


def from_first(text: str) -> str:
    """The text that the first process has, in all of them. Bytes travel, not pickles, which could run code."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return text
    device = torch.device('cuda', torch.cuda.current_device()) if dist.get_backend() == 'nccl' else torch.device('cpu')
    content = torch.frombuffer(bytearray(text.encode() or b'\0'), dtype=torch.uint8).to(device)
    length = torch.tensor([len(text.encode())], device=device)
    dist.broadcast(length, 0)
    if dist.get_rank() != 0:
        content = torch.zeros(max(int(length), 1), dtype=torch.uint8, device=device)
    dist.broadcast(content, 0)
    return bytes(content[: int(length)].tolist()).decode()


def average(tensors: Sequence[Tensor]) -> None:
    """Replaces tensors by their mean over all processes, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()


def end_process_group() -> None:
    """Leaves the group, if there is one; NCCL warns of processes that end without."""
    if dist.is_initialized():
        dist.barrier()  # a process that leaves while another still talks to it can abort that one
        dist.destroy_process_group()
