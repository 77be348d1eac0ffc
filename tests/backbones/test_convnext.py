import inspect

import pytest
import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.registry import MODELS
from mmseg.registry import MODELS as MMSEG_MODELS
from torch import nn

from backbones import ARCHS, GRN, ConvNeXt, LayerNorm2d

MINI = dict(depths=(1, 2, 3, 1), channels=(8, 16, 24, 32))


# Classifiers as published: parameters with the last norm (2 C4) and a head of 1000 classes (1000 C4 + 1000).
PUBLISHED = [
    ('tiny', False, 28_589_128),
    ('small', False, 50_223_688),
    ('base', False, 88_591_464),
    ('large', False, 197_767_336),
    ('xlarge', False, 350_196_968),
    ('atto', True, 3_708_400),
    ('femto', True, 5_233_240),
    ('pico', True, 9_066_280),
    ('nano', True, 15_623_800),
    ('tiny', True, 28_635_496),
    ('base', True, 88_717_800),
    ('large', True, 197_956_840),
    ('huge', True, 660_289_640),
]


@pytest.mark.parametrize(('arch', 'use_grn', 'published'), PUBLISHED)
def test_parameters_are_as_many_as_published(arch, use_grn, published):
    with torch.device('meta'):
        model = ConvNeXt(arch, use_grn=use_grn)
    c4 = ARCHS[arch][1][-1]
    backbone = published - 2 * c4 - (1000 * c4 + 1000)
    output_norms = 2 * sum(ARCHS[arch][1])
    assert sum(p.numel() for p in model.parameters()) == backbone + output_norms


def test_v1_atto_and_its_channels():
    model = ConvNeXt('atto')
    assert model.channels == (40, 80, 160, 320)
    assert [len(stage) for stage in model.stages] == [2, 2, 6, 2]
    assert not any('grn' in name for name, _ in model.named_parameters())


def test_signature_is_the_contract():
    contract = dict(
        arch='tiny',
        in_channels=3,
        stem_patch_size=4,
        norm_cfg=dict(type='LN2d', eps=1e-6),
        act_cfg=dict(type='GELU'),
        linear_pw_conv=True,
        use_grn=False,
        drop_path_rate=0.0,
        layer_scale_init_value=1e-6,
        out_indices=(0, 1, 2, 3),
        frozen_stages=0,
        gap_before_final_norm=False,
        with_cp=False,
        init_cfg=None,
        kernel_size=7,  # ours, behind the others
        output_stride=32,
        kernels='auto',
    )
    parameters = inspect.signature(ConvNeXt).parameters
    assert [(name, p.default) for name, p in parameters.items()] == list(contract.items())


@pytest.mark.parametrize('size', [(64, 64), (65, 97), (63, 130), (32, 32), (7, 50), (1, 1), (3, 70)])
def test_output_shapes_for_any_input_size(mini, size):
    outputs = mini()(torch.randn(2, 3, *size))
    assert [out.shape[:2] for out in outputs] == [(2, 8), (2, 16), (2, 24), (2, 32)]
    for out, stride in zip(outputs, (4, 8, 16, 32), strict=True):
        assert tuple(out.shape[2:]) == tuple(max(side // stride, 1) for side in size)
        assert torch.isfinite(out).all()


def test_padding_is_only_for_inputs_that_are_too_small(mini):
    model = mini()
    x = torch.randn(1, 3, 66, 67)
    torch.testing.assert_close(model(x), model(x[..., :64, :64]), rtol=1e-4, atol=1e-4)


def test_other_input_channels_and_patch_size(mini):
    model = mini(in_channels=1, stem_patch_size=2)
    assert model.strides == (2, 4, 8, 16)
    assert [out.shape[-1] for out in model(torch.randn(1, 1, 32, 32))] == [16, 8, 4, 2]


@pytest.mark.parametrize(
    ('given', 'stages'),
    [
        ((0, 1, 2, 3), (0, 1, 2, 3)),
        ([3, 1], (1, 3)),
        ([-1, 0], (0, 3)),
        ((-4, -2), (0, 2)),
        (3, (3,)),
        (-1, (3,)),
        ([1], (1,)),
    ],
)
def test_out_indices(mini, given, stages):
    copy = list(given) if isinstance(given, list) else given
    model = mini(out_indices=given)
    assert given == copy  # the caller's list is left alone
    assert model.out_indices == stages
    assert model.channels == tuple(MINI['channels'][i] for i in stages)
    assert model.strides == tuple(4 * 2**i for i in stages)
    assert {name for name, _ in model.named_children() if name.startswith('norm')} == {f'norm{i}' for i in stages}

    x = torch.randn(1, 3, 64, 64)
    everything = mini()
    everything.load_state_dict(model.state_dict(), strict=False)
    for out, i in zip(model(x), stages, strict=True):
        torch.testing.assert_close(out, everything(x)[i], rtol=0, atol=0)


def test_stages_behind_the_last_output_cost_nothing(mini):
    model = mini(out_indices=(0, 1)).train()
    model.stages[2].register_forward_hook(lambda *_: pytest.fail('stage 2 was computed'))
    sum(out.sum() for out in model(torch.randn(1, 3, 64, 64))).backward()
    # DistributedDataParallel fails on trainable parameters without a gradient.
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert {n.split('.')[1] for n, p in model.named_parameters() if not p.requires_grad} == {'2', '3'}


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize(('frozen_stages', 'frozen'), [(0, 0), (-1, 0), (2, 2), (4, 4)])
def test_frozen_stages_stay_frozen(mini, frozen_stages, frozen, training):
    model = mini(frozen_stages=frozen_stages, drop_path_rate=0.1)
    model.requires_grad_(True)
    assert model.train() is model
    assert model.eval() is model
    assert model.train(training) is model

    for i in range(4):
        for module in (model.downsample_layers[i], *model.stages[i].modules()):
            assert module.training == (training and i >= frozen)
    sum(out.square().sum() for out in model(torch.randn(2, 3, 64, 64))).backward()
    for name, parameter in model.named_parameters():
        is_frozen = not name.startswith('norm') and int(name.split('.')[1]) < frozen
        assert parameter.requires_grad == (not is_frozen), name
        assert (parameter.grad is None) == is_frozen, name


def test_frozen_after_construction(mini):
    model = mini(frozen_stages=1)
    assert not any(p.requires_grad for p in model.stages[0].parameters())
    assert not model.stages[0].training


def _step(model):
    torch.manual_seed(3)  # of the drop path
    outputs = model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    sum(out.square().mean() for out in outputs).backward()
    return outputs, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize('use_grn', [False, True])
@pytest.mark.parametrize('frozen_stages', [0, 2])
@pytest.mark.parametrize('drop_path_rate', [0.0, 0.5])
def test_checkpointing_changes_nothing(mini, use_grn, frozen_stages, drop_path_rate):
    options = dict(use_grn=use_grn, frozen_stages=frozen_stages, drop_path_rate=drop_path_rate)
    plain_outputs, plain_grads = _step(mini(**options).train())
    outputs, grads = _step(mini(with_cp=True, **options).train())
    torch.testing.assert_close(outputs, plain_outputs, rtol=0, atol=0)
    torch.testing.assert_close(grads, plain_grads, rtol=0, atol=0)


def test_checkpointing_behind_a_frozen_stem(mini):
    model = mini(with_cp=True)
    model.downsample_layers[0].requires_grad_(False)  # now the first block's input needs no gradient
    _, grads = _step(model)
    assert grads['stages.0.0.pwconv1.weight'].abs().sum() > 0


def test_drop_path_is_at_work_in_training_only(mini):
    model = mini(drop_path_rate=0.5)
    x = torch.randn(4, 3, 64, 64)
    assert [block.drop_path.drop_prob for block in model.stages[2]] == pytest.approx([0.25, 1 / 3, 5 / 12])
    assert not torch.equal(model.train()(x)[-1], model(x)[-1])
    assert torch.equal(model.eval()(x)[-1], model(x)[-1])


@pytest.mark.parametrize('with_cp', [False, True])
def test_checkpointing_computes_blocks_twice(mini, with_cp):
    model = mini(with_cp=with_cp)
    calls = []
    model.stages[2][1].dwconv.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert len(calls) == 1  # nothing to recompute
    _step(model)
    assert len(calls) == (3 if with_cp else 2)


@pytest.mark.parametrize(('with_cp', 'stages'), [((0, 1), {0, 1}), ([-1], {3}), ((), set()), (True, {0, 1, 2, 3})])
def test_checkpointing_of_some_stages(mini, with_cp, stages):
    model = mini(with_cp=with_cp)
    assert {i for i, stage in enumerate(model.stages) for block in stage if block.with_cp} == stages
    outputs, grads = _step(model.train())
    plain_outputs, plain_grads = _step(mini().train())
    torch.testing.assert_close(outputs, plain_outputs, rtol=0, atol=0)
    torch.testing.assert_close(grads, plain_grads, rtol=0, atol=0)


@pytest.mark.parametrize('use_grn', [False, True])
def test_every_parameter_gets_a_gradient(mini, use_grn):
    _, grads = _step(mini(use_grn=use_grn))
    assert [name for name, grad in grads.items() if grad is None or not grad.abs().sum() > 0] == []


def test_layer_scale():
    assert ConvNeXt(MINI).stages[3][0].gamma.tolist() == pytest.approx([1e-6] * 32)
    assert ConvNeXt(MINI, layer_scale_init_value=1.0).stages[0][0].gamma.tolist() == [1.0] * 8
    assert ConvNeXt(MINI, layer_scale_init_value=0).stages[0][0].gamma is None


def test_grn_has_layer_scale_only_if_asked_for():
    assert ConvNeXt(MINI, use_grn=True).stages[0][0].gamma is None
    assert ConvNeXt(MINI, use_grn=True, layer_scale_init_value=float('0.000001')).stages[0][0].gamma is not None
    model = MODELS.build(dict(type='ConvNeXt', arch=MINI, use_grn=True, layer_scale_init_value=1e-6))
    assert model.stages[0][0].gamma is not None
    assert model.stages[0][0].grn.gamma.shape == (1, 1, 1, 32)


def test_initial_weights_are_the_official_ones():
    model = ConvNeXt('atto')
    weight = model.stages[3][0].pwconv1.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.stages[3][0].pwconv1.bias.abs().max() == 0


def test_activation_and_eps_reach_the_blocks():
    model = ConvNeXt(MINI, norm_cfg=dict(type='LN2d', eps=1e-5), act_cfg=dict(type='GELU', approximate='tanh'))
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert model.stages[0][0].act.approximate == 'tanh'
    assert isinstance(ConvNeXt(MINI, act_cfg=dict(type='ReLU')).stages[0][0].act, nn.ReLU)


def _official_channels_first_variance(x):
    """The variance as facebookresearch/ConvNeXt takes it, in the dtype of its input."""
    return (x - x.mean(1, keepdim=True)).pow(2).mean(1, keepdim=True)


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_layer_norm_of_large_activations(dtype, tolerance):
    x = (torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(0)) * 1e4).to(dtype)
    y = LayerNorm2d(64, eps=1e-6).to(dtype)(x)
    assert y.dtype == dtype
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y.float(), LayerNorm2d(64, eps=1e-6)(x.float()), rtol=tolerance, atol=tolerance)


def test_the_official_variance_overflows_there():
    x = (torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(0)) * 1e4).to(torch.float16)
    assert torch.isinf(_official_channels_first_variance(x)).any()


def test_layer_norm_keeps_the_shape_and_is_channels_last():
    y = LayerNorm2d(16)(torch.randn(2, 16, 5, 7))
    assert y.shape == (2, 16, 5, 7)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('scale', [1.0, 1e4])
def test_grn_in_half_precision(randomize, scale):
    x = torch.randn(2, 8, 8, 32, generator=torch.Generator().manual_seed(0)).mul(scale).clamp(-3e4, 3e4).half()
    grn = GRN(32)
    randomize(grn)
    grn.gamma.data.mul_(0.1)
    expected = grn(x.float())
    y = grn.half()(x)
    assert y.dtype == torch.float16
    assert torch.isfinite(y).all()
    assert (y.float() - expected).norm() / expected.norm() < 1e-3


def test_grn_is_its_formula_in_float64(randomize):
    grn = GRN(6).double()
    randomize(grn)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    norm = x.square().sum((1, 2), keepdim=True).sqrt()
    expected = x + grn.gamma * (x * norm / (norm.mean(-1, keepdim=True) + 1e-6)) + grn.beta
    torch.testing.assert_close(grn(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(grn, x)


def _relative_errors(outputs, references):
    return [((a.float() - b).norm() / b.norm()).item() for a, b in zip(outputs, references, strict=True)]


@pytest.mark.parametrize('use_grn', [False, True])
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_half_precision_weights(mini, dtype, tolerance, use_grn):
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    references = mini(use_grn=use_grn)(x)
    outputs = mini(use_grn=use_grn).to(dtype)(x.to(dtype))
    assert {out.dtype for out in outputs} == {dtype}
    assert max(_relative_errors(outputs, references)) < tolerance


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('use_grn', [False, True])
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_autocast(mini, dtype, tolerance, use_grn, with_cp):
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    references = mini(use_grn=use_grn)(x)
    model = mini(use_grn=use_grn, with_cp=with_cp)
    with torch.autocast('cpu', dtype):
        outputs = model(x)
        loss = sum(out.float().square().mean() for out in outputs)
    loss.backward()
    assert max(_relative_errors(outputs, references)) < tolerance
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize('registry', [MODELS, MMDET_MODELS, MMSEG_MODELS], ids=['mmengine', 'mmdet', 'mmseg'])
def test_found_from_every_registry(registry):
    assert registry.get('ConvNeXt') is ConvNeXt
    assert isinstance(registry.build(dict(type='ConvNeXt', arch=MINI, linear_pw_conv=False)), ConvNeXt)


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (dict(arch='xl'), r"Did you mean 'xlarge'"),
        (dict(arch='convnextv2_base'), r"Did you mean 'base'"),
        (dict(arch=None), r'arch=None: give a name or a dict'),
        (dict(arch='tinny'), r"'tinny'.*Did you mean 'tiny'.*atto, femto.*huge"),
        (dict(arch='XLarge'), r"Did you mean 'xlarge'"),
        (dict(arch='resnet'), r'unknown\. Choose from'),
        (dict(arch=dict(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))), r'depths and channels'),
        (dict(arch=dict(depths=(1, 1, 1), channels=(8, 8, 8))), r'four positive numbers'),
        (dict(arch=dict(depths=(1, 0, 1, 1), channels=(8, 8, 8, 8))), r'four positive numbers'),
        (dict(norm_cfg=dict(type='BN')), r"norm_cfg.*'BN'.*LN2d"),
        (dict(norm_cfg=dict(type='LN2d', epsilon=1e-5)), r'epsilon'),
        (dict(act_cfg=dict(type='Swisch')), r"'Swisch'.*GELU, ReLU"),
        (dict(drop_path_rate=1.0), r'drop_path_rate=1\.0'),
        (dict(drop_path_rate=-0.1), r'drop_path_rate=-0\.1'),
        (dict(layer_scale_init_value=-1.0), r'layer_scale_init_value=-1\.0'),
        (dict(layer_scale_init_value=float('nan')), r'layer_scale_init_value=nan'),
        (dict(out_indices=(0, 4)), r'out_indices=\(0, 4\)'),
        (dict(out_indices=(-5,)), r'out_indices=\(-5,\)'),
        (dict(out_indices=(1, 1)), r'different stages'),
        (dict(out_indices=(3, -1)), r'different stages'),
        (dict(out_indices=()), r'at least one'),
        (dict(frozen_stages=5), r'frozen_stages=5'),
        (dict(frozen_stages=-2), r'frozen_stages=-2'),
        (dict(gap_before_final_norm=True), r'gap_before_final_norm'),
        (dict(kernel_size=4), r'kernel_size=4: give 3, 5'),
        (dict(kernel_size='7'), r"kernel_size='7'"),
        (dict(output_stride=4), r'output_stride=4: give 32, 16 or 8'),
        (dict(output_stride=8, stem_patch_size=16), r'output_stride=8: .*not less than the stem'),
        (dict(with_cp=1), r'with_cp=1: give True, False, or different stages .*such as \(0, 1\)'),
        (dict(with_cp=(0, 4)), r'with_cp=\(0, 4\): give True'),
        (dict(with_cp=(1, 1)), r'with_cp=\(1, 1\): .*different'),
        (dict(with_cp='all'), r"with_cp='all': give True"),
        (dict(kernels='cuda'), r"kernels='cuda' is unknown; choose from auto, eager, triton"),
        (dict(in_channels=0), r'in_channels=0'),
        (dict(stem_patch_size=0), r'stem_patch_size=0: give 1 to 32'),
        (dict(act_cfg=dict(type='GELU', approx='tanh')), r'act_cfg=.*approx'),
    ],
)
def test_mistakes_are_explained(options, said):
    with pytest.raises(ValueError, match=said):
        ConvNeXt(**{'arch': MINI, **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason='says what happens without a GPU')
def test_triton_without_a_gpu(monkeypatch):
    monkeypatch.setenv('TRITON_INTERPRET', '0')
    with pytest.raises(ValueError, match=r"kernels='triton' needs a CUDA device"):
        ConvNeXt(MINI, kernels='triton')


def test_layer_depth_refuses_an_unknown_mode(mini):
    with pytest.raises(ValueError, match=r"'layerwise'.*'layer_wise' or 'stage_wise'"):
        mini().layer_depth('stages.0.0.gamma', 'layerwise')
