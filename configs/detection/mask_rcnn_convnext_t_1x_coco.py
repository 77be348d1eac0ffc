"""Mask R-CNN, ConvNeXt-T (ImageNet-1K), COCO, 1x.

Not from a paper, which has 3x only: the recipe of mask_rcnn_convnext_t_coco in a third of the time, for comparisons.
Expected: not known, not run here; 48 M parameters, 262 GFLOPs at 1280 x 800.

    torchrun --nproc-per-node 8 tools/train.py configs/detection/mask_rcnn_convnext_t_1x_coco.py
"""

_base_ = [
    '../_base_/models/mask_rcnn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw_1x.py',  # learning rate 1e-4, decay 0.95 per layer
    '../_base_/runtime_det.py',
]
