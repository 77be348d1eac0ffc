"""Two processes train, sharded and not, and note what they come to; run as a script this file is one of them."""

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes

import densekit.ops  # noqa: F401

# isort: split
from mmengine.hooks import EMAHook
from mmengine.model import ExponentialMovingAverage, MMDistributedDataParallel
from mmengine.optim import OptimWrapper

from backbones import ConvNeXt
from densekit.engine import sharding
from densekit.engine.sharding import (
    gathered,
    load_full_optimizer_state,
    shard,
)

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / 'configs/detection/mask_rcnn_convnext_mini_shapes.py'
PROCESSES = 2


class Net(nn.Module):
    """A backbone with what is hard to cut: a frozen stage, GRN's (1, 1, 1, C), 33 channels for two, shared weights."""

    def __init__(self, **options):
        super().__init__()
        arch = dict(depths=(1, 1, 2, 1), channels=(8, 16, 24, 33))
        self.backbone = ConvNeXt(arch=arch, use_grn=True, drop_path_rate=0.3, frozen_stages=1, **options)
        self.norm = nn.BatchNorm2d(33)
        self.head = nn.Linear(33, 33, bias=False)
        self.tied = nn.Linear(33, 33)
        self.tied.weight = self.head.weight

    def forward(self, x):
        features = self.backbone(x)
        pooled = self.norm(features[-1]).mean((2, 3))
        return {'deep': self.tied(self.head(pooled)).square().mean(), 'all': [f.square().mean() for f in features]}


class TwoHeads(nn.Module):
    """The first process uses one head, the second the other."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
        self.heads = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])

    def forward(self, x):
        return self.heads[dist.get_rank()](self.backbone(x)).sum()


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def loss_of(model, step):
    """On data that differ between steps and processes."""
    torch.manual_seed(100 * dist.get_rank() + step)
    losses = model(torch.randn(2, 3, 64, 64))
    return losses['deep'] + sum(losses['all'])


def train(model, optimizer, steps, *, max_norm=None, averaged=None):
    """Some steps; returns the norms of the gradients."""
    norms = []
    for step in steps:
        loss = loss_of(model, step)
        optimizer.zero_grad()
        loss.backward()
        if max_norm:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
        optimizer.step()
        if averaged is not None:
            averaged.update_parameters(getattr(model, 'module', model))
    return norms


def ddp(model):
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


def state_of(model):
    """Of the first process; independent of the functions under test."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def steps_of_a_net():
    """Three steps in DDP and with FSDP2, and a fourth after a change from one to the other."""
    plain = net()
    averaged = ExponentialMovingAverage(plain, momentum=0.1)
    wrapped, optimizer = ddp(plain), optimizer_of(plain)
    train(wrapped, optimizer, range(3), averaged=averaged)
    three = state_of(plain), copy.deepcopy(optimizer.state_dict())
    noted = {'ddp 3': three, 'ddp average': state_of(averaged)}
    train(wrapped, optimizer, [3])
    noted['ddp 4'] = state_of(plain), optimizer.state_dict()

    sharded = shard(net(seed=dist.get_rank()), activation_checkpointing=True)  # the first one's weights count
    optimizer = optimizer_of(sharded)
    averaged = ExponentialMovingAverage(sharded, momentum=0.1)
    train(sharded, optimizer, range(3), averaged=averaged)
    from_sharded = gathered(sharded.state_dict(keep_vars=True)), gathered(optimizer.state_dict())
    noted |= {'fsdp 3': from_sharded, 'fsdp average': gathered(averaged.state_dict())}
    hook = EMAHook()
    hook.src_model, hook.ema_model = sharded, averaged
    hook._swap_ema_parameters()  # as it does for the time of a validation
    noted['swapped'] = gathered(sharded.state_dict(keep_vars=True))

    resumed = shard(net(seed=7))
    optimizer = optimizer_of(resumed)
    resumed.load_state_dict(three[0])
    load_full_optimizer_state(optimizer, copy.deepcopy(three[1]))
    noted['ddp to fsdp'] = gathered(resumed.state_dict(keep_vars=True)), gathered(optimizer.state_dict())
    train(resumed, optimizer, [3])
    noted['ddp to fsdp 4'] = gathered(resumed.state_dict(keep_vars=True)), gathered(optimizer.state_dict())
    averaged.module.load_state_dict(three[0])
    noted['average loads whole tensors'] = gathered(averaged.module.state_dict())
    return noted


def clipped_steps():
    noted = {}
    for kind, wrap in {'ddp': ddp, 'fsdp': shard}.items():
        model = wrap(net())
        noted[f'{kind} norms'] = train(model, optimizer_of(model), range(3), max_norm=0.01)
    return noted


def accumulated_steps():
    """One step on two batches, by mmengine's wrapper."""
    noted = {}
    for kind, wrap in {'ddp': ddp, 'fsdp': shard}.items():
        model = wrap(net())
        wrapper = OptimWrapper(optimizer_of(model), accumulative_counts=2)
        for step in range(2):
            with wrapper.optim_context(model):
                loss = loss_of(model, step)
            wrapper.update_params(loss)
        noted[kind] = gathered(wrapper.state_dict())
    return noted


def heads_of_their_own():
    noted = {}
    for kind in ('filled', 'not filled'):
        with pytest.MonkeyPatch.context() as patch:
            if kind == 'not filled':
                patch.setattr(sharding, '_fill_missing_gradients', lambda *_: None)
            model = shard(TwoHeads())
        for parameter in model.parameters():
            nn.init.ones_(parameter.to_local())
        model(torch.full((1, 4), 1.0 + dist.get_rank())).backward()
        noted[kind] = gathered({name: parameter.grad for name, parameter in model.named_parameters()})
    return noted


def differing_weights():
    """What becomes of models that differ between the processes, with our order and with torch's function alone."""
    ours, torchs = shard(net(seed=dist.get_rank())), fully_shard(net(seed=dist.get_rank()))
    noted = {
        'broadcast': gathered(ours.state_dict(keep_vars=True)),
        'not broadcast': gathered(torchs.state_dict(keep_vars=True)),
        'first': net().state_dict(),
    }
    with torch.no_grad():
        torchs(torch.zeros(2, 3, 64, 64))
    noted['cut'] = all(isinstance(parameter, DTensor) for parameter in torchs.parameters())
    return {**noted, 'first': net().state_dict()}


def steps_of_the_recipe():
    import recipes

    noted = {}
    for kind in ('ddp', 'fsdp', 'fsdp bfloat16'):
        torch.manual_seed(0)
        cfg = recipes.recipe(RECIPE)
        cfg.model.backbone.update(arch=dict(depths=(1, 1, 1, 1), channels=(24, 48, 96, 192)), drop_path_rate=0.2)
        cfg.optim_wrapper.clip_grad = dict(max_norm=5.0) if 'bfloat16' in kind else None
        cfg.optim_wrapper.paramwise_cfg.decay_rate = 0.8
        # On a CPU the fused one rounds the last elements of a tensor otherwise, and these are others in a part of it.
        cfg.optim_wrapper.optimizer.fused = False
        model = recipes.build_model(cfg, 'cpu')
        if 'ddp' in kind:
            model = MMDistributedDataParallel(model, broadcast_buffers=False)
        else:
            shard(model, param_dtype='bfloat16' if 'bfloat16' in kind else None, activation_checkpointing=True)
        wrapper = recipes.build_wrapper(cfg, model, 'off')
        model.train()
        logs = []
        for step in range(2):
            batch = recipes.make_batch(cfg)
            torch.manual_seed(10 * step + dist.get_rank())
            batch['inputs'] = [torch.randint_like(image, 256) for image in batch['inputs']]
            logs.append({key: value.detach().clone() for key, value in model.train_step(batch, wrapper).items()})
        noted[kind] = {
            'logs': logs,
            'lrs': [(group['lr'], group['param_names']) for group in wrapper.optimizer.param_groups],
            'model': gathered(getattr(model, 'module', model).state_dict(keep_vars=True)),
            'optimizer': gathered(wrapper.state_dict()),
        }
        if kind == 'fsdp bfloat16':
            noted['cut behind validation'] = behind_validation(model, batch)
            noted['dtypes'] = {str(p.dtype) for p in model.parameters()}
    return noted


def behind_validation(model, batch):
    with torch.no_grad():
        model.eval().val_step(batch)
    return all(isinstance(parameter, DTensor) for parameter in model.parameters())


def errors():
    scalar = nn.Module()
    scalar.scale = nn.Parameter(torch.tensor(1.0))
    tries = {
        'single numbers.*: scale': lambda: shard(scalar),
        'sharded already': lambda: shard(shard(nn.Linear(2, 2))),
        "'float16': give 'bfloat16'": lambda: shard(net(), param_dtype='float16'),
        'switch with_cp, and these have not: Sequential': lambda: shard(TwoHeads(), activation_checkpointing=True),
    }
    for message, attempt in tries.items():
        with pytest.raises(ValueError, match=message):
            attempt()
    with pytest.raises(RuntimeError, match='holds its weights alone'):
        copy.deepcopy(shard(net()))(torch.zeros(1, 3, 32, 32))


def free_port():
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


def one_process(rank, path, port):
    """One of the two."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'tcp://127.0.0.1:{port}', rank=rank, world_size=PROCESSES)
    small = [steps_of_a_net, clipped_steps, accumulated_steps, heads_of_their_own, differing_weights]
    noted = {part.__name__: part() for part in (*small, steps_of_the_recipe)}
    errors()
    if rank == 0:
        torch.save(noted, path)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def noted(tmp_path_factory):
    """What the two processes noted, by the name of the function."""
    path = tmp_path_factory.mktemp('sharding') / 'noted.pt'
    env = {
        **os.environ,
        'OMP_NUM_THREADS': '1',
        'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT / 'tests/configs')]),
    }
    done = subprocess.run(
        [sys.executable, __file__, str(path)], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return torch.load(path, weights_only=True)


def assert_same(left, right):
    """Nested states are equal to the last bit, in the same order."""
    assert type(left) is type(right) or {type(left), type(right)} <= {dict, type(nn.Module().state_dict())}
    if isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    else:
        assert left == right


def test_three_steps_are_those_of_ddp_to_the_bit(noted):
    steps = noted['steps_of_a_net']
    assert_same(steps['fsdp 3'], steps['ddp 3'])


def test_the_comparison_can_fail(noted):
    steps = noted['steps_of_a_net']
    with pytest.raises(AssertionError):
        assert_same(steps['fsdp 3'], steps['ddp 4'])


def test_a_run_changes_from_ddp_to_fsdp2_and_back(noted):
    steps = noted['steps_of_a_net']
    assert_same(steps['ddp to fsdp'], steps['ddp 3'])  # 0 ulp
    assert_same(steps['ddp to fsdp 4'], steps['ddp 4'])


def test_a_single_process_takes_the_state(noted):
    model = net(seed=9)
    optimizer = optimizer_of(model)
    weights, state = noted['steps_of_a_net']['fsdp 3']
    model.load_state_dict(weights)
    load_full_optimizer_state(optimizer, state)
    assert_same(dict(model.state_dict()), weights)
    assert_same(optimizer.state_dict(), state)
    assert weights['head.weight'].data_ptr() == weights['tied.weight'].data_ptr()  # shared in the file as in the model


def test_averaged_weights_are_those_of_ddp(noted):
    steps = noted['steps_of_a_net']
    assert_same(steps['fsdp average'], steps['ddp average'])
    names = dict(net().named_parameters())
    assert_same({k: steps['swapped'][k] for k in names}, {k: steps['ddp average'][f'module.{k}'] for k in names})
    assert_same(steps['average loads whole tensors'], dict(steps['ddp 3'][0]))


def test_clipping_sees_the_norm_over_all_processes(noted):
    # Sums of squares over parts are added in another order, so not to the bit.
    norms = noted['clipped_steps']
    assert norms['fsdp norms'] == pytest.approx(norms['ddp norms'], rel=1e-5)
    assert norms['ddp norms'][0] > 0.01  # it was clipped


def test_a_head_that_a_process_did_not_use_has_a_zero_gradient_there(noted):
    heads = noted['heads_of_their_own']
    expected = {'heads.0.weight': 2.5, 'heads.0.bias': 0.5, 'heads.1.weight': 4.5, 'heads.1.bias': 0.5}
    for name, value in expected.items():
        assert torch.equal(heads['filled'][name], torch.full_like(heads['filled'][name], value))
    mixed = heads['not filled']['heads.0.weight']
    assert torch.equal(mixed, torch.full_like(mixed, 2.5 + 4.5))  # torch adds the second's head to the first's


def test_the_weights_of_the_first_process_count(noted):
    states = noted['differing_weights']
    assert_same(states['broadcast'], dict(states['first']))
    mixture = states['not broadcast']['backbone.downsample_layers.1.1.weight']
    first = states['first']['backbone.downsample_layers.1.1.weight']
    assert torch.equal(mixture[:8], first[:8])
    assert not torch.equal(mixture[8:], first[8:])  # torch puts halves of two models together


def test_a_recipe_trains_as_with_ddp(noted):
    recipe = noted['steps_of_the_recipe']
    assert_same(recipe['fsdp'], recipe['ddp'])
    assert len({lr for lr, _ in recipe['fsdp']['lrs']}) > 5  # decayed by layers


def test_gradients_are_accumulated(noted):
    # DDP adds up batches and then processes, FSDP2 the other way round, so not to the bit.
    states = noted['accumulated_steps']
    for index, state in states['fsdp']['state'].items():
        assert state['step'] == 1
        torch.testing.assert_close(state['exp_avg'], states['ddp']['state'][index]['exp_avg'], rtol=1e-4, atol=1e-7)


def test_bfloat16_is_sent_and_float32_is_kept(noted):
    recipe = noted['steps_of_the_recipe']
    assert recipe['dtypes'] == {'torch.float32'}
    first, exact = recipe['fsdp bfloat16']['logs'][0], recipe['fsdp']['logs'][0]
    assert float(first['loss']) == pytest.approx(float(exact['loss']), rel=2e-2)
    assert float(first['loss']) != float(exact['loss'])


def test_parameters_are_cut_behind_validation(noted):
    assert noted['steps_of_the_recipe']['cut behind validation']
    assert not noted['differing_weights']['cut']  # with torch's function alone they are not


def test_one_process_alone_is_told_to_start_more():
    with pytest.raises(ValueError, match='start with torchrun or srun'):
        shard(net())


if __name__ == '__main__':
    # Forked, so that the imports are paid for once; nothing has started a thread yet.
    start_processes(one_process, (sys.argv[1], free_port()), PROCESSES, start_method='fork')
