"""UperNet, Swin-T (ImageNet-1K), ADE20K, crops of 512, 160k: the recipe of upernet_convnext_t_ade20k with Swin.

Table 4 of arXiv 2201.03545, from SwinTransformer/Swin-Transformer-Semantic-Segmentation. Heads, augmentation and
schedule are shared; drop path, learning rate and weight decay are Swin's, and there is no layer decay.
Expected (published, not run here): mIoU 44.5 single-scale, 45.8 multi-scale with flips (tools/test.py --tta); 60 M
parameters, 945 GFLOPs at 2048 x 512.

    torchrun --nproc-per-node 8 tools/train.py configs/segmentation/upernet_swin_t_ade20k.py
"""

_base_ = [
    '../_base_/models/upernet_swin.py',
    '../_base_/datasets/ade20k_512.py',
    '../_base_/schedules/adamw_160k_swin.py',  # learning rate 6e-5, weight decay 0.01
    '../_base_/runtime_seg.py',
]
