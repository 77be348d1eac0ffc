"""Mask R-CNN, ConvNeXt-T (ImageNet-1K), COCO, 3x.

Table 3 of arXiv 2201.03545; facebookresearch/ConvNeXt at 048efce, mask_rcnn_convnext_tiny_*_3x.
Expected (published, not run here): box AP 46.2, mask AP 41.7; 48 M parameters, 262 GFLOPs at 1280 x 800.

    torchrun --nproc-per-node 8 tools/train.py configs/detection/mask_rcnn_convnext_t_coco.py
"""

_base_ = [
    '../_base_/models/mask_rcnn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw_3x.py',  # learning rate 1e-4, decay 0.95 per layer
    '../_base_/runtime_det.py',
]
