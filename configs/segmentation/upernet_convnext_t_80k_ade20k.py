"""UperNet, ConvNeXt-T (ImageNet-1K), ADE20K, crops of 512, 80k iterations.

Not from a paper, which has 160k only: the recipe of upernet_convnext_t_ade20k in half the time, for comparisons.
Expected: not known, not run here; 60 M parameters, 939 GFLOPs at 2048 x 512.

    torchrun --nproc-per-node 8 tools/train.py configs/segmentation/upernet_convnext_t_80k_ade20k.py
"""

_base_ = [
    '../_base_/models/upernet.py',
    '../_base_/datasets/ade20k_512.py',
    '../_base_/schedules/adamw_80k.py',  # learning rate 1e-4, decay 0.9 per stage
    '../_base_/runtime_seg.py',
]
default_hooks = dict(checkpoint=dict(interval=8000))
