"""UperNet on ConvNeXt V2-B with an auxiliary FCN head, 150 classes, crops of 512.

GRN in every block and no layer scale; the heads are those of V1. ConvNeXt V2 paper, arXiv 2301.00808, appendix A.
"""

_base_ = './upernet.py'

model = dict(
    backbone=dict(
        arch='base',
        use_grn=True,
        layer_scale_init_value=0.0,
        init_cfg=dict(checkpoint='convnextv2_base.fcmae_ft_in1k'),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
