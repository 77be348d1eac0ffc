"""UperNet, isotropic ConvNeXt-S (ImageNet-1K), ADE20K, crops of 512, 160k: to be compared with upernet_vit_s_ade20k.

Not from a paper: Table 2 of arXiv 2201.03545 compares isotropic ConvNeXt with plain ViTs on ImageNet only. This is the
recipe of upernet_convnext_s_ade20k, but with its decay of 0.9 for each block: all blocks are one stage here.
Expected: not known, not run here; 58 M parameters, 1068 GFLOPs at 2048 x 512.

    torchrun --nproc-per-node 8 tools/train.py configs/segmentation/upernet_convnext_iso_s_ade20k.py
"""

_base_ = [
    '../_base_/models/upernet_iso.py',
    '../_base_/datasets/ade20k_512.py',
    '../_base_/schedules/adamw_160k.py',  # learning rate 1e-4, decay 0.9
    '../_base_/runtime_seg.py',
]

optim_wrapper = dict(paramwise_cfg=dict(decay_type='layer_wise'))
