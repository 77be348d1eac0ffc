import math
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from backbones.files import read_checkpoint
from densekit.engine.launch import train

pytestmark = pytest.mark.usefixtures('quick_mmengine')

MMDET_TRAIN = Path(sysconfig.get_path('purelib'), 'mmdet/.mim/tools/train.py')
TASKS = ['det', 'seg']


def log_of(work_dir):
    """The log of the newest run in a work folder."""
    return max(Path(work_dir).glob('*/*.log')).read_text()


def iteration(checkpoint):
    return read_checkpoint(checkpoint)['meta']['iter']


@pytest.fixture(scope='module')
def finished(tiny, tmp_path_factory):
    """Work folder of a detector after four iterations, from which others are copied."""
    folder = tmp_path_factory.mktemp('finished')
    train(tiny.det, work_dir=str(folder), options=['train_cfg.val_interval=100'])
    return folder


@pytest.fixture
def moved(finished, tmp_path):
    """The same after a move: the pointer that mmengine left names a folder that is gone."""
    folder = tmp_path / 'moved'
    shutil.copytree(finished, folder)
    pointer = folder / 'last_checkpoint'
    assert Path(pointer.read_text()) == finished / 'iter_4.pth'
    pointer.write_text('/gone/iter_4.pth')
    for log in folder.glob('*/*.log'):
        log.unlink()
    return folder


def more(*options):
    """Options for two more iterations without validation."""
    return ['--cfg-options', 'train_cfg.max_iters=6', 'train_cfg.val_interval=100', *options]


def test_a_detector_trains_and_is_validated(tiny, tool, tmp_path):
    work_dir = tmp_path / 'run'
    assert tool('train', tiny.det, '--work-dir', work_dir) == 0
    assert sorted(path.name for path in work_dir.glob('*.pth')) == ['iter_2.pth', 'iter_4.pth']
    assert 'coco/bbox_mAP' in log_of(work_dir)
    assert 'coco/segm_mAP' in log_of(work_dir)
    weights = read_checkpoint(work_dir / 'iter_4.pth')['state_dict']
    before = read_checkpoint(work_dir / 'iter_2.pth')['state_dict']
    assert all(value.isfinite().all() for value in weights.values())
    assert not torch.equal(weights['backbone.stages.0.0.pwconv1.weight'], before['backbone.stages.0.0.pwconv1.weight'])


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('amp', ['bf16', 'off'])
def test_both_tasks_train_in_either_precision(tiny, tool, tmp_path, task, amp):
    options = ['train_cfg.max_iters=2', 'train_cfg.val_interval=2']
    assert tool('train', getattr(tiny, task), '--work-dir', tmp_path, '--amp', amp, '--cfg-options', *options) == 0
    checkpoint = read_checkpoint(tmp_path / 'iter_2.pth')
    assert all(value.isfinite().all() for value in checkpoint['state_dict'].values())
    assert torch.bfloat16 not in {value.dtype for value in checkpoint['state_dict'].values()}
    log = log_of(tmp_path)
    assert ("type='AutocastOptimWrapper'" in log) == (amp == 'bf16')
    assert ('mIoU' if task == 'seg' else 'segm_mAP') in log.rpartition('Iter(val)')[2]


def test_fp16_without_a_gpu_is_an_error(tiny, tool, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert tool('train', tiny.det, '--work-dir', tmp_path, '--amp', 'fp16') == 2
    assert capsys.readouterr().err == (
        'error: --amp fp16 needs a GPU, which its loss scaler runs on; choose bf16 or off\n'
    )


def test_resume_goes_on_where_the_run_stopped(tiny, tool, moved):
    saved = read_checkpoint(moved / 'iter_4.pth')
    assert tool('train', tiny.det, '--work-dir', moved, '--resume', *more()) == 0
    log = log_of(moved)
    assert f'Loaded every weight of the model from {moved}/iter_4.pth' in log
    assert 'resumed epoch: 0, iter: 4' in log
    assert 'Iter(train) [5/6]' in log
    assert 'Iter(train) [4/6]' not in log
    after = read_checkpoint(moved / 'iter_6.pth')
    assert after['meta']['iter'] == 6
    assert {int(state['step']) for state in after['optimizer']['state'].values()} == {6}
    assert {int(state['step']) for state in saved['optimizer']['state'].values()} == {4}
    # The losses of the first part are still in the history.
    values, counts, _ = after['densekit']['histories']['train/loss']
    assert len(values) == len(counts) == 6


@pytest.mark.parametrize(('given', 'start'), [('--resume=auto', 4), ('--resume={}/iter_2.pth', 2)])
def test_resume_with_a_value(tiny, tool, moved, given, start):
    assert tool('train', tiny.det, '--work-dir', moved, given.format(moved), *more()) == 0
    assert f'resumed epoch: 0, iter: {start}' in log_of(moved)
    assert iteration(moved / 'iter_6.pth') == 6


def test_resume_with_nothing_to_resume(tiny, tool, tmp_path, capsys):
    assert tool('train', tiny.det, '--work-dir', tmp_path, '--resume') == 2
    error = capsys.readouterr().err
    assert f'error: --resume: no checkpoint in {tmp_path}' in error
    assert '--resume=auto' in error


def test_auto_starts_afresh_with_nothing_to_resume(tiny, tool, finished, tmp_path):
    """From the weights that the config names, where it does: a job that is started again goes on instead."""
    options = ['train_cfg.max_iters=1', 'train_cfg.val_interval=100', f'load_from={finished}/iter_4.pth']
    assert tool('train', tiny.det, '--work-dir', tmp_path, '--resume=auto', '--cfg-options', *options) == 0
    log = log_of(tmp_path)
    assert f'Loaded every weight of the model from {finished}/iter_4.pth' in log
    assert 'resumed' not in log
    assert 'Iter(train) [1/1]' in log


def test_load_from_starts_a_new_run(tiny, tool, finished, tmp_path):
    options = ['train_cfg.max_iters=2', 'train_cfg.val_interval=100', 'resume=True', 'optim_wrapper.optimizer.lr=0']
    given = ['--load-from', finished / 'iter_4.pth', '--cfg-options', *options]
    assert tool('train', tiny.det, '--work-dir', tmp_path, *given) == 0
    assert 'resumed' not in log_of(tmp_path)
    assert iteration(tmp_path / 'iter_2.pth') == 2
    before, after = (
        read_checkpoint(folder / name)['state_dict']
        for folder, name in [(finished, 'iter_4.pth'), (tmp_path, 'iter_2.pth')]
    )
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_a_checkpoint_that_no_run_can_go_on_from(tiny, tool, moved, tmp_path, capsys):
    checkpoint = read_checkpoint(moved / 'iter_4.pth')
    torch.save({'state_dict': checkpoint['state_dict']}, tmp_path / 'weights.pth')
    assert tool('train', tiny.det, '--work-dir', moved, f'--resume={tmp_path}/weights.pth') == 2
    assert 'has no meta, message_hub, optimizer, param_schedulers' in capsys.readouterr().err

    other = 'optim_wrapper.paramwise_cfg.decay_type=stage_wise'
    assert tool('train', tiny.det, '--work-dir', moved, '--resume', *more(other)) == 2
    error = capsys.readouterr().err
    assert 'is of a run with another optim_wrapper' in error
    assert '--load-from' in error


def test_text_in_a_checkpoint_is_not_run(tiny, tool, moved, tmp_path):
    from mmengine.config import Config

    marker = tmp_path / 'marker'
    text = f"written = open({str(marker)!r}, 'w').write('run')\n"
    checkpoint = read_checkpoint(moved / 'iter_4.pth')
    checkpoint['meta']['config'] = text
    torch.save(checkpoint, moved / 'iter_4.pth')
    (moved / 'iter_4.pth.json').unlink()  # as another program would have written it; ours would be found changed
    assert tool('train', tiny.det, '--work-dir', moved, '--resume', *more()) == 0
    assert 'resumed epoch: 0, iter: 4' in log_of(moved)
    assert not marker.exists()

    Config.fromstring(text, '.py')  # what mmengine's own resume does with it
    assert marker.read_text() == 'run'


def test_the_learning_rate_is_scaled_when_asked(tiny, tool, tmp_path):
    options = ['train_cfg.max_iters=1', 'train_cfg.val_interval=100', 'auto_scale_lr.enable=True', 'param_scheduler=[]']
    assert tool('train', tiny.det, '--work-dir', tmp_path, '--cfg-options', *options) == 0
    log = log_of(tmp_path)
    assert 'The global batch is 2 and the recipe was made for 8: the learning rate is multiplied by 0.25' in log
    assert 'what it should be' not in log
    line = next(line for line in log.splitlines() if 'Iter(train) [1/1]' in line)
    assert math.isclose(float(line.split(' lr: ')[1].split()[0]), 0.003 / 4, rel_tol=1e-3)


def test_our_configs_run_under_mmdets_own_tool(tiny, command, tmp_path):
    options = ['train_cfg.max_iters=2', 'train_cfg.val_interval=2']
    done = command(MMDET_TRAIN, tiny.det, '--work-dir', 'run', '--cfg-options', *options)
    assert done.returncode == 0, done.stderr
    assert iteration(tmp_path / 'run/iter_2.pth') == 2
    assert 'coco/bbox_mAP' in log_of(tmp_path / 'run')


@pytest.mark.parametrize(
    ('imports', 'safe'),
    [
        (['backbones', 'densekit.engine.amp', 'densekit.models', 'densekit.data', 'densekit.evaluation.coco'], False),
        (['backbones', 'densekit.safe_runs', 'densekit.models', 'densekit.evaluation.coco'], True),
    ],
)
def test_one_import_gives_a_users_own_config_our_runs(tiny, command, tmp_path, imports, safe):
    config = tmp_path / 'own.py'
    config.write_text(f"_base_ = '{tiny.det}'\ncustom_imports = dict(_delete_=True, imports={imports})\n")
    options = ['--cfg-options', 'train_cfg.max_iters=2', 'train_cfg.val_interval=9']
    done = command('-c', RUN_OWN, config, '--work-dir', 'run', *options)
    assert done.returncode == 0, done.stderr
    assert iteration(tmp_path / 'run/iter_2.pth') == 2
    assert (tmp_path / 'run/iter_2.pth.json').exists() == safe


# mmdet's own tool on a config without a runner_type, as a user's is.
RUN_OWN = f"""
import runpy, sys
from mmengine.config import Config
read = Config.fromfile
def without_runner_type(*args, **kwargs):
    cfg = read(*args, **kwargs)
    cfg.pop('runner_type')
    return cfg
Config.fromfile = without_runner_type
sys.argv = ['train.py', *sys.argv[1:]]
runpy.run_path({str(MMDET_TRAIN)!r}, run_name='__main__')
"""
