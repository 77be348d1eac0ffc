"""DINO with four scales, ConvNeXt-T (ImageNet-1K), COCO, 12 epochs.

Not from a paper: mmdet's recipe with ResNet-50 (box AP 49.0 there) and another backbone. Expected: not known, not run
here.

    torchrun --nproc-per-node 8 tools/train.py configs/detection/dino_convnext_t_12e_coco.py
"""

_base_ = [
    '../_base_/models/dino.py',
    '../_base_/datasets/coco_boxes_dino.py',
    '../_base_/schedules/adamw_dino_12e.py',  # learning rate 1e-4, 1e-5 in the backbone
    '../_base_/runtime_det.py',
]
