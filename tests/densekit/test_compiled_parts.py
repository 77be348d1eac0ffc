"""Parts of a model compiled in training give what the model gives, and nothing else of a run notices.

Most tests stop in front of the code generator (``aot_eager``): graphs, shapes and gradients are those of the compiler,
and no C++ is compiled, which takes minutes for a whole model.
"""

import copy
import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch.multiprocessing import start_processes

import densekit.ops  # noqa: F401

# isort: split
from mmdet.models.necks import FPN
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from backbones import ConvNeXt
from densekit.benchmark.generated import make_batch
from densekit.engine import compiled
from densekit.engine.compiled import CompilePlan, compile_parts, read_plan
from densekit.engine.config import load_config
from densekit.engine.runner import DensekitRunner

PARTS = ('backbone', 'neck')
ELEVEN = [(2, 3, 64 + 16 * i, 96 + 8 * (i % 4)) for i in range(11)]


class Model(nn.Module):
    """Two blocks, the second with drop path, and a neck."""

    def __init__(self, levels=1, **options):
        super().__init__()
        self.backbone = ConvNeXt(
            arch=dict(depths=(2, 1, 1, 1), channels=(8, 16, 16, 16)),
            **dict(out_indices=0, drop_path_rate=0.9, layer_scale_init_value=1.0) | options,
        )
        self.neck = FPN([8], 8, levels)

    def forward(self, images):
        return self.neck(self.backbone(images))


@pytest.fixture(autouse=True)
def _nothing_compiled():
    """What one test has compiled counts for the limits of the next."""
    torch.compiler.reset()
    counters.clear()


@pytest.fixture
def compiled_model():
    def build(dynamic=True, backend='aot_eager', parts=PARTS, **options):
        torch.manual_seed(0)
        model = Model(**options)
        ours = copy.deepcopy(model)
        compile_parts(ours, CompilePlan(parts, dynamic), backend)
        return ours, model

    return build


def images(size):
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def loss_and_gradients(model, x, *, bf16=False):
    torch.manual_seed(1)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        maps = model(x)
    fixed = torch.Generator().manual_seed(2)
    loss = sum((y.float() * torch.randn(y.shape, generator=fixed).to(y.device)).mean() for y in maps)
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(ours, theirs, tolerance):
    """Losses, and gradients as one vector: of what is next to nothing in it, only rounding would be compared."""
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance, abs=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    ours, theirs = (torch.cat([g.flatten().double() for g in one[1].values()]) for one in (ours, theirs))
    assert theirs.norm() > 0 and (ours - theirs).norm() <= tolerance * theirs.norm()


def graphs():
    return counters['stats']['unique_graphs']


@pytest.mark.parametrize(
    'options', [{}, pytest.param({'with_cp': True, 'use_grn': True, 'kernels': 'eager'}, marks=pytest.mark.slow)]
)
def test_eleven_sizes_are_compiled_once(compiled_model, options):
    ours, model = compiled_model(**options)
    for size in ELEVEN:
        assert_equal(loss_and_gradients(ours, images(size)), loss_and_gradients(model, images(size)), 1e-5)
        assert graphs() == len(PARTS)
    assert not counters['graph_break']


def test_a_neck_that_pools(compiled_model):
    """Mask R-CNN's coarsest level takes every other pixel: sides may be odd or even, so that there are four cases."""
    ours, model = compiled_model(parts=('neck',), levels=2)
    for size in [(2, 3, 64 + 4 * i, 128 + 4 * (i // 2)) for i in range(8)]:
        assert_equal(loss_and_gradients(ours, images(size)), loss_and_gradients(model, images(size)), 1e-5)
    assert 1 < graphs() <= 4


def test_each_size_by_itself(compiled_model, caplog):
    ours, model = compiled_model(dynamic=False, parts=('neck',))
    limit = torch._dynamo.config.recompile_limit
    with caplog.at_level(logging.WARNING, 'torch._dynamo'):
        for size in ELEVEN:
            assert_equal(loss_and_gradients(ours, images(size)), loss_and_gradients(model, images(size)), 1e-5)
    assert graphs() == limit < len(ELEVEN)


@pytest.mark.parametrize('part', PARTS)
def test_frozen_stages(compiled_model, part):
    """Those of a part that is compiled, and of one before it."""
    ours, model = compiled_model(False, parts=(part,), frozen_stages=1)
    found, expected = (loss_and_gradients(one.train(), images(ELEVEN[0])) for one in (ours, model))
    assert_equal(found, expected, 1e-5)
    assert graphs() == 1
    names = [name for name, _ in model.named_parameters() if name.startswith('backbone.')]
    assert 0 < sum(name in found[1] for name in names) < len(names)


def test_in_bf16(compiled_model):
    ours, model = compiled_model()
    x = images(ELEVEN[0])
    found, expected = loss_and_gradients(ours, x, bf16=True), loss_and_gradients(model, x, bf16=True)
    assert_equal(found, expected, 1e-2)
    assert_equal(found, loss_and_gradients(ours, x, bf16=True), 1e-7)
    assert not counters['graph_break']


def test_other_weights_are_other_losses(compiled_model):
    """The compiled part reads the weights there are, not those it was compiled with."""
    ours, model = compiled_model(parts=('neck',))
    loss_and_gradients(ours, images(ELEVEN[0]))
    torch.manual_seed(5)
    other = Model()
    ours.load_state_dict(other.state_dict())
    found = loss_and_gradients(ours, images(ELEVEN[0]))
    assert_equal(found, loss_and_gradients(other, images(ELEVEN[0])), 1e-5)
    with pytest.raises(AssertionError):
        assert_equal(found, loss_and_gradients(model, images(ELEVEN[0])), 1e-2)


def test_validation_is_not_compiled(compiled_model):
    ours, model = compiled_model()
    with torch.no_grad():
        ours(images(ELEVEN[0]))
    found, expected = (one.eval()(images(ELEVEN[0])) for one in (ours, model))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert graphs() == 0


def test_a_copy_has_weights_of_its_own(compiled_model):
    ours, _ = compiled_model(parts=('neck',))
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        twin.neck.lateral_convs[0].conv.weight.zero_()
    loss, _ = loss_and_gradients(twin, images(ELEVEN[0]))
    assert graphs() == 0
    assert loss != loss_and_gradients(ours, images(ELEVEN[0]))[0]


def test_names_stay(compiled_model):
    ours, model = compiled_model()
    assert list(ours.state_dict()) == list(model.state_dict())
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in model.named_modules()]


def test_a_part_gets_channels_last(compiled_model):
    """Inductor chooses no layouts where sizes are not known, and convolutions are slow in NCHW."""
    ours, _ = compiled_model(parts=('backbone',))
    given = []
    ours.backbone.forward.compiled = lambda x: given.append(x) or (x,)
    ours.backbone(images(ELEVEN[0]))
    assert given[0].is_contiguous(memory_format=torch.channels_last) and not given[0].is_contiguous()


class Narrow(nn.Module):
    """A few lines of C++."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.GELU(), nn.Dropout2d(0.5))

    def forward(self, images):
        return [self.backbone(images)]


@pytest.mark.slow
def test_the_code_generator(one_thread):
    torch.manual_seed(0)
    model = Narrow()
    ours = copy.deepcopy(model)
    compile_parts(ours, CompilePlan(('backbone',), True))
    for size in ELEVEN[:3]:
        assert_equal(loss_and_gradients(ours, images(size)), loss_and_gradients(model, images(size)), 1e-5)
    assert graphs() == 1


@pytest.fixture(params=['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
def backend(request, monkeypatch):
    """Of runs."""
    if request.param != 'inductor':
        original = compiled.compile_parts
        monkeypatch.setattr(compiled, 'compile_parts', lambda model, plan: original(model, plan, request.param))
        monkeypatch.setattr(compiled, '_check_compiler', lambda device: None)
    return request.param


def run(tool, config, folder, *argv):
    assert tool('train', config, '--work-dir', folder, '--amp', 'off', *argv) == 0
    return torch.load(folder / 'iter_4.pth', weights_only=False)['state_dict']


def close(ours, theirs):
    assert list(ours) == list(theirs)
    return all(torch.allclose(ours[key], theirs[key], rtol=1e-3, atol=1e-5) for key in ours)


def test_a_run(tool, tiny, tmp_path, quick_mmengine, capsys, backend):
    """Compiled, eager, and from one to the other on the way."""
    argv = ('--compile', '--cfg-options', 'compile.parts=[auxiliary_head]')
    eager = run(tool, tiny.seg, tmp_path / 'eager')
    assert graphs() == 0
    ours = run(tool, tiny.seg, tmp_path / 'compiled', *argv)
    assert graphs() == 1 + (backend == 'inductor')  # which is tried out on a line first
    said = capsys.readouterr().out
    assert 'Compiled in training, for each size of images (dynamic=False): auxiliary_head.' in said
    to_eager = run(tool, tiny.seg, tmp_path / 'a', '--resume', tmp_path / 'compiled/iter_2.pth')
    back = run(tool, tiny.seg, tmp_path / 'b', '--resume', tmp_path / 'eager/iter_2.pth', *argv)
    assert close(ours, eager) and close(to_eager, eager) and close(back, eager)


def test_a_run_with_averaged_weights(tool, tiny, tmp_path, quick_mmengine, backend):
    config = tmp_path / 'averaged.py'
    config.write_text(f"_base_ = {tiny.seg!r}\ncustom_hooks = [dict(type='EMAHook', momentum=0.5)]\n")
    argv = ('--compile', '--cfg-options', 'compile.parts=[auxiliary_head]')
    averaged = []
    for folder, options in ((tmp_path / 'eager', ()), (tmp_path / 'compiled', argv)):
        averaged.append(run(tool, config, folder, *options))
        last = torch.load(folder / 'iter_4.pth', weights_only=False)['ema_state_dict']
        key = 'auxiliary_head.conv_seg.weight'
        assert not torch.allclose(averaged[-1][key], last[f'module.{key}'], rtol=1e-3)
    assert graphs() == 1 + (backend == 'inductor')
    assert close(*averaged)


def model_of(config):
    cfg = load_config(config)
    init_default_scope(cfg.default_scope)
    return cfg, MODELS.build(cfg.model)


@pytest.mark.parametrize('given', [True, False])
def test_options_beside_a_bool_in_the_config(tiny, tmp_path, given):
    config = tmp_path / 'given.py'
    config.write_text(f'_base_ = {tiny.seg!r}\ncompile = {given}\n')
    assert load_config(str(config), ['compile.dynamic=False', 'compile.parts=[backbone]']).compile == {
        'dynamic': False,
        'parts': ['backbone'],
    }
    assert load_config(str(config)).compile is given


def test_what_is_compiled_by_default(tiny):
    _, detector = model_of(tiny.det)
    assert read_plan(True, detector) == CompilePlan(('backbone', 'neck', 'rpn_head'), True)
    _, segmentor = model_of(tiny.seg)
    assert read_plan({}, segmentor) == CompilePlan(('backbone', 'decode_head', 'auxiliary_head'), False)
    segmentor.decode_head.forward = lambda maps, batch_data_samples: None
    assert read_plan({}, segmentor) == CompilePlan(('backbone', 'auxiliary_head'), False)
    assert read_plan(None, detector) is None and read_plan(False, detector) is None
    given = Config(dict(compile=dict(parts=['roi_head.mask_head'], dynamic=None))).compile
    assert read_plan(given, detector) == CompilePlan(('roi_head.mask_head',), None)
    assert read_plan(dict(graphs=3), detector) == CompilePlan((), None, 3)


@pytest.mark.parametrize(
    ('setting', 'said'),
    [
        (dict(mode='max-autotune'), r'compile=.*max-autotune.* dict\(graphs=8\)'),
        ('yes', 'give True, False, dict'),
        (dict(dynamic='auto'), "compile.dynamic='auto': give True, False or None"),
        (dict(parts='backbone'), "compile.parts='backbone': give a list of backbone, neck, rpn_head, roi_head.bbox"),
        (dict(parts=[]), 'give a list of'),
        (dict(parts=['decode_head']), 'there is no decode_head to compile; MaskRCNN has backbone, neck, rpn_head'),
        (dict(parts=['roi_head']), 'has backbone, neck, rpn_head, roi_head.bbox_head, roi_head.mask_head$'),
        (dict(parts=['neck', 'neck']), 'named twice'),
        (dict(graphs=True), 'give the number of sizes'),
        (dict(graphs=0), 'give the number of sizes'),
        (dict(graphs=2, dynamic=True), 'goes alone'),
    ],
)
def test_mistakes_are_explained(tiny, setting, said):
    with pytest.raises(ValueError, match=said):
        read_plan(setting, model_of(tiny.det)[1])


@pytest.mark.parametrize('dynamic', [True, None])
def test_a_head_for_one_size(tiny, dynamic):
    with pytest.raises(ValueError, match='decode_head is a LeanUPerHead, which compiles for images of one size'):
        read_plan(dict(dynamic=dynamic), model_of(tiny.seg)[1])


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (['compile.graphs=4'], 'CUDA graphs need a CUDA GPU'),
        (['compile.parts=[nose]'], 'there is no nose to compile'),
        (['activation_checkpointing=backbone'], 'with_cp=True'),
        (['sharding.param_dtype=bfloat16'], '--shard'),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason='says what there is to say without a GPU')
def test_a_run_that_cannot_be_does_not_start(tool, tiny, tmp_path, quick_mmengine, capsys, options, said):
    argv = ('--work-dir', tmp_path, '--dry-run', '--compile', '--cfg-options', *options)
    assert tool('train', tiny.det, *argv) == 2
    assert said in capsys.readouterr().err


def test_without_a_compiler_a_run_does_not_start(tool, tiny, tmp_path, quick_mmengine, capsys):
    with inductor_config.patch({'cpp.cxx': ('no-such-compiler',)}):  # monkeypatch would leave the option deleted
        assert tool('train', tiny.seg, '--work-dir', tmp_path, '--compile') == 2
    said = capsys.readouterr().err
    assert 'torch.compile does not work on this machine' in said and 'g++' in said
    assert not list(tmp_path.glob('*.pth'))


def test_mmengine_still_compiles_the_whole_step():
    """Whose method is replaced; when it is gone, so can ours be."""
    from mmengine.runner import Runner

    assert "_maybe_compile('train_step')" in Path(Runner.__init__.__code__.co_filename).read_text()
    assert DensekitRunner._maybe_compile is not Runner._maybe_compile


def in_ddp(rank, store):
    """A process of two: gradients are those without compilation, on images that differ in size between processes."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Model()
    ours = copy.deepcopy(model)
    wrapped = [nn.parallel.DistributedDataParallel(one, broadcast_buffers=False) for one in (ours, model)]
    compile_parts(ours, CompilePlan(PARTS, True), 'aot_eager')
    for size in ELEVEN[rank : rank + 3]:
        found, expected = (loss_and_gradients(one, images(size) + rank) for one in wrapped)
        assert_equal(found, expected, 1e-5)
    assert graphs() == len(PARTS) and not counters['graph_break']
    dist.destroy_process_group()


@pytest.mark.slow
def test_in_two_processes(tmp_path):
    start_processes(in_ddp, (tmp_path / 'store',), nprocs=2, start_method='spawn')


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('bf16', [False, True])
@pytest.mark.parametrize('kernels', ['eager', 'triton'])
@pytest.mark.parametrize('dynamic', [False, True])
def test_on_cuda(compiled_model, dynamic, kernels, bf16, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, 'allow_tf32', False)
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    ours, model = (one.cuda() for one in compiled_model(dynamic, 'inductor', kernels=kernels))
    for size in ELEVEN if dynamic else ELEVEN[:1]:
        found, expected = (loss_and_gradients(one, images(size).cuda(), bf16=bf16) for one in (ours, model))
        assert_equal(found, expected, 2e-2 if bf16 else 1e-4)
    assert graphs() == len(PARTS) and not counters['graph_break']


SLOW = [
    ('det', 'aot_eager', True, 'MaskRCNN'),
    ('seg', 'aot_eager', False, 'BatchedSlideEncoderDecoder'),
    ('det', 'inductor', True, 'MaskRCNN'),
    ('seg', 'inductor', False, 'BatchedSlideEncoderDecoder'),
]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(('recipe', 'backend', 'dynamic', 'name'), SLOW)
def test_losses_and_gradients_of_the_recipes(tiny, one_thread, recipe, backend, dynamic, name):
    """In float64, of which batches of two leave enough behind BN."""
    cfg, model = model_of(getattr(tiny, recipe))
    assert type(model).__name__ == name
    model.init_weights()
    model.double().train()
    ours = copy.deepcopy(model)
    plan = read_plan(dict(dynamic=dynamic), ours)
    compile_parts(ours, plan, backend)
    sizes = [(64, 96), (96, 128), (128, 64)] if dynamic else [(96, 96)]
    for size in sizes:
        found, expected = (recipe_step(one, make_batch(cfg, (2, *size))) for one in (ours, model))
        assert_equal(found, expected, 1e-6)
    assert graphs() == len(plan.parts)
    assert not counters['graph_break']


def recipe_step(model, batch):
    torch.manual_seed(1)
    data = model.data_preprocessor(batch, True)
    data['inputs'] = data['inputs'].double()
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
