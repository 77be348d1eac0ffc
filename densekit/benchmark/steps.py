"""Whole training and inference steps of a config's model, ours beside the stock form of it."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from densekit.benchmark.breakdown import parts_of
from densekit.benchmark.case import LAYOUTS, Candidate, Images, Record, Settings, measure_rows, written
from densekit.benchmark.generated import jittered_truth, make_batch
from densekit.benchmark.peers import OURS
from densekit.benchmark.stock import stock_form
from densekit.benchmark.timing import Call, why
from densekit.engine.config import load_config, set_amp
from densekit.environment import mmcv_ext

STOCK = 'stock'
_POSITIVES = 128  # of the proposals of an image: as many as mmdet's sampler takes at most
_FOUND_BIAS = 4.0  # makes an untrained box head find class 0 everywhere, so that there is something to suppress


@dataclass(frozen=True)
class StepCase:
    """One recipe.

    Attributes:
        config: path.
        images: number, height, width.
        dtype: 'bf16', by autocast, or 'fp32'.
        training: ``train_step`` with its optimizer; else ``test_step``.
        layouts: of each candidate.
        options: ``key=value`` texts that change the config.
    """

    config: str
    images: Images
    dtype: str = 'bf16'
    training: bool = True
    layouts: tuple[str, ...] = LAYOUTS
    options: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Says all that matters."""
        what = 'train' if self.training else 'infer'
        return ' '.join(['step', Path(self.config).stem, written(self.images), self.dtype, what, *self.options])

    def measure(self, settings: Settings) -> Record:
        """Measures all candidates in one interleaved run, then the parts of each one's step."""
        configs = {OURS: self.ours()}
        configs[STOCK], replaced = stock_form(configs[OURS])
        steps: dict[Candidate, Step] = {}

        def make(candidate: Candidate) -> Call:
            steps[candidate] = Step(self, configs[candidate.who], candidate.layout, settings.device)
            return steps[candidate]

        candidates = [Candidate(who, layout) for layout in self.layouts for who in configs]
        rows = measure_rows({one: (lambda one=one: make(one)) for one in candidates}, settings)  # type: ignore[misc]
        for candidate, row in zip(candidates, rows, strict=True):
            if 'error' not in row:
                try:
                    row['parts'] = steps[candidate].parts()
                except Exception as error:  # a model whose methods cannot be wrapped; its whole step is measured
                    row['parts_error'] = why(error)
        number, height, width = self.images
        what = 'training' if self.training else 'inference'
        return {
            'kind': 'step',
            'title': f'{Path(self.config).stem}, {what}, {number} x {height} x {width}, {self.dtype}',
            'images': number,
            'rows': rows,
            'text': f'Stock is mmdet and mmseg on {_operators()}, with {"; ".join(replaced)}.',
        }

    def ours(self) -> Config:
        """The config as it is, without weights to download, in the precision asked for."""
        cfg = load_config(self.config, self.options)
        set_amp(cfg, 'bf16' if self.dtype == 'bf16' else 'off')
        cfg.model.backbone.init_cfg = None
        preprocessor = cfg.model.data_preprocessor
        if preprocessor.get('size'):
            preprocessor.size = self.images[1:]
        return cfg

    def build(self, device: torch.device, layout: str = 'nchw') -> 'Step':
        """Our step."""
        return Step(self, self.ours(), layout, device)


class Step:
    """A step that can be called again and again on the same batch.

    Args:
        case: what to do.
        cfg: of the model and its optimizer.
        layout: of the weights; features follow it.
        device: to run on.
    """

    def __init__(self, case: StepCase, cfg: Config, layout: str, device: torch.device) -> None:
        self.device = device
        self.training = case.training
        self.dtype = case.dtype
        self.scope = cfg.get('default_scope', 'mmengine')
        torch.manual_seed(0)
        with DefaultScope.overwrite_default_scope(self.scope), _quietly():
            self.model: Any = revert_sync_batchnorm(MODELS.build(cfg.model))
            self.model.init_weights()
            _make_realistic(self.model, case.training)
            memory_format = torch.channels_last if layout == 'nhwc' else torch.contiguous_format
            self.model.to(device=device, memory_format=memory_format).train(case.training)
            self.wrapper = build_optim_wrapper(self.model, cfg.optim_wrapper) if case.training else None
        self.batch = make_batch(cfg, case.images)

    def __call__(self) -> None:
        """Takes a step."""
        batch = {'inputs': list(self.batch['inputs']), 'data_samples': copy.copy(self.batch['data_samples'])}
        with DefaultScope.overwrite_default_scope(self.scope):
            if self.training:
                self.model.train_step(batch, self.wrapper)
                return
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == 'bf16'):
                self.model.test_step(batch)

    def parts(self) -> dict[str, float]:
        """Seconds of each part."""
        return parts_of(self, self.model, self.wrapper, self.device)


def _make_realistic(model: Any, training: bool) -> None:
    """Gives the later heads of an untrained detector as much to do as those of a trained one have.

    In training the best proposals lie on the true boxes, so that the sampler finds its positives; in inference the box
    heads find class 0 in all proposals, so that there are boxes to suppress and masks to draw.
    """
    if training and getattr(model, 'with_rpn', False) and getattr(model, 'with_roi_head', False):
        original = model.rpn_head.loss_and_predict

        def loss_and_predict(features: Any, samples: Any, **kwargs: Any) -> Any:
            losses, proposals = original(features, samples, **kwargs)
            for found, sample in zip(proposals, samples, strict=True):
                truth = jittered_truth(sample.gt_instances.bboxes, min(_POSITIVES, len(found)))
                found.bboxes[: len(truth)] = truth.to(found.bboxes)
            return losses, proposals

        model.rpn_head.loss_and_predict = loss_and_predict
    if not training:
        for module in model.modules():
            classifier = getattr(module, 'fc_cls', None)
            if isinstance(classifier, nn.Linear):
                nn.init.constant_(classifier.bias[:1], _FOUND_BIAS)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the lines that mmengine logs for each parameter and each group of them."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _operators() -> str:
    return "mmcv's compiled operators" if mmcv_ext() else "torchvision's operators"
