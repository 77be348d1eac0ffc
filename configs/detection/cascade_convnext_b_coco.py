"""Cascade Mask R-CNN, ConvNeXt-B (ImageNet-1K), COCO, 3x.

Table 3 of arXiv 2201.03545; facebookresearch/ConvNeXt at 048efce, cascade_mask_rcnn_convnext_base_*_3x.
Expected (published, not run here): box AP 52.7, mask AP 45.6; 146 M parameters, 964 GFLOPs at 1280 x 800.

    torchrun --nproc-per-node 8 tools/train.py configs/detection/cascade_convnext_b_coco.py
"""

_base_ = [
    '../_base_/models/cascade_mask_rcnn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw_3x.py',
    '../_base_/runtime_det.py',
]

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.7,
        init_cfg=dict(checkpoint='https://dl.fbaipublicfiles.com/convnext/convnext_base_1k_224.pth'),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(optimizer=dict(lr=0.0002), paramwise_cfg=dict(decay_rate=0.8))
