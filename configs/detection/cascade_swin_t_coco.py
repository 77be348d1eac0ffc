"""Cascade Mask R-CNN, Swin-T (ImageNet-1K), COCO, 3x: the recipe of cascade_convnext_t_coco with Swin.

Table 3 of arXiv 2201.03545, from SwinTransformer/Swin-Transformer-Object-Detection. Heads, augmentation and
schedule are shared; drop path, learning rate and weight decay are Swin's, and there is no layer decay.
Expected (published, not run here): box AP 50.4, mask AP 43.7; 86 M parameters, 745 GFLOPs at 1280 x 800.

    torchrun --nproc-per-node 8 tools/train.py configs/detection/cascade_swin_t_coco.py
"""

_base_ = [
    '../_base_/models/cascade_mask_rcnn_swin.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw_3x_swin.py',  # learning rate 1e-4
    '../_base_/runtime_det.py',
]
