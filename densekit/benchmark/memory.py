"""The most memory that a call holds at one time, beyond what was there before.

On CUDA as the allocator counts it (``max_memory_allocated``). On a CPU from the profiler's record of each tensor's
allocation and release: what libraries take for themselves is not among it.
"""

import torch

from densekit.benchmark.machine import synchronize
from densekit.benchmark.timing import Call


def peak_bytes(call: Call, device: torch.device) -> int:
    """Runs a call and counts.

    Args:
        call: it has run before, so that what it makes once is there.
        device: that it runs on.
    """
    if device.type == 'cuda':
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        call()
    result = profile.profiler.kineto_results
    changes = sorted((event.start_ns(), event.nbytes()) for event in result.events() if event.name() == '[memory]')
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak
