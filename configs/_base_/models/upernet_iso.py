"""UperNet on isotropic ConvNeXt-S with an auxiliary FCN head, 150 classes, crops of 512: the heads of upernet.

The backbone makes its own pyramid out of its one resolution, as wide as the neck of upernet_vit.
"""

_base_ = './upernet.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='ConvNeXtIsotropic',
        arch='small',
        out_channels=384,
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.3,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/convnext_iso_small_1k_224_ema.pth',
        ),
    ),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384),
)
