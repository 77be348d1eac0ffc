"""Weights of a small ConvNeXt as other projects write them."""

import re
from pathlib import Path

import torch

from backbones import ConvNeXt

MINI = dict(depths=(1, 2, 3, 1), channels=(8, 16, 24, 32))


def official(model):
    """The weights of ``model`` as facebookresearch/ConvNeXt publishes a classifier's."""
    weights = {key: value.clone() for key, value in model.state_dict().items() if not key.startswith('norm')}
    head = {'norm.weight': torch.ones(32), 'norm.bias': torch.zeros(32), 'head.weight': torch.zeros(10, 32)}
    return {'model': {**weights, **head, 'head.bias': torch.zeros(10)}}


def openmmlab(weights):
    names = {'dwconv': 'depthwise_conv', 'pwconv1': 'pointwise_conv1', 'pwconv2': 'pointwise_conv2'}
    renamed = {re.sub('|'.join(names), lambda m: names[m[0]], key): value for key, value in weights.items()}
    return {key: v.flatten() if '.grn.' in key else v for key, v in renamed.items()}


def detector(weights):
    others = {'neck.lateral_convs.0.conv.weight': torch.ones(4, 8, 1, 1), 'rpn_head.rpn_conv.bias': torch.ones(4)}
    return {'meta': {}, 'state_dict': {**{f'backbone.{key}': value for key, value in weights.items()}, **others}}


def saved(content, folder, name='weights.pth'):
    torch.save(content, folder / name)
    return str(folder / name)


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_equal(model, expected, keys):
    for key in keys:
        torch.testing.assert_close(model.state_dict()[key], expected[key], rtol=0, atol=0, msg=key)


def load_on_rank(rank, folder, path):
    """Lets one of two processes load a file, and writes down what came of it."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    try:
        ConvNeXt(MINI, init_cfg=dict(type='Pretrained', checkpoint=path)).init_weights()
        outcome = 'loaded'
    except ValueError as error:
        outcome = str(error)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    Path(folder, f'rank{rank}').write_text(outcome)
