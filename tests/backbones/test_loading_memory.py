"""One copy of the weights in memory: what loading adds is the file, not twice or three times as much."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from backbones import ConvNeXt

# Peak memory is a property of a process, so loading has one to itself. Clearing the peak needs Linux.
PROGRAM = """
import json, sys, torch
from pathlib import Path
from backbones import ConvNeXt, load_pretrained

def memory(what):
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

torch.manual_seed(0)
model = ConvNeXt(sys.argv[1])
if sys.argv[3] == 'plain':  # the negative control
    before = memory('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')
    weights = torch.load(sys.argv[2], weights_only=True)['model']
    copies = {key: value.clone() for key, value in weights.items()}
    model.load_state_dict(copies, strict=False)
else:
    before = memory('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')
    load_pretrained(model, sys.argv[2])
print(json.dumps(dict(extra=memory('VmHWM') - before, size=Path(sys.argv[2]).stat().st_size)))
"""

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='measures memory through /proc')


def written(arch, suffix, folder):
    with torch.device('meta'):
        shapes = {key: value.shape for key, value in ConvNeXt(arch).state_dict().items() if not key.startswith('norm')}
    weights = {key: torch.full(shape, 0.5) for key, shape in shapes.items()}
    path = folder / f'weights{suffix}'
    if suffix == '.pth':
        torch.save({'model': weights}, path)
    else:
        save_file(weights, path)
    return path


def extra_memory(arch, path, how='load_pretrained'):
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM, arch, str(path), how], capture_output=True, text=True, check=True, timeout=300
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    return measured['extra'] / measured['size']


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_loading_takes_the_file_once(suffix, tmp_path):
    assert extra_memory('base', written('base', suffix, tmp_path)) < 1.3


def test_two_copies_are_seen(tmp_path):
    assert extra_memory('base', written('base', '.pth', tmp_path), 'plain') > 1.7


@pytest.mark.slow
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_loading_xlarge_takes_the_file_once(suffix, tmp_path):
    assert extra_memory('xlarge', written('xlarge', suffix, tmp_path)) < 1.3
