"""UperNet, ConvNeXt V2-H (FCMAE, fine-tuned on ImageNet-1K), ADE20K, crops of 512, 160k iterations.

Table 7 of arXiv 2301.00808, recipe of its appendix A. Learning rate, drop path and decay are V1's, which lie within
the paper's sweep; the chosen values are not published.
Expected (published, not run here): mIoU 55.0, probably multi-scale with flips, as V1-B stands there with 49.9; 707 M
parameters, 3272 GFLOPs at 2048 x 512.

    torchrun --nproc-per-node 8 tools/train.py configs/segmentation/upernet_convnextv2_h_ade20k.py
"""

_base_ = [
    '../_base_/models/upernet_v2.py',
    '../_base_/datasets/ade20k_512.py',
    '../_base_/schedules/adamw_160k.py',  # learning rate 1e-4, decay 0.9 per stage
    '../_base_/runtime_seg.py',
]

model = dict(
    backbone=dict(
        arch='huge',
        init_cfg=dict(checkpoint='convnextv2_huge.fcmae_ft_in1k'),
    ),
    decode_head=dict(in_channels=[352, 704, 1408, 2816]),
    auxiliary_head=dict(in_channels=1408),
)
optim_wrapper = dict(type='OptimWrapper')  # float32, as V1 of this size
