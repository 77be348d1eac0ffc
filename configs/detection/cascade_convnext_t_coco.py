"""Cascade Mask R-CNN, ConvNeXt-T (ImageNet-1K), COCO, 3x.

Table 3 of arXiv 2201.03545; facebookresearch/ConvNeXt at 048efce, cascade_mask_rcnn_convnext_tiny_*_3x.
Expected (published, not run here): box AP 50.4, mask AP 43.7; 86 M parameters, 741 GFLOPs at 1280 x 800.

    torchrun --nproc-per-node 8 tools/train.py configs/detection/cascade_convnext_t_coco.py
"""

_base_ = [
    '../_base_/models/cascade_mask_rcnn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw_3x.py',
    '../_base_/runtime_det.py',
]

optim_wrapper = dict(optimizer=dict(lr=0.0002), paramwise_cfg=dict(decay_rate=0.7))
