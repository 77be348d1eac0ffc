"""UperNet, ConvNeXt-B (ImageNet-1K), ADE20K, crops of 512, 160k iterations.

Table 4 of arXiv 2201.03545; facebookresearch/ConvNeXt at 048efce, upernet_convnext_base_512_160k_ade20k_*.
Expected (published, not run here): mIoU 49.1 single-scale, 49.9 multi-scale with flips (tools/test.py --tta); 122 M
parameters, 1170 GFLOPs at 2048 x 512.

    torchrun --nproc-per-node 8 tools/train.py configs/segmentation/upernet_convnext_b_ade20k.py
"""

_base_ = [
    '../_base_/models/upernet.py',
    '../_base_/datasets/ade20k_512.py',
    '../_base_/schedules/adamw_160k.py',  # learning rate 1e-4, decay 0.9 per stage
    '../_base_/runtime_seg.py',
]

model = dict(
    backbone=dict(
        arch='base',
        init_cfg=dict(checkpoint='https://dl.fbaipublicfiles.com/convnext/convnext_base_1k_224.pth'),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
