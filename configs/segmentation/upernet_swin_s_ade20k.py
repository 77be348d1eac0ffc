"""UperNet, Swin-S (ImageNet-1K), ADE20K, crops of 512, 160k: the recipe of upernet_convnext_s_ade20k with Swin.

Table 4 of arXiv 2201.03545, from SwinTransformer/Swin-Transformer-Semantic-Segmentation. Heads, augmentation and
schedule are shared; drop path, learning rate and weight decay are Swin's, and there is no layer decay.
Expected (published, not run here): mIoU 47.6 single-scale, 49.5 multi-scale with flips (tools/test.py --tta); 81 M
parameters, 1038 GFLOPs at 2048 x 512.

    torchrun --nproc-per-node 8 tools/train.py configs/segmentation/upernet_swin_s_ade20k.py
"""

_base_ = [
    '../_base_/models/upernet_swin.py',
    '../_base_/datasets/ade20k_512.py',
    '../_base_/schedules/adamw_160k_swin.py',  # learning rate 6e-5, weight decay 0.01
    '../_base_/runtime_seg.py',
]

model = dict(
    backbone=dict(
        depths=(2, 2, 18, 2),
        init_cfg=dict(
            checkpoint='https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_small_patch4_window7_224.pth',
        ),
    ),
)
