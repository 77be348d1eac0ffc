"""UperNet, ConvNeXt-T (ImageNet-1K), ADE20K, crops of 512, 160k iterations.

Table 4 of arXiv 2201.03545; facebookresearch/ConvNeXt at 048efce, upernet_convnext_tiny_512_160k_ade20k_*.
Expected (published, not run here): mIoU 46.0 single-scale, 46.7 multi-scale with flips (tools/test.py --tta); 60 M
parameters, 939 GFLOPs at 2048 x 512.

    torchrun --nproc-per-node 8 tools/train.py configs/segmentation/upernet_convnext_t_ade20k.py
"""

_base_ = [
    '../_base_/models/upernet.py',
    '../_base_/datasets/ade20k_512.py',
    '../_base_/schedules/adamw_160k.py',  # learning rate 1e-4, decay 0.9 per stage
    '../_base_/runtime_seg.py',
]
