"""tools/train.py --log: TensorBoard and Weights & Biases."""

import importlib.util
import json
import sys

import pytest
from mmengine.config import Config

from densekit.engine.log_backends import add_backends, check_backends

pytestmark = pytest.mark.usefixtures('quick_mmengine')

NO_TENSORBOARD = importlib.util.find_spec('tensorboard') is None
SHORT = ['--cfg-options', 'train_cfg.max_iters=2', 'train_cfg.val_interval=2']

# As much of the package as a run calls.
WANDB = """
import json

class Config:
    def update(self, values, allow_val_change):
        write('config', values['train_cfg'])

def write(*what):
    with open({path!r}, 'a') as file:
        file.write(json.dumps(what) + '\\n')

def init(**options):
    write('init', options)

def log(values, commit):
    write('log', values)

def finish():
    write('finish', None)

config = Config()
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A package of that name, and the calls to it."""
    calls = tmp_path / 'calls.jsonl'
    (tmp_path / 'packages').mkdir()
    (tmp_path / 'packages/wandb.py').write_text(WANDB.format(path=str(calls)))
    monkeypatch.syspath_prepend(tmp_path / 'packages')
    monkeypatch.delitem(sys.modules, 'wandb', raising=False)
    yield lambda: [json.loads(line) for line in calls.read_text().splitlines()]
    sys.modules.pop('wandb', None)


def config(tiny, folder, text):
    path = folder / 'mine.py'
    path.write_text(f'_base_ = {tiny.seg!r}\n{text}\n')
    return path


@pytest.mark.parametrize('visualizer', ['', 'visualizer = None'])
def test_losses_and_scores_go_to_wandb_too(tiny, tool, tmp_path, wandb, visualizer):
    path = config(tiny, tmp_path, visualizer)
    assert tool('train', path, '--work-dir', tmp_path / 'run seven', '--log', 'wandb', *SHORT) == 0
    calls = wandb()
    assert calls[0][0] == 'init' and calls[0][1]['name'] == 'run seven'
    assert [kind for kind, _ in calls] == ['init', 'config', 'log', 'log', 'log', 'finish']
    logged = [values for kind, values in calls if kind == 'log']
    assert logged[0].keys() >= {'loss', 'lr', 'time'} and 'mIoU' in logged[-1]
    (scalars,) = (tmp_path / 'run seven').glob('*/vis_data/scalars.json')  # what the report is made from
    kept = [json.loads(line) for line in scalars.read_text().splitlines()]
    assert [line['loss'] for line in kept if 'loss' in line] == [values['loss'] for values in logged[:2]]


def test_without_the_option_nothing_goes_there(tiny, tool, tmp_path, wandb):
    assert tool('train', tiny.seg, '--work-dir', tmp_path / 'run', *SHORT) == 0
    assert not (tmp_path / 'calls.jsonl').exists()


@pytest.mark.skipif(NO_TENSORBOARD, reason='tensorboard is not installed')
def test_losses_go_to_tensorboard_too(tiny, tool, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert tool('train', tiny.seg, '--work-dir', tmp_path / 'run', '--log', 'tensorboard', *SHORT) == 0
    (folder,) = (tmp_path / 'run').glob('*/vis_data')
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars('loss')] == [1, 2]


@pytest.mark.parametrize(('name', 'module'), [('tensorboard', 'tensorboard'), ('wandb', 'wandb')])
def test_a_package_that_is_missing(tool, tmp_path, capsys, monkeypatch, name, module):
    for loaded in [key for key in sys.modules if key.startswith(('torch.utils.tensorboard', module))]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    assert tool('train', 'no_such_config.py', '--work-dir', tmp_path / 'run', '--log', name) == 2
    said = capsys.readouterr().err
    assert f'error: --log {name} needs a package that cannot be imported' in said
    assert said.endswith(f'pip install {name}\n')
    assert not (tmp_path / 'run').exists()


def test_an_unknown_name(tool, capsys):
    with pytest.raises(SystemExit):
        tool('train', 'config.py', '--log', 'tensorbord')
    assert "invalid choice: 'tensorbord'" in capsys.readouterr().err
    with pytest.raises(ValueError, match='--log mlflow: choose from tensorboard, wandb'):
        check_backends(['mlflow'])


def test_backends_that_a_config_has_stay_and_none_comes_twice():
    own = {'type': 'mmengine.TensorboardVisBackend', 'save_dir': 'there'}
    cfg = Config({'work_dir': 'runs/a', 'visualizer': {'type': 'SegLocalVisualizer', 'vis_backends': own}})
    add_backends(cfg, ['tensorboard', 'wandb', 'wandb'])
    assert cfg.visualizer.type == 'SegLocalVisualizer'
    assert cfg.visualizer.vis_backends == [own, {'type': 'NumbersToWandb', 'init_kwargs': {'name': 'a'}}]
    before = cfg.visualizer.to_dict()
    add_backends(cfg, [])
    assert cfg.visualizer.to_dict() == before
