"""Mask2Former, panoptic, ConvNeXt-T (ImageNet-1K), COCO, 50 epochs.

Not from a paper: mmdet's recipe with ResNet-50 and Swin-T and another backbone. Expected: not known, not run here.
Its data need panopticapi: pip install git+https://github.com/cocodataset/panopticapi.git

    torchrun --nproc-per-node 8 tools/train.py configs/detection/mask2former_panoptic_convnext_t_coco.py
"""

_base_ = [
    '../_base_/models/mask2former.py',
    '../_base_/datasets/coco_panoptic_lsj.py',
    '../_base_/schedules/adamw_mask2former_50e.py',  # learning rate 1e-4, 1e-5 in the backbone
    '../_base_/runtime_det_iter.py',
]
default_hooks = dict(checkpoint=dict(interval=7375))  # every epoch
