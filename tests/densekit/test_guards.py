"""Nothing is trained on numbers that are none, and a run that is told to stop does so once and well."""

import itertools
import os
import signal

import fault_run  # noqa: F401  (registers the model and the data)
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import nn

from backbones.files import read_checkpoint
from densekit.cli import Interrupted
from densekit.data.loader import run_loader
from densekit.engine import guards
from densekit.engine.guards import FiniteGuard, NonFiniteError, StopSignalHook, agree
from densekit.engine.runner import DensekitRunner

pytestmark = pytest.mark.usefixtures('quick_mmengine')
NUMBER = itertools.count()


class Poison(Hook):
    """Breaks the gradient of a parameter, or the loss, at some iterations."""

    def __init__(self, at, value=float('nan'), parameter=None):
        self.at, self.value, self.parameter = at, value, parameter

    def before_train(self, runner):
        if self.parameter:
            parameter = dict(runner.bare_model().named_parameters())[self.parameter]
            parameter.register_hook(lambda grad: grad * self.value if runner.iter + 1 in self.at else grad)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.weights = {name: p.detach().clone() for name, p in runner.bare_model().named_parameters()}
        if not self.parameter:
            runner.bare_model().poison = self.value if runner.iter + 1 in self.at else 1.0


def runner(folder, *hooks, **changes):
    config = dict(
        model=dict(type='FaultNet', drop=0.0),
        work_dir=str(folder),
        train_dataloader=dict(
            batch_size=2, dataset=dict(type='FaultData'), sampler=dict(type='InfiniteSampler', shuffle=True)
        ),
        train_cfg=dict(by_epoch=False, max_iters=6),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.05)),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2)),
        randomness=dict(seed=3),
        experiment_name=f'guards{next(NUMBER)}',
    )
    built = DensekitRunner.from_cfg(Config({**config, **changes}))
    for hook in hooks:
        built.register_hook(hook)
    return built


def unchanged(built, poison):
    return all(torch.equal(p, poison.weights[name]) for name, p in built.bare_model().named_parameters())


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('clip', [None, dict(max_norm=1.0)])
def test_a_loss_that_is_no_number(tmp_path, value, clip):
    poison = Poison([3], value)
    optim_wrapper = dict(optimizer=dict(type='AdamW', lr=0.05), **({'clip_grad': clip} if clip else {}))
    built = runner(tmp_path, poison, optim_wrapper=optim_wrapper)
    with pytest.raises(NonFiniteError) as raised:
        built.train()
    assert unchanged(built, poison)
    assert built.iter == 2
    lines = str(raised.value).splitlines()
    assert lines[0].startswith('iteration 3: a gradient is NaN or infinite. The optimizer did not step')
    assert lines[1] == f'  losses of this process: loss_a is {value:g}'
    assert lines[2].startswith('  its images: images/0')
    assert lines[3].startswith('  gradients: first.weight')
    assert 'another process' not in str(raised.value)
    assert (tmp_path / 'iter_2.pth').exists()
    assert not (tmp_path / 'iter_4.pth').exists()


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_gradient_alone(tmp_path, value):
    """The losses are finite; the parameter is named."""
    poison = Poison([3], value, 'second.bias')
    built = runner(tmp_path, poison)
    with pytest.raises(NonFiniteError, match=r'iteration 3: [^\n]*\n  gradients: second.bias\n'):
        built.train()
    assert unchanged(built, poison)


def test_without_the_guard(tmp_path):
    """The negative control: the weights are lost, and the run goes on."""
    built = runner(tmp_path, Poison([3]))
    built._hooks = [hook for hook in built.hooks if not isinstance(hook, FiniteGuard)]
    built.train()
    assert all(value.isnan().any() for value in read_checkpoint(tmp_path / 'iter_6.pth')['state_dict'].values())


def test_norms_of_clipped_gradients_are_written_down(tmp_path):
    """As mmengine does it, which asks the device for each at once."""
    optim_wrapper = dict(optimizer=dict(type='AdamW', lr=0.05), clip_grad=dict(max_norm=0.1))
    histories = []
    for name in ('ours', "mmengine's"):
        built = runner(tmp_path / name, optim_wrapper=optim_wrapper)
        if name != 'ours':
            built._hooks = [hook for hook in built.hooks if not isinstance(hook, FiniteGuard)]
        built.train()
        histories.append(built.message_hub.get_scalar('train/grad_norm').data[0].tolist())
        assert built.optim_wrapper.clip_func is torch.nn.utils.clip_grad_norm_
    assert histories[0] == histories[1]
    assert len(set(histories[0])) == 6


def test_large_gradients_are_numbers(tmp_path):
    """The sum of their squares overflows, so that they are looked at one by one; they themselves do not."""
    built = runner(tmp_path, Poison([3], 1e30, 'second.bias'))
    built.train()
    assert built.iter == 6


def test_accumulated_batches_name_the_one_at_fault(tmp_path):
    """The step after batch 4 is refused because of batch 3."""
    seen = {}

    class See(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            seen[runner.iter + 1] = [sample.img_path for sample in data_batch['data_samples']]

    poison = Poison([3])
    optim_wrapper = dict(optimizer=dict(type='AdamW', lr=0.05), accumulative_counts=2)
    with pytest.raises(NonFiniteError) as raised:
        runner(tmp_path, poison, See(), optim_wrapper=optim_wrapper).train()
    text = str(raised.value)
    assert text.startswith('iteration 4:')
    assert text.count('its images') == 1
    assert f'its images: {", ".join(seen[3])}' in text


def test_frozen_parameters_do_not_matter(tmp_path):
    built = runner(tmp_path)
    for parameter in built.bare_model().first.parameters():
        parameter.requires_grad = False
    built.train()
    assert built.iter == 6


def optimizers(*parameters):
    return [torch.optim.SGD([parameter], lr=0.1) for parameter in parameters]


class Stub:
    """What the guard asks of a runner."""

    world_size, rank, iter = 1, 0, 0

    def __init__(self, model, optim_wrapper):
        self.model, self.optim_wrapper = model, optim_wrapper

    def bare_model(self):
        return self.model


def test_several_optimizers():
    model = nn.ModuleDict({'a': nn.Linear(1, 1, bias=False), 'b': nn.Linear(1, 1, bias=False)})
    a, b = optimizers(model['a'].weight, model['b'].weight)
    guard = FiniteGuard()
    guard.before_train(Stub(model, OptimWrapperDict(a=OptimWrapper(a), b=OptimWrapper(b))))
    model['a'].weight.grad = torch.ones(1, 1)
    model['b'].weight.grad = torch.full((1, 1), float('nan'))
    a.step()
    before = model['b'].weight.clone()
    with pytest.raises(NonFiniteError, match=r'gradients: b.weight'):
        b.step()
    assert torch.equal(model['b'].weight, before)
    guard.after_run(None)
    b.step()  # it has let go of them
    assert model['b'].weight.isnan()


@pytest.mark.parametrize('kind', ['none', 'empty', 'sparse', 'bfloat16 beside float32'])
def test_gradients_of_all_kinds(kind):
    a, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(0 if kind == 'empty' else 2))
    if kind == 'none':
        grads = [None, None]
    elif kind == 'sparse':
        grads = [torch.eye(2).to_sparse(), None]
    elif kind == 'empty':
        grads = [torch.ones(2, 2), torch.ones(0)]
    else:
        b.data = b.data.bfloat16()
        grads = [torch.ones(2, 2), torch.ones(2).bfloat16()]
    a.grad, b.grad = grads
    optimizer = torch.optim.SGD([a, b], lr=0.1)
    for check in (guards._norm_overflows, guards._any_nonfinite):
        assert not check(optimizer)
    if a.grad is not None:
        a.grad = a.grad * float('inf')
        for check in (guards._norm_overflows, guards._any_nonfinite):
            assert check(optimizer)


class Scaler:
    """Like GradScaler: a step whose gradients are infinite is skipped."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        if all(p.grad.isfinite().all() for p in guards._parameters(self.optimizer)):
            self.optimizer.step()


def test_steps_that_a_loss_scaler_skips_do_not_count(monkeypatch):
    monkeypatch.setattr(guards, 'MOST_SKIPPED', 3)
    model = nn.Linear(1, 1, bias=False)
    (optimizer,) = optimizers(model.weight)
    guard, scaler = FiniteGuard(), Scaler(optimizer)
    stub = Stub(model, OptimWrapper(optimizer))
    stub.optim_wrapper.loss_scaler = scaler
    guard.before_train(stub)

    def iterate(value):
        model.weight.grad = torch.full((1, 1), value)
        scaler.step()
        guard.after_train_iter(stub, 0)

    for value in [float('inf')] * 3 + [1.0] + [float('inf')] * 3:
        iterate(value)
    assert model.weight.isfinite()
    with pytest.raises(NonFiniteError, match=r'no step of the optimizer for 4 batches.*--amp bf16'):
        iterate(float('inf'))


def test_a_fused_step_that_the_loss_scaler_skips_does_not_count(monkeypatch):
    """A fused optimizer is called for such a step, with ``found_inf`` told, and skips it itself."""
    monkeypatch.setattr(guards, 'MOST_SKIPPED', 3)
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler('cpu', init_scale=4.0)
    stub = Stub(model, OptimWrapper(optimizer))
    stub.optim_wrapper.loss_scaler = scaler
    guard = FiniteGuard()
    guard.before_train(stub)

    def iterate(value):
        optimizer.zero_grad()
        scaler.scale((model.weight * value).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        guard.after_train_iter(stub, 0)

    for value in [float('inf')] * 3 + [1.0] + [float('inf')] * 3:
        before = model.weight.clone()
        iterate(value)
        assert torch.equal(before, model.weight) == (value != 1.0)
    with pytest.raises(NonFiniteError, match='no step of the optimizer for 4 batches'):
        iterate(float('inf'))
    model.weight.grad = torch.full((1, 1), float('nan'))
    with pytest.raises(NonFiniteError, match='a gradient is NaN'):
        optimizer.step()  # by no scaler


def test_a_batch_that_the_loss_scaler_skipped_has_no_part_in_the_next_step():
    """Of two batches per step; the last step is of one batch alone."""
    model = nn.Linear(1, 1, bias=False)
    (optimizer,) = optimizers(model.weight)
    wrapper = OptimWrapper(optimizer, accumulative_counts=2)
    wrapper.initialize_count_status(model, 0, 3)
    guard, stub = FiniteGuard(), Stub(model, wrapper)
    guard.before_train(stub)
    for loss in (float('nan'), float('nan'), 1.0):
        guard._keep_losses(model, (), {'loss': torch.tensor(loss)})
        wrapper._inner_count += 1
        if loss == 1.0:
            before = model.weight.detach().clone()
            model.weight.grad = torch.ones(1, 1)
            optimizer.step()
            assert not torch.equal(before, model.weight)
        guard.after_train_iter(stub, 0)


class Extra(Hook):
    """Adds an output without a gradient at one iteration."""

    def __init__(self, name, value):
        self.name, self.value = name, value

    def before_train(self, runner):
        def add(module, args, output):
            return {**output, self.name: torch.tensor(self.value)} if runner.iter == 2 else None

        runner.bare_model().register_forward_hook(add, prepend=True)  # before the guard's


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_loss_without_a_gradient(tmp_path, value):
    extra = Extra('loss_constant', value)
    built = runner(tmp_path, extra)
    with pytest.raises(NonFiniteError) as raised:
        built.train()
    assert built.iter == 2
    text = str(raised.value)
    assert text.startswith('iteration 3: a loss is NaN or infinite. The optimizer did not step')
    assert f'losses of this process: loss_constant is {value:g}' in text
    assert 'gradients:' not in text


def test_outputs_that_are_no_losses_may_be_anything(tmp_path):
    built = runner(tmp_path, Extra('accuracy', float('nan')))
    built.train()
    assert built.iter == 6


def test_flags_of_one_process():
    assert agree([True, torch.tensor(False)], torch.device('cpu')) == [True, False]


class Term(Hook):
    def __init__(self, at):
        self.at = at

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter + 1 in self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def test_the_handler_is_given_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    runner(tmp_path / 'whole').train()
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(Interrupted, match='stopped by SIGTERM after iteration 3; the checkpoint is in'):
        runner(tmp_path / 'stopped', Term([3])).train()
    assert signal.getsignal(signal.SIGTERM) == before
    assert read_checkpoint(tmp_path / 'stopped/iter_3.pth')['meta']['iter'] == 3


def test_the_same_signal_twice_is_one(tmp_path):
    """torchrun and the batch system both send it."""

    class Twice(Term):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            super().before_train_iter(runner, batch_idx)
            super().before_train_iter(runner, batch_idx)

    with pytest.raises(Interrupted):
        runner(tmp_path, Twice([3])).train()
    assert (tmp_path / 'iter_3.pth').exists()


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path):
    built = runner(tmp_path, Term([4]))
    saves = []
    original = built.save_checkpoint
    built.save_checkpoint = lambda *args, **kwargs: saves.append(args[1]) or original(*args, **kwargs)
    with pytest.raises(Interrupted, match='after iteration 4'):
        built.train()
    assert saves == ['iter_2.pth', 'iter_4.pth']


def test_a_run_that_saves_nothing_says_so(tmp_path):
    built = runner(tmp_path, Term([3]), default_hooks=dict(checkpoint=None))
    with pytest.raises(Interrupted, match='nothing was saved'):
        built.train()


def test_uneven_validation_is_agreed_on_only_as_long_as_all_take_part(monkeypatch):
    """With 9 images, 2 processes, batches of 2 and no rounding up one process has 3 batches and the other 2."""
    asked = []
    monkeypatch.setattr(guards, 'agree', lambda flags, device: asked.append(flags) or [False])

    class Two(Stub):
        world_size = 2
        val_dataloader = run_loader(torch.utils.data.DataLoader(list(range(9)), 2), 0)

    hook = StopSignalHook(FiniteGuard())
    for batch in range(3):
        hook.after_val_iter(Two(nn.Linear(1, 1), None), batch)
    assert len(asked) == 2
