"""Cascade Mask R-CNN, ConvNeXt-XL (ImageNet-22K), COCO, 3x.

Table 3 of arXiv 2201.03545; facebookresearch/ConvNeXt at 048efce, cascade_mask_rcnn_convnext_xlarge_*_3x.
Expected (published, not run here): box AP 55.2, mask AP 47.7; 407 M parameters, 1898 GFLOPs at 1280 x 800.

    torchrun --nproc-per-node 8 tools/train.py configs/detection/cascade_convnext_xl_in22k_coco.py
"""

_base_ = [
    '../_base_/models/cascade_mask_rcnn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw_3x.py',  # learning rate 1e-4
    '../_base_/runtime_det.py',
]

model = dict(
    backbone=dict(
        arch='xlarge',
        drop_path_rate=0.8,
        init_cfg=dict(checkpoint='https://dl.fbaipublicfiles.com/convnext/convnext_xlarge_22k_224.pth'),
    ),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
optim_wrapper = dict(
    type='OptimWrapper',  # float32, as the paper has it for this size
    paramwise_cfg=dict(decay_rate=0.7),
)
