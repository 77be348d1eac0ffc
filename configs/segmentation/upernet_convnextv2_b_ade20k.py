"""UperNet, ConvNeXt V2-B (FCMAE, fine-tuned on ImageNet-1K), ADE20K, crops of 512, 160k iterations.

Table 7 of arXiv 2301.00808, recipe of its appendix A. Learning rate, drop path and decay are V1's, which lie within
the paper's sweep; the chosen values are not published.
Expected (published, not run here): mIoU 52.1, probably multi-scale with flips, as V1-B stands there with 49.9.

    torchrun --nproc-per-node 8 tools/train.py configs/segmentation/upernet_convnextv2_b_ade20k.py
"""

_base_ = [
    '../_base_/models/upernet_v2.py',
    '../_base_/datasets/ade20k_512.py',
    '../_base_/schedules/adamw_160k.py',  # learning rate 1e-4, decay 0.9 per stage
    '../_base_/runtime_seg.py',
]
