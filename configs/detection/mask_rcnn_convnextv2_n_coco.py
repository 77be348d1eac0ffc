"""Mask R-CNN, ConvNeXt V2-N (FCMAE, fine-tuned on ImageNet-1K), COCO, 3x.

Not from a paper: the recipe of arXiv 2301.00808, appendix A, for a size that its Table 6 does not have. Drop path and
layer decay lie within the paper's sweep. Expected: not known, not run here.

    torchrun --nproc-per-node 8 tools/train.py configs/detection/mask_rcnn_convnextv2_n_coco.py
"""

_base_ = [
    '../_base_/models/mask_rcnn_v2.py',
    '../_base_/datasets/coco_instance_lsj.py',
    '../_base_/schedules/adamw_3x_batch32.py',  # learning rate 1e-4
    '../_base_/runtime_det.py',
]

model = dict(
    backbone=dict(
        arch='nano',
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint='convnextv2_nano.fcmae_ft_in1k'),
    ),
    neck=dict(in_channels=[80, 160, 320, 640]),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.9))
