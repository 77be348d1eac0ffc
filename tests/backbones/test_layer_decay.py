import copy
import re

import pytest
import torch
from layer_decay_golden import GOLDEN, LAYER_WISE, STAGE_WISE
from mmdet.engine.optimizers import LearningRateDecayOptimizerConstructor
from mmengine.optim import build_optim_wrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from backbones import ConvNeXt, LayerDecayOptimWrapperConstructor, layer_decay
from backbones.layer_decay import mend_fused

DEPTHS = {'tiny': (3, 3, 9, 3), 'base': (3, 3, 27, 3), 'xxlarge': (3, 4, 30, 3)}

NO_DECAY = re.compile(
    r'.*(bias|gamma|beta|scale)'
    r'|backbone\.(norm\d|downsample_layers\.(0\.1|[123]\.0)|stages\.\d\.\d\.norm)\.weight'
    r'|neck\.[12]\.weight'
)


def backbone(size='tiny', **options):
    return ConvNeXt(dict(depths=DEPTHS[size], channels=(4, 4, 4, 4)), layer_scale_init_value=1.0, **options)


class Detector(nn.Module):
    def __init__(self, size='tiny', **options):
        super().__init__()
        self.backbone = backbone(size, **options)
        self.neck = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
        self.head = nn.Linear(4, 2)


def groups_of(model, decay_rate=0.7, constructor='LayerDecayOptimWrapperConstructor', **paramwise_cfg):
    wrapper = build_optim_wrapper(
        model,
        dict(
            type='OptimWrapper',
            optimizer=dict(type='AdamW', lr=2e-4, weight_decay=0.05),
            constructor=constructor,
            paramwise_cfg=dict(decay_rate=decay_rate, **paramwise_cfg),
        ),
    )
    return wrapper.optimizer.param_groups


def by_name(groups):
    return {name: (g['lr'], g['weight_decay']) for g in groups for name in g['param_names']}


def by_parameter(model, groups):
    """Learning rate and weight decay of each parameter, by the name it has in ``model``."""
    values = {id(p): (g['lr'], g['weight_decay']) for g in groups for p in g['params']}
    return {name: values[id(p)] for name, p in model.named_parameters()}


@pytest.mark.parametrize(('size', 'mode', 'rate', 'scales'), GOLDEN)
def test_golden_table(size, mode, rate, scales):
    table = LAYER_WISE[size] if mode == 'layer_wise' else STAGE_WISE
    assert len(table) == len(scales)
    scale_of = {f'{prefix}.': scale for names, scale in zip(table, scales, strict=True) for prefix in names}
    model = Detector(size)
    groups = groups_of(model, rate, decay_type=mode)
    seen = by_parameter(model, groups)
    for name, (lr, _) in seen.items():
        expected = [scale for prefix, scale in scale_of.items() if name.startswith(prefix)]
        assert len(expected) == 1, name
        assert lr == pytest.approx(2e-4 * expected[0], abs=2e-4 * 6e-6), name
    assert all(group['lr'] == 2e-4 * group['lr_scale'] for group in groups)


@pytest.mark.parametrize(
    ('size', 'mode', 'count'),
    [('tiny', 'layer_wise', 16), ('base', 'layer_wise', 28), ('tiny', 'stage_wise', 12), ('base', 'stage_wise', 12)],
)
def test_equal_to_mmdet(size, mode, count):
    model = Detector(size)
    theirs = groups_of(
        model,
        decay_type=mode,
        num_layers={'tiny': 6, 'base': 12}[size],
        constructor=LearningRateDecayOptimizerConstructor,
    )
    ours = groups_of(model, decay_type=mode)
    assert len(ours) == len(theirs) == count
    assert by_name(ours) == by_name(theirs)
    assert {g['group_name']: set(g['param_names']) for g in ours} == {
        g['group_name']: set(g['param_names']) for g in theirs
    }


def test_a_wrong_number_of_layers_is_an_error():
    """With T's number of layers on a 27-block stage, mmdet's constructor trains above the base rate without a word."""
    groups = groups_of(Detector('base'), num_layers=6, constructor=LearningRateDecayOptimizerConstructor)
    assert max(group['lr_scale'] for group in groups) == pytest.approx(4.16, abs=0.01)
    with pytest.raises(ValueError, match=r'num_layers=6, but backbone \(ConvNeXt\) has 12\. Leave num_layers out'):
        groups_of(Detector('base'), num_layers=6)


@pytest.mark.parametrize(('blocks', 'layers'), [(2, 6), (9, 6), (10, 12), (27, 12), (28, 13), (30, 13), (36, 15)])
def test_layers_follow_from_the_third_stage(blocks, layers):
    with torch.device('meta'):
        model = ConvNeXt(dict(depths=(3, 3, blocks, 3), channels=(4, 4, 4, 4)))
    depths = [model.layer_depth(name) for name, _ in model.named_parameters()]
    assert {number for _, number in depths} == {layers + 2}
    assert model.layer_depth('stages.3.0.gamma')[0] == layers
    assert model.layer_depth(f'stages.2.{blocks - 1}.gamma')[0] < layers  # no collision with the last stage
    assert model.layer_depth('norm3.weight')[0] == layers + 1


def test_thirty_blocks_in_the_third_stage():
    names = by_name(groups_of(Detector('xxlarge'), 0.8, num_layers=13))
    assert names['backbone.stages.3.0.gamma'][0] == pytest.approx(2e-4 * 0.8)
    assert names['backbone.stages.2.29.gamma'][0] == pytest.approx(2e-4 * 0.8**2)
    assert names['backbone.downsample_layers.0.0.weight'][0] == pytest.approx(2e-4 * 0.8**14)


def test_weight_decay_goes_by_role():
    model = Detector(use_grn=True)
    model.attention = nn.MultiheadAttention(4, 2)
    model.scale = nn.Parameter(torch.ones(()))
    decays = {name for name, (_, weight_decay) in by_parameter(model, groups_of(model)).items() if weight_decay}
    assert decays == {name for name, _ in model.named_parameters() if not NO_DECAY.fullmatch(name)}
    assert model.backbone.stages[0][0].grn.gamma.ndim == 4  # which a rule by dimensions would decay
    assert 'backbone.stages.0.0.dwconv.weight' in decays
    assert 'attention.in_proj_weight' in decays


# Wherever the backbone is.


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_under_ddp(process_group):
    model = Detector()
    expected = by_parameter(model, groups_of(model))
    ddp = nn.parallel.DistributedDataParallel(model)
    assert by_parameter(model, groups_of(ddp)) == expected
    assert by_parameter(model, groups_of(torch.compile(ddp))) == expected


def test_under_compile():
    model = Detector()
    expected = by_parameter(model, groups_of(model))
    assert by_parameter(model, groups_of(torch.compile(model))) == expected
    model.backbone = torch.compile(model.backbone)
    names = by_name(groups_of(model))
    assert names == {name.replace('_orig_mod.', ''): value for name, value in expected.items()}


def fsdp(module):
    return FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device('cpu'))


@pytest.mark.parametrize('wrapper', [checkpoint_wrapper, fsdp])
@pytest.mark.parametrize('where', ['model', 'backbone', 'stage', 'blocks'])
def test_under_wrappers(where, wrapper, process_group):
    model = Detector()
    expected = by_parameter(model, groups_of(model))
    if where == 'backbone':
        model.backbone = wrapper(model.backbone)
    elif where == 'stage':
        model.backbone.stages[2] = wrapper(model.backbone.stages[2])
    elif where == 'blocks':
        for stage in model.backbone.stages:
            for i, block in enumerate(stage):
                stage[i] = wrapper(block)
    wrapped = wrapper(model) if where == 'model' else model
    assert any('wrapped_module' in name for name, _ in wrapped.named_modules())
    assert by_name(groups_of(wrapped)) == expected


def test_under_fully_shard(process_group):
    model = Detector()
    expected = by_parameter(model, groups_of(model))
    for stage in model.backbone.stages:
        fully_shard(stage)
    fully_shard(model.backbone)
    assert by_parameter(model, groups_of(model)) == expected
    for out in model.backbone(torch.randn(1, 3, 32, 32)):  # its hooks sit on the stages, which must be called
        assert torch.isfinite(out).all()


def test_flattened_fsdp_is_refused(process_group):
    model = Detector()
    model.backbone = FullyShardedDataParallel(model.backbone, use_orig_params=False, device_id=torch.device('cpu'))
    with pytest.raises(ValueError, match=r'backbone\._flat_param; give it use_orig_params=True'):
        groups_of(model)


def test_under_any_prefix():
    expected = by_name(groups_of(Detector()))

    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = Detector()
            self.projector = nn.Linear(4, 4)

    names = by_name(groups_of(Student()))
    assert {n.removeprefix('student.'): v for n, v in names.items() if n.startswith('student.')} == expected
    assert names['projector.weight'] == (2e-4, 0.05)


def test_without_a_prefix():
    expected = by_name(groups_of(Detector()))
    names = by_name(groups_of(backbone()))
    assert {f'backbone.{name}': value for name, value in names.items()}.items() <= expected.items()


def test_two_backbones_of_different_depth():
    model = nn.ModuleDict(dict(a=backbone('tiny'), b=backbone('base'), head=nn.Linear(4, 4)))
    groups = groups_of(model)
    names = by_name(groups)
    assert names['a.downsample_layers.0.0.weight'][0] == pytest.approx(2e-4 * 0.7**7)
    assert names['b.downsample_layers.0.0.weight'][0] == pytest.approx(2e-4 * 0.7**13)
    assert names['a.norm0.weight'][0] == names['b.norm0.weight'][0] == names['head.weight'][0] == 2e-4
    assert len({group['group_name'] for group in groups}) == len(groups)


def pairs(groups):
    return {(group['lr'], group['weight_decay']) for group in groups}


@pytest.mark.parametrize('mode', ['layer_wise', 'stage_wise'])
@pytest.mark.parametrize('size', DEPTHS)
def test_no_more_groups_than_learning_rates_and_weight_decays(size, mode):
    """A fused step is one pass over the parameters of each group."""
    groups = groups_of(Detector(size), decay_type=mode)
    assert len(groups) == len(pairs(groups))


def test_groups_of_one_learning_rate_stay_apart():
    """With them together, no checkpoint written before could be resumed: their number and names are in it."""
    groups = groups_of(Detector(), 1.0)
    assert (len(groups), len(pairs(groups))) == (16, 2)
    assert len({group['group_name'] for group in groups}) == 16


def test_every_trainable_parameter_is_in_one_group():
    model = Detector('base', use_grn=True)
    ids = [id(p) for group in groups_of(model) for p in group['params']]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize('mode', ['layer_wise', 'stage_wise'])
def test_frozen_parameters_are_skipped(mode):
    model = Detector(frozen_stages=2)
    names = by_name(groups_of(model, decay_type=mode))
    assert set(names) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith(('backbone.stages.0', 'backbone.downsample_layers.1')) for name in names)
    assert names.items() <= by_name(groups_of(Detector(), decay_type=mode)).items()


# Options.


def test_custom_keys_multiply():
    plain = by_name(groups_of(Detector()))
    custom = dict(head=dict(lr_mult=10.0), backbone=dict(lr_mult=0.5), dwconv=dict(decay_mult=0.0))
    custom['backbone.stages.3'] = dict(lr_mult=2.0, decay_mult=0.1)
    model = Detector()
    groups = groups_of(model, custom_keys=custom)
    for name, (lr, weight_decay) in by_parameter(model, groups).items():
        lr_mult, decay_mult = 1.0, 1.0
        if 'backbone.stages.3' in name:  # the longest key counts, alone
            lr_mult, decay_mult = 2.0, 0.1
        elif 'backbone' in name:
            lr_mult = 0.5
        elif 'head' in name:
            lr_mult = 10.0
        assert (lr, weight_decay) == pytest.approx((plain[name][0] * lr_mult, plain[name][1] * decay_mult)), name


def test_custom_key_of_a_part_of_a_name():
    names = by_name(groups_of(Detector(), custom_keys={'dwconv': dict(decay_mult=0.0)}))
    assert names['backbone.stages.1.0.dwconv.weight'][1] == 0.0
    assert names['backbone.stages.1.0.pwconv1.weight'][1] == 0.05


def test_decay_rate_of_one_is_no_decay():
    assert {group['lr'] for group in groups_of(Detector(), 1)} == {2e-4}


def test_one_log_line_for_each_group(monkeypatch):
    lines = []
    monkeypatch.setattr('backbones.layer_decay.print_log', lambda message, **_: lines.append(message))
    groups = groups_of(Detector())
    assert [line.split()[0] for line in lines] == [group['group_name'] for group in groups]
    for line, group in zip(lines, groups, strict=True):
        count = sum(p.numel() for p in group['params'])
        assert f'lr x {group["lr_scale"]:.5f}  weight decay {group["weight_decay"]:g}  ' in line
        assert line.endswith(f'{len(group["params"])} tensors, {count:,} parameters')
        assert '\n' not in line


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (dict(decay_rat=0.9), r"unknown keys \['decay_rat'\]; allowed are decay_rate, decay_type"),
        (dict(bias_lr_mult=2.0), r"unknown keys \['bias_lr_mult'\]"),
        (dict(decay_rate=0), r'decay_rate=0: give a number in \(0, 1\]'),
        (dict(decay_rate=1.1), r'decay_rate=1\.1'),
        (dict(decay_rate=None), r'decay_rate=None'),
        (dict(decay_rate='0.9'), r"decay_rate='0\.9'"),
        (dict(decay_type='layerwise'), r"decay_type='layerwise': choose from layer_wise, stage_wise"),
        (dict(num_layers=12), r'num_layers=12, but backbone \(ConvNeXt\) has 6'),
        (dict(custom_keys=dict(head=dict(lr_mul=1))), r"custom_keys\['head'\] has \['lr_mul'\]; allowed are .*lr_mult"),
        (dict(custom_keys=dict(haed=dict(lr_mult=1))), r"custom_keys \['haed'\] match no parameter"),
    ],
)
def test_mistakes_are_explained(options, said):
    with pytest.raises(ValueError, match=said):
        groups_of(Detector(), **{'decay_rate': 0.7, **options})


@pytest.mark.parametrize('missing', ['lr', 'weight_decay'])
def test_optimizer_must_say_what_is_scaled(missing):
    optimizer = dict(type='AdamW', lr=1e-4, weight_decay=0.05)
    del optimizer[missing]
    with pytest.raises(ValueError, match='the optimizer needs lr and weight_decay'):
        LayerDecayOptimWrapperConstructor(dict(optimizer=optimizer), dict(decay_rate=0.9))


@pytest.mark.parametrize(('rate', 'depth'), [(0.7, 8), (0.7, 11), (1.0, 8), (0.7, -1)])
def test_a_scale_above_one_is_an_error(rate, depth):
    class Wrong(nn.Linear):
        def layer_depth(self, name, mode='layer_wise'):
            return (depth if name == 'weight' else 0), 8

    model = nn.ModuleDict(dict(backbone=Wrong(2, 2)))
    said = {(0.7, 8): r'1\.43 x', (0.7, 11): r'4\.16 x'}.get((rate, depth), '')
    with pytest.raises(ValueError, match=rf'backbone\.weight would train at .*{said}.*depth {depth} of 8'):
        groups_of(model, rate)


def test_any_backbone_with_layer_depth_is_served():
    class Foreign(nn.Linear):
        def layer_depth(self, name, mode):
            return (0 if name == 'weight' else 1), 3

    names = by_name(groups_of(nn.ModuleDict(dict(body=Foreign(2, 2), head=nn.Linear(2, 2))), 0.5))
    assert [names[n][0] for n in ('body.weight', 'body.bias', 'head.weight')] == pytest.approx([0.5e-4, 1e-4, 2e-4])


@pytest.mark.parametrize('key', ['backbone', 'body'])
def test_a_backbone_without_layer_depth_is_refused(key):
    model = nn.ModuleDict({key: nn.Linear(2, 2)})
    said = 'the backbone Linear' if key == 'backbone' else 'ModuleDict'
    with pytest.raises(ValueError, match=rf'{said} does not know.*layer_depth\(name, mode\).*DefaultOptimWrapper'):
        groups_of(model)


def test_registered_under_a_name_that_nobody_shadows():
    from mmdet.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMDET
    from mmseg.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMSEG

    for registry in (OPTIM_WRAPPER_CONSTRUCTORS, MMDET, MMSEG):
        assert registry.get('LayerDecayOptimWrapperConstructor') is LayerDecayOptimWrapperConstructor


def stepped(fused, steps, resumed=None):
    """A model's wrapper after some steps on gradients that are always the same, perhaps going on from a state."""
    torch.manual_seed(0)
    model = Detector()
    wrapper = build_optim_wrapper(
        model,
        dict(
            type='OptimWrapper',
            optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.05, fused=fused),
            constructor='LayerDecayOptimWrapperConstructor',
            paramwise_cfg=dict(decay_rate=0.7),
        ),
    )
    if resumed:
        weights, state = copy.deepcopy(resumed)  # an optimizer goes on with the tensors that it is given
        model.load_state_dict(weights)
        wrapper.load_state_dict(state)
    for i in range(steps):
        generator = torch.Generator().manual_seed(i)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        wrapper.step()
    return model, wrapper


def test_a_fused_optimizer_steps_the_same_within_rounding():
    (fused, _), (plain, _), (other, _) = stepped(True, 10), stepped(None, 10), stepped(None, 9)
    torch.testing.assert_close(fused.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError, match='not close'):
        torch.testing.assert_close(fused.state_dict(), other.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(('before', 'after'), [(None, True), (True, None), (True, True)])
def test_a_run_goes_on_fused_or_not_as_its_config_says(before, after):
    model, wrapper = stepped(before, 3)
    state = model.state_dict(), wrapper.state_dict()
    resumed, now = stepped(after, 4, state)
    assert {group['fused'] for group in now.optimizer.param_groups} == {after}
    expected, _ = stepped(before, 4, state)
    torch.testing.assert_close(resumed.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)
    assert [group['lr'] for group in now.optimizer.param_groups] == [g['lr'] for g in wrapper.optimizer.param_groups]


def test_each_group_stays_as_it_is():
    parameters = [torch.zeros(1, requires_grad=True) for _ in range(3)]
    hows = [dict(fused=True), dict(foreach=True), dict(foreach=False)]
    optimizer = torch.optim.AdamW([dict(params=[p], **how) for p, how in zip(parameters, hows, strict=True)])
    mend_fused(optimizer)
    before = [(group['fused'], group['foreach']) for group in optimizer.param_groups]
    assert len(set(before)) == 3
    optimizer.load_state_dict(torch.optim.AdamW([dict(params=[p]) for p in parameters]).state_dict())
    assert [(group['fused'], group['foreach']) for group in optimizer.param_groups] == before
    for number in (2, 4):
        state = torch.optim.AdamW([dict(params=[torch.zeros(1)]) for _ in range(number)]).state_dict()
        with pytest.raises(ValueError, match='different number of parameter groups'):
            optimizer.load_state_dict(state)


def test_torch_still_takes_the_state_s_word_for_it():
    """When this fails, the hook that keeps ``fused`` can go."""
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], fused=True)
    state = torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).state_dict()
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]['fused'] is None


def give_gradients(model, memory_format=torch.contiguous_format):
    for i, parameter in enumerate(model.parameters()):
        gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        parameter.grad = gradient.contiguous(memory_format=memory_format) if gradient.ndim == 4 else gradient


def to_channels_last(model, optimizer):
    """Weights that change their format between two steps."""
    model.to(memory_format=torch.channels_last)


def channels_last_state(model, optimizer):
    """A checkpoint of a run in channels_last, after a step without it."""
    state = optimizer.state_dict()
    for values in state['state'].values():
        values.update({k: v.to(memory_format=torch.channels_last) for k, v in values.items() if v.ndim == 4})
    optimizer.load_state_dict(state)


def nothing(model, optimizer):
    """Gradients alone are in another format."""


CHANGES = [to_channels_last, channels_last_state, nothing]


def steps_around(change, fused, gradients=torch.contiguous_format):
    """Weights after three steps; something changes its memory format between the second and the third."""
    model, wrapper = stepped(fused, 2)
    change(model, wrapper.optimizer)
    give_gradients(model, gradients)
    wrapper.step()
    return model.state_dict()


@pytest.mark.parametrize('gradients', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('change', CHANGES)
def test_a_fused_step_minds_strides(change, gradients):
    fused, plain = (steps_around(change, how, gradients) for how in (True, None))
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('change', CHANGES)
def test_torch_still_passes_over_strides(change, monkeypatch):
    """When this fails torch has mended it, and the hook can go."""
    monkeypatch.setattr(layer_decay, '_match_strides', lambda *_: None)
    gradients = torch.channels_last if change is nothing else torch.contiguous_format
    fused, plain = (steps_around(change, how, gradients) for how in (True, None))
    with pytest.raises(AssertionError, match='not close'):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


def test_what_was_in_order_is_not_looked_at_again(monkeypatch):
    model, wrapper = stepped(True, 2)
    looked = []
    strides = layer_decay._strides
    monkeypatch.setattr(layer_decay, '_strides', lambda x: looked.append(x) or strides(x))
    give_gradients(model)
    wrapper.step()
    assert looked == []
    wrapper.load_state_dict(wrapper.state_dict())
    give_gradients(model)
    wrapper.step()
    assert len(looked) >= 2 * len(list(model.parameters()))


def test_any_fused_optimizer_can_be_mended():
    def stepped_by_sgd(mend):
        torch.manual_seed(0)
        model = nn.Conv2d(4, 4, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=mend is not None)
        for _ in range(2 if mend else 0):
            mend_fused(optimizer)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            model.to(memory_format=memory_format)
            give_gradients(model)
            optimizer.step()
        return model.state_dict(), len(optimizer._optimizer_step_pre_hooks)

    (mended, hooks), (left, none), (plain, _) = (stepped_by_sgd(mend) for mend in (True, False, None))
    assert (hooks, none) == (1, 0)
    torch.testing.assert_close(mended, plain)
    with pytest.raises(AssertionError, match='not close'):
        torch.testing.assert_close(left, plain)
