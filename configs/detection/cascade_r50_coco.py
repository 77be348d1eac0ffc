"""Cascade Mask R-CNN, ResNet-50 (ImageNet-1K), COCO, 3x: the recipe of cascade_convnext_t_coco with a ResNet.

Table 3 of arXiv 2201.03545, from Table 2 of the Swin paper, arXiv 2103.14030. Heads, augmentation and schedule are
shared; the learning rate is that of Swin, there is no layer decay, and stem, first stage and BatchNorm statistics are
frozen, as everywhere in mmdet.
Expected (published, not run here): box AP 46.3; 739 GFLOPs at 1280 x 800.

    torchrun --nproc-per-node 8 tools/train.py configs/detection/cascade_r50_coco.py
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
        type='ResNet',
        depth=50,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        frozen_stages=1,
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=True,
        style='pytorch',
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50'),
    ),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
optim_wrapper = dict(constructor='DefaultOptimWrapperConstructor', paramwise_cfg=dict(_delete_=True))
