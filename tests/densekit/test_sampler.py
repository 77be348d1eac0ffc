"""Boxes drawn are mmdet's, to the bit, with the same random numbers."""

import densekit.ops  # noqa: F401

# isort: split
import copy
import warnings

import pytest
import torch
from mmdet.models.task_modules.assigners import AssignResult
from mmdet.models.task_modules.samplers import RandomSampler
from mmengine.structures import InstanceData

from densekit.models import WholeRandomSampler

FIELDS = ('pos_inds', 'neg_inds', 'pos_priors', 'neg_priors', 'pos_is_gt', 'pos_assigned_gt_inds', 'pos_gt_labels')
FIELDS += ('pos_gt_bboxes', 'num_pos', 'num_neg', 'avg_factor', 'num_gts', 'priors')


def image(seed, boxes, objects, *, positive=0.3, left_out=0.2, device='cpu'):
    """Boxes, of which some have an object, some none, and some are left out; and the objects."""
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(boxes, generator=generator)
    owners = torch.randint(1, objects + 1, (boxes,), generator=generator) if objects else torch.zeros(boxes).long()
    found = torch.where(chance < positive, owners, torch.where(chance < 1 - left_out, 0, -1))
    truth = InstanceData(bboxes=torch.rand(objects, 4, generator=generator) * 99, labels=torch.arange(objects) + 10)
    labels = torch.where(found > 0, found + 9, -1)
    result = AssignResult(
        objects, found.to(device), torch.rand(boxes, generator=generator).to(device), labels.to(device)
    )
    return result, (torch.rand(boxes, 4, generator=generator) * 99).to(device), truth.to(device)


def drawn(cls, images, **options):
    """What a sampler draws from all images, and a random number that follows."""
    torch.manual_seed(7)
    sampler = cls(**options)
    images = copy.deepcopy(images)
    if cls is WholeRandomSampler:
        results = sampler.sample_all(*map(list, zip(*images, strict=True)))
    else:
        results = [sampler.sample(found, InstanceData(priors=boxes), truth) for found, boxes, truth in images]
    return results, torch.rand(1)


CASES = {
    'more than wanted': [image(1, 900, 12), image(2, 700, 3)],
    'few': [image(3, 20, 2), image(4, 9, 1)],
    'no object in one': [image(5, 300, 0), image(6, 300, 5)],
    'no object': [image(7, 300, 0)],
    'none has an object': [image(8, 300, 4, positive=0.0)],
    'all have one': [image(9, 300, 4, positive=1.0)],
    'all left out': [image(10, 300, 4, positive=0.0, left_out=1.0)],
    'no boxes': [image(11, 0, 3), image(12, 0, 0)],
    'more objects than wanted': [image(13, 50, 90)],
}


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('add', [True, False])
@pytest.mark.parametrize(
    'options',
    [dict(num=64, pos_fraction=0.25), dict(num=256, pos_fraction=0.5), dict(num=64, pos_fraction=0.5, neg_pos_ub=2)],
    ids=str,
)
def test_as_mmdets(case, add, options):
    ours, our_next = drawn(WholeRandomSampler, CASES[case], add_gt_as_proposals=add, **options)
    theirs, their_next = drawn(RandomSampler, CASES[case], add_gt_as_proposals=add, **options)
    assert torch.equal(our_next, their_next)  # as many numbers were drawn
    for own, reference in zip(ours, theirs, strict=True):
        for name in FIELDS:
            left, right = getattr(own, name), getattr(reference, name)
            if isinstance(left, torch.Tensor):
                assert left.dtype == right.dtype and torch.equal(left, right), name
            else:
                assert left == right, name
        assert own.truths == int(reference.pos_is_gt.sum())
        assert bool(own.pos_is_gt[: own.truths].all())


def test_the_data_above_have_what_is_to_be_told_apart():
    def sizes(case, **options):
        return [
            (len(one.pos_inds), len(one.neg_inds), one.truths) for one in drawn(WholeRandomSampler, case, **options)[0]
        ]

    usual = dict(num=64, pos_fraction=0.25)
    assert sizes(CASES['more than wanted'], **usual) == [(16, 48, 1), (16, 48, 0)]  # true boxes are drawn too
    assert sizes(CASES['all left out'], add_gt_as_proposals=False, **usual) == [(0, 0, 0)]
    assert sizes(CASES['few'], **usual)[1] < (16, 48, 0)


def test_other_numbers_are_seen():
    """Drawing in another order than mmdet's gives other boxes."""
    images = CASES['more than wanted']
    forward, _ = drawn(WholeRandomSampler, images, num=64, pos_fraction=0.25)
    backward, _ = drawn(WholeRandomSampler, images[::-1], num=64, pos_fraction=0.25)
    assert not torch.equal(forward[0].neg_inds, backward[1].neg_inds)


def test_one_image_at_a_time():
    found, boxes, truth = copy.deepcopy(CASES['more than wanted'][0])
    torch.manual_seed(7)
    one = WholeRandomSampler(num=64, pos_fraction=0.25).sample(found, InstanceData(priors=boxes), truth)
    all_of_one, _ = drawn(WholeRandomSampler, CASES['more than wanted'][:1], num=64, pos_fraction=0.25)
    assert torch.equal(one.neg_inds, all_of_one[0].neg_inds)


FIRST = {
    '_sample_pos': lambda self, result, wanted, **kwargs: (result.gt_inds > 0).nonzero().squeeze(1)[:wanted],
    '_sample_neg': lambda self, result, wanted, **kwargs: (result.gt_inds == 0).nonzero().squeeze(1)[:wanted],
    'random_choice': lambda self, places, wanted: places[:wanted],
}


@pytest.mark.parametrize('name', FIRST)
def test_a_subclass_draws_in_its_own_way(name):
    options = dict(num=64, pos_fraction=0.25)
    found = []
    for cls in (WholeRandomSampler, RandomSampler):
        sampler = type('First', (cls,), {name: FIRST[name]})(**options)
        torch.manual_seed(7)
        result, boxes, truth = copy.deepcopy(CASES['more than wanted'][0])
        found.append(sampler.sample(result, InstanceData(priors=boxes), truth))
        if cls is WholeRandomSampler:
            assert not sampler.whole
            with pytest.raises(AssertionError, match='own way'):
                sampler.sample_all([result], [boxes], [truth])
    usual = drawn(WholeRandomSampler, CASES['more than wanted'][:1], **options)[0][0]
    differs = [not torch.equal(getattr(found[0], kind), getattr(usual, kind)) for kind in ('pos_inds', 'neg_inds')]
    assert any(differs)
    for kind in ('pos_inds', 'neg_inds'):
        assert torch.equal(getattr(found[0], kind), getattr(found[1], kind))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_the_host_waits_once():
    images = [image(1, 900, 12, device='cuda'), image(2, 700, 3, device='cuda')]
    drawn(WholeRandomSampler, images, num=64, pos_fraction=0.25)
    batch = [list(part) for part in zip(*images, strict=True)]
    sampler = WholeRandomSampler(num=64, pos_fraction=0.25)
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter('always')
            sampler.sample_all(*batch)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert len([one for one in found if 'synchroniz' in str(one.message)]) == 1
