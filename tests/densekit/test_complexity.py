import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from backbones import ARCHS, ConvNeXt
from densekit.report.complexity import ProductCount, count_layers, count_multiply_adds, count_parameters

# Multiply-adds of the classifiers at 224 x 224 in the model index of OpenMMLab, which counts a little more than
# convolutions and linear layers, and GFLOPs as printed in Table 1 of arXiv 2201.03545.
PUBLISHED = {
    'tiny': (4_457_472_768, 4.5),
    'small': (8_687_008_512, 8.7),
    'base': (15_359_124_480, 15.4),
    'large': (34_368_026_112, 34.4),
    'xlarge': (60_929_820_672, 60.9),
}


@pytest.mark.parametrize('arch', PUBLISHED)
def test_convnext_as_published(arch):
    with torch.device('meta'):
        count = count_multiply_adds(ConvNeXt(arch, out_indices=3), torch.empty(1, 3, 224, 224))
    count += 1000 * ARCHS[arch][1][-1]
    exact, printed = PUBLISHED[arch]
    assert count == pytest.approx(exact, rel=5e-4)
    assert round(count / 1e9, 1) == printed


def counted_by_torch(model, *inputs):
    """Every matrix product and convolution that reaches PyTorch's kernels, a multiply-add as one."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(*inputs)
    return counter.get_total_flops() / 2


LAYERS = {
    'conv': (nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), (2, 6, 9, 7)),
    'dilated': (nn.Conv2d(4, 8, 3, dilation=2), (1, 4, 9, 9)),
    'depthwise': (nn.Conv2d(6, 6, 7, padding=3, groups=6), (2, 6, 9, 7)),
    'conv1d': (nn.Conv1d(4, 6, 3), (2, 4, 9)),
    'conv3d': (nn.Conv3d(4, 6, 3), (2, 4, 5, 6, 7)),
    'transposed': (nn.ConvTranspose2d(6, 8, 2, stride=2), (2, 6, 5, 4)),
    'linear': (nn.Linear(6, 5), (2, 3, 4, 6)),
    'resnet': (torchvision.models.resnet18(), (2, 3, 64, 64)),
}


@pytest.mark.parametrize('name', LAYERS)
def test_same_count_as_torchs_own(name):
    model, shape = LAYERS[name]
    x = torch.randn(shape)
    assert count_multiply_adds(model, x) == counted_by_torch(model, x) > 0


@pytest.mark.parametrize('name', LAYERS)
def test_products_of_layers_are_what_layers_count(name):
    model, shape = LAYERS[name]
    with ProductCount() as products, torch.no_grad():
        model.eval()(torch.randn(shape))
    assert products.multiply_adds == count_multiply_adds(model, torch.randn(shape))
    assert not products.unknown


def test_products_beside_the_layers():
    """Attention: three projections in one product and queries by keys by values, none of which is a layer's call."""
    attention, tokens = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(1, 5, 8)
    with count_layers(attention) as layers, ProductCount() as products, torch.no_grad():
        attention.train()(tokens, tokens, tokens)  # in evaluation one fused operation does it all
    assert layers.multiply_adds == 0
    assert products.multiply_adds == 5 * 8 * (3 * 8) + 2 * 5 * 5 * 8 + 5 * 8 * 8


def test_an_operation_without_a_formula_is_named():
    x, offset, weight = torch.randn(1, 3, 8, 8), torch.zeros(1, 18, 6, 6), torch.randn(4, 3, 3, 3)
    with ProductCount() as products:
        torchvision.ops.deform_conv2d(x, offset, weight)
    assert products.multiply_adds == 0
    assert products.unknown == {'torchvision::deform_conv2d'}


def test_the_count_of_a_transposed_convolution():
    assert count_multiply_adds(nn.ConvTranspose2d(6, 8, 2, stride=2), torch.randn(1, 6, 5, 4)) == 5 * 4 * 6 * 8 * 4


def test_norms_activations_and_biases_are_not_counted():
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GELU(), nn.GroupNorm(2, 4), nn.AvgPool2d(2))
    assert count_multiply_adds(layers, torch.randn(1, 3, 8, 8)) == 8 * 8 * 3 * 4


def test_a_layer_called_twice_counts_twice_and_its_parameters_once():
    layer = nn.Linear(4, 4)
    twice = nn.Sequential(layer, layer)
    assert count_multiply_adds(twice, torch.randn(1, 4)) == 2 * 16
    assert count_parameters(twice) == 4 * 4 + 4


def test_frozen_parameters_are_counted():
    layer = nn.Conv2d(3, 4, 2)
    layer.weight.requires_grad_(False)
    assert count_parameters(layer) == 3 * 4 * 4 + 4


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)).train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_multiply_adds(model, torch.randn(2, 3, 8, 8))
    assert [module.training for module in model] == [True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model[0]._forward_hooks
    with pytest.raises(RuntimeError):
        count_multiply_adds(model, torch.randn(2, 5, 8, 8))
    assert not model[0]._forward_hooks and model.training
