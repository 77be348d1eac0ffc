"""Our recipes compute what the stock recipes on mmpretrain's ConvNeXt compute (stock.json, made by stock.py)."""

import json

import pytest
from recipes import CONFIGS, build_model, recipe
from stock import GOLDEN, STOCK, fitted, step, weights_by_name

STORED = json.loads(GOLDEN.read_text())


def ours(name):
    cfg = fitted(recipe(CONFIGS / f'{name}.py'))
    model = build_model(cfg, 'cpu')
    weights_by_name(dict(model.named_parameters()))
    return cfg, model


@pytest.mark.parametrize('name', STOCK)
def test_losses_and_gradient_norm(name):
    found = step(*ours(name))
    assert found == pytest.approx(STORED[name], rel=1e-4)


def test_a_small_difference_is_seen():
    name = 'detection/mask_rcnn_convnext_t_coco'
    cfg, model = ours(name)
    model.backbone.stages[2][4].norm.eps = 1e-3
    assert step(cfg, model) != pytest.approx(STORED[name], rel=1e-4)
