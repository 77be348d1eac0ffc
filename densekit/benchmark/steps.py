"""Whole training and inference steps of a config's model, ours beside the stock form of it."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, METRICS, MODELS, DefaultScope
from torch import nn

from backbones.folding import fold
from densekit.benchmark.breakdown import parts_of
from densekit.benchmark.case import LAYOUTS, Candidate, Images, Record, Settings, measure_rows, written
from densekit.benchmark.generated import jittered_truth, make_batch
from densekit.benchmark.peers import FOLDED, OURS
from densekit.benchmark.stock import class_of, stock_form
from densekit.benchmark.timing import Call, why
from densekit.engine.config import load_config, set_amp
from densekit.engine.guards import FiniteGuard
from densekit.environment import mmcv_ext

STOCK = 'stock'
_POSITIVES = 128  # of the proposals of an image: as many as mmdet's sampler takes at most
_FOUND_BIAS = 4.0  # makes an untrained box head find class 0 everywhere, so that there is something to suppress
_RESULT_HOOKS = ('LabelMapsHook', 'RleMasksHook')  # choose, before a test, in what form a model gives its results


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
        if not self.training:
            configs[FOLDED] = configs[OURS]
        steps: dict[Candidate, Step] = {}

        def make(candidate: Candidate) -> Call:
            step = Step(self, configs[candidate.who], candidate.layout, settings.device, candidate.who == OURS)
            if candidate.who == FOLDED:
                fold(step.model, in_place=True)
            if steps:
                step.take_heads(next(iter(steps.values())))
            steps[candidate] = step
            return step

        candidates = [Candidate(who, layout) for layout in self.layouts for who in configs]
        rows = measure_rows({one: (lambda one=one: make(one)) for one in candidates}, settings)  # type: ignore[misc]
        for candidate, row in zip(candidates, rows, strict=True):
            if 'error' not in row:
                try:
                    if (found := steps[candidate].found()) is not None:
                        row['found'] = found
                    row['parts'] = steps[candidate].parts()
                except Exception as error:  # a model whose methods cannot be wrapped; its whole step is measured
                    row['parts_error'] = why(error)
        number, height, width = self.images
        what = 'training' if self.training else 'inference'
        parts = [Path(self.config).stem, what, f'{number} x {height} x {width}', self.dtype, *self.options]
        return {
            'kind': 'step',
            'title': ', '.join(parts),
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
        cfg: of the model, its optimizer, its metrics and cuDNN's choice of algorithms.
        layout: of the weights; features follow it.
        device: to run on.
        guarded: a training step looks at losses and gradients as :class:`FiniteGuard` has it in each run of ours.

    Raises (when called):
        ValueError: if batches of one image are too small for a BatchNorm of the model.
    """

    def __init__(self, case: StepCase, cfg: Config, layout: str, device: torch.device, guarded: bool = True) -> None:
        self.device = device
        self.training = case.training
        self.dtype = case.dtype
        self.scope = cfg.get('default_scope', 'mmengine')
        self.cudnn_benchmark = bool(cfg.get('env_cfg', {}).get('cudnn_benchmark'))
        torch.manual_seed(0)
        cfg = copy.deepcopy(cfg)  # models such as DINO write into what they are built from
        with DefaultScope.overwrite_default_scope(self.scope), _quietly():
            self.model: Any = revert_sync_batchnorm(MODELS.build(cfg.model))
            self.model.init_weights()
            _make_realistic(self.model, case.training)
            memory_format = torch.channels_last if layout == 'nhwc' else torch.contiguous_format
            self.model.to(device=device, memory_format=memory_format).train(case.training)
            self.wrapper = build_optim_wrapper(self.model, cfg.optim_wrapper) if case.training else None
            if not case.training:
                _choose_results(self.model, cfg)
        self.guard = FiniteGuard() if case.training and guarded else None
        self.runner = SimpleNamespace(
            optim_wrapper=self.wrapper, bare_model=lambda: self.model, world_size=1, rank=0, iter=0
        )
        if self.guard:
            self.guard.before_train(self.runner)
        self.batch = make_batch(cfg, case.images)

    def __call__(self) -> Any:
        """Takes a step; returns what the model does."""
        batch = {'inputs': list(self.batch['inputs']), 'data_samples': copy.copy(self.batch['data_samples'])}
        with DefaultScope.overwrite_default_scope(self.scope), _cudnn_benchmark(self.cudnn_benchmark):
            if self.training:
                with _batch_norm_explained():
                    return self._train(batch)
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == 'bf16'):
                return self.model.test_step(batch)

    def _train(self, batch: dict[str, Any]) -> Any:
        if self.guard is None:
            return self.model.train_step(batch, self.wrapper)
        self.guard.before_train_iter(self.runner, 0, batch)
        losses = self.model.train_step(batch, self.wrapper)
        self.guard.after_train_iter(self.runner, 0, batch, losses)
        return losses

    @torch.no_grad()
    def take_heads(self, other: 'Step') -> None:
        """Takes what is not in the backbone of another step's model, where names and shapes are the same.

        Untrained heads with other weights find another number of objects.
        """
        theirs = other.model.state_dict()
        for name, value in self.model.state_dict().items():
            if not name.startswith('backbone.') and name in theirs and theirs[name].shape == value.shape:
                value.copy_(theirs[name])

    def found(self) -> int | None:
        """Objects in the results of the whole batch; None in training and where results are no objects."""
        if self.training:
            return None
        results = self()
        return sum(len(one.pred_instances) for one in results) if 'pred_instances' in results[0] else None

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


def _choose_results(model: Any, cfg: Config) -> None:
    """Has our hooks choose the form of the results as they do before a test with the metrics of the config."""
    scope = cfg.get('default_scope', 'mmengine')
    evaluators = cfg.get('test_evaluator') or []
    kinds = [
        class_of(one['type'], scope, (METRICS,))
        for one in (evaluators if isinstance(evaluators, list) else [evaluators])
    ]
    if not kinds:
        return
    # The hooks look at the classes alone. Made as usual, a metric may read its annotations; made without that, one with
    # __del__ (Cityscapes') misses what it never had, and the hooks know none of these.
    metrics = [object() if kind is None or hasattr(kind, '__del__') else kind.__new__(kind) for kind in kinds]
    evaluator = SimpleNamespace(metrics=metrics)
    runner = SimpleNamespace(model=model, test_loop=SimpleNamespace(evaluator=evaluator))
    for hook in [*cfg.get('default_hooks', {}).values(), *(cfg.get('custom_hooks') or [])]:
        if hook and getattr(class_of(hook['type'], scope, (HOOKS,)), '__name__', '') in _RESULT_HOOKS:
            HOOKS.build(hook).before_test(runner)


@contextmanager
def _batch_norm_explained() -> Iterator[None]:
    """Within this context PyTorch's error about maps of one value says what to do."""
    try:
        yield
    except ValueError as error:
        if 'more than 1 value per channel' not in str(error):
            raise
        raise ValueError(
            'a BatchNorm of the model meets a map of one pixel, and with one image has nothing to normalize by: train '
            f'on 2 images or more, such as --images 2x512x512 (PyTorch: {error})'
        ) from error


@contextmanager
def _cudnn_benchmark(on: bool) -> Iterator[None]:
    """Within this context cuDNN tries its algorithms for each new shape, or does not."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


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
