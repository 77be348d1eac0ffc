"""Mask2Former, ConvNeXt-T (ImageNet-1K), ADE20K, crops of 512, 160k iterations.

Not from a paper: mmseg's recipe with ResNet-50 and Swin-T and another backbone; the augmentation is that of
upernet_convnext_t_ade20k. Expected: not known, not run here.

    torchrun --nproc-per-node 8 tools/train.py configs/segmentation/mask2former_convnext_t_ade20k.py
"""

_base_ = [
    '../_base_/models/mask2former_seg.py',
    '../_base_/datasets/ade20k_512.py',
    '../_base_/schedules/adamw_mask2former_160k.py',  # learning rate 1e-4, 1e-5 in the backbone
    '../_base_/runtime_seg.py',
]
