import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from torch import nn

from densekit import cli
from densekit.engine import runner as runner_module
from densekit.engine.amp import AutocastOptimWrapper
from densekit.engine.config import set_amp
from densekit.engine.runner import DensekitRunner
from densekit.engine.weights import fitting_weights

pytestmark = pytest.mark.usefixtures('quick_mmengine')


NUMBER = itertools.count()


class Toy(BaseModel):
    """A model of three parameters, which notes what happens to it."""

    def __init__(self, norm: type[nn.Module] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(2, 1)
        if norm is not None:
            self.norms = nn.Sequential(norm(1), norm(1))
        self.initialized = 0
        self.dtypes: set[torch.dtype] = set()

    def init_weights(self) -> None:
        self.initialized += 1

    def forward(self, x, mode='tensor'):
        y = self.linear(torch.stack(x))
        self.dtypes.add(y.dtype)
        return {'loss': y.float().square().mean()} if mode == 'loss' else y


def runner_of(work_dir, model=None, *, batch_size=2, max_iters=2, **kwargs):
    config = dict(
        model=model or Toy(),
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=batch_size,
            sampler=dict(type='InfiniteSampler', shuffle=False),
            dataset=[{'x': torch.tensor([i, 1.0])} for i in range(8)],
        ),
        train_cfg=dict(by_epoch=False, max_iters=max_iters),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.1)),
        param_scheduler=[dict(type='LinearLR', start_factor=0.5, by_epoch=False, begin=0, end=10)],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1)),
        randomness=dict(seed=0),
        experiment_name=f'toy{next(NUMBER)}',
    )
    return DensekitRunner(**{**config, **kwargs})


def log_of(work_dir):
    return max(Path(work_dir).glob('*/*.log')).read_text()


@pytest.mark.parametrize(
    ('batch_size', 'accumulated', 'enable', 'line', 'lr'),
    [
        (2, 1, False, 'is 2 and the recipe was made for 8: by the linear rule the learning rate is 4 x', 0.1),
        (2, 2, False, 'is 4 and the recipe was made for 8: by the linear rule the learning rate is 2 x', 0.1),
        (4, 2, False, None, 0.1),
        (8, 1, False, None, 0.1),
        (2, 1, True, 'is 2 and the recipe was made for 8: the learning rate is multiplied by 0.25', 0.025),
        (8, 2, True, 'is 16 and the recipe was made for 8: the learning rate is multiplied by 2', 0.2),
        (4, 2, True, None, 0.1),
    ],
)
def test_the_global_batch_is_compared_with_the_recipes(tmp_path, batch_size, accumulated, enable, line, lr):
    wrapper = dict(type='OptimWrapper', accumulative_counts=accumulated, optimizer=dict(type='SGD', lr=0.1))
    runner = runner_of(
        tmp_path,
        batch_size=batch_size,
        optim_wrapper=wrapper,
        auto_scale_lr=dict(enable=enable, base_batch_size=8),
        param_scheduler=None,
    )
    runner.train()
    log = log_of(tmp_path)
    assert ('The global batch' in log) == (line is not None)
    if line is not None:
        assert line in log
    assert runner.optim_wrapper.optimizer.param_groups[0]['lr'] == pytest.approx(lr)


def test_a_recipe_without_its_global_batch_cannot_be_scaled(tmp_path):
    with pytest.raises(ValueError, match='auto_scale_lr needs base_batch_size'):
        runner_of(tmp_path, auto_scale_lr=dict(enable=True)).train()


def test_sync_bn_becomes_bn_with_one_line(tmp_path):
    runner = runner_of(tmp_path / 'sync', Toy(nn.SyncBatchNorm))
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in runner.model.modules())
    assert sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in runner.model.modules()) == 2
    assert log_of(tmp_path / 'sync').count('SyncBN') == 1
    assert '2 SyncBN layers become BN: a single process' in log_of(tmp_path / 'sync')
    runner_of(tmp_path / 'plain', Toy(nn.BatchNorm1d))
    assert 'SyncBN' not in log_of(tmp_path / 'plain')


@pytest.mark.parametrize('accumulated', [1, 2])
def test_bf16_on_the_cpu(tmp_path, accumulated):
    wrapper = dict(type='AutocastOptimWrapper', accumulative_counts=accumulated, optimizer=dict(type='SGD', lr=0.1))
    runner = runner_of(tmp_path, optim_wrapper=wrapper)
    before = runner.model.linear.weight.detach().clone()
    runner.train()
    assert runner.model.dtypes == {torch.bfloat16}
    assert runner.model.linear.weight.dtype == torch.float32
    assert not torch.equal(runner.model.linear.weight, before)
    runner = runner_of(tmp_path)
    runner.train()
    assert runner.model.dtypes == {torch.float32}


def test_autocast_takes_bfloat16_only():
    optimizer = torch.optim.SGD(Toy().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"dtype='float16'.*takes 'bfloat16' only.*AmpOptimWrapper"):
        AutocastOptimWrapper(dtype='float16', optimizer=optimizer)


def test_set_amp_keeps_the_rest_of_the_wrapper(monkeypatch):
    def wrapper(amp, **given):
        cfg = Config(dict(optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1), clip_grad=dict(max_norm=1), **given)))
        set_amp(cfg, amp)
        assert cfg.optim_wrapper.pop('optimizer') == dict(type='AdamW', lr=1)
        assert cfg.optim_wrapper.pop('clip_grad') == dict(max_norm=1)
        return dict(cfg.optim_wrapper)

    assert wrapper('bf16', type='AmpOptimWrapper', loss_scale='dynamic') == dict(type='AutocastOptimWrapper')
    assert wrapper('off', type='AmpOptimWrapper', dtype='float16') == dict(type='OptimWrapper')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert wrapper('fp16') == dict(type='AmpOptimWrapper', dtype='float16', loss_scale='dynamic')
    with pytest.raises(ValueError, match='choose bf16, fp16 or off'):
        wrapper('fp8')


class SawOnResume:
    """Keeps the optimizer's state as it is before the first step."""

    priority = 50

    def before_train(self, runner):
        self.state = copy.deepcopy(runner.optim_wrapper.state_dict())
        self.weights = {key: value.clone() for key, value in runner.model.state_dict().items()}
        self.lr = runner.optim_wrapper.get_lr()['lr']


def test_resume_restores_everything(tmp_path):
    runner_of(tmp_path, max_iters=3).train()
    saved = torch.load(tmp_path / 'iter_2.pth', weights_only=False)
    runner = runner_of(tmp_path, max_iters=4, load_from=str(tmp_path / 'iter_2.pth'), resume=True)
    saw = SawOnResume()
    runner._hooks.append(saw)
    runner.train()
    assert runner.iter == 4
    assert runner.model.initialized == 0
    assert saw.state['param_groups'] == saved['optimizer']['param_groups']
    assert saw.lr == [saved['optimizer']['param_groups'][0]['lr']]
    assert all(torch.equal(value, saved['state_dict'][key]) for key, value in saw.weights.items())
    moments = [(key, name) for key, state in saved['optimizer']['state'].items() for name in state]
    assert len(moments) == 6
    for key, name in moments:
        assert torch.equal(saw.state['state'][key][name], saved['optimizer']['state'][key][name])
    # The run that was not stopped ends at the same weights.
    runner_of(tmp_path / 'whole', max_iters=4).train()
    ends = [torch.load(folder / 'iter_4.pth', weights_only=False) for folder in (tmp_path, tmp_path / 'whole')]
    assert all(torch.equal(value, ends[1]['state_dict'][key]) for key, value in ends[0]['state_dict'].items())


def test_weights_about_to_be_replaced_are_not_initialized(tmp_path):
    runner_of(tmp_path, max_iters=1).train()
    loaded = runner_of(tmp_path, load_from=str(tmp_path / 'iter_1.pth'))
    loaded.train()
    assert loaded.model.initialized == 0
    fresh = runner_of(tmp_path)
    fresh.train()
    assert fresh.model.initialized == 1


def test_mistakes_show_in_the_order_optimizer_weights_data(tmp_path):
    data = dict(dataset=dict(type='CocoDataset', data_root=f'{tmp_path}/coco'), batch_size=1)
    wrong = dict(
        optim_wrapper=dict(type='AdamWrapper', optimizer=dict(type='AdamW', lr=0.1)),
        load_from=f'{tmp_path}/missing.pth',
        train_dataloader=data,
        cfg=Config(dict(train_dataloader=data)),
    )
    with pytest.raises(KeyError, match='AdamWrapper'):
        runner_of(tmp_path, **wrong).prepare('train')
    del wrong['optim_wrapper']
    with pytest.raises(FileNotFoundError, match=r'missing\.pth does not exist'):
        runner_of(tmp_path, **wrong).prepare('train')
    del wrong['load_from']
    with pytest.raises(FileNotFoundError, match=f'{tmp_path}/coco: no such folder'):
        runner_of(tmp_path, **wrong).prepare('train')


def test_the_environment_is_logged_when_nothing_is_wrong(tmp_path):
    runner = runner_of(tmp_path)
    assert 'System environment' not in log_of(tmp_path)
    runner.train()
    assert log_of(tmp_path).count('System environment') == 1


@pytest.mark.parametrize(
    ('weights', 'said'),
    [
        ({'linear.weight': torch.zeros(1, 2)}, '1 missing in the file: linear.bias'),
        ({'linear.weight': torch.zeros(1, 3), 'linear.bias': torch.zeros(1)}, r'linear.weight \(1, 3\) for \(1, 2\)'),
        (
            {**{f'head.{i}': torch.zeros(1) for i in range(9)}, **Toy().state_dict()},
            r'9 unknown to the model: head.0, head.1, head.2 and 6 more',
        ),
        ({'epoch': 3}, r'file\.pth: no weights found'),
    ],
)
def test_weights_that_do_not_fit_are_listed(weights, said):
    with pytest.raises(ValueError, match=said):
        fitting_weights('file.pth', weights, Toy())


def test_weights_that_fit():
    own = Toy().state_dict()
    wrapped = {'state_dict': {f'module.{key}': value for key, value in own.items()}}
    assert fitting_weights('file.pth', wrapped, Toy()).keys() == own.keys()


def test_a_users_mistake_is_a_message_and_status_2(capsys, monkeypatch):
    def mistake():
        with cli.user_errors():
            raise ValueError('arch is wrong')

    assert cli.exit_status(lambda: None) == 0
    assert cli.exit_status(mistake) == 2
    assert capsys.readouterr().err == 'error: arch is wrong\n'
    monkeypatch.setenv('DENSEKIT_TRACEBACK', '1')
    assert cli.exit_status(mistake) == 2
    shown = capsys.readouterr().err
    assert 'Traceback' in shown
    assert shown.endswith('error: arch is wrong\n')


def test_what_only_building_finds_names_its_kind(capsys):
    def mistake():
        with cli.user_errors():
            raise KeyError('ConvNext is not in the registry')

    assert cli.exit_status(mistake) == 2
    assert capsys.readouterr().err.startswith('error: KeyError: ConvNext is not in the registry\nDENSEKIT_TRACEBACK=1')


def test_a_missing_package_points_to_the_doctor(capsys):
    def action():
        raise ImportError('mmengine is missing')

    assert cli.exit_status(action) == 2
    assert 'densekit.doctor' in capsys.readouterr().err


def test_a_defect_of_ours_keeps_its_traceback():
    def defect():
        raise ValueError('ours')

    with pytest.raises(ValueError, match='ours'):
        cli.exit_status(defect)


def test_nothing_is_made_by_checking_for_writability(tmp_path):
    cli.check_writable(str(tmp_path / 'a/b/c'), '--out')
    assert list(tmp_path.iterdir()) == []
    (tmp_path / 'file').touch()
    with pytest.raises(ValueError, match=rf'{tmp_path}/file/run cannot be written.*--out FOLDER'):
        cli.check_writable(str(tmp_path / 'file/run'), '--out')


@pytest.mark.parametrize('name', ['train', 'test', 'predict'])
def test_help_imports_next_to_nothing(name):
    tool = Path(__file__).parents[2] / 'tools' / f'{name}.py'
    code = (
        f'import runpy, sys; sys.argv = ["{name}.py", "--help"]\n'
        f'try: runpy.run_path({str(tool)!r}, run_name="__main__")\n'
        'except SystemExit as end: print("STATUS", end.code)\n'
        'print(sorted({name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)))\n'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ, check=True)
    assert f'usage: {name}.py CONFIG' in done.stdout
    *_, status, modules = done.stdout.splitlines()
    assert status == 'STATUS 0'
    assert 'densekit' in modules
    assert not {'torch', 'numpy', 'mmengine', 'mmcv', 'mmdet'} & set(modules.replace("'", '').strip('[]').split(', '))


def test_the_wrapper_of_float32_is_mmengines(tmp_path):
    assert type(runner_of(tmp_path).build_optim_wrapper(dict(optimizer=dict(type='SGD', lr=1)))) is OptimWrapper


@pytest.mark.parametrize('given', [{}, {'pin_memory': False}])
@pytest.mark.parametrize('cuda', [True, False])
def test_batches_are_pinned_where_there_is_cuda(given, cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
    monkeypatch.setattr(runner_module.Runner, 'build_dataloader', staticmethod(lambda config, *args: config))
    monkeypatch.setattr(runner_module, 'run_loader', lambda loader, seed: loader)
    assert DensekitRunner.build_dataloader(given)['pin_memory'] is (cuda and not given)
    assert given in ({}, {'pin_memory': False})  # the config itself stays
