import ctypes
import subprocess
import sys

from densekit.engine.heap import keep_freed_memory

PAGE_FAULTS = """
import resource
import torch
from densekit.engine.heap import keep_freed_memory
if {keep}:
    assert keep_freed_memory()

def step():
    return [torch.zeros(1_000_000).add_(1) for _ in range(20)]

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool) -> int:
    command = [sys.executable, '-c', PAGE_FAULTS.format(keep=keep)]
    return int(subprocess.run(command, env={}, capture_output=True, text=True, check=True).stdout)


def test_pages_are_touched_once():
    assert faults(keep=True) * 10 < faults(keep=False)


def test_what_the_environment_says_holds(monkeypatch):
    monkeypatch.setattr(ctypes, 'CDLL', None)
    monkeypatch.setenv('MALLOC_ARENA_MAX', '2')
    assert not keep_freed_memory()
