"""Label maps without logits are those that mmseg finds in the logits."""

import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

import densekit.ops  # noqa: F401

# isort: split
from mmseg.structures import SegDataSample
from torch.nn import functional

import backbones  # noqa: F401
from densekit.evaluation.iou import ExactIoUMetric
from densekit.models import label_maps, slide

pytestmark = pytest.mark.usefixtures('one_thread')

CLASSES = 45


@pytest.mark.parametrize('classes_at_once', [16, 32, 64])
@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('size', [(31, 45), (9, 12), (5, 6)], ids=str)
def test_the_greatest_of_the_resized_logits(monkeypatch, size, align_corners, classes_at_once):
    monkeypatch.setattr(label_maps, 'CLASSES_AT_ONCE', classes_at_once)
    logits = torch.randn(CLASSES, 9, 12, generator=torch.Generator().manual_seed(0))
    logits[:, :3] = logits[:, :3].round()  # some are equal
    logits[20, 5, 5] = torch.nan
    resized = functional.interpolate(logits[None], size=size, mode='bilinear', align_corners=align_corners)[0]
    found = label_maps.label_map(logits, size, align_corners)
    assert torch.equal(found, resized.argmax(dim=0, keepdim=True))
    assert len(found.unique()) > 10


def test_of_equal_logits_the_first_counts():
    assert label_maps.label_map(torch.zeros(CLASSES, 2, 2), (4, 4)).eq(0).all()


@pytest.fixture(scope='module')
def segmentor(tiny):
    torch.manual_seed(0)
    cfg = Config.fromfile(tiny.seg).model
    cfg.type = 'BatchedSlideEncoderDecoder'
    with DefaultScope.overwrite_default_scope('mmseg'):
        return MODELS.build(copy.deepcopy(cfg)).eval()


@pytest.mark.parametrize(
    'meta',
    [
        {},
        {'padding_size': (1, 2, 3, 4)},
        {'img_padding_size': (0, 5, 0, 3), 'padding_size': (9, 9, 9, 9)},
        {'flip': True, 'flip_direction': 'horizontal'},
        {'flip': True, 'flip_direction': 'vertical', 'padding_size': (1, 0, 2, 0)},
    ],
    ids=str,
)
def test_as_mmseg_after_padding_and_flips(segmentor, meta):
    logits = torch.randn(2, 6, 24, 32, generator=torch.Generator().manual_seed(0))
    results = []
    for only in (True, False):
        segmentor.label_maps_only = only
        samples = [SegDataSample(metainfo={'ori_shape': (40 + i, 50), **meta}) for i in range(2)]
        results.append(segmentor.postprocess_result(logits.clone(), samples))
    segmentor.label_maps_only = False
    for ours, stock in zip(*results, strict=True):
        assert torch.equal(ours.pred_sem_seg.data, stock.pred_sem_seg.data)
        assert ours.pred_sem_seg.data.dtype == stock.pred_sem_seg.data.dtype
        assert 'seg_logits' in stock and 'seg_logits' not in ours


class Loop:
    def __init__(self, *metrics):
        self.evaluator = type('Evaluator', (), {'metrics': metrics})()


class Other(ExactIoUMetric):
    """A metric that may look at anything."""


@pytest.mark.parametrize(('metrics', 'spared'), [((ExactIoUMetric(),), True), ((ExactIoUMetric(), Other()), False)])
def test_the_hook_spares_them_where_nothing_looks_at_them(segmentor, metrics, spared):
    runner = type('Runner', (), {'model': segmentor, 'val_loop': Loop(*metrics), 'test_loop': Loop(*metrics)})()
    hook = label_maps.LabelMapsHook()
    for before, after in ((hook.before_val, hook.after_val), (hook.before_test, hook.after_test)):
        before(runner)
        assert segmentor.label_maps_only == spared
        after(runner)
        assert not segmentor.label_maps_only
    assert not slide.BatchedSlideEncoderDecoder.label_maps_only


def test_views_that_are_added_up_keep_their_logits(segmentor):
    with DefaultScope.overwrite_default_scope('mmseg'):
        views = MODELS.build(dict(type='SegTTAModel', module=segmentor))
    runner = type('Runner', (), {'model': views, 'test_loop': Loop(ExactIoUMetric())})()
    label_maps.LabelMapsHook().before_test(runner)
    assert not segmentor.label_maps_only
