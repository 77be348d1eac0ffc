"""Cascade Mask R-CNN with FPN on Swin-T, 80 classes: the heads of cascade_mask_rcnn, mmdet's backbone.

SwinTransformer/Swin-Transformer-Object-Detection, configs/swin/cascade_mask_rcnn_swin_tiny_*_3x.
"""

_base_ = './cascade_mask_rcnn.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        embed_dims=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        window_size=7,
        drop_path_rate=0.2,
        out_indices=(0, 1, 2, 3),
        convert_weights=True,  # the authors' names to mmdet's
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_tiny_patch4_window7_224.pth',
        ),
    ),
)
