"""UperNet, ConvNeXt V2-T (FCMAE, fine-tuned on ImageNet-1K), ADE20K, crops of 512, 160k iterations.

Not from a paper: the recipe of arXiv 2301.00808, appendix A, for a size that its Table 7 does not have. Learning rate,
drop path and decay are V1's, which lie within the paper's sweep. Expected: not known, not run here.

    torchrun --nproc-per-node 8 tools/train.py configs/segmentation/upernet_convnextv2_t_ade20k.py
"""

_base_ = [
    '../_base_/models/upernet_v2.py',
    '../_base_/datasets/ade20k_512.py',
    '../_base_/schedules/adamw_160k.py',  # learning rate 1e-4, decay 0.9 per stage
    '../_base_/runtime_seg.py',
]

model = dict(
    backbone=dict(
        arch='tiny',
        init_cfg=dict(checkpoint='convnextv2_tiny.fcmae_ft_in1k'),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
