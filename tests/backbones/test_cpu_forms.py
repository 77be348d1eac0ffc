"""The faster forms for a CPU against plain PyTorch, and against sums written out in float64."""

import platform

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from backbones import ConvNeXt, ConvNeXtIsotropic
from backbones.kernels import cpu

MINI = dict(depths=(1, 2, 1, 1), channels=(24, 96, 112, 128))  # linear layers of either kind
X86 = platform.machine() in ('x86_64', 'AMD64')
needs_onednn = pytest.mark.skipif(not (X86 and cpu.has_onednn(torch.float32)), reason='needs oneDNN on x86')


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weight_gradient(x, gradient, k, dilation):
    """By its definition: each weight multiplies the input shifted by its place in the kernel."""
    reach, (h, w) = k // 2 * dilation, x.shape[2:]
    x = F.pad(x, (reach,) * 4)
    shifted = [x[:, :, i * dilation :][:, :, :h, j * dilation :][..., :w] for i in range(k) for j in range(k)]
    return torch.stack([(s * gradient).sum((0, 2, 3)) for s in shifted], -1).view(-1, 1, k, k)


@pytest.fixture
def poisoned():
    """Memory that is handed out uninitialized is full of NaN."""
    torch.use_deterministic_algorithms(True)  # without it, filling is off
    assert torch.empty(1000).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


SIZES = [(2, 5, 9, 13), (1, 16, 20, 7), (3, 4, 2, 11), (1, 3, 1, 1), (2, 32, 7, 7), (1, 17, 15, 1)]


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('dilation', [1, 2, 3])
@pytest.mark.parametrize('k', [3, 5, 7, 9, 11])
def test_weight_gradient_is_its_definition(k, dilation, size, poisoned):
    x, gradient = random(*size), random(*size, seed=1)
    expected = weight_gradient(x, gradient, k, dilation)
    torch.testing.assert_close(cpu.depthwise_weight_gradient(x, gradient, k, dilation), expected)
    for layout in (torch.contiguous_format, torch.channels_last):
        given = (t.float().contiguous(memory_format=layout) for t in (x, gradient))
        result = cpu.depthwise_weight_gradient(*given, k, dilation)
        assert (result - expected).norm() < 1e-6 * expected.norm()


def test_weight_gradient_of_slices():
    x, gradient = random(4, 6, 12, 14)[::2, 1::2, 1:-1, ::2], random(2, 3, 1, 1, seed=1).expand(2, 3, 10, 7)
    torch.testing.assert_close(cpu.depthwise_weight_gradient(x, gradient, 7), weight_gradient(x, gradient, 7, 1))


def test_bfloat16_sums_in_float32():
    x, gradient = random(2, 32, 40, 40, dtype=torch.bfloat16), random(2, 32, 40, 40, seed=1, dtype=torch.bfloat16)
    expected = weight_gradient(x.double(), gradient.double(), 7, 1)
    result = cpu.depthwise_weight_gradient(x, gradient, 7)
    assert result.dtype == torch.bfloat16
    assert (result.double() - expected).norm() < 3e-3 * expected.norm()  # one rounding of the result


@pytest.mark.parametrize('dilation', [1, 2])
def test_gradients_of_the_convolution(dilation):
    given = [t.requires_grad_() for t in (random(2, 3, 5, 6), random(3, 1, 5, 5, seed=1), random(3, seed=2))]
    assert torch.autograd.gradcheck(lambda *t: cpu.depthwise_conv2d(*t, dilation), given)
    assert torch.autograd.gradgradcheck(lambda *t: cpu.depthwise_conv2d(*t, dilation), given)


@needs_onednn
def test_gradients_of_the_linear_layer():
    given = [random(2, 5, 12), random(7, 12, seed=1), random(7, seed=2)]
    ours, theirs = ([t.float().requires_grad_() for t in given] for _ in range(2))
    outputs = cpu.linear(*ours), F.linear(*theirs)
    torch.testing.assert_close(*outputs)
    seed = random(2, 5, 7, seed=3, dtype=torch.float32)
    once, stock = (
        torch.autograd.grad(o, t, seed, create_graph=True) for o, t in zip(outputs, (ours, theirs), strict=True)
    )
    torch.testing.assert_close(once, stock)
    twice = [torch.autograd.grad(sum(g.square().sum() for g in gs), t[:2]) for gs, t in ((once, ours), (stock, theirs))]
    torch.testing.assert_close(*twice)
    plain = torch.autograd.grad(cpu.linear(*ours), ours, seed)  # not to be differentiated again: another way
    torch.testing.assert_close(plain, stock)


@pytest.mark.parametrize('wanted', [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize('layer', ['depthwise', pytest.param('linear', marks=needs_onednn)])
def test_only_wanted_gradients(layer, wanted):
    shapes = [(2, 8, 9, 9), (8, 1, 7, 7), (8,)] if layer == 'depthwise' else [(3, 4, 8), (6, 8), (6,)]
    function, stock = (cpu.depthwise_conv2d, lambda x, w, b: F.conv2d(x, w, b, padding=3, groups=8))
    if layer == 'linear':
        function, stock = cpu.linear, F.linear
    results = []
    for run in (function, stock):
        given = [random(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(shapes)]
        for i in wanted:
            given[i].requires_grad_()
        run(*given).square().sum().backward()
        results.append([t.grad for t in given])
    assert [g is not None for g in results[0]] == [i in wanted for i in range(3)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def weight_gradient_code(capfd, run):
    """The implementations of depthwise weight gradients that oneDNN ran."""
    capfd.readouterr()
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        run()
    lines = [line.split(',') for line in capfd.readouterr().out.splitlines() if ',backward_weights,' in line]
    return {line[line.index('backward_weights') - 1].split(':')[0] for line in lines}


@needs_onednn
@pytest.mark.parametrize('k', [5, 7, 9, 11])
@pytest.mark.parametrize('size', [(2, 40, 32, 32), (1, 96, 14, 21), (2, 320, 4, 4), (1, 768, 7, 7), (1, 64, 1, 9)])
def test_fast_code_runs(capfd, size, k):
    x = random(*size, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    assert weight_gradient_code(capfd, lambda: cpu.depthwise_weight_gradient(x, x, k)) == {'jit_dw'}


@needs_onednn
def test_fast_code_does_not_run_by_itself(capfd):
    """Fails when oneDNN has fast code for 7 x 7: then ours can go."""
    x = random(1, 96, 14, 14, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(96, 1, 7, 7, requires_grad=True)
    code = weight_gradient_code(capfd, lambda: F.conv2d(x, weight, padding=3, groups=96).sum().backward())
    assert code
    assert 'jit_dw' not in code


def pair(randomize, kind='V1', **options):
    """The same model in its eager and its automatic form."""
    models = []
    for kernels in ('eager', 'auto'):
        if kind == 'isotropic':
            model = ConvNeXtIsotropic(dict(depth=2, channels=96), out_channels=16, kernels=kernels, **options)
        else:
            version = dict(use_grn=True) if kind == 'V2' else dict(layer_scale_init_value=1.0)
            model = ConvNeXt(MINI, kernels=kernels, **version, **options)
        randomize(model)
        models.append(model)
    return models


def step(model, x, seed=5):
    """Outputs and gradients, of the input first."""
    torch.manual_seed(seed)  # of the drop path
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    outputs = model(x)
    loss = sum((o * random(*o.shape, seed=i, dtype=o.dtype)).sum() for i, o in enumerate(outputs))
    return outputs, torch.autograd.grad(loss, [x, *model.parameters()])


def errors(tensors, references):
    return [
        ((t.double() - r).norm() / r.norm().clamp_min(1e-30)).item() for t, r in zip(tensors, references, strict=True)
    ]


@pytest.mark.parametrize('size', [(96, 64), (65, 97), (7, 50), (1, 1)])
@pytest.mark.parametrize(
    ('kind', 'options'),
    [
        ('V1', dict()),
        ('V1', dict(drop_path_rate=0.5)),
        ('V2', dict()),
        ('V2', dict(drop_path_rate=0.5, with_cp=True)),
        ('V1', dict(output_stride=8, kernel_size=5)),
        ('isotropic', dict()),
    ],
)
def test_training_step(randomize, kind, options, size):
    eager, auto = pair(randomize, kind, **options)
    x = random(2, 3, *size)
    references = step(eager.double(), x)
    eager.float()
    for reference, plain, ours in zip(references, step(eager, x.float()), step(auto, x.float()), strict=True):
        assert max(errors(ours, reference)) < max(4 * max(errors(plain, reference)), 2e-6)


@pytest.mark.parametrize('size', [(96, 64), (65, 97), (7, 50)])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ('kind', 'options'),
    [('V1', dict()), ('V2', dict()), ('V1', dict(act_cfg=dict(type='SiLU'))), ('isotropic', dict())],
)
def test_inference(randomize, kind, options, layout, size, poisoned):
    eager, auto = (model.eval() for model in pair(randomize, kind, **options))
    x = random(2, 3, *size).contiguous(memory_format=layout)
    with torch.no_grad():
        references = eager.double()(x)
        plain, ours = eager.float()(x.float()), auto(x.float())
    assert max(errors(ours, references)) < max(4 * max(errors(plain, references)), 2e-6)
    with torch.inference_mode():
        again = auto(x.float())
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@needs_onednn
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('kind', ['V1', 'V2'])
def test_a_block_alone(randomize, kind, layout):
    eager, auto = (model.stages[1][0].eval() for model in pair(randomize, kind))
    x = random(2, 96, 5, 7, dtype=torch.float32).contiguous(memory_format=layout)
    with torch.no_grad():
        assert auto._can_fuse(x)
        torch.testing.assert_close(auto(x), eager(x), rtol=1e-5, atol=1e-5)
        empty = x[:0]
        assert auto(empty).shape == empty.shape
    assert not auto._can_fuse(x)  # now there are gradients


def test_no_images(randomize):
    _, auto = pair(randomize)
    outputs, gradients = step(auto, torch.zeros(0, 3, 64, 64))
    assert [len(out) for out in outputs] == [0] * 4
    assert all(not gradient.any() for gradient in gradients)


def test_a_step_repeats_to_the_bit(randomize):
    _, auto = pair(randomize, drop_path_rate=0.3)
    x = random(2, 3, 64, 96, dtype=torch.float32)
    (outputs, gradients), (outputs_again, gradients_again) = step(auto, x), step(auto, x)
    assert all(torch.equal(a, b) for a, b in zip(outputs, outputs_again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))


@pytest.mark.parametrize('kind', ['V1', 'V2'])
@pytest.mark.parametrize('drop_path_rate', [0.0, 0.5])
def test_autocast_is_as_close_as_the_eager_form(randomize, kind, drop_path_rate):
    eager, auto = pair(randomize, kind, drop_path_rate=drop_path_rate)
    x = random(2, 3, 64, 96, dtype=torch.float32)
    references = step(eager.double(), x.double())
    eager.float()
    with torch.autocast('cpu', torch.bfloat16):
        for reference, plain, ours in zip(references, step(eager, x), step(auto, x), strict=True):
            assert [t.dtype for t in ours] == [t.dtype for t in plain]
            assert sum(errors(ours, reference)) < 1.1 * sum(errors(plain, reference))


def test_frozen_stages_and_a_frozen_kernel(randomize):
    gradients = []
    for model in pair(randomize, frozen_stages=1):
        model.train()
        model.stages[2][0].dwconv.weight.requires_grad_(False)
        sum(
            out.mul(random(*out.shape, dtype=out.dtype)).sum() for out in model(random(1, 3, 64, 64).float())
        ).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert [g is None for g in gradients[0].values()] == [g is None for g in gradients[1].values()]
    assert gradients[1]['stages.2.0.dwconv.weight'] is None
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_onlookers_see_the_plain_operators(randomize):
    x = torch.randn(1, 3, 64, 64)
    counts = []
    for model in pair(randomize):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0

    traced = torch.jit.trace(model.eval(), x)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert 'aten::_convolution' in kinds
    assert not any(kind.startswith(('mkldnn', 'prim::PythonOp', '^')) for kind in kinds)

    images = torch.randn(2, 1, 3, 64, 64)
    each = torch.func.vmap(lambda image: torch.func.functional_call(model, dict(model.named_parameters()), image)[3])
    torch.testing.assert_close(each(images)[1], model(images[1])[3], rtol=1e-4, atol=1e-4)


def test_hooks_are_called_in_inference(randomize):
    _, auto = pair(randomize)
    seen = []
    for layer in (auto.stages[1][0].pwconv1, auto.stages[1][0].act, auto.stages[1][0].pwconv2):
        layer.register_forward_hook(lambda layer, *_: seen.append(layer))
    with torch.no_grad():
        auto(torch.randn(1, 3, 64, 64))
    assert len(seen) == 3


class Halved(nn.Module):
    def forward(self, x):
        return x * 0.5


def test_another_module_in_the_place_of_drop_path_runs(randomize):
    models = pair(randomize)
    x, outputs = torch.randn(1, 3, 64, 64), []
    for model in models:
        for stage in model.stages:
            for block in stage:
                block.drop_path = Halved()
        outputs.append(model.eval()(x)[3])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['pwconv1', 'drop_path'])
def test_a_forward_put_on_a_layer_runs(name, randomize):
    models = pair(randomize)
    x, outputs = torch.randn(1, 3, 64, 64), []
    for model in models:
        layer = getattr(model.eval().stages[1][0], name)
        layer.forward = lambda x, forward=layer.forward: 2 * forward(x)
        with torch.no_grad():
            outputs.append(model(x)[3])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)


def test_autocast_casts_no_more_than_the_eager_form(randomize):
    x, casts = torch.randn(1, 3, 64, 64), []
    for model in pair(randomize):
        with torch.profiler.profile() as profile, torch.autocast('cpu', dtype=torch.bfloat16):
            model(x)
        casts.append(sum(event.name == 'aten::_to_copy' for event in profile.events()))
    assert casts[1] <= casts[0]


@needs_onednn
def test_the_fused_operators_are_still_there(monkeypatch, randomize):
    """Private to PyTorch: when they go, the eager form steps in, more slowly, and this test says so."""
    x, weight, bias = random(1, 5, 96, dtype=torch.float32), torch.ones(8, 96), torch.ones(8)
    assert cpu.can_fuse_linear(x)
    expected = F.linear(x, weight, bias)
    for form in (weight, cpu.packed(weight, 5)):
        torch.testing.assert_close(cpu.linear_gelu(x, form, bias), F.gelu(expected))
        torch.testing.assert_close(cpu.linear_add(x, form, bias, expected), 2 * expected)

    eager, auto = (model.eval() for model in pair(randomize))
    monkeypatch.setattr(cpu, 'has_onednn', lambda dtype: False)
    monkeypatch.setattr(cpu, '_pointwise', lambda *_: pytest.fail('was asked for'))
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(step(auto, image), step(eager, image), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(auto(image), eager(image), rtol=1e-5, atol=1e-5)


def test_gelu_of_the_fused_operator_is_the_exact_one():
    x = torch.linspace(-12, 12, 100_001).view(-1, 1)
    expected = F.gelu(x.double())
    result = cpu.linear_gelu(x, torch.ones(1, 1), torch.zeros(1))
    assert (result - expected).abs().max() < 2e-6
    assert (F.gelu(x, approximate='tanh') - expected).abs().max() > 1e-4  # which would be seen
