"""Cascade Mask R-CNN, ConvNeXt-B (ImageNet-22K), COCO, 3x.

Table 3 of arXiv 2201.03545; facebookresearch/ConvNeXt at 048efce, cascade_mask_rcnn_convnext_base_*_3x.
Expected (published, not run here): box AP 54.0, mask AP 46.9; 146 M parameters, 964 GFLOPs at 1280 x 800.

    torchrun --nproc-per-node 8 tools/train.py configs/detection/cascade_convnext_b_in22k_coco.py
"""

_base_ = [
    '../_base_/models/cascade_mask_rcnn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw_3x.py',  # learning rate 1e-4
    '../_base_/runtime_det.py',
]

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.6,
        init_cfg=dict(checkpoint='https://dl.fbaipublicfiles.com/convnext/convnext_base_22k_224.pth'),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.8))
