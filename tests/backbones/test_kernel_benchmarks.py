"""The scripts that time kernels on a GPU run, and time what they say."""

import importlib.util
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from backbones import convnext

BENCHMARKS = Path(__file__).parents[2] / 'benchmarks'


def script(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def smoke(name, out):
    env = {**os.environ, 'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, str(BENCHMARKS / f'{name}.py'), '--smoke', '--out', str(out)]
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_parts_of_a_block(tmp_path):
    said = smoke('gpu_block', tmp_path)
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    parts = {line['what']: line for line in content['lines']}
    assert {'LayerNorm', 'fc2 backward with GELU', 'block V1, forward + backward'} <= set(parts)
    assert len(parts) == len(content['lines']) == 10
    assert all(min(line['microseconds'].values()) > 0 and line['what'] in said for line in content['lines'])
    assert content['command'].endswith(f'--smoke --out {tmp_path}') and 'torch' in content['versions']


@pytest.mark.slow
def test_tables_of_the_depthwise_kernels(tmp_path):
    said = smoke('tune_depthwise', tmp_path / 'tune.json')
    lines = json.loads((tmp_path / 'tune.json').read_text())
    assert [line['direction'] for line in lines] == list(script('tune_depthwise').DIRECTIONS)
    assert {'torch nchw', 'as planned', '4 columns, 3 programs, one kernel'} <= set(lines[1]['seconds'])
    assert all(name in said for line in lines for name in line['seconds'])


def test_no_gradient_is_added_to_that_of_the_run_before(monkeypatch):
    made, layers = [], []
    original = convnext.ConvNeXtBlock

    def build(*args, **kwargs):
        made.append(block := original(*args, **kwargs))
        for parameter in block.parameters():
            parameter.register_hook(lambda gradient, p=parameter: layers.append(p.grad))
        return block

    monkeypatch.setattr(convnext, 'ConvNeXtBlock', build)
    forms = script('gpu_block').blocks(1, (2, 3), 16, torch.bfloat16, 'cpu', False)
    for _ in range(2):
        forms['eager'](0)
    assert layers == [None] * 2 * len(list(made[1].parameters()))
    assert all(parameter.grad is None for parameter in made[1].parameters())


def test_each_block_is_compiled_for_itself(monkeypatch):
    done = []
    monkeypatch.setattr(torch.compiler, 'reset', lambda: done.append('reset'))
    monkeypatch.setattr(torch, 'compile', lambda block, **options: done.append(options) or block)
    for use_grn in (False, True):
        script('gpu_block').blocks(1, (2, 3), 16, torch.bfloat16, 'cpu', use_grn)
    assert done == ['reset', {'dynamic': False}] * 2


@pytest.fixture
def queue(monkeypatch):
    """What the device is given, instead of a device."""
    given = []
    event = lambda **_: SimpleNamespace(  # noqa: E731
        record=lambda: given.append('record'), synchronize=lambda: given.append('wait'), elapsed_time=lambda end: 6.0
    )
    monkeypatch.setattr(torch.cuda, 'Event', event)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: given.append('wait'))
    monkeypatch.setattr(torch.cuda, '_sleep', lambda cycles: given.append('sleep'))
    return given


def test_calls_are_in_the_queue_before_the_device_begins(queue):
    times = script('gpu_block').measure({'a': lambda i: queue.append(i)}, rounds=1, repeats=3, cuda=True)
    assert queue == 2 * ['wait', 'sleep', 'record', 0, 1, 2, 'record', 'wait']
    assert times == {'a': pytest.approx(2000.0)}


def test_tables_are_changed_once_for_all_calls(queue):
    @contextmanager
    def within():
        queue.append('enter')
        yield
        queue.append('leave')

    calls = [lambda i=i: queue.append(i) for i in range(3)]
    times = script('tune_depthwise').seconds({'a': (within, calls)}, rounds=1, cuda=True)
    assert queue == ['enter', 0, 1, 2, 'leave', 'enter', 'sleep', 'record', 0, 1, 2, 'record', 'leave', 'wait']
    assert times == {'a': pytest.approx(0.002)}
