"""Cascade Mask R-CNN, ResNeXt-101-64x4d (ImageNet-1K), COCO, 3x: the recipe of cascade_convnext_t_coco with a ResNet.

Table 3 of arXiv 2201.03545, from Table 2 of the Swin paper, arXiv 2103.14030. Heads, augmentation and schedule are
shared; the learning rate is that of Swin, there is no layer decay, and stem, first stage and BatchNorm statistics are
frozen, as everywhere in mmdet.
Expected (published, not run here): 972 GFLOPs at 1280 x 800; the weights are torchvision's, newer than the paper's.

    torchrun --nproc-per-node 8 tools/train.py configs/detection/cascade_x101_coco.py
"""

_base_ = [
    '../_base_/models/cascade_mask_rcnn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw_3x.py',  # learning rate 1e-4
    '../_base_/runtime_det.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        type='ResNeXt',
        depth=101,
        groups=64,
        base_width=4,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        frozen_stages=1,
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=True,
        style='pytorch',
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnext101_64x4d.imagenet1k_v1'),
    ),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
optim_wrapper = dict(constructor='DefaultOptimWrapperConstructor', paramwise_cfg=dict(_delete_=True))
