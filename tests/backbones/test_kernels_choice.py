import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backbones.kernels import choice, depthwise
from backbones.kernels.depthwise import SIZES
from backbones.kernels.depthwise_plan import (
    CONVOLVE_RESIDENT,
    CONVOLVE_RESIDENT_OLDER,
    CORRELATE_RESIDENT,
    TOGETHER_RESIDENT,
)

ROOT = Path(__file__).parents[2]
CUDA = torch.device('cuda', 0)


@pytest.fixture
def hopper(monkeypatch):
    """As if a device of compute capability 9.0 were there."""
    pytest.importorskip('triton')
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'a GPU')


def test_without_triton():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        'import backbones, torch\nfrom backbones.kernels import block, choice, depthwise, grn, mlp, pointwise\n'
        "print(choice.why_not('cuda', torch.float32), choice.choose('auto', torch.device('cpu'), torch.float32))\n"
        'depthwise.depthwise_conv2d(torch.zeros(1, 8, 2, 2), torch.zeros(8, 1, 7, 7))'
    )
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.split('\n')[0] == 'Triton is not installed eager'
    assert done.stderr.endswith('RuntimeError: the Triton kernels cannot run here: Triton is not installed\n')


def test_on_a_cpu(monkeypatch, caplog):
    pytest.importorskip('triton')
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    cpu = torch.device('cpu')
    assert not choice.available(cpu, torch.float32)
    assert choice.choose('auto', cpu, torch.float32) == choice.choose('eager', cpu, torch.float32) == 'eager'
    assert not caplog.records
    with pytest.raises(RuntimeError, match=r"there are none for cpu. Give kernels='auto' or 'eager'"):
        choice.choose('triton', cpu, torch.float32)
    with pytest.raises(RuntimeError, match='there are none for cpu'):
        depthwise.depthwise_conv2d(torch.zeros(1, 8, 2, 2), torch.zeros(8, 1, 7, 7))
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    assert choice.choose('triton', cpu, torch.float64) == 'triton'
    assert choice.choose('auto', cpu, torch.float64) == 'eager'


def test_auto_is_eager_until_proven_and_says_so_once(hopper, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        assert [choice.choose('auto', CUDA, torch.bfloat16) for _ in range(3)] == ['eager'] * 3
    (record,) = caplog.records
    assert record.getMessage() == (
        "ConvNeXt runs without Triton kernels (kernels='auto'): they are not proven on compute capability 9.0 with "
        "torch.bfloat16 yet; kernels='triton' takes them all the same"
    )
    monkeypatch.setattr(choice, 'PROVEN', frozenset({((9, 0), torch.bfloat16)}))
    choice._decide.cache_clear()
    assert choice.choose('auto', CUDA, torch.bfloat16) == 'triton'
    assert choice.choose('auto', CUDA, torch.float16) == 'eager'


def test_an_old_device_has_none(hopper, monkeypatch):
    assert choice.choose('triton', CUDA, torch.float16) == 'triton'
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))
    choice._decide.cache_clear()
    assert choice.choose('auto', CUDA, torch.float16) == 'eager'
    with pytest.raises(RuntimeError, match=r'a GPU has compute capability 7\.5, below 8\.0'):
        choice.choose('triton', CUDA, torch.float16)
    with pytest.raises(RuntimeError, match=r'there are none for torch\.float64'):
        choice.choose('triton', CUDA, torch.float64)


def test_the_device_is_asked_once_for_all_blocks(hopper, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: asked.append(device) or (9, 0))
    for dtype in (torch.float16, torch.bfloat16):
        for _ in range(3):
            assert choice.choose('triton', CUDA, dtype) == 'triton'
    assert asked == [CUDA] * 2


def test_an_old_triton_is_named(hopper, monkeypatch):
    monkeypatch.setattr(choice, '_triton_version', lambda: (3, 2))
    with pytest.raises(RuntimeError, match=r'cannot run here: Triton 3\.2 is older than 3\.6'):
        choice.choose('triton', CUDA, torch.float16)


def test_what_the_kernels_are_compared_with_is_exact(device):
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_unknown_kernels():
    with pytest.raises(ValueError, match=r"kernels='cuda' is unknown; choose from auto, eager, triton"):
        choice.check_kernels('cuda')


def budget(*args):
    """What benchmarks/kernel_budget.py reads in the machine code, by default for compute capability 9.0."""
    pytest.importorskip('triton')
    command = [sys.executable, 'benchmarks/kernel_budget.py', '--json', *args]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=3000, env={'HOME': str(Path.home())}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_budget(rows):
    for row in rows:
        convolve = CONVOLVE_RESIDENT if row['capability'] >= 90 else CONVOLVE_RESIDENT_OLDER
        resident = dict(convolve=convolve, convolve_normalize=TOGETHER_RESIDENT, correlate=CORRELATE_RESIDENT)
        assert row['spills'] == row['stack'] == 0, row
        name, _, size = row['kernel'].partition(' ')
        if name in resident:
            assert row['programs'] >= resident[name][int(size.split('x')[0])], row


def test_seven_by_seven_fits_the_registers():
    rows = budget('--channels', '96', '--only', 'convolve', 'correlate')
    assert {row['kernel'] for row in rows} == {'convolve 7x7', 'correlate 7x7'}
    check_budget(rows)
    assert all(row['programs'] == 4 for row in rows)
    check_multiply_adds(rows)


def check_multiply_adds(rows):
    """Within the images and beside their borders."""
    assert all(row['multiply-adds'] > 0.65 for row in rows)
    assert all(0.6 < row['at the border'] < row['multiply-adds'] for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_with_the_norm_in_the_same_kernel(dtype):
    """For programs of 16, 32, 128 and 64 channels; its sums are in the order of the kernel for the norm alone."""
    for channels, capability in (('40', '90'), ('96', '80'), ('128', '90'), ('256', '90')):
        arguments = '--channels', channels, '--capability', capability, '--dtype', dtype
        norm, *rows = budget(*arguments, '--only', '_normalize_kernel', 'convolve_normalize')
        assert norm['kernel'] == '_normalize_kernel 7x7' and len(norm['sums']) == 2
        for row in rows:
            assert row['kernel'] == 'convolve_normalize 7x7' and row['sums'] == norm['sums']
        check_budget(rows)
        check_multiply_adds(rows)


@pytest.mark.slow
@pytest.mark.parametrize('size', SIZES)
def test_filters_fit_the_registers_before_hopper(size):
    rows = budget('--channels', '96', '--size', str(size), '--capability', '80')
    assert {row['capability'] for row in rows} == {80}
    check_budget(rows)
    if size == 7:
        check_multiply_adds([row for row in rows if row['multiply-adds']])


@pytest.mark.slow
@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_filters_fit_the_registers(dtype, size):
    check_budget(budget('--channels', '40', '96', '2816', '--size', str(size), '--dtype', dtype))
