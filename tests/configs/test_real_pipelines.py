"""The data of V2, DINO, Mask2Former and RTMDet on real photographs, where DENSEKIT_SAMPLES names their folder."""

import pytest
import torch
from mmengine.dataset import Compose
from recipes import CONFIGS, recipe, scope_of
from test_real_data import COCO, SAMPLES, dataset_of

pytestmark = pytest.mark.skipif(not SAMPLES, reason='DENSEKIT_SAMPLES names no folder of sample photographs')

# The recipe, the largest side of an image to train with, whether it comes with masks.
RECIPES = [
    ('mask_rcnn_convnextv2_b_coco', 1024, True),
    ('mask2former_convnext_t_coco', 1024, True),
    ('dino_convnext_t_12e_coco', 1333, False),
    ('rtmdet_l_convnext_b_coco', 640, False),
]


def check(sample, largest, masks):
    height, width = sample['inputs'].shape[1:]
    assert sample['inputs'].dtype == torch.uint8 and max(height, width) <= largest
    truth = sample['data_samples'].gt_instances
    assert ('masks' in truth) == masks
    if len(truth):
        boxes = truth.bboxes.tensor
        assert (boxes >= 0).all() and (boxes[:, [0, 2]] <= width).all() and (boxes[:, [1, 3]] <= height).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        if masks:
            assert (truth.masks.height, truth.masks.width) == (height, width)


@pytest.mark.parametrize(('name', 'largest', 'masks'), RECIPES)
def test_augmented_images_and_boxes_agree(name, largest, masks):
    dataset = dataset_of(recipe(CONFIGS / f'detection/{name}.py'), 'train_dataloader', COCO)
    assert len(dataset) == 2
    samples = [dataset[i % 2] for i in range(8)]
    for sample in samples:
        check(sample, largest, masks)
    assert any(len(sample['data_samples'].gt_instances) for sample in samples)


def test_rtmdet_ends_with_plain_images():
    cfg = recipe(CONFIGS / 'detection/rtmdet_l_convnext_b_coco.py')
    dataset = dataset_of(cfg, 'train_dataloader', COCO)
    with scope_of(cfg):
        dataset.pipeline = Compose(cfg.custom_hooks[1].switch_pipeline)
    sample = dataset[0]
    assert sample['inputs'].shape == (3, 640, 640)
    check(sample, 640, False)
