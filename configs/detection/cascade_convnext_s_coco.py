"""Cascade Mask R-CNN, ConvNeXt-S (ImageNet-1K), COCO, 3x.

Table 3 of arXiv 2201.03545; facebookresearch/ConvNeXt at 048efce, cascade_mask_rcnn_convnext_small_*_3x.
Expected (published, not run here): box AP 51.9, mask AP 45.0; 108 M parameters, 827 GFLOPs at 1280 x 800.

    torchrun --nproc-per-node 8 tools/train.py configs/detection/cascade_convnext_s_coco.py
"""

_base_ = [
    '../_base_/models/cascade_mask_rcnn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw_3x.py',
    '../_base_/runtime_det.py',
]

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.6,
        init_cfg=dict(checkpoint='https://dl.fbaipublicfiles.com/convnext/convnext_small_1k_224.pth'),
    ),
)
optim_wrapper = dict(optimizer=dict(lr=0.0002), paramwise_cfg=dict(decay_rate=0.7))
