"""UperNet on DeiT-S/16 with an auxiliary FCN head, 150 classes, crops of 512: the heads of upernet, mmseg's backbone.

mmseg 1.2.2, configs/vit/vit_deit-s16_mln_upernet_8xb2-160k_ade20k-512x512: four layers of one resolution, which the
neck scales. The weights are DeiT's under mmseg's names; the recipes say how to get them.
"""

_base_ = './upernet.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='VisionTransformer',
        img_size=(512, 512),
        patch_size=16,
        embed_dims=384,
        num_layers=12,
        num_heads=6,
        mlp_ratio=4,
        out_indices=(2, 5, 8, 11),
        qkv_bias=True,
        patch_bias=True,  # DeiT has one, which mmseg 1.2.2 leaves out unless told
        drop_path_rate=0.1,
        norm_cfg=dict(type='LN', eps=1e-6),
        init_cfg=dict(type='Pretrained', checkpoint='pretrain/deit_small_mmseg.pth'),
    ),
    neck=dict(
        type='MultiLevelNeck',
        in_channels=[384, 384, 384, 384],
        out_channels=384,
        scales=[4, 2, 1, 0.5],
    ),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384),
)
