"""What all recipes come to, as text that a reviewer can read in a diff: resolved configs and layer-decay groups.

    python tests/configs/golden.py

writes both anew: tests/configs/resolved/<family>.txt, where the first recipe of a family stands in full and the
others with what differs from it, and tests/configs/layer_decay.txt.
"""

import logging
import re
import warnings
from pathlib import Path
from typing import Any

from mmengine.config import Config
from recipes import CONFIGS, RECIPES, build_wrapper, meta_model, recipe

from densekit.engine.config import _TOP_LEVEL

HERE = Path(__file__).parent
RESOLVED = HERE / 'resolved'
LAYER_DECAY = HERE / 'layer_decay.txt'
OURS = 'LayerDecayOptimWrapperConstructor'


def family(path: Path) -> str:
    """``mask_rcnn_coco``: what stands before the backbone in the name, and the data; V2 is a family of its own."""
    method, backbone = re.fullmatch(
        r'(.+?)_(convnextv2|convnext|roadmap|swin|vit|r50|x101)(?:_.+)?', path.stem
    ).groups()
    return f'{method}_{"v2_" if backbone == "convnextv2" else ""}{path.stem.rsplit("_", 1)[1]}'


def entries(node: Any, name: str = '') -> dict[str, str]:
    """``{'model.neck.in_channels': '[96, 192, 384, 768]', ...}``; lists without dictionaries in them are one value."""
    if isinstance(node, dict) and node:
        items = list(node.items())
    elif isinstance(node, list | tuple) and '{' in repr(node):
        items = list(enumerate(node))
    else:
        return {name: repr(node)}
    return {key: text for part, value in items for key, text in entries(value, f'{name}.{part}'.lstrip('.')).items()}


def resolved(path: Path) -> dict[str, str]:
    """What the files of a recipe come to, without the variables that they use among themselves."""
    cfg = Config.fromfile(path, import_custom_modules=False).to_dict()
    return entries({key: cfg[key] for key in sorted(cfg) if key in _TOP_LEVEL})


def resolved_texts() -> dict[str, str]:
    """The text of each file in ``resolved/``."""
    texts: dict[str, list[str]] = {}
    first: dict[str, dict[str, str]] = {}
    for path in RECIPES:
        found = resolved(path)
        lines = texts.setdefault(family(path), [])
        base = first.setdefault(family(path), {})
        lines.append(f'## {path.relative_to(CONFIGS).as_posix()}{", against the first" if base else ""}')
        lines += [f'{key} = {value}' for key, value in found.items() if base.get(key) != value]
        lines += [f'{key} is not there' for key in base if key not in found]
        first[family(path)] = base or found
    return {name: '\n'.join(lines) + '\n' for name, lines in texts.items()}


def layer_decay_text() -> str:
    """A line for each parameter group of each recipe: name, factor on the learning rate, weight decay, how much.

    Recipes whose groups are alike share them. Without layer decay, where mmengine makes a group of each parameter, the
    groups of one learning rate and weight decay are one.
    """
    owners: dict[str, list[str]] = {}
    for path in RECIPES:
        cfg = recipe(path)
        groups = build_wrapper(cfg, meta_model(path), 'off').optimizer.param_groups
        if cfg.optim_wrapper.get('constructor') != OURS:
            groups = _merged(groups, cfg.optim_wrapper.optimizer.lr)
        owner = f'## {path.relative_to(CONFIGS).as_posix()}, learning rate {cfg.optim_wrapper.optimizer.lr:g}'
        owners.setdefault('\n'.join(map(_group_text, groups)), []).append(owner)
    return '\n'.join('\n'.join([*names, text]) for text, names in owners.items()) + '\n'


def _merged(groups: list[dict[str, Any]], base_lr: float) -> list[dict[str, Any]]:
    merged: dict[tuple[float, float], list[Any]] = {}
    for group in groups:
        merged.setdefault((group['lr'] / base_lr, group['weight_decay']), []).extend(group['params'])
    return [
        {'group_name': 'no layer decay', 'lr_scale': scale, 'weight_decay': decay, 'params': params}
        for (scale, decay), params in sorted(merged.items())
    ]


def _group_text(group: dict[str, Any]) -> str:
    count = sum(parameter.numel() for parameter in group['params'])
    factors = f'x {group["lr_scale"]:.5f}, weight decay {group["weight_decay"]:g}'
    return f'{group["group_name"]}: {factors}, {len(group["params"])} tensors, {count} parameters'


if __name__ == '__main__':
    warnings.simplefilter('ignore')
    logging.disable(logging.INFO)
    RESOLVED.mkdir(exist_ok=True)
    for stale in RESOLVED.glob('*.txt'):
        stale.unlink()
    for name, text in resolved_texts().items():
        (RESOLVED / f'{name}.txt').write_text(text)
    LAYER_DECAY.write_text(layer_decay_text())
