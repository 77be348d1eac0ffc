"""Exported and compiled, the backbones give what they give in eager mode, for images of other sizes too."""

import numpy as np
import onnxruntime
import pytest
import torch

from backbones import ConvNeXt, ConvNeXtIsotropic

MINI = dict(depths=(1, 2, 2, 1), channels=(8, 16, 24, 32))
MODELS = {
    'V1': lambda: ConvNeXt(MINI, layer_scale_init_value=1.0),
    'V2': lambda: ConvNeXt(MINI, use_grn=True),
    'dilated': lambda: ConvNeXt(MINI, layer_scale_init_value=1.0, output_stride=8),
    'isotropic': lambda: ConvNeXtIsotropic(dict(depth=2, channels=16), out_channels=8),
}
SHOWN, SIZES = (96, 128), [(96, 128), (75, 130), (224, 65)]
SIDES = {2: torch.export.Dim('height', min=64, max=4096), 3: torch.export.Dim('width', min=64, max=4096)}


@pytest.fixture(params=MODELS)
def model(request, randomize):
    model = MODELS[request.param]()
    randomize(model)
    return model.eval()


def image(size, number=2):
    return torch.randn(number, 3, *size, generator=torch.Generator().manual_seed(0))


def assert_same(outputs, expected, tolerance):
    assert len(outputs) == len(expected) == 4
    for out, reference in zip(outputs, expected, strict=True):
        assert out.shape == reference.shape
        assert (out - reference).abs().max() < tolerance


def test_export(model):
    program = torch.export.export(model, (image(SHOWN),), dynamic_shapes=(SIDES,)).module()
    with torch.no_grad():
        for size in SIZES:
            assert_same(program(image(size)), model(image(size)), 1e-4)


# Of the exporter of torch itself.
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::UserWarning')
def test_onnx(model, tmp_path):
    path = tmp_path / 'model.onnx'
    program = torch.onnx.export(model, (image(SHOWN),), dynamo=True, dynamic_shapes=(SIDES,), verbose=False)
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    [given] = session.get_inputs()
    with torch.no_grad():
        for size in SIZES:
            outputs = session.run(None, {given.name: image(size).numpy()})
            assert_same([torch.from_numpy(np.asarray(out)) for out in outputs], model(image(size)), 1e-4)


def check_compiled(model, backend):
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = image(SHOWN).requires_grad_()
    gradients = []
    for run in (compiled, model):
        outputs = run(x)
        gradients.append(torch.autograd.grad(sum(out.square().sum() for out in outputs), [x, *model.parameters()]))
    assert_same(compiled(x), model(x), 1e-4)
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-6


def test_compiled(model):
    """As one graph, forward and backward; the code that a compiler makes of it is the slow test's."""
    torch.compiler.reset()
    check_compiled(model, 'aot_eager')


@pytest.mark.slow
def test_compiled_to_machine_code(model):
    torch.compiler.reset()
    check_compiled(model, 'inductor')
