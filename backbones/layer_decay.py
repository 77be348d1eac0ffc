"""Layer-wise learning-rate decay: each parameter's learning rate falls with its distance from the head.

``scale = decay_rate ** (num_depths - 1 - depth)``. A backbone says how deep a parameter lies (``layer_depth``); this
file holds the arithmetic and the optimizer groups, and knows no architecture.

Source of the rules: facebookresearch/ConvNeXt at 048efce, object_detection/mmcv_custom/layer_decay_optimizer_
constructor.py. Differs from it: the number of layers follows from the backbone, every wrapper and prefix works,
exclusion from weight decay goes by the role of a parameter, ``custom_keys`` are respected, and what cannot be right
is an error.
"""

import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import Tensor, nn
from torch.optim import Optimizer

from backbones.layers import NORMS

DECAY_TYPES = ('layer_wise', 'stage_wise')
OPTIONS = ('decay_rate', 'decay_type', 'num_layers', 'custom_keys')
FACTORS = ('lr_mult', 'decay_mult')

# Names that DDP, FSDP, torch.compile and activation checkpointing put into a parameter's path.
_WRAPPERS = re.compile(r'(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.|^(?:module\.)+')

# Scales, shifts and embeddings that are parameters of their own: layer scale, GRN, position tables and tokens.
# Besides these, every name that ends in "bias" (attention has in_proj_bias).
_NO_DECAY_NAMES = frozenset(
    {'gamma', 'beta', 'scale', 'layer_scale', 'layer_scale_parameter', 'pos_embed', 'absolute_pos_embed'}
    | {'relative_position_bias_table', 'cls_token', 'mask_token'}
)


# By id of a parameter: its strides and those of its gradient.
_Known = dict[int, tuple[tuple[int, ...], tuple[int, ...]]]


@dataclass
class _Group:
    """Parameters that share a learning rate and a weight decay."""

    depth: int
    lr_scale: float
    weight_decay: float
    names: list[str] = field(default_factory=list)
    params: list[nn.Parameter] = field(default_factory=list)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Builds an optimizer whose learning rates decay with depth.

    ``paramwise_cfg`` takes:

    - ``decay_rate``: in (0, 1].
    - ``decay_type``: ``'layer_wise'`` (detection) or ``'stage_wise'`` (segmentation); default layer_wise.
    - ``num_layers``: optional; must agree with the backbone, from which it follows.
    - ``custom_keys``: ``{part of a name: dict(lr_mult=..., decay_mult=...)}``; the longest matching key counts, its
      factors multiply what depth and role give (so a norm stays without weight decay).

    Biases, normalizations, layer scale, GRN and embeddings are not decayed by weight decay. Frozen parameters are
    skipped; every other one lies in exactly one group.

    Args:
        optim_wrapper_cfg: mmengine's.
        paramwise_cfg: see above.

    Raises:
        ValueError: if an option is unknown or out of range, if ``num_layers`` contradicts the backbone, if a custom
            key matches no parameter, if a scale exceeds 1, or if the model has no backbone that knows its depths.
    """

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Builds the optimizer and its wrapper.

        What is loaded into the optimizer later leaves ``fused`` and ``foreach`` as the config has them: a run goes on
        from a checkpoint of a run without them, and the other way round.

        Args:
            model: wrapped or not.
        """
        wrapper = super().__call__(model)
        mend_fused(wrapper.optimizer)
        return wrapper

    def _validate_cfg(self) -> None:
        cfg = self.paramwise_cfg
        unknown = [key for key in cfg if key not in OPTIONS]
        if unknown:
            raise ValueError(f'paramwise_cfg has unknown keys {unknown}; allowed are {", ".join(OPTIONS)}')
        rate = cfg.get('decay_rate')
        if not isinstance(rate, int | float) or not 0 < rate <= 1:
            raise ValueError(f'paramwise_cfg.decay_rate={rate!r}: give a number in (0, 1], such as 0.9')
        if cfg.get('decay_type', 'layer_wise') not in DECAY_TYPES:
            raise ValueError(f'paramwise_cfg.decay_type={cfg["decay_type"]!r}: choose from {", ".join(DECAY_TYPES)}')
        for key, factors in cfg.get('custom_keys', {}).items():
            if not set(factors) <= set(FACTORS):
                raise ValueError(f'paramwise_cfg.custom_keys[{key!r}] has {list(factors)}; allowed are {FACTORS}')
        if self.base_lr is None or self.base_wd is None:
            raise ValueError('the optimizer needs lr and weight_decay in the config: layer decay scales them')

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **kwargs: Any) -> None:
        """Appends one group per depth and weight decay to ``params``.

        Args:
            params: optimizer groups, changed in place. Each has ``params``, ``param_names``, ``lr``,
                ``lr_scale``, ``weight_decay`` and ``group_name``.
            module: the model, wrapped or not.
            **kwargs: what mmengine passes to its own recursion; not used.
        """
        groups = self._groups(module)
        for name, group in groups.items():
            params.append(
                {
                    'params': group.params,
                    'param_names': group.names,
                    'lr': self.base_lr * group.lr_scale,
                    'lr_scale': group.lr_scale,
                    'weight_decay': group.weight_decay,
                    'group_name': name,
                }
            )
            count = sum(parameter.numel() for parameter in group.params)
            print_log(
                f'{name:<24} lr x {group.lr_scale:.5f}  weight decay {group.weight_decay:g}  '
                f'{len(group.params)} tensors, {count:,} parameters',
                logger='current',
            )
        trainable = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
        grouped = [id(parameter) for group in groups.values() for parameter in group.params]
        assert len(grouped) == len(set(grouped)) and set(grouped) == trainable

    def _groups(self, model: nn.Module) -> dict[str, _Group]:
        backbones = _backbones(model)
        self._check_num_layers(backbones)
        self._check_custom_keys(model)
        no_decay = _no_decay(model)
        groups: dict[str, _Group] = {}
        for raw_name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            name = _clean(raw_name)
            if name.endswith('_flat_param'):
                raise ValueError(f'FSDP merged parameters of several depths into {name}; give it use_orig_params=True')
            prefix, depth, scale = self._place(name, backbones)
            decays = name not in no_decay
            key, lr_mult, decay_mult = self._custom(name)
            # Depth 5 of one backbone need not have the scale of depth 5 of another.
            group_name = (prefix if len(backbones) > 1 else '') + f'layer_{depth}_{"decay" if decays else "no_decay"}'
            group_name += f'_{key}' if key else ''
            weight_decay = self.base_wd * decay_mult if decays else 0.0
            group = groups.setdefault(group_name, _Group(depth, scale * lr_mult, weight_decay))
            group.names.append(name)
            group.params.append(parameter)
        return dict(sorted(groups.items(), key=lambda item: (item[1].depth, item[0])))

    def _place(self, name: str, backbones: dict[str, Any]) -> tuple[str, int, float]:
        """The backbone of a parameter ('' if in none), its depth, and its factor on the learning rate."""
        mode = self.paramwise_cfg.get('decay_type', 'layer_wise')
        owners = [prefix for prefix in backbones if name.startswith(prefix)]
        if not owners:
            return '', max(backbone.layer_depth('', mode)[1] for backbone in backbones.values()) - 1, 1.0
        prefix = max(owners, key=len)
        depth, num_depths = backbones[prefix].layer_depth(name.removeprefix(prefix), mode)
        if not 0 <= depth < num_depths:
            scale = self.paramwise_cfg['decay_rate'] ** (num_depths - 1 - depth)
            raise ValueError(
                f'{name} would train at {scale:.3g} x the learning rate: depth {depth} of {num_depths}. '
                'Depths count from 0 and must be smaller than their number; mend layer_depth of the backbone.'
            )
        return prefix, depth, self.paramwise_cfg['decay_rate'] ** (num_depths - 1 - depth)

    def _check_num_layers(self, backbones: dict[str, Any]) -> None:
        given, mode = self.paramwise_cfg.get('num_layers'), self.paramwise_cfg.get('decay_type', 'layer_wise')
        for prefix, backbone in backbones.items():
            layers = backbone.layer_depth('', mode)[1] - 2
            if given is not None and given != layers:
                raise ValueError(
                    f'paramwise_cfg.num_layers={given}, but {prefix.rstrip(".") or "the backbone"} '
                    f'({type(backbone).__name__}) has {layers}. Leave num_layers out: it follows from the backbone.'
                )

    def _check_custom_keys(self, model: nn.Module) -> None:
        names = [_clean(name) for name, _ in model.named_parameters()]
        unused = [key for key in self.paramwise_cfg.get('custom_keys', {}) if not any(key in name for name in names)]
        if unused:
            raise ValueError(f'paramwise_cfg.custom_keys {unused} match no parameter; names look like {names[0]!r}')

    def _custom(self, name: str) -> tuple[str, float, float]:
        """The longest custom key in ``name`` with its factors on learning rate and weight decay."""
        custom = self.paramwise_cfg.get('custom_keys', {})
        for key in sorted(sorted(custom), key=len, reverse=True):
            if key in name:
                return key, custom[key].get('lr_mult', 1.0), custom[key].get('decay_mult', 1.0)
        return '', 1.0, 1.0


_mended: WeakSet[Optimizer] = WeakSet()


def mend_fused(optimizer: Optimizer) -> None:
    """Mends what fused optimizers of torch get wrong when memory formats or checkpoints change.

    - Gradients and states are laid out as their parameters are before each step; with others a fused step mixes up
      numbers.
    - What is loaded leaves ``fused`` and ``foreach`` as they are.

    The constructor of this file does so by itself; a second time changes nothing.

    Args:
        optimizer: of any kind; nothing changes for one that is not fused.
    """
    if optimizer in _mended:
        return
    _mended.add(optimizer)
    known: _Known = {}
    optimizer.register_load_state_dict_pre_hook(_keep_implementation)
    optimizer.register_load_state_dict_post_hook(lambda _: known.clear())
    optimizer.register_step_pre_hook(partial(_match_strides, known))


def _keep_implementation(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state for ``load_state_dict`` that leaves to the optimizer how it computes, not what."""
    given, own = state['param_groups'], optimizer.param_groups
    if len(given) != len(own):
        return state  # torch says so
    how = [{key: group[key] for key in ('fused', 'foreach') if key in group} for group in own]
    return {**state, 'param_groups': [{**group, **keys} for group, keys in zip(given, how, strict=True)]}


def _match_strides(known: _Known, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Lays out gradients and states as their parameters are.

    A fused step goes through memory without a look at strides: with others it mixes up numbers and says nothing (torch
    2.11, CPU). Autograd gives gradients their parameter's strides; a checkpoint's may be of another memory format.

    Args:
        known: strides with which a parameter was looked at before, changed in place. As long as they stay and no state
            is loaded, all is as it was left; this runs on the host in each step.
        optimizer: about to step.
        args: of the step; not used.
        kwargs: likewise.
    """
    for group in optimizer.param_groups:
        for parameter in group['params'] if group.get('fused') else ():
            if (gradient := parameter.grad) is None:
                continue
            if known.get(id(parameter)) == (parameter.stride(), gradient.stride()):
                continue
            strides = _strides(parameter)
            if _strides(gradient) != strides:
                parameter.grad = gradient = torch.empty_like(parameter).copy_(gradient)
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and _strides(value) != strides:
                    state[key] = torch.empty_like(parameter).copy_(value)
            known[id(parameter)] = parameter.stride(), gradient.stride()


def _strides(x: Tensor) -> tuple[int, ...]:
    """Those that matter: along a side of 1 there is no step."""
    return x.stride() if 1 not in x.shape else tuple(s for s, n in zip(x.stride(), x.shape, strict=True) if n != 1)


def _clean(name: str) -> str:
    """A parameter's path without the names that wrappers put into it."""
    while (shorter := _WRAPPERS.sub('', name)) != name:
        name = shorter
    return name


def _backbones(model: nn.Module) -> dict[str, Any]:
    """The modules of ``model`` that know the depth of their parameters, by clean prefix."""
    found: dict[str, Any] = {}
    for raw_name, module in model.named_modules():
        # A wrapper that forwards attributes has the method too; the innermost module of a prefix is the real one.
        if callable(getattr(module, 'layer_depth', None)):
            found[_clean(f'{raw_name}.') if raw_name else ''] = module
    if not found:
        backbone = getattr(model, 'backbone', None)
        what = f'the backbone {type(backbone).__name__}' if backbone is not None else f'{type(model).__name__}'
        raise ValueError(
            f'{what} does not know the depth of its parameters. Layer decay works for the backbones of densekit and '
            'for any with a method layer_depth(name, mode) -> (depth, number of depths). For others, take '
            "mmengine's DefaultOptimWrapperConstructor with custom_keys."
        )
    return found


def _no_decay(model: nn.Module) -> set[str]:
    """Clean names of the parameters that weight decay leaves alone, by what they are."""
    names = set()
    for module_name, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            if isinstance(module, NORMS) or name in _NO_DECAY_NAMES or name.endswith('bias'):
                names.add(_clean(f'{module_name}.{name}' if module_name else name))
    return names
