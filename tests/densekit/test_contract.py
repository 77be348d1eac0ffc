"""A run that goes on differently from how it began is refused, unless the difference is allowed by name."""

import copy
import itertools

import fault_run  # noqa: F401  (registers the model and the data)
import pytest
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner import Runner

from backbones.files import read_checkpoint
from densekit.engine.contract import PARTS, check_contract
from densekit.engine.runner import DensekitRunner

pytestmark = pytest.mark.usefixtures('quick_mmengine')
NUMBER = itertools.count()


def config(folder, **changes):
    text = dict(
        model=dict(type='FaultNet'),
        work_dir=str(folder),
        train_dataloader=dict(
            batch_size=2, dataset=dict(type='FaultData'), sampler=dict(type='InfiniteSampler', shuffle=True)
        ),
        train_cfg=dict(by_epoch=False, max_iters=2),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.05)),
        param_scheduler=[dict(type='ConstantLR', begin=0, end=2, by_epoch=False)],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1)),
        randomness=dict(seed=3),
        experiment_name=f'contract{next(NUMBER)}',
        resume=True,
    )
    text.update(changes)
    return Config(copy.deepcopy(text))


@pytest.fixture
def begun(tmp_path):
    DensekitRunner.from_cfg(config(tmp_path)).train()
    return tmp_path


LONGER = dict(by_epoch=False, max_iters=4)
TWO_SCHEDULES = [dict(type='ConstantLR', begin=0, end=3, by_epoch=False)]
LARGER = dict(batch_size=4, dataset=dict(type='FaultData'), sampler=dict(type='InfiniteSampler', shuffle=True))
# What can be changed in a config of one process; names of classes, images and processes follow below.
CHANGES = {
    'model': (dict(model=dict(type='FaultNet', drop=0.25)), 'model: drop is not there, 0.25 here'),
    'optim_wrapper': (
        dict(optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01))),
        'optim_wrapper: optimizer.lr is 0.05 there, 0.01 here',
    ),
    'param_scheduler': (dict(param_scheduler=TWO_SCHEDULES), 'param_scheduler: 0.end is 2 there, 3 here'),
    'seed': (dict(randomness=dict(seed=4)), 'seed: 3 there, 4 here'),
    'global_batch': (dict(train_dataloader=LARGER), 'global_batch: 2 there, 4 here'),
}


def messages(monkeypatch):
    """What is logged from here on."""
    said = []
    monkeypatch.setattr(MMLogger, 'callHandlers', lambda self, record: said.append(record.getMessage()))
    return said


@pytest.mark.parametrize('part', CHANGES)
def test_a_change_of_a_config(begun, monkeypatch, part):
    change, message = CHANGES[part]
    with pytest.raises(ValueError, match=f'(?s)iter_2.pth is of.*{message}.*--allow-changed {part}$'):
        DensekitRunner.from_cfg(config(begun, train_cfg=LONGER, **change)).train()
    assert not (begun / 'iter_3.pth').exists()
    said = messages(monkeypatch)
    DensekitRunner.from_cfg(config(begun, train_cfg=LONGER, allow_changed=[part], **change)).train()
    assert f'{message.replace(":", " changed as allowed:", 1)}' in said
    assert (begun / 'iter_4.pth').exists()


CONTRACT = {
    'model': {'type': 'A', 'heads': [1, 2]},
    'optim_wrapper': {'optimizer': {'type': 'AdamW'}},
    'param_scheduler': [{'type': 'LinearLR'}],
    'classes': ['cat', 'dog'],
    'images': 16,
    'seed': 3,
    'world_size': 2,
    'global_batch': 8,
    'train_cfg': {'max_iters': 10},
    'densekit': '1.0',
    'torch': '2.11.0',
}
OTHER = {
    'model': ({'type': 'A', 'heads': [1, 3]}, 'heads.1 is 2 there, 3 here'),
    'optim_wrapper': ({'optimizer': {'type': 'SGD'}}, 'optimizer.type is AdamW there, SGD here'),
    'param_scheduler': ([], '0.type is LinearLR there, not here'),
    'classes': (['dog', 'cat'], '0 is cat there, dog here, 1 is dog there, cat here'),
    'images': (15, '16 there, 15 here'),
    'seed': (4, '3 there, 4 here'),
    'world_size': (1, '2 there, 1 here'),
    'global_batch': (4, '8 there, 4 here'),
}


def test_every_part_is_known_here():
    assert set(OTHER) == set(PARTS)
    assert check_contract('f.pth', CONTRACT, CONTRACT) == []


@pytest.mark.parametrize('part', PARTS)
def test_every_part_is_compared_and_can_be_allowed(part):
    value, message = OTHER[part]
    now = {**CONTRACT, part: value}
    with pytest.raises(ValueError) as raised:
        check_contract('f.pth', CONTRACT, now)
    text = str(raised.value)
    assert f'\n  {part}: {message}' in text
    assert text.count('\n  ') == 1
    assert text.endswith(f'--allow-changed {part}')
    (note,) = check_contract('f.pth', CONTRACT, now, [part])
    assert note.startswith(f'{part} changed as allowed: {message}')


def test_several_parts():
    now = {**CONTRACT, 'world_size': 1, 'global_batch': 4, 'seed': 4}
    with pytest.raises(ValueError, match=r'--allow-changed seed world_size global_batch$') as raised:
        check_contract('f.pth', CONTRACT, now, ['seed'])
    assert '  seed:' not in str(raised.value)


def test_what_may_change_is_pointed_out():
    now = {**CONTRACT, 'train_cfg': {'max_iters': 20}, 'torch': '2.15.0'}
    assert check_contract('f.pth', CONTRACT, now) == [
        'train_cfg changed: max_iters is 10 there, 20 here',
        'torch changed: 2.11.0 there, 2.15.0 here',
    ]


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r'--allow-changed worldsize: choose from model .* global_batch$'):
        check_contract('f.pth', CONTRACT, CONTRACT, ['worldsize'])


def test_mmengines_own_checkpoint(tmp_path, monkeypatch):
    """It tells nothing of its run, so the run goes on with a warning."""
    Runner.from_cfg(config(tmp_path)).train()
    assert 'densekit' not in read_checkpoint(tmp_path / 'iter_2.pth')
    said = messages(monkeypatch)
    runner = DensekitRunner.from_cfg(config(tmp_path, train_cfg=LONGER))
    runner.train()
    assert [line for line in said if 'was not written by densekit' in line and 'not exact to the bit' in line]
    assert runner.iter == 4
    assert read_checkpoint(tmp_path / 'iter_4.pth')['meta']['iter'] == 4
