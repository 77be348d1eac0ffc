"""UperNet, isotropic ConvNeXt-B (ImageNet-1K), ADE20K, crops of 512, 160k: to be compared with upernet_vit_b_ade20k.

Not from a paper: Table 2 of arXiv 2201.03545 compares isotropic ConvNeXt with plain ViTs on ImageNet only. This is the
recipe of upernet_convnext_b_ade20k, but with its decay of 0.9 for each block: all blocks are one stage here.
Expected: not known, not run here; 146 M parameters, 1721 GFLOPs at 2048 x 512.

    torchrun --nproc-per-node 8 tools/train.py configs/segmentation/upernet_convnext_iso_b_ade20k.py
"""

_base_ = [
    '../_base_/models/upernet_iso.py',
    '../_base_/datasets/ade20k_512.py',
    '../_base_/schedules/adamw_160k.py',  # learning rate 1e-4, decay 0.9
    '../_base_/runtime_seg.py',
]

model = dict(
    backbone=dict(
        arch='base',
        out_channels=768,
        drop_path_rate=0.4,
        init_cfg=dict(checkpoint='https://dl.fbaipublicfiles.com/convnext/convnext_iso_base_1k_224_ema.pth'),
    ),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_type='layer_wise'))
