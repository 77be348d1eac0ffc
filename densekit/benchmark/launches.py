"""What a call costs the processor that starts its kernels, and how long the GPU works on them."""

import time
from dataclasses import dataclass

import torch

from densekit.benchmark.machine import synchronize
from densekit.benchmark.timing import Call

_MOST_PROFILED = 20
_LAUNCHES = ('cudaLaunchKernel', 'cuLaunchKernel', 'cudaGraphLaunch', 'cuGraphLaunch')


@dataclass(frozen=True)
class Launches:
    """Of one call.

    Attributes:
        kernels: launches of kernels and of graphs.
        host: seconds until the call returns, the GPU not waited for.
        busy: seconds in which the GPU did anything.
    """

    kernels: int
    host: float
    busy: float


def count(call: Call, device: torch.device) -> Launches | None:
    """Runs a call four times; None on a CPU, which launches nothing."""
    if device.type != 'cuda':
        return None
    hosts = []
    for _ in range(3):
        synchronize(device)
        start = time.perf_counter()
        call()
        hosts.append(time.perf_counter() - start)
    synchronize(device)
    kernels, busy = _profiled(call, device, 1)
    return Launches(kernels, sorted(hosts)[1], busy)


def busy_seconds(call: Call, device: torch.device, repeats: int = 1) -> float:
    """Seconds of a call in which a GPU did anything."""
    return _profiled(call, device, min(repeats, _MOST_PROFILED))[1]


def _profiled(call: Call, device: torch.device, repeats: int) -> tuple[int, float]:
    """Launches and busy seconds of a call."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(repeats):
            call()
        synchronize(device)
    kernels, spans = 0, []
    for event in profile.profiler.kineto_results.events():
        if event.name().startswith(_LAUNCHES):
            kernels += 1
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation():
            spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
    return kernels // repeats, covered(spans) / 1e9 / repeats


def covered(spans: list[tuple[int, int]]) -> int:
    """The length of the union of intervals ``(begin, end)``."""
    total, reached = 0, None
    for begin, end in sorted(spans):
        begin = begin if reached is None else max(begin, reached)
        if end > begin:
            total += end - begin
        reached = end if reached is None else max(reached, end)
    return total
