"""Finds misspelt keys: a key of a ``dict(type=...)`` that the class does not take."""

import difflib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mmengine.config import Config
from mmengine.registry import (
    DATASETS,
    HOOKS,
    LOOPS,
    METRICS,
    MODELS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    TASK_UTILS,
    TRANSFORMS,
    Registry,
)

SECTIONS: dict[str, tuple[Registry, ...]] = {
    'model': (MODELS, TASK_UTILS),
    'tta_model': (MODELS,),
    'train_dataloader': (DATASETS, TRANSFORMS),
    'val_dataloader': (DATASETS, TRANSFORMS),
    'test_dataloader': (DATASETS, TRANSFORMS),
    'val_evaluator': (METRICS,),
    'test_evaluator': (METRICS,),
    'default_hooks': (HOOKS,),
    'custom_hooks': (HOOKS,),
    'optim_wrapper': (OPTIM_WRAPPERS,),
    'param_scheduler': (PARAM_SCHEDULERS,),
    'train_cfg': (LOOPS,),
    'val_cfg': (LOOPS,),
    'test_cfg': (LOOPS,),
}

# Dictionaries whose keys are read by a builder and not by the class that `type` names.
_BUILDER_READ = {'act_cfg', 'conv_cfg', 'dcn', 'init_cfg', 'norm_cfg', 'optimizer', 'roi_layer', 'upsample_cfg'}

# Keys that a builder takes out before it calls the class.
_BUILDER_KEYS = {
    *('type', '_scope_', '_delete_'),
    *('constructor', 'paramwise_cfg', 'optimizer'),  # of an optimizer wrapper
    'priority',  # of a hook
    'convert_to_iter_based',  # of a scheduler
    'bg_cls_weight',  # of the loss of a DETR head
}

# Keys of the dictionaries without a type that mmdet and mmseg read with get(): a misspelt one is passed over silently.
_UNTYPED = {
    'train_cfg': {'rpn', 'rpn_proposal', 'rcnn', 'assigner', 'sampler', 'allowed_border', 'pos_weight', 'debug'}
    | {'nms_pre', 'max_per_img', 'nms', 'min_bbox_size', 'mask_size', 'mask_thr_binary'}
    | {'cls_assigner', 'reg_assigner', 'ga_assigner', 'ga_sampler'},
    'test_cfg': {'rpn', 'rcnn', 'nms_pre', 'max_per_img', 'nms', 'min_bbox_size', 'score_thr', 'mask_thr_binary'}
    | {'mode', 'crop_size', 'stride', 'multi_label', 'panoptic_on', 'semantic_on', 'instance_on'}
    | {'max_per_image', 'panoptic'},
}


# Those whose owner is certain take no other keys (all of mmdet's and mmseg's released configs keep to these).
_PROPOSALS = {'nms_pre', 'nms_post', 'max_per_img', 'nms', 'min_bbox_size'}
_CLOSED = {
    'train_cfg.rpn': {'assigner', 'sampler', 'allowed_border', 'pos_weight', 'debug'}
    | {'ga_assigner', 'ga_sampler', 'center_ratio', 'ignore_ratio'},
    'train_cfg.rpn_proposal': _PROPOSALS,
    'train_cfg.rcnn': {'assigner', 'sampler', 'mask_size', 'pos_weight', 'debug', 'mask_thr_binary', 'isr', 'carl'}
    | {'pos_radius', 'max_num_grid', 'dynamic_rcnn'},
    'test_cfg.rpn': _PROPOSALS,
    'test_cfg.rcnn': {'score_thr', 'nms', 'max_per_img', 'mask_thr_binary'},
}
_SEGMENTOR_TEST = {'mode', 'crop_size', 'stride', 'subdivision_steps', 'subdivision_num_points', 'scale_factor'}
_BATCHED = 'BatchedSlideEncoderDecoder'  # ours, which reads test_cfg.window_batch
_NMS = {'type', 'iou_threshold', 'iou_thr', 'class_agnostic', 'split_thr', 'max_num', 'score_threshold', 'offset'} | {
    *('sigma', 'min_score', 'method'),  # of soft NMS
}


@dataclass
class _Lookup:
    """Finds the class that a type names, as mmengine will when it builds the config."""

    scope: str
    registries: tuple[Registry, ...]

    def __call__(self, kind: Any) -> Any:
        if not isinstance(kind, str):
            return kind
        for registry in self.registries:
            with registry.switch_scope_and_registry(self.scope) as scoped:
                found = scoped.get(kind)
            if found is not None:
                return found
        return None


def check_types(cfg: Config) -> None:
    """Checks the keys of every part of a config that names its class.

    Raises:
        ValueError: listing each key that its class does not take, with the nearest that it does.
    """
    problems: list[str] = []
    for section, registries in SECTIONS.items():
        if cfg.get(section) is not None:
            lookup = _Lookup(cfg.get('default_scope', 'mmengine'), registries)
            problems += _problems(cfg[section], section, lookup)
    problems += _optimizer_problems(cfg)
    problems += _segmentor_problems(cfg)
    if problems:
        raise ValueError('the config has keys that nothing reads:\n  ' + '\n  '.join(problems))


def accepted_keys(cls: Any) -> tuple[set[str], bool]:
    """The keyword arguments of a class.

    Args:
        cls: a class or function.

    Returns:
        The names, those of the base classes as well if the class has ``**kwargs``, and whether it has.
    """
    names: set[str] = set()
    owners = inspect.getmro(cls)[:-1] if inspect.isclass(cls) else [cls]  # without object
    inits = [owner.__dict__.get('__init__') if inspect.isclass(owner) else owner for owner in owners]
    for depth, init in enumerate(init for init in inits if init is not None):
        parameters = inspect.signature(init).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {'self'}
        if depth == 0 and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names, False
    return names, True


def _problems(node: Any, path: str, lookup: '_Lookup') -> Iterator[str]:
    if isinstance(node, list | tuple):
        for i, item in enumerate(node):
            yield from _problems(item, f'{path}.{i}', lookup)
        return
    if not isinstance(node, Mapping):
        return
    if 'type' in node and _closed_keys(node, path) is None:
        yield from _typed_problems(node, path, lookup)
    else:
        yield from _untyped_problems(node, path)
    for key, value in node.items():
        if key not in _BUILDER_READ:
            yield from _problems(value, f'{path}.{key}', lookup)


def _typed_problems(node: Mapping[str, Any], path: str, lookup: '_Lookup') -> Iterator[str]:
    cls = lookup(node['type'])
    if cls is None:
        return  # building it will say so
    names, open_ended = accepted_keys(cls)
    for key in node:
        if key in names or key in _BUILDER_KEYS:
            continue
        # What becomes of **kwargs only building can tell; here only what is nearly a known name is a mistake.
        nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.85 if open_ended else 0.6)
        if nearest:
            yield f'{path}.{key}: did you mean {nearest[0]}?'
        elif not open_ended:
            yield f'{path}.{key}: {cls.__name__} takes {", ".join(sorted(names))}'


def _optimizer_problems(cfg: Config) -> Iterator[str]:
    """An unknown optimizer, which mmengine reports as "None is not a callable object"."""
    kind = (cfg.get('optim_wrapper') or {}).get('optimizer', {}).get('type')
    lookup = _Lookup(cfg.get('default_scope', 'mmengine'), (OPTIMIZERS,))
    if isinstance(kind, str) and lookup(kind) is None:
        nearest = difflib.get_close_matches(kind, OPTIMIZERS.module_dict, n=1)
        hint = f' Did you mean {nearest[0]}?' if nearest else ''
        yield f'optim_wrapper.optimizer.type: there is no optimizer {kind}.{hint}'


def _segmentor_problems(cfg: Config) -> Iterator[str]:
    model = cfg.get('model') or {}
    given = model.get('test_cfg') or {}
    cls = _Lookup(cfg.get('default_scope', 'mmengine'), (MODELS,))(model.get('type'))
    batched = inspect.isclass(cls) and _BATCHED in {base.__name__ for base in inspect.getmro(cls)}
    if 'window_batch' in given and not batched:
        yield (
            f'model.test_cfg.window_batch: {model.get("type")} computes windows one by one; with model.type={_BATCHED} '
            'they are computed in batches'
        )
    elif 'window_batch' in given and given.get('mode', 'whole') != 'slide':
        yield "model.test_cfg.window_batch: there are windows with model.test_cfg.mode='slide' only"
    if str(model.get('type')).rpartition('.')[2] in ('EncoderDecoder', 'CascadeEncoderDecoder', _BATCHED):
        allowed = _SEGMENTOR_TEST | ({'window_batch'} if batched else set())
        for key in given:
            if key not in allowed | {'window_batch'}:
                yield f'model.test_cfg.{key}: allowed are {", ".join(sorted(allowed))}'


def _closed_keys(node: Mapping[str, Any], path: str) -> set[str] | None:
    """All keys that a dictionary may have, where its owner is certain."""
    if path.endswith('.nms'):
        return _NMS if node.get('type', 'nms') in ('nms', 'soft_nms') else None
    place = re.sub(r'\.\d+$', '', path).removeprefix('model.')
    return _CLOSED.get(place)


def _untyped_problems(node: Mapping[str, Any], path: str) -> Iterator[str]:
    closed = _closed_keys(node, path)
    if closed is not None:
        for key in node:
            if key not in closed:
                yield f'{path}.{key}: allowed are {", ".join(sorted(closed))}'
        return
    for owner, known in _UNTYPED.items():
        if f'.{owner}' in path:
            for key in node:
                nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
                if key not in known and nearest:
                    yield f'{path}.{key}: did you mean {nearest[0]}?'
