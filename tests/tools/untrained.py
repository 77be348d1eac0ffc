"""Checkpoints of models that nobody trained."""

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope


def random_weights(config, path, alter=lambda model: None):
    """A checkpoint of the config's model: after a seed, as good as any where only the plumbing is tested."""
    torch.manual_seed(0)
    cfg = Config.fromfile(config)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        model.init_weights()
    alter(model)
    torch.save({'state_dict': model.state_dict()}, path)
    return str(path)
