"""Mask R-CNN, ConvNeXt V2-H (FCMAE, fine-tuned on ImageNet-1K), COCO, 3x.

Table 6 of arXiv 2301.00808, recipe of its appendix A. Drop path and layer decay lie within the paper's sweep; the
chosen values are not published.
Expected (published, not run here): box AP 55.7, mask AP 48.9; 2525 GFLOPs at 1280 x 800.

    torchrun --nproc-per-node 8 tools/train.py configs/detection/mask_rcnn_convnextv2_h_coco.py
"""

_base_ = [
    '../_base_/models/mask_rcnn_v2.py',
    '../_base_/datasets/coco_instance_lsj.py',
    '../_base_/schedules/adamw_3x_batch32.py',  # learning rate 1e-4, decay 0.95 per layer
    '../_base_/runtime_det.py',
]

model = dict(
    backbone=dict(
        arch='huge',
        drop_path_rate=0.5,
        init_cfg=dict(checkpoint='convnextv2_huge.fcmae_ft_in1k'),
    ),
    neck=dict(in_channels=[352, 704, 1408, 2816]),
)
optim_wrapper = dict(type='OptimWrapper')  # float32, as V1 of this size
