"""Whether a checkpoint fits the model, and the run, that is to take it."""

from collections.abc import Mapping
from typing import Any

from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from backbones.checkpoint import state_dict_of


def fitting_weights(filename: str, checkpoint: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The weights of a checkpoint, once every one of them is known to fit.

    Args:
        filename: for the message.
        checkpoint: the dictionary in the file.
        model: a whole detector or segmentor; not changed.

    Raises:
        ValueError: if a key is missing, unknown or of another shape; the message lists the first few of each.
    """
    try:
        weights = state_dict_of(checkpoint)
    except ValueError as error:
        raise ValueError(f'checkpoint {filename}: {error}') from error
    own = model.state_dict()
    misfits = {
        'of another shape (file, model)': [
            f'{key} {tuple(value.shape)} for {tuple(own[key].shape)}'
            for key, value in weights.items()
            if key in own and value.shape != own[key].shape
        ],
        'missing in the file': [key for key in own if key not in weights],
        'unknown to the model': [key for key in weights if key not in own],
    }
    if not any(misfits.values()):
        return weights
    lines = [f'checkpoint {filename} does not fit the {type(model).__name__} of this config; nothing was loaded.']
    for what, keys in misfits.items():
        if keys:
            more = f' and {len(keys) - 3} more' if len(keys) > 3 else ''
            lines.append(f'  {len(keys)} {what}: {", ".join(keys[:3])}{more}')
    lines.append(
        'Give the config that the checkpoint was trained with. To start from its backbone alone: '
        "model.backbone.init_cfg=dict(type='Pretrained', checkpoint=..., prefix='backbone.')"
    )
    raise ValueError('\n'.join(lines))


def check_resumable(filename: str, checkpoint: Mapping[str, Any], optim_wrapper: OptimWrapper) -> None:
    """Checks that a run can go on from a checkpoint whose weights fit.

    Args:
        filename: for the message.
        checkpoint: the dictionary in the file.
        optim_wrapper: of the run that is to go on.

    Raises:
        ValueError: if there are weights only, or the optimizer's groups of parameters are others.
    """
    lacking = [key for key in ('meta', 'message_hub', 'optimizer', 'param_schedulers') if key not in checkpoint]
    if lacking:
        raise ValueError(
            f'checkpoint {filename} has no {", ".join(lacking)}, so no run can go on from it. '
            '--load-from starts a new run from its weights.'
        )
    saved = [len(group['params']) for group in checkpoint['optimizer']['param_groups']]
    own = [len(group['params']) for group in optim_wrapper.optimizer.param_groups]
    if saved != own:
        raise ValueError(
            f'checkpoint {filename} is of a run with another optim_wrapper: {sum(saved)} parameters in {len(saved)} '
            f'groups there, {sum(own)} in {len(own)} groups here. Resume with the config of that run, or start a new '
            'one from its weights: --load-from.'
        )
