"""Half precision against float32: the error of each stage, and activations that overflow where sums are not float32."""

import copy

import pytest
import torch

from backbones import ConvNeXt

MODES = ['weights', 'autocast']
V1, V2 = dict(layer_scale_init_value=1.0), dict(use_grn=True)


def atto(version, scale):
    """With the initial weights of training, GRN at work, and activations of ``scale`` behind the stem."""
    torch.manual_seed(0)
    model = ConvNeXt('atto', **version).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if '.grn.' in name:
                parameter.normal_(std=0.5)
        model.downsample_layers[0][1].weight.mul_(scale)
    return model


def narrow(model, x, mode, dtype):
    with torch.no_grad():
        if mode == 'weights':
            return copy.deepcopy(model).to(dtype)(x.to(dtype))
        with torch.autocast('cpu', dtype):
            return model(x)


@pytest.mark.parametrize('scale', [1.0, 1e2, 1e4])
@pytest.mark.parametrize('version', [V1, V2], ids=['V1', 'V2'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('mode', MODES)
def test_every_stage_is_within_a_hundredth(mode, dtype, version, scale):
    model = atto(version, scale)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        references = model(x)
    for out, reference in zip(narrow(model, x, mode, dtype), references, strict=True):
        assert torch.isfinite(out).all()
        assert (out.float() - reference).norm() / reference.norm() < 1e-2


def test_statistics_in_half_precision_are_seen(monkeypatch):
    """The negative control: the same network with the official LayerNorm overflows."""

    def official(self, x):
        """As LayerNorm(data_format='channels_first') of the official code computes."""
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]

    model = atto(V1, 1e4)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model(x)
    monkeypatch.setattr('backbones.layers.LayerNorm2d.forward', official)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)  # in float32 it is the same
    outputs = narrow(model, x, 'weights', torch.float16)
    errors = [((out.float() - b).norm() / b.norm()).item() for out, b in zip(outputs, expected, strict=True)]
    assert not max(errors) < 1e-2  # nan, infinite or far off
