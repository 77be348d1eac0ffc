"""Whether a checkpoint fits the model, and the run, that is to take it."""

from collections.abc import Mapping
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from backbones.files import some, state_dict_of
from backbones.formats import convert_state_dict, same_values


def fitting_weights(filename: str, checkpoint: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The weights of a checkpoint under the model's names, once every one of them is known to fit.

    Args:
        filename: for the message.
        checkpoint: the dictionary in the file.
        model: a whole detector or segmentor; not changed.

    Raises:
        ValueError: if a key is missing, unknown or of another shape; the message lists the first few of each.
    """
    weights, changes = converted_weights(filename, checkpoint, model)
    check_fit(filename, weights, model)
    if changes:
        print_log(f'{filename}: {changes}', logger='current')
    return weights


def own_weights(filename: str, checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint as they are.

    Raises:
        ValueError: if there are none.
    """
    try:
        return state_dict_of(checkpoint)
    except ValueError as error:
        raise ValueError(f'checkpoint {filename}: {error}') from error


def converted_weights(filename: str, checkpoint: Mapping[str, Any], model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """The weights of a checkpoint with those of its backbone under the model's names and in its shapes.

    Neck and heads need no other names: what the official detectors (mmdet 2.11) and segmentors (mmseg 0.x) are made of
    is called in mmdet 3.3 and mmseg 1.2 as it was there.

    Args:
        filename: for the message.
        checkpoint: the dictionary in the file.
        model: a whole detector or segmentor; not changed.

    Returns:
        The weights, and in words what was changed, empty if nothing was. Whether they fit is not checked.

    Raises:
        ValueError: if there are no weights, or those of the backbone have names that are not known.
    """
    weights = own_weights(filename, checkpoint)
    own = model.state_dict()
    backbone = {key: value for key, value in weights.items() if key.startswith('backbone.')}
    changes = []
    if backbone.keys() - own.keys():
        try:
            converted, source = convert_state_dict(backbone)
        except ValueError as error:
            raise _misfit(filename, weights, model, [f'  the names of its backbone: {error}']) from error
        named = {f'backbone.{key}': value for key, value in converted.items() if value is not None}
        weights = {key: value for key, value in weights.items() if key not in backbone} | named
        if named.keys() != backbone.keys():
            changes.append(f'the backbone had {source} names')
        dropped = [key for key, value in converted.items() if value is None]
        if dropped:
            changes.append(f'left out on purpose: {some(dropped)}')
    # A Linear layer holds the weights of a 1x1 convolution, GRN those of shape (C,) or (1, 1, 1, C).
    reshaped = [
        key
        for key in weights.keys() & own.keys()
        if key.startswith('backbone.') and weights[key].shape != own[key].shape and same_values(weights[key], own[key])
    ]
    if reshaped:
        changes.append(f'{len(reshaped)} of its tensors were reshaped')
        weights |= {key: weights[key].reshape(own[key].shape) for key in reshaped}
    return weights, '; '.join(changes)


def check_fit(filename: str, weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Checks that weights are the model's own, all of them and no others.

    Args:
        filename: for the message.
        weights: names and tensors.
        model: a whole detector or segmentor; not changed.

    Raises:
        ValueError: if a key is missing, unknown or of another shape; the message lists the first few of each.
    """
    own = model.state_dict()
    if weights.keys() != own.keys() or any(value.shape != own[key].shape for key, value in weights.items()):
        raise _misfit(filename, weights, model)


def check_resumable(
    filename: str, checkpoint: Mapping[str, Any], optim_wrapper: OptimWrapper, param_schedulers: Any = None
) -> None:
    """Checks that a run can go on from a checkpoint whose weights fit.

    Args:
        filename: for the message.
        checkpoint: the dictionary in the file.
        optim_wrapper: of the run that is to go on.
        param_schedulers: of that run, built or not.

    Raises:
        ValueError: if there are weights only, or the optimizer's groups of parameters or the number of schedulers are
            others.
    """
    needed = ['meta', 'message_hub', 'optimizer', *(['param_schedulers'] if param_schedulers is not None else [])]
    lacking = [key for key in needed if key not in checkpoint]
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

    schedulers, saved_schedulers = _lengths(param_schedulers), _lengths(checkpoint.get('param_schedulers'))
    if schedulers != saved_schedulers:
        raise ValueError(
            f'checkpoint {filename} is of a run with {saved_schedulers} schedulers (param_scheduler), and this config '
            f'has {schedulers}. Resume with the config of that run, or start a new one from its weights: --load-from.'
        )


def _lengths(schedulers: Any) -> Any:
    """How many schedulers there are; one by itself is a dictionary with a type."""
    if isinstance(schedulers, Mapping):
        return 1 if 'type' in schedulers else {name: _lengths(group) for name, group in schedulers.items()}
    return len(schedulers) if isinstance(schedulers, list | tuple) else int(schedulers is not None)


def _misfit(
    filename: str, weights: Mapping[str, Tensor], model: nn.Module, reasons: list[str] | None = None
) -> ValueError:
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
    lines = [f'checkpoint {filename} does not fit the {type(model).__name__} of this config; nothing was loaded.']
    lines += [f'  {len(keys)} {what}: {some(keys, 3)}' for what, keys in misfits.items() if keys]
    lines += reasons or []
    lines.append(
        'Give the config that the checkpoint was trained with. To start from its backbone alone: '
        "model.backbone.init_cfg=dict(type='Pretrained', checkpoint=..., prefix='backbone.')"
    )
    return ValueError('\n'.join(lines))
