"""Two-stage detectors with our heads, samplers and coders learn and find what they do with mmdet's, to the bit."""

import densekit.ops  # noqa: F401

# isort: split
import copy

import pytest
import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.models.dense_heads import RPNHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead, Shared2FCBBoxHead
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from small_detectors import small
from torch import nn

from densekit.benchmark.generated import jittered_truth, make_batch
from densekit.models import (
    DeviceDetDataPreprocessor,
    ExactRPNHead,
    WholeRandomSampler,
    WholeShared2FCBBoxHead,
)

SIZE = (2, 96, 128)
MMDETS = {
    'DeviceDetDataPreprocessor': 'DetDataPreprocessor',
    'ExactRPNHead': 'RPNHead',
    'DeviceBoxCoder': 'DeltaXYWHBBoxCoder',
    'WholeMaxIoUAssigner': 'MaxIoUAssigner',
    'WholeRandomSampler': 'RandomSampler',
    'WholeRoIHead': 'StandardRoIHead',
    'WholeCascadeRoIHead': 'CascadeRoIHead',
    'WholeShared2FCBBoxHead': 'Shared2FCBBoxHead',
    'WholeConvFCBBoxHead': 'ConvFCBBoxHead',
}
RECIPES = ('mask_rcnn', 'cascade')


def types_in(node):
    """The dictionaries of a config that name one of our types."""
    if isinstance(node, dict):
        if node.get('type') in MMDETS:
            yield node
        node = list(node.values())
    if isinstance(node, list | tuple):
        for part in node:
            yield from types_in(part)


def mmdets(cfg, *, but=()):
    cfg = copy.deepcopy(cfg)
    for node in list(types_in(cfg.model)):
        if node['type'] not in but:
            node['type'] = MMDETS[node['type']]
    return cfg


def built(cfg):
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
    return model


def learn_on_truth(model):
    """As in a trained model, some proposals lie on objects."""
    original = model.rpn_head.loss_and_predict

    def loss_and_predict(features, samples, **kwargs):
        losses, proposals = original(features, samples, **kwargs)
        for one, sample in zip(proposals, samples, strict=True):
            if len(sample.gt_instances):
                near = jittered_truth(sample.gt_instances.bboxes, min(40, len(one)))
                one.bboxes[: len(near)] = near
        return losses, proposals

    model.rpn_head.loss_and_predict = loss_and_predict


def without_objects(batch, images):
    for image in images:
        truth = batch['data_samples'][image].gt_instances
        batch['data_samples'][image].gt_instances = truth[torch.zeros(len(truth), dtype=torch.bool)]
    return batch


def learned(cfg, *, empty=(), near=True, bf16=False):
    """Losses and gradients of a batch, and a random number that follows."""
    model = built(cfg).train()
    if near:
        learn_on_truth(model)
    batch = without_objects(make_batch(cfg, SIZE, polygons=False), empty)
    torch.manual_seed(1)
    with DefaultScope.overwrite_default_scope('mmdet'), torch.autocast('cpu', torch.bfloat16, enabled=bf16):
        losses = model(**model.data_preprocessor(batch, True), mode='loss')
        total, named = model.parse_losses(losses)
        total.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {**named, **gradients, 'next': torch.rand(1)}


@pytest.mark.parametrize('recipe', RECIPES)
@pytest.mark.parametrize(
    ('empty', 'near', 'num'),
    [((), True, 64), ((), True, 512), ((1,), True, 64), ((0, 1), True, 64), ((), False, 64)],
    ids=['fewer than found', 'all', 'an image without objects', 'no objects', 'untrained'],
)
def test_learning(recipe, empty, near, num, one_thread):
    cfg = small(recipe)
    stages = cfg.model.train_cfg.rcnn
    for stage in stages if isinstance(stages, list) else [stages]:
        stage.sampler.num = num
    ours, theirs = (learned(one, empty=empty, near=near) for one in (cfg, mmdets(cfg)))
    assert_equal(ours, theirs)
    assert any('loss_mask' in name for name in ours)


@pytest.mark.parametrize('recipe', RECIPES)
def test_learning_in_bf16(recipe, one_thread):
    """The proposal head stays ours: mmdet's has coarser anchors."""
    cfg = small(recipe)
    ours, theirs = (learned(one, bf16=True) for one in (cfg, mmdets(cfg, but=('ExactRPNHead',))))
    assert_equal(ours, theirs)
    assert not torch.equal(ours['loss'], learned(cfg)['loss'])


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not equal(ours[name], theirs[name])] == []


def equal(own, reference):
    return own is reference if own is None or reference is None else torch.equal(own, reference)


def test_a_small_difference_is_seen(one_thread):
    cfg = small('mask_rcnn')
    other = copy.deepcopy(cfg)
    other.model.train_cfg.rcnn.sampler.num = 32
    ours, theirs = learned(cfg), learned(other)
    assert not torch.equal(ours['loss_bbox'], theirs['loss_bbox'])


@pytest.mark.parametrize('recipe', RECIPES)
@pytest.mark.parametrize(('found', 'scale'), [(0.0, (1.3, 1.7)), (0.015, (1.0, 1.0)), (1.0, (1.0, 1.0))])
def test_finding(recipe, found, scale, one_thread):
    cfg = small(recipe, found=found)
    results = []
    for one in (cfg, mmdets(cfg)):
        model = built(one).eval()
        with torch.no_grad():
            for name, value in model.named_parameters():
                if name.endswith(('fc_cls.weight', 'rpn_cls.weight')):
                    value.mul_(40)  # scores unlike each other
        batch = make_batch(one, SIZE, polygons=False)
        for sample in batch['data_samples']:
            sample.set_metainfo(dict(scale_factor=scale))
        with DefaultScope.overwrite_default_scope('mmdet'), torch.no_grad():
            results.append([sample.pred_instances for sample in model.test_step(batch)])
    for own, reference in zip(*results, strict=True):
        assert own.keys() == reference.keys()
        for name, expected in reference.items():
            assert torch.equal(own[name], expected), name
    assert (len(results[0][0]) > 0) == (found < 0.5)


def test_no_anchor_in_the_image():
    cfg = small('cascade')
    for one in (cfg, mmdets(cfg)):
        one.model.rpn_head.anchor_generator.scales = [64]
        with pytest.raises(ValueError, match='allowed_border'):
            learned(one)


@pytest.mark.parametrize('recipe', RECIPES)
def test_each_class_of_ours_is_in_a_recipe(recipe):
    cfg = small(recipe)
    names = {node['type'] for node in types_in(cfg.model)}
    mask_rcnn = {'WholeRoIHead', 'WholeShared2FCBBoxHead'}
    cascade = {'WholeCascadeRoIHead', 'WholeConvFCBBoxHead'}
    assert names == set(MMDETS) - (cascade if recipe == 'mask_rcnn' else mask_rcnn)
    assert not list(types_in(mmdets(cfg).model))


@pytest.mark.parametrize('recipe', RECIPES)
def test_finding_without_suppression(recipe, one_thread):
    cfg = small(recipe, found=0.0)
    cfg.model.test_cfg.rpn.nms = cfg.model.test_cfg.rcnn.nms = None
    ours, theirs = (results(one) for one in (cfg, mmdets(cfg)))
    for own, reference in zip(ours, theirs, strict=True):
        assert len(own) > 1 and torch.equal(own.bboxes, reference.bboxes) and torch.equal(own.labels, reference.labels)


def results(cfg):
    with DefaultScope.overwrite_default_scope('mmdet'), torch.no_grad():
        return [one.pred_instances for one in built(cfg).eval().test_step(make_batch(cfg, SIZE, polygons=False))]


class Parts(nn.Module):
    """A loss of scores in two named parts."""

    custom_activation = False

    def forward(self, scores, labels, weights, avg_factor=None, **kwargs):
        loss = nn.functional.cross_entropy(scores, labels, reduction='sum') / avg_factor
        return {'loss_near': loss * 0.75, 'loss_far': loss * 0.25}


def test_a_loss_in_parts(one_thread):
    cfg = small('mask_rcnn')
    cfg.model.roi_head.bbox_head.loss_cls = dict(type=Parts)
    ours, theirs = (learned(one) for one in (cfg, mmdets(cfg)))
    assert_equal(ours, theirs)
    assert {'loss_near', 'loss_far', 'acc'} < ours.keys() and 'loss_cls' not in ours


def counted(calls, cls, name):
    """A subclass that notes the calls of a method and then does as before."""

    def own(self, *args, **kwargs):
        calls.append(name)
        return getattr(super(made, self), name)(*args, **kwargs)

    made = type(f'Own{cls.__name__}', (cls,), {name: own})
    return made


OVERRIDES = [
    (WholeShared2FCBBoxHead, 'loss'),
    (WholeRandomSampler, 'sample'),
    (WholeRandomSampler, '_sample_pos'),
    (WholeRandomSampler, '_sample_neg'),
    (ExactRPNHead, '_get_targets_single'),
]


@pytest.mark.parametrize(('cls', 'name'), OVERRIDES, ids=lambda value: getattr(value, '__name__', value))
def test_a_subclass_is_not_passed_over(cls, name, one_thread):
    calls = []
    own = counted(calls, cls, name)
    cfg = small('mask_rcnn')
    other = copy.deepcopy(cfg)
    for node in list(types_in(other.model)):
        if node['type'] == cls.__name__:
            node['type'] = own
    ours, theirs = learned(other), learned(mmdets(cfg))
    assert calls
    assert_equal(ours, theirs)


def half_counts(self, *args, **kwargs):
    """Targets of boxes of which only every other one counts."""
    labels, weights, *rest = BBoxHead._get_targets_single(self, *args, **kwargs)
    return labels, weights * (torch.arange(len(weights)) % 2), *rest


def test_box_targets_of_a_subclass(one_thread):
    cfg = small('mask_rcnn')
    found = []
    for one, cls in ((cfg, WholeShared2FCBBoxHead), (mmdets(cfg), Shared2FCBBoxHead)):
        one.model.roi_head.bbox_head.type = type('HalfCounts', (cls,), {'_get_targets_single': half_counts})
        found.append(learned(one))
    assert_equal(*found)


def test_a_subclass_that_suppresses_proposals_itself(one_thread):
    cfg = small('mask_rcnn')
    expected = learned(mmdets(cfg))
    own = {'_bbox_post_process': RPNHead._bbox_post_process}
    cfg.model.rpn_head.type = type('OwnSuppression', (ExactRPNHead,), own)
    assert_equal(learned(cfg), expected)


@pytest.mark.parametrize('joined', [False, True])
def test_channels_are_swapped_as_mmdet_does(joined):
    generator = torch.Generator().manual_seed(0)
    for channels, mean in ((3, [1.0, 2.0, 3.0]), (4, [1.0, 2.0, 3.0])):
        images = [torch.randint(0, 255, (channels, 32, 32), generator=generator, dtype=torch.uint8) for _ in range(2)]
        found = []
        for cls in (DeviceDetDataPreprocessor, DetDataPreprocessor):
            preprocessor = cls(mean=mean, std=[2.0, 3.0, 4.0], bgr_to_rgb=True)
            data = {'inputs': torch.stack(images) if joined else list(images), 'data_samples': None}
            found.append(preprocessor(data)['inputs'])
        assert found[0].shape == (2, 3, 32, 32) and torch.equal(*found)


def test_images_of_one_channel_have_none_to_swap():
    for cls in (DeviceDetDataPreprocessor, DetDataPreprocessor):
        with pytest.raises(IndexError):
            cls(bgr_to_rgb=True)({'inputs': [torch.zeros(1, 32, 32)], 'data_samples': None})
