"""Mask R-CNN with FPN on ConvNeXt V2-B, 80 classes, soft suppression at test time.

GRN in every block and no layer scale; the heads are those of V1. ConvNeXt V2 paper, arXiv 2301.00808, appendix A.
"""

_base_ = './mask_rcnn.py'

model = dict(
    backbone=dict(
        arch='base',
        use_grn=True,
        layer_scale_init_value=0.0,
        init_cfg=dict(checkpoint='convnextv2_base.fcmae_ft_in1k'),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
    test_cfg=dict(rcnn=dict(nms=dict(type='soft_nms'))),
)
