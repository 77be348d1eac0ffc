"""Cascade Mask R-CNN, Swin-B (ImageNet-1K), COCO, 3x: the recipe of cascade_convnext_b_coco with Swin.

Table 3 of arXiv 2201.03545, from SwinTransformer/Swin-Transformer-Object-Detection. Heads, augmentation and
schedule are shared; drop path, learning rate and weight decay are Swin's, and there is no layer decay.
Expected (published, not run here): box AP 51.9, mask AP 45.0; 145 M parameters, 982 GFLOPs at 1280 x 800.

    torchrun --nproc-per-node 8 tools/train.py configs/detection/cascade_swin_b_coco.py
"""

_base_ = [
    '../_base_/models/cascade_mask_rcnn_swin.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw_3x_swin.py',  # learning rate 1e-4
    '../_base_/runtime_det.py',
]

model = dict(
    backbone=dict(
        embed_dims=128,
        depths=(2, 2, 18, 2),
        num_heads=(4, 8, 16, 32),
        drop_path_rate=0.3,
        init_cfg=dict(
            checkpoint='https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_base_patch4_window7_224.pth',
        ),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
