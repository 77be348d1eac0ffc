"""Parameters and FLOPs of recipes by the papers' counting rule, beside the figures that the papers print."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from densekit.cli import UserError, user_errors
from densekit.engine.config import load_config
from densekit.report.complexity import ProductCount, count_layers, count_parameters
from densekit.report.forward import run_as_counted
from densekit.report.image_size import Size, padded, training_size
from densekit.report.meta import SizesWithValues, build_on_meta
from densekit.report.metafile import find_recipe
from densekit.report.tables import format_table

# Images of COCO scaled to fit 1333 x 800 are counted at 1280 x 800 in the papers.
COUNTED_AT: dict[Size, Size] = {(800, 1333): (800, 1280)}

REMARKS = """\
params M: millions of parameters, all of them; no aux: without the auxiliary head, which serves training only.
GFLOPs: multiply-adds of convolutions, linear layers and attention for one image, without the auxiliary head; 1000
  proposals through each box head, 100 RoIs through each mask head. mmdet's own tool has 1431 more for each Cascade Mask
  R-CNN: it sends all 1000 proposals through the three mask heads, whereas a test, and so this count, keeps 100.
attention: the part of these in matrix products that are no layer of the model. The figures published for Swin include
  it, those of other papers may not; sampling, as in deformable attention, is in no count.
paper: as published, not run here."""


def analyze(configs: Sequence[str]) -> list[dict[str, Any]]:
    """Counts the parameters and FLOPs of recipes, without data, weights or memory.

    Args:
        configs: paths of config files.

    Returns:
        A dictionary for each: ``config``; ``height`` and ``width`` of the image in pixels; ``parameters`` and
        ``parameters_without_auxiliary_head``; ``multiply_adds`` and ``multiply_adds_of_attention``, the part of them in
        matrix products that are no layer, both None where the model cannot be counted; ``not_counted``, what is missing
        from them and why, or None; ``paper``, what is published, or None.

    Raises:
        UserError: if a config cannot be read or its model not be built.
    """
    analyses = []
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of losses, which are not computed, and of PyTorch's future
        for config in configs:
            try:
                analyses.append(_analyze(config))
            except UserError as error:
                raise UserError(str(error) if config in str(error) else f'{config}: {error}') from error
    return analyses


def image_size(cfg: Config) -> Size:
    """Height and width of the test image that FLOPs are counted at, in pixels.

    Args:
        cfg: of a recipe; its test pipeline says, or its training pipeline if it has none.

    Raises:
        ValueError: if neither resizes to a size.
    """
    loader = cfg.get('test_dataloader') or cfg.train_dataloader
    size = training_size(loader.dataset)
    if size is None:
        raise ValueError('the test pipeline has no Resize, so there is no size to count FLOPs at')
    return COUNTED_AT.get(size) or padded(size, cfg.model.get('data_preprocessor'))


def analysis_table(analyses: Sequence[dict[str, Any]]) -> str:
    """Shows what :func:`analyze` gives as a table, with remarks below."""
    header = ['config', 'image', 'params M', 'no aux', 'paper', 'GFLOPs', 'paper', 'diff', 'attention']
    table = format_table(header, [_cells(analysis) for analysis in analyses], align='<' + '>' * 8)
    missing = [f'{Path(a["config"]).stem}: {a["not_counted"]}' for a in analyses if a['not_counted']]
    return '\n\n'.join([table, *(['Not counted:\n' + '\n'.join(missing)] if missing else []), REMARKS])


def _analyze(config: str) -> dict[str, Any]:
    with user_errors():
        cfg = load_config(config)
        size = image_size(cfg)
        recipe = find_recipe(Path(config))
        model = build_on_meta(cfg)
    auxiliary = getattr(model, 'auxiliary_head', None)
    parameters = count_parameters(model)
    multiply_adds, of_attention, not_counted = count(model, size)
    return {
        'config': config,
        'height': size[0],
        'width': size[1],
        'parameters': parameters,
        'parameters_without_auxiliary_head': parameters - (count_parameters(auxiliary) if auxiliary else 0),
        'multiply_adds': multiply_adds,
        'multiply_adds_of_attention': of_attention,
        'not_counted': not_counted,
        'paper': asdict(recipe.paper) if recipe and recipe.paper else None,
    }


def count(model: nn.Module, size: Size) -> tuple[int | None, int | None, str | None]:
    """Counts the multiply-adds of a model by the papers' rule.

    Args:
        model: on the meta device, in evaluation mode.
        size: height and width of the image.

    Returns:
        All, the part of them in matrix products that are no layer, and what is not among them, or None. For a model
        that cannot be run in this way, None twice and the reason.
    """
    try:
        with count_layers(model) as layers, ProductCount() as products, SizesWithValues(), torch.no_grad():
            run_as_counted(model, size)
    except Exception as error:  # models of all kinds, run on tensors without values
        return None, None, f'{type(error).__name__}: {str(error).splitlines()[0]}'
    unknown = ', '.join(sorted(products.unknown))
    total = products.multiply_adds
    return total, total - layers.multiply_adds, f'{unknown}, which has no formula here' if unknown else None


def _cells(analysis: dict[str, Any]) -> list[str]:
    paper = analysis['paper'] or {}
    parameters, alone = analysis['parameters'], analysis['parameters_without_auxiliary_head']
    counted, printed = analysis['multiply_adds'], paper.get('gflops')
    return [
        Path(analysis['config']).stem,
        f'{analysis["width"]}x{analysis["height"]}',
        f'{parameters / 1e6:.1f}',
        f'{alone / 1e6:.1f}' if alone != parameters else '-',
        str(paper.get('parameters') or '-'),
        f'{counted / 1e9:.1f}' if counted is not None else '-',
        str(printed or '-'),
        f'{counted / 1e9 - printed:+.1f}' if counted is not None and printed else '-',
        f'{analysis["multiply_adds_of_attention"] / 1e9:.1f}' if counted is not None else '-',
    ]
