"""UperNet on Swin-T with an auxiliary FCN head, 150 classes, crops of 512: the heads of upernet, mmdet's backbone.

SwinTransformer/Swin-Transformer-Semantic-Segmentation, configs/swin/upernet_swin_tiny_patch4_window7_512x512_160k_*;
mmseg 1.2.2, swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.
"""

_base_ = './upernet.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdet.SwinTransformer',
        embed_dims=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        window_size=7,
        drop_path_rate=0.3,
        out_indices=(0, 1, 2, 3),
        convert_weights=True,  # the authors' names to mmdet's; mmseg's Swin cannot
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_tiny_patch4_window7_224.pth',
        ),
    ),
)
