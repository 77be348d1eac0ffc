"""A folded model gives what the model gives; a copy leaves it alone."""

import copy
import gc
import pickle
import re
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from backbones import ConvNeXt, ConvNeXtIsotropic
from backbones.convnext import ConvNeXtBlock
from backbones.folding import FoldedBlock, fold, runs_on_triton, why_not
from backbones.kernels import choice, cpu

MINI = dict(depths=(1, 2, 1, 1), channels=(24, 96, 112, 128))
MODELS = {
    'V1': lambda: ConvNeXt(MINI, layer_scale_init_value=1.0, drop_path_rate=0.5),
    'V1 without layer scale': lambda: ConvNeXt(MINI, layer_scale_init_value=0),
    'V2': lambda: ConvNeXt(MINI, use_grn=True),
    'tanh': lambda: ConvNeXt(MINI, layer_scale_init_value=1.0, act_cfg=dict(type='GELU', approximate='tanh')),
    'SiLU': lambda: ConvNeXt(MINI, layer_scale_init_value=1.0, act_cfg=dict(type='SiLU')),
    'eager': lambda: ConvNeXt(MINI, layer_scale_init_value=1.0, kernels='eager'),
    'isotropic': lambda: ConvNeXtIsotropic(dict(depth=2, channels=96), out_channels=16),
}


@pytest.fixture(params=MODELS)
def model(request, randomize):
    model = MODELS[request.param]()
    randomize(model)
    return model.eval()


def image(*size, dtype=torch.float32):
    return torch.randn(*size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def worst(outputs, references):
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(outputs, references, strict=True))


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('size', [(2, 3, 96, 64), (1, 3, 65, 97), (3, 3, 7, 50)])
def test_within_rounding_of_float64(model, size, layout):
    x = image(*size).contiguous(memory_format=layout)
    folded = fold(model)
    with torch.inference_mode():
        references = copy.deepcopy(model).double()(x.double())
        again, outputs = folded(image(1, 3, 128, 32)), folded(x)  # packed for other sizes than are computed now
        assert worst(outputs, references) < max(4 * worst(model(x), references), 2e-6)
        assert len(again) == 4
    assert worst(fold(model.double())(x.double()), references) < 1e-12


def test_bfloat16(model):
    x = image(2, 3, 64, 64)
    with torch.no_grad():
        references = copy.deepcopy(model).double()(x.double())
        plain, outputs = model.bfloat16()(x.bfloat16()), fold(model)(x.bfloat16())
        assert {out.dtype for out in outputs} == {torch.bfloat16}
        assert worst(outputs, references) < 1.5 * worst(plain, references)
        model.float()
        with torch.autocast('cpu', torch.bfloat16):
            assert worst(fold(model)(x), references) < 1.5 * worst(model(x), references)


def test_the_model_is_left_alone(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    folded = fold(model)
    folded(image(1, 3, 64, 64))
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(m, FoldedBlock) for m in model.modules())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(RuntimeError, match=r'Unexpected|Missing'):
        model.load_state_dict(folded.state_dict())  # no checkpoint of the copy is mistaken for one of the model


def test_later_weights_do_not_reach_the_copy(model):
    x = image(1, 3, 64, 64)
    folded = fold(model)
    with torch.no_grad():
        expected = folded(x)
        for parameter in model.parameters():
            parameter.data.add_(1)
        assert all(torch.equal(a, b) for a, b in zip(folded(x), expected, strict=True))


def test_copied_pickled_and_cast(model):
    x = image(1, 3, 64, 64)
    folded = fold(model)
    with torch.no_grad():
        expected = folded(x)
        for other in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded)), folded.double().float()):
            assert worst(other(x), [e.double() for e in expected]) < 1e-6


def test_gradients_of_the_input(model):
    """As a perceptual loss takes them."""
    xs = [image(1, 3, 64, 64).requires_grad_() for _ in range(2)]
    for x, form in zip(xs, (model, fold(model)), strict=True):
        sum(out.mul(image(*out.shape)).sum() for out in form(x)).backward()
    assert (xs[0].grad - xs[1].grad).norm() < 1e-5 * xs[0].grad.norm()


def test_exported(model):
    folded, x = fold(model), image(1, 3, 64, 64)
    program = torch.export.export(folded, (x,))
    assert not any('mkldnn' in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        assert worst(program.module()(x), [out.double() for out in folded(x)]) < 1e-5


def test_without_the_fused_operators(model, monkeypatch):
    x, folded = image(1, 3, 64, 64), fold(model)
    with torch.no_grad():
        expected = folded(x)
        monkeypatch.setattr(cpu, 'has_onednn', lambda dtype: False)
        monkeypatch.setattr(cpu, '_pointwise', lambda *_: pytest.fail('was asked for'))
        assert worst(folded(x), [out.double() for out in expected]) < 1e-5


@pytest.mark.skipif(not cpu.can_fuse_linear(torch.ones(1)), reason='needs oneDNN')
@pytest.mark.parametrize(
    ('name', 'used'), [('V1', True), ('V2', True), ('tanh', False), ('SiLU', False), ('eager', False)]
)
def test_which_models_take_the_fused_operators(name, used, monkeypatch):
    calls, run = [], cpu.linear_gelu
    monkeypatch.setattr(cpu, 'linear_gelu', lambda *args: calls.append(1) or run(*args))
    with torch.no_grad():
        fold(MODELS[name]())(image(1, 3, 64, 64))
    assert bool(calls) == used


def test_in_place_the_folded_weights_are_given_up(model):
    x = image(2, 3, 64, 64)
    with torch.no_grad():
        expected = fold(model)(x)
    blocks = [m for m in model.modules() if type(m) is ConvNeXtBlock]
    given_up = [weakref.ref(block.pwconv1.weight) for block in blocks]
    number = len(blocks)
    del blocks
    assert fold(model.train(), in_place=True) is model
    gc.collect()
    assert given_up and all(weight() is None for weight in given_up)
    assert sum(isinstance(m, FoldedBlock) for m in model.modules()) == number
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(x), expected, strict=True))


def adapted(model):
    model.stages[0][0].pwconv1 = nn.Sequential(model.stages[0][0].pwconv1)


def normed(model):
    model.stages[0][0].norm = nn.RMSNorm(24)


def hooked(model):
    model.stages[1][0].pwconv2.register_forward_hook(lambda *_: None)


def patched(model):
    layer = model.stages[1][0].norm
    original = layer.forward
    layer.forward = lambda x: 2 * original(x)


def wrapped(model):
    block = model.stages[1][0]
    original = block.forward
    block.forward = lambda x: 2 * original(x)


def dropping(model):
    model.stages[1][0].drop_path = nn.Dropout()


def without_shift(model):
    model.stages[1][0].norm = nn.LayerNorm(16, bias=False)


@pytest.mark.parametrize('in_place', [False, True])
@pytest.mark.parametrize(
    ('harm', 'said'),
    [
        (lambda model: model.half(), 'float16, which loses'),
        (adapted, 'Sequential in the place of a layer that folds'),
        (normed, 'RMSNorm in the place'),
        (hooked, 'pwconv2 has a hook'),
        (patched, 'norm was replaced'),
        (wrapped, 'another forward function'),
        (dropping, 'drop_path was replaced'),
        (without_shift, 'norm lacks its weight or bias'),
    ],
)
def test_what_cannot_be_folded_is_refused_and_stays(mini, harm, said, in_place):
    model = mini()
    assert why_not(model) is None
    harm(model)
    assert re.search(said, str(why_not(model)))
    with pytest.raises(ValueError, match=f'ConvNeXt cannot be folded: .*{said}'):
        fold(model, in_place=in_place)
    assert model.training and not any(isinstance(m, FoldedBlock) for m in model.modules())


def test_a_hook_on_every_module_is_not_passed_over(mini):
    model = mini()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ValueError, match='every module has a hook'):
            fold(model)
    finally:
        handle.remove()
    assert why_not(model) is None


@pytest.mark.parametrize('cast', [nn.Module.half, lambda model: model.to('cpu', torch.float16)])
def test_a_folded_model_does_not_become_float16(cast, mini):
    """In which a layer scale of 1e-6 times a weight is zero."""
    folded = fold(mini(layer_scale_init_value=1e-6))
    blocks = [m for m in folded.modules() if isinstance(m, FoldedBlock)]
    weights = [block.w2 for block in blocks]
    with pytest.raises(RuntimeError, match=r'cannot become float16, .*small layer scales are lost'):
        cast(folded)
    assert all(block.w2 is weight for block, weight in zip(blocks, weights, strict=True))
    for other in (torch.bfloat16, torch.float64):
        assert {m.w2.dtype for m in fold(mini()).to(other).modules() if isinstance(m, FoldedBlock)} == {other}
    cast(fold(MODELS['V1 without layer scale']()))


def test_a_folded_model_does_not_run_in_float16(mini):
    x = image(1, 3, 64, 64)
    with torch.no_grad(), torch.autocast('cpu', torch.float16):
        with pytest.raises(RuntimeError, match='cannot run in float16: small layer scales'):
            fold(mini())(x)
        fold(MODELS['V1 without layer scale']())(x)


def test_sharded_weights_are_refused(mini, tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = mini()
        fully_shard(model)
        assert 'DTensor, as sharding has them' in str(why_not(model))
    finally:
        torch.distributed.destroy_process_group()


def test_mistakes_are_explained(mini):
    with pytest.raises(ValueError, match='Conv2d cannot be folded: it holds no ConvNeXt block'):
        fold(nn.Conv2d(1, 1, 1))
    with pytest.raises(RuntimeError, match='for inference'):
        fold(mini()).train()(image(1, 3, 64, 64))


def test_which_models_run_on_triton(monkeypatch, caplog):
    """Under autocast the products have another dtype than the weights, here float32."""
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setattr(choice, 'why_not', lambda device, dtype: None)
    models = [MODELS[name]() for name in ('V1', 'eager')]
    assert [runs_on_triton(model) for model in models] == [False, False]
    for model in models:
        for block in (m for m in model.modules() if type(m) is ConvNeXtBlock):
            block.pwconv1 = _OnCuda()
    assert [runs_on_triton(model) for model in models] == [False, False]
    monkeypatch.setattr(choice, 'PROVEN', frozenset({((9, 0), torch.bfloat16)}))
    assert [runs_on_triton(model) for model in models] == [True, False]
    assert [runs_on_triton(models[0], dtype) for dtype in (torch.bfloat16, torch.float32)] == [True, False]
    assert not caplog.records


class _OnCuda(nn.Module):
    """Where there is none."""

    class weight:
        device, dtype = torch.device('cuda', 0), torch.float32
