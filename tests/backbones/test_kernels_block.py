import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kernel_helpers import IN_SERIES, TOLERANCE, assert_close, build, fused, noise, poisoned_memory, step
from timm.layers import DropPath
from torch import nn

from backbones import ConvNeXt, ConvNeXtIsotropic
from backbones.convnext import ConvNeXtBlock, Linear
from backbones.kernels import choice, cpu
from backbones.kernels.block import unsupported


@pytest.fixture
def torch_depthwise(device, monkeypatch):
    """PyTorch's depthwise convolution instead of ours, which takes seconds in the interpreter and has its own tests.

    On a GPU ours takes no time, and cuDNN's weight gradient differs from run to run.
    """
    if device == 'cuda':
        return
    from backbones.kernels import depthwise_triton, pointwise_triton

    def forward_and_normalize(x, weight, bias, eps, dtype):
        out = F.conv2d(*(t.to(dtype) for t in (x, weight, bias)), padding=weight.shape[2] // 2, groups=x.shape[1])
        flat = out.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        x_norm, rstd = pointwise_triton.normalize(flat, eps, dtype)
        return x_norm.view(out.permute(0, 2, 3, 1).shape), rstd.view(out[:, 0].shape)

    def input_gradient(grad, weight, dtype, more):
        size = dict(padding=weight.shape[2] // 2, groups=grad.shape[1])
        dx = nn.grad.conv2d_input(grad.shape, weight.to(grad.dtype), grad, **size) + more
        return dx.to(dtype, memory_format=torch.channels_last)

    def weight_gradient(x, grad, weight, bias):
        size = dict(padding=weight.shape[2] // 2, groups=grad.shape[1])
        d_weight = nn.grad.conv2d_weight(x.to(grad.dtype), weight.shape, grad, **size)
        return d_weight.to(weight.dtype), grad.sum((0, 2, 3)).to(weight.dtype)

    for function in (forward_and_normalize, input_gradient, weight_gradient):
        monkeypatch.setattr(depthwise_triton, function.__name__, function)


def test_the_reference_stays_eager():
    assert build().kernels == 'eager'  # 'auto' would take what is compared with it, once that is proven


def compare(block, x, tolerance, amp=None, recompute=False):
    with poisoned_memory():
        got = step(fused(block, recompute), block, x, amp)
    wanted = step(block.double(), block, x.double())
    assert_close(got, wanted, tolerance)


@pytest.mark.parametrize('shape', [(2, 16, 5, 7), (1, 16, 1, 1), (3, 24, 1, 9), (2, 100, 3, 3), (0, 16, 4, 4)])
@pytest.mark.parametrize('use_grn', [False, True])
def test_result_and_gradients(shape, use_grn, device, torch_depthwise):
    block = build(shape[1], use_grn=use_grn).to(device)
    compare(block, noise(*shape, device=device), 2e-6)


def test_random_blocks(device, torch_depthwise):
    rng = random.Random(0)
    for _ in range(3):
        shape = rng.randint(1, 3), rng.randint(1, 90), rng.randint(1, 9), rng.randint(1, 9)
        scale, use_grn = rng.choice([0.0, 0.4]), rng.random() < 0.5
        block = build(shape[1], layer_scale=scale, use_grn=use_grn, kernel_size=rng.choice([3, 7]))
        compare(block.to(device), noise(*shape, device=device), 1e-5)


@pytest.mark.parametrize('kernel_size', [3, 7])
def test_with_our_depthwise_convolution(kernel_size, device):
    compare(build(kernel_size=kernel_size).to(device), noise(1, 16, 5, 6, device=device), 2e-6)


@pytest.mark.parametrize('layer_scale', [0.0, 0.3])
@pytest.mark.parametrize('amp', [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_stream_in_float32(layer_scale, amp, device, torch_depthwise):
    block = build(layer_scale=layer_scale).to(device)
    x = noise(2, 16, 6, 6, device=device)
    for stream in (x, x.to(amp)):  # as behind a LayerNorm, and behind a convolution
        assert step(fused(block), block, stream, amp)[0].dtype == torch.float32
    compare(block, x, IN_SERIES[amp], amp)


@pytest.mark.parametrize('amp', [torch.bfloat16, torch.float16])
def test_small_layer_scale_is_not_lost(amp, device, torch_depthwise):
    """A float16 weight times 1e-6 would be zero. The stream is zero here, so that the branch is seen alone."""
    block = build(layer_scale=1e-6).to(device)
    x = torch.zeros(1, 16, 3, 3, device=device)
    ours = step(fused(block), block, x, amp)[0]
    assert_close([ours], [step(block.double(), block, x.double())[0]], IN_SERIES[amp])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_whole_block_in_one_dtype(dtype, device, torch_depthwise):
    block = build(layer_scale=0.5).to(device, dtype)
    out = step(fused(block), block, noise(2, 16, 4, 4, dtype=dtype, device=device))[0]
    assert out.dtype == dtype
    compare(block, noise(2, 16, 4, 4, dtype=dtype, device=device), 4 * TOLERANCE.get(dtype, 1e-12))


@pytest.mark.parametrize('use_grn', [False, True])
@pytest.mark.parametrize('layer_scale', [0.0, 1.0])
def test_same_random_numbers_for_dropped_paths(layer_scale, use_grn, device, torch_depthwise):
    block = build(drop_path=0.5, layer_scale=layer_scale, use_grn=use_grn).to(device).train()
    x = noise(8, 16, 2, 2, device=device)
    eager, ours = step(block, block, x, seed=3), step(fused(block), block, x, seed=3)
    dropped = (eager[0] == x).flatten(1).all(1)
    assert dropped.any() and not dropped.all()
    assert_close(ours, eager, 2e-6)
    block.eval()
    assert_close(step(fused(block), block, x), step(block, block, x), 2e-6)


def test_drop_path_under_autocast_draws_as_eager_does(device, torch_depthwise):
    block = build(drop_path=0.5).to(device).train()
    x = noise(8, 16, 2, 2, device=device)
    eager, ours = (step(f, block, x, torch.bfloat16, seed=3)[0] for f in (block, fused(block)))
    assert torch.equal((eager == x).flatten(1).all(1), (ours == x).flatten(1).all(1))


@pytest.mark.skipif(torch.cuda.is_available(), reason='float64 is for the interpreter')
@pytest.mark.parametrize(('use_grn', 'recompute'), [(False, False), (True, True)])
def test_gradients_by_finite_differences(use_grn, recompute):
    """Of the stream and of all parameters, in the kernels of every part."""
    block = build(3, use_grn=use_grn, kernels='triton').double()
    block.with_cp = recompute
    names, parameters = zip(*block.named_parameters(), strict=True)
    run = lambda x, *given: torch.func.functional_call(block, dict(zip(names, given, strict=True)), (x,))  # noqa: E731
    x = noise(2, 3, 1, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


def test_parameters_may_lie_apart_in_memory(device, torch_depthwise):
    """As columns of a larger tensor; what lies between them is NaN."""
    block = build(use_grn=True, layer_scale=0.5).to(device)
    x = noise(1, 16, 3, 2, device=device)
    wanted = step(fused(block), block, x)
    for module in block.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            wide = torch.stack([parameter.detach(), torch.full_like(parameter, torch.nan)], -1)
            setattr(module, name, nn.Parameter(wide[..., 0]))
    assert not block.norm.bias.is_contiguous()
    assert_close(step(fused(block), block, x), wanted, 1e-6)


@pytest.mark.parametrize('use_grn', [False, True])
def test_recomputing_gives_the_same_bits(use_grn, device, torch_depthwise):
    block = build(use_grn=use_grn).to(device)
    x = noise(2, 16, 5, 7, device=device)
    kept, again, once_more = (step(fused(block, recompute), block, x) for recompute in (False, True, True))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(again, once_more, strict=True))


@pytest.mark.parametrize(('recompute', 'channels'), [(False, 2 * 16 + 64 + 1), (True, 2 * 16 + 1)])
def test_numbers_kept_for_the_backward_pass(recompute, channels, device, torch_depthwise):
    """Per pixel: x and the normalized input, GELU's input unless recomputed, and one factor of the normalization."""
    block = build().to(device)
    kept = {}

    def pack(tensor):
        if tensor.shape[:1] != block.pwconv1.weight.shape[:1] and tensor.numel() % 81 == 0:
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = fused(block, recompute)(noise(1, 16, 9, 9, device=device).requires_grad_())
    assert out.grad_fn is not None
    assert sum(kept.values()) == channels * 81


def test_memory_format_does_not_matter(device, torch_depthwise):
    block = build().to(device)
    x = noise(2, 16, 5, 7, device=device)
    plain, last = (step(fused(block), block, t) for t in (x, x.contiguous(memory_format=torch.channels_last)))
    assert plain[0].is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(plain, last, strict=True))


def test_frozen_parts_and_inputs_get_no_gradient(device, torch_depthwise):
    block = build().to(device)
    block.norm.requires_grad_(False)
    fused(block)(noise(1, 16, 3, 3, device=device)).sum().backward()  # whose gradient is one number, expanded
    got = {name for name, p in block.named_parameters() if p.grad is not None}
    assert got == {name for name, _ in block.named_parameters()} - {'norm.weight', 'norm.bias'}
    with torch.no_grad():
        assert fused(block)(noise(1, 16, 3, 3, device=device)).grad_fn is None


@pytest.mark.parametrize('use_grn', [False, True])
def test_a_frozen_block_computes_the_gradient_of_its_input_alone(use_grn, device, torch_depthwise, monkeypatch):
    from backbones.kernels import depthwise_triton, fold_triton

    block = build(use_grn=use_grn).to(device)
    x = noise(1, 16, 3, 3, device=device)
    wanted = step(fused(block), block, x)[1]
    block.requires_grad_(False).zero_grad()
    for module, name in ((depthwise_triton, 'weight_gradient'), (fold_triton, 'fold_norm_backward')):
        monkeypatch.setattr(module, name, None)
    x.requires_grad_()
    out = fused(block)(x)
    out.backward(noise(*out.shape, seed=99, device=device))
    assert torch.equal(x.grad, wanted)
    assert all(p.grad is None for p in block.parameters())


@pytest.mark.parametrize(('use_grn', 'dtype'), [(True, torch.float32), (False, torch.float16)])
def test_operator_keeps_torchs_rules(use_grn, dtype, device, torch_depthwise):
    block = build(8, use_grn=use_grn).to(device)
    x = noise(1, 8, 3, 2, device=device).requires_grad_()
    grn = (None, None) if block.grn is None else (block.grn.gamma.detach().view(-1), block.grn.beta.detach().view(-1))
    torch.library.opcheck(
        torch.ops.densekit.convnext_block.default,
        (
            *(x, block.dwconv.weight, block.dwconv.bias, block.norm.weight, block.norm.bias),
            *(block.pwconv1.weight, block.pwconv1.bias, *grn, block.pwconv2.weight, block.pwconv2.bias, block.gamma),
            *(torch.ones(1, device=device), 1e-6, 1e-6, dtype, torch.float32, True),
        ),
    )


@pytest.mark.parametrize(
    ('options', 'dtype', 'amp'),
    [
        (dict(), torch.float32, torch.bfloat16),
        (dict(use_grn=True, layer_scale=0.0), torch.float32, torch.bfloat16),
        (dict(), torch.float32, torch.float16),
        (dict(use_grn=True), torch.bfloat16, None),
    ],
)
@pytest.mark.parametrize('frozen', ['nothing', 'input', 'parameters'])
def test_backward_operator_keeps_torchs_rules(options, dtype, amp, frozen, device, torch_depthwise, monkeypatch):
    """Above all that each gradient has the dtype that a compiler is promised."""
    from backbones.kernels import block as kernels

    calls, backward = [], kernels._backward
    monkeypatch.setattr(kernels, '_backward', lambda *args: calls.append(args) or backward(*args))
    block = build(8, **options).to(device, dtype).requires_grad_(frozen != 'parameters')
    x = noise(2, 8, 3, 2, dtype=dtype, device=device).requires_grad_(frozen != 'input')
    with torch.autocast(device, amp or dtype, enabled=amp is not None):
        fused(block)(x).sum().backward()
    [arguments] = calls
    arguments = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
    torch.library.opcheck(torch.ops.densekit.convnext_block_backward.default, arguments)


def test_the_operators_give_the_same_bits(device, torch_depthwise, monkeypatch):
    """Which run where somebody looks on; else their functions are called without them."""
    from backbones.kernels import block as kernels

    block = build(use_grn=True, drop_path=0.5).to(device).train()
    x = noise(4, 16, 3, 3, device=device)
    plain = step(fused(block), block, x)
    monkeypatch.setattr(kernels, '_is_watched', lambda: True)
    assert all(torch.equal(a, b) for a, b in zip(step(fused(block), block, x), plain, strict=True))


@pytest.mark.parametrize('watched', [False, True])
def test_result_may_be_changed_and_differentiated_once(watched, device, torch_depthwise, monkeypatch):
    from backbones.kernels import block as kernels

    monkeypatch.setattr(kernels, '_is_watched', lambda: watched)
    x = noise(1, 16, 2, 2, device=device).requires_grad_()
    out = fused(build().to(device))(x)
    (grad,) = torch.autograd.grad(out.mul_(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='no autograd formula'):
        grad.sum().backward()


@pytest.mark.skipif(shutil.which('g++') is None, reason='needs a C++ compiler')
@pytest.mark.parametrize('use_grn', [False, True])
def test_compiled_under_autocast(use_grn, device, torch_depthwise, monkeypatch, tmp_path):
    """By a compiler that lays out memory as the operators promise: the sum of a gradient in the dtype it will have."""
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))
    torch._dynamo.reset()
    block = build(8, layer_scale=0.0 if use_grn else 1.0, use_grn=use_grn).to(device)
    block.kernels = 'triton'
    x = noise(1, 8, 2, 2, device=device)
    compiled, plain = (step(f, block, x, torch.bfloat16) for f in (torch.compile(block), block))
    assert_close(compiled, plain, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize('dtype', list(TOLERANCE))
@pytest.mark.parametrize(('rows', 'columns'), [(7, 5), (96, 24), (400, 100), (8, 1300)])
def test_folding(rows, columns, dtype, device):
    """Against the definitions, with the gradients that float64 autograd gives for the same incoming ones."""
    from backbones.kernels import fold_triton

    weight, d_out = (noise(rows, columns, seed=i, device=device) for i in (0, 1))
    bias, gamma, d_bias = (noise(rows, seed=i, device=device) for i in (2, 3, 4))
    scale, shift = (noise(columns, seed=i, device=device) for i in (5, 6))
    d_out = d_out.to(dtype)
    with poisoned_memory():
        norm = fold_triton.fold_norm(weight, bias, scale, shift, dtype)
        d_norm = fold_triton.fold_norm_backward(weight, scale, shift, d_out, d_bias)
        scaled = fold_triton.fold_scale(weight, bias, gamma, dtype)
        d_scaled = fold_triton.fold_scale_backward(weight, bias, gamma, d_out, d_bias)

    leaves = [t.double().requires_grad_() for t in (weight, bias, scale, shift, gamma)]
    weight, bias, scale, shift, gamma = leaves
    wanted = weight * scale, bias + weight @ shift
    grads = torch.autograd.grad(wanted, (weight, scale, shift), (d_out.double(), d_bias.double()))
    assert_close(norm, wanted, TOLERANCE[dtype])
    assert_close(d_norm, grads, 1e-6)
    wanted = weight * gamma[:, None], bias * gamma
    grads = torch.autograd.grad(wanted, (weight, bias, gamma), (d_out.double(), d_bias.double()))
    assert_close(scaled, wanted, TOLERANCE[dtype])
    assert_close(d_scaled, grads, 1e-6)


@pytest.mark.parametrize(
    ('changes', 'act', 'words'),
    [
        (dict(), nn.GELU(), None),
        (dict(padding='same'), nn.GELU(), None),
        (dict(kernel_size=13), nn.GELU(), '13 x 13'),
        (dict(kernel_size=(7, 5)), nn.GELU(), '7 x 5'),
        (dict(dilation=2), nn.GELU(), 'dilation 2'),
        (dict(dilation=(1, 2)), nn.GELU(), 'dilation 1 x 2'),
        (dict(stride=2), nn.GELU(), 'stride 2'),
        (dict(padding=2), nn.GELU(), 'padding 2'),
        (dict(padding=(3, 0)), nn.GELU(), 'padding 3 x 0'),
        (dict(padding='valid'), nn.GELU(), 'padding valid'),
        (dict(padding_mode='circular'), nn.GELU(), 'padding 3 of circular'),
        (dict(groups=4), nn.GELU(), '4 groups of 8 channels'),
        (dict(), nn.ReLU(), 'activation ReLU'),
        (dict(), nn.GELU(approximate='tanh'), 'tanh'),
    ],
)
def test_reasons_against_kernels(changes, act, words):
    reason = unsupported(nn.Conv2d(8, 8, **{'kernel_size': 7, 'padding': 3, 'groups': 8, **changes}), act)
    assert reason is None if words is None else words in reason


@pytest.mark.parametrize(
    'changes', [dict(padding_mode='circular'), dict(padding=(1, 1)), dict(stride=(2, 2)), dict(dilation=(1, 2)), dict()]
)
def test_a_changed_convolution_is_computed_as_it_is_on_a_cpu(changes, monkeypatch):
    """And one as it was built in the faster form."""
    form, calls = cpu.depthwise_conv2d, []
    monkeypatch.setattr(cpu, 'depthwise_pays', lambda x, kernel_size: True)
    monkeypatch.setattr(cpu, 'depthwise_conv2d', lambda *args: calls.append(args) or form(*args))
    dwconv = build(8, kernel_size=7, kernels='auto').dwconv
    for name, value in changes.items():
        setattr(dwconv, name, value)
    dwconv._reversed_padding_repeated_twice = [3, 3, 3, 3]  # which nn.Conv2d keeps of its padding
    x = noise(1, 8, 12, 12)
    torch.testing.assert_close(dwconv(x), nn.Conv2d.forward(dwconv, x))
    assert bool(calls) is not bool(changes)


class Told(nn.Module):
    """Adds 1 if something looks on."""

    def forward(self, x):
        from backbones.kernels import block as kernels

        return x + 1 if kernels._is_watched() else x + 0


def test_an_exporter_looks_on_and_a_compiler_does_not():
    torch._dynamo.reset()
    x = torch.zeros(1)
    assert Told()(x) == torch.compile(Told(), backend='eager', fullgraph=True)(x) == 0
    for strict in (False, True):
        assert torch.export.export(Told(), (x,), strict=strict).module()(x) == 1


def test_a_torch_that_does_not_tell_an_exporter(monkeypatch):
    """2.6 has neither."""
    for name in ('is_exporting', '_is_exporting_flag'):
        monkeypatch.delattr(torch.compiler, name)
    assert Told()(torch.zeros(1)) == 0


NARROW = dict(depths=(1, 1, 2, 1), channels=(8, 8, 16, 16))


def pair(**options):
    """The same random model twice, eager and on the kernels; the kernels' weights come from the eager checkpoint."""
    torch.manual_seed(1)
    options = {'arch': NARROW, 'layer_scale_init_value': 0.5, 'kernel_size': 3, **options}
    eager, ours = ConvNeXt(**options, kernels='eager'), ConvNeXt(**options, kernels='triton')
    with torch.no_grad():
        for i, p in enumerate(eager.parameters()):
            p.add_(noise(*p.shape, seed=i), alpha=0.2)
    assert list(eager.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(eager.state_dict())
    return eager, ours


def train(model, images, steps, amp=None, seed=7):
    """A few steps of SGD; the losses, and what was learned."""
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp is not None):
            outputs = model(images)
        loss = sum((out.float() - 1).square().mean() for out in outputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *model.state_dict().values()]


def test_backbone_with_our_depthwise_convolution(device):
    eager, ours = (model.to(device) for model in pair(use_grn=True))
    x = noise(1, 3, 32, 36, device=device)
    assert_close(train(ours, x, 1), train(eager, x, 1), 1e-5)


@pytest.mark.parametrize(
    'options',
    [
        dict(drop_path_rate=0.4),
        dict(use_grn=True, layer_scale_init_value=0.0, drop_path_rate=0.2),
        dict(with_cp=True, drop_path_rate=0.4),
        dict(with_cp=(0, 1), frozen_stages=1),
        dict(layer_scale_init_value=0.0, out_indices=(1, 2)),
    ],
)
def test_training_is_the_same(options, device, torch_depthwise):
    eager, ours = (model.to(device).train() for model in pair(**options))
    x = noise(3, 3, 32, 36, device=device)
    assert_close(train(ours, x, 3), train(eager, x, 3), 1e-4)
    eager.load_state_dict(ours.state_dict())


def test_a_gradient_that_is_a_little_off_is_seen(device, torch_depthwise, monkeypatch):
    from backbones.kernels import pointwise_triton

    def off(h, grad, **options):
        out, dh, sums = gelu_backward(h, grad, **options)
        return out, 1.02 * dh, 1.02 * sums

    gelu_backward = pointwise_triton.gelu_backward
    monkeypatch.setattr(pointwise_triton, 'gelu_backward', off)
    eager, ours = (model.to(device).train() for model in pair())
    x = noise(3, 3, 32, 36, device=device)
    with pytest.raises(AssertionError, match='differs by'):
        assert_close(train(ours, x, 3), train(eager, x, 3), 1e-4)


def test_training_under_autocast_is_close(device, torch_depthwise):
    eager, ours = (model.to(device).train() for model in pair())
    reference = pair()[0].to(device).train()
    x = noise(2, 3, 32, 36, device=device)
    exact, ours, eager = (torch.stack(train(m, x, 3, amp)[:3]) for m, amp in ((reference, None), (ours, 1), (eager, 1)))
    assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max() + 0.02 * exact.abs().max()


def test_isotropic_backbone(device, torch_depthwise):
    options = dict(arch=dict(depth=2, channels=16), out_channels=8)
    eager, ours = (ConvNeXtIsotropic(**options, kernels=kernels).to(device) for kernels in ('eager', 'triton'))
    ours.load_state_dict(eager.state_dict())
    x = noise(1, 3, 48, 40, device=device)
    assert_close(ours(x), eager(x), 1e-5)


def test_compiled_with_sizes_left_open(device, torch_depthwise):
    torch._dynamo.reset()
    graphs, counts = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend('aot_eager')(graph, inputs)

    block = ConvNeXtBlock(
        8, drop_path=0.3, layer_scale=1.0, use_grn=True, eps=1e-6, act=nn.GELU(), with_cp=False, kernels='triton'
    )
    block.to(device).train()
    compiled = torch.compile(block, backend=backend, dynamic=True, fullgraph=True)
    for height, width in ((3, 4), (5, 3), (4, 7)):
        x = noise(2, 8, height, width, device=device)
        ours, plain = (step(f, block, x, seed=3) for f in (compiled, block))
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
        counts.append(len(graphs))
    assert len(set(counts)) == 1


@pytest.fixture
def ran(monkeypatch):
    """Says for each block that ran on the kernels how many channels it has."""
    from backbones.kernels import block

    channels = []
    convnext_block = block.convnext_block
    record = lambda x, *args, **options: channels.append(x.shape[1]) or convnext_block(x, *args, **options)  # noqa: E731
    monkeypatch.setattr(block, 'convnext_block', record)
    return channels


def test_kernels_run_when_asked_for(ran, device, torch_depthwise):
    eager, ours = pair()
    x = noise(1, 3, 32, 32, device=device)
    eager.to(device)(x)
    assert ran == []
    ours.to(device)(x)
    assert ran == [8, 8, 16, 16, 16]


def test_a_hook_sees_its_layer(ran, device, torch_depthwise):
    ours = pair()[1].to(device)
    seen = []
    ours.stages[2][0].pwconv1.register_forward_hook(lambda *_: seen.append(1))
    ours.stages[2][1].norm.register_full_backward_hook(lambda *_: seen.append(2))
    sum(out.sum() for out in ours(noise(1, 3, 32, 32, device=device))).backward()
    assert seen == [1, 2] and ran == [8, 8, 16]


def test_an_adapter_is_not_passed_over(ran, device, torch_depthwise):
    eager, ours = (model.to(device) for model in pair())
    for model in (eager, ours):
        model.stages[1][0].pwconv1 = nn.Sequential(model.stages[1][0].pwconv1, nn.Tanh())
    x = noise(1, 3, 32, 32, device=device)
    assert_close(ours(x), eager(x), 1e-5)
    assert ran == [8, 16, 16, 16]


class Doubled(Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def subclass(block):
    layer = Doubled(16, 64, eager=True)
    layer.load_state_dict(block.pwconv1.state_dict())
    block.pwconv1 = layer


def patch(block):
    original = block.pwconv2.forward
    block.pwconv2.forward = lambda x: 2 * original(x)


def unscaled(block):
    block.drop_path = DropPath(0.5, scale_by_keep=False).train()


def no_affine(block):
    block.norm = nn.LayerNorm(16, elementwise_affine=False)


ALTERATIONS = {
    'pwconv1 was replaced': subclass,
    'pwconv2 was replaced': patch,
    'dwconv was replaced': lambda block: setattr(block, 'dwconv', nn.Sequential(block.dwconv, nn.Tanh())),
    'grn was replaced': lambda block: setattr(block, 'grn', nn.Sequential(block.grn, nn.Tanh())),
    'norm lacks its weight or bias': no_affine,
    'norm has a hook': lambda block: block.norm.register_forward_hook(lambda module, inputs, out: 2 * out) and None,
    'drop_path has scale_by_keep=False': unscaled,
}


def test_a_hook_on_all_modules_sees_the_layers(ran, device, torch_depthwise, caplog):
    block = build(kernels='triton').to(device)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        block(noise(1, 16, 2, 2, device=device))
    finally:
        handle.remove()
    assert nn.LayerNorm in seen and ran == [] and 'every module has a hook' in caplog.text


@pytest.mark.parametrize('words', ALTERATIONS)
def test_an_altered_block_runs_as_it_is_and_says_so_once(words, device, torch_depthwise, caplog):
    block = build(use_grn=True, kernels='triton').to(device)
    x = noise(4, 16, 3, 3, device=device)
    before = block(x)
    assert not caplog.records
    ALTERATIONS[words](block)
    eager = [(torch.manual_seed(0), block.to(device)._forward(x))[1] for _ in range(2)]
    ours = [(torch.manual_seed(0), block(x))[1] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))
    assert (ours[0] - before).abs().max() > 0.01
    assert [record.getMessage() for record in caplog.records] == [
        f"Some ConvNeXt blocks run without Triton kernels (kernels='triton'): {words}"
    ]


def test_an_altered_block_is_compiled_without_a_break(device, caplog):
    torch._dynamo.reset()
    block = build(kernels='triton').to(device)
    no_affine(block)
    x = noise(1, 16, 3, 3, device=device)
    assert torch.equal(torch.compile(block, backend='eager', fullgraph=True)(x), block._forward(x))
    assert 'norm lacks its weight or bias' in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_a_counter_of_operations_sees_those_it_knows(ran, monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(choice, 'PROVEN', frozenset({(torch.cuda.get_device_capability(), torch.float32)}))
    model, x = ConvNeXt(NARROW).cuda(), noise(1, 3, 32, 32, device='cuda')
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert ran == [] and counter.get_total_flops() > 0
    model(x)
    assert ran


def test_auto_on_the_cpu_is_not_interpreted(ran):
    ConvNeXt(NARROW, kernel_size=3)(noise(1, 3, 32, 32))
    assert ran == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_auto_takes_what_is_proven(ran, monkeypatch, caplog):
    x, model = noise(1, 3, 32, 32, device='cuda'), ConvNeXt(NARROW, output_stride=16).cuda()
    monkeypatch.setattr(choice, 'PROVEN', frozenset())
    model(x)
    assert ran == []
    monkeypatch.setattr(choice, 'PROVEN', frozenset({(torch.cuda.get_device_capability(), torch.float32)}))
    choice._decide.cache_clear()
    model(x)
    assert ran == [8, 8, 16, 16]
    assert 'dilation 2' in caplog.text


@pytest.mark.parametrize(
    ('options', 'reason'),
    [
        (dict(output_stride=16), 'dilation 2'),
        (dict(act_cfg=dict(type='ReLU')), 'activation ReLU'),
    ],
)
def test_what_the_kernels_lack_is_named(options, reason, device, torch_depthwise):
    model = ConvNeXt(NARROW, kernels='triton', **options).to(device)
    with pytest.raises(RuntimeError, match=f"kernels='triton' cannot run this block: .*{reason}"):
        model(noise(1, 3, 32, 32, device=device))


def test_triton_without_a_device_is_an_error(monkeypatch):
    model = ConvNeXt(NARROW, kernels='triton')
    monkeypatch.setenv('TRITON_INTERPRET', '0')
    with pytest.raises(RuntimeError, match=r"kernels='triton' cannot run here: there are none for cpu"):
        model(noise(1, 3, 32, 32))


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
def test_no_kernel_spills_registers(dtype):
    """Compiled for compute capability 9.0 without a device, in a process that does not interpret."""
    pytest.importorskip('triton')
    kernels = ['--kernels', 'fold', 'pointwise', 'grn', 'mlp', '--channels', '40', '96', '256', '--dtype', dtype]
    done = subprocess.run(
        [sys.executable, 'benchmarks/kernel_budget.py', '--json', *kernels],
        cwd=Path(__file__).parents[2],
        env={'HOME': str(Path.home())},
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) > 40 and not any(row['spills'] or row['stack'] for row in rows)
