"""Windows in batches give what mmseg gives window by window."""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

import densekit.ops  # noqa: F401

# isort: split
from mmseg.models.segmentors import EncoderDecoder

import backbones  # noqa: F401
from densekit.engine.config import load_config
from densekit.models import slide

ROOT = Path(__file__).parents[2]
CROP, STRIDE = (64, 64), (43, 43)


@pytest.fixture(scope='module')
def models(tiny):
    """mmseg's segmentor and ours with the same weights; windows overlap by a third."""
    torch.manual_seed(0)
    cfg = Config.fromfile(tiny.seg).model
    cfg.test_cfg = dict(mode='slide', crop_size=CROP, stride=STRIDE)
    with DefaultScope.overwrite_default_scope('mmseg'):
        stock = MODELS.build({**copy.deepcopy(cfg), 'type': 'EncoderDecoder'}).eval()
        ours = MODELS.build(cfg).eval()
    ours.load_state_dict(stock.state_dict())
    assert type(stock) is EncoderDecoder and type(ours) is slide.BatchedSlideEncoderDecoder
    return stock, ours


@torch.no_grad()
def logits(model, images, window_batch=None):
    if window_batch is not None:
        model.test_cfg.window_batch = window_batch
    height, width = images.shape[2:]
    meta = {'ori_shape': (height, width), 'img_shape': (height, width), 'pad_shape': (height, width)}
    return model.inference(images, [dict(meta) for _ in images])


def images(count, height, width):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(height + width))


@pytest.mark.parametrize('shape', [(1, 64, 150), (1, 150, 131), (2, 107, 64), (1, 40, 100), (2, 33, 47)], ids=str)
@pytest.mark.parametrize('window_batch', [1, 3, 100])
def test_equal_to_mmseg(models, shape, window_batch):
    stock, ours = models
    expected = logits(stock, images(*shape))
    found = logits(ours, images(*shape), window_batch)
    if window_batch == 1:
        assert torch.equal(found, expected)
    scale = expected.abs().max()
    assert (found - expected).abs().max() <= 1e-5 * scale
    assert torch.equal(found.argmax(1), expected.argmax(1))


def test_windows_do_go_through_together(models, monkeypatch):
    _, ours = models
    seen = []
    monkeypatch.setattr(ours.backbone, 'forward', _noting(ours.backbone.forward, seen))
    logits(ours, images(2, 150, 131), 4)
    assert seen == [8, 8, 2]  # nine windows of two images
    seen.clear()
    logits(ours, images(1, 150, 131), 5)
    assert seen == [5, 4]


def _noting(forward, seen):
    def noted(x):
        seen.append(len(x))
        return forward(x)

    return noted


def test_windows_in_the_wrong_place_are_noticed(models, monkeypatch):
    stock, ours = models
    expected = logits(stock, images(1, 150, 131))
    right = ours.encode_decode
    monkeypatch.setattr(ours, 'encode_decode', lambda *args: right(*args).flip(0))
    assert not torch.allclose(logits(ours, images(1, 150, 131), 3), expected, atol=1e-3)


@pytest.mark.parametrize('value', [0, -1, 2.0, 'all'])
def test_a_batch_of_no_windows_is_refused(models, value):
    with pytest.raises(ValueError, match=f'test_cfg.window_batch is {value!r}; give how many windows'):
        logits(models[1], images(1, 64, 100), value)


def test_gaps_are_refused(models, monkeypatch):
    monkeypatch.setitem(models[1].test_cfg, 'stride', (43, 65))
    with pytest.raises(ValueError, match='windows of 64 pixels every 65 leave gaps'):
        logits(models[1], images(1, 64, 150), 1)


def test_a_recipe_takes_it_by_options():
    options = ['model.type=BatchedSlideEncoderDecoder', 'model.test_cfg.window_batch=4']
    cfg = load_config(str(ROOT / 'configs/segmentation/upernet_convnext_t_ade20k.py'), options)
    assert cfg.model.test_cfg.window_batch == 4
    with DefaultScope.overwrite_default_scope('mmseg'):
        assert MODELS.get(cfg.model.type) is slide.BatchedSlideEncoderDecoder
