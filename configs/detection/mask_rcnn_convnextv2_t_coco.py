"""Mask R-CNN, ConvNeXt V2-T (FCMAE, fine-tuned on ImageNet-1K), COCO, 3x.

Not from a paper: the recipe of arXiv 2301.00808, appendix A, for a size that its Table 6 does not have. Drop path and
layer decay lie within the paper's sweep. Expected: not known, not run here.

    torchrun --nproc-per-node 8 tools/train.py configs/detection/mask_rcnn_convnextv2_t_coco.py
"""

_base_ = [
    '../_base_/models/mask_rcnn_v2.py',
    '../_base_/datasets/coco_instance_lsj.py',
    '../_base_/schedules/adamw_3x_batch32.py',  # learning rate 1e-4, decay 0.95 per layer
    '../_base_/runtime_det.py',
]

model = dict(
    backbone=dict(
        arch='tiny',
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint='convnextv2_tiny.fcmae_ft_in1k'),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
