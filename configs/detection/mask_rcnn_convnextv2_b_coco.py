"""Mask R-CNN, ConvNeXt V2-B (FCMAE, fine-tuned on ImageNet-1K), COCO, 3x.

Table 6 of arXiv 2301.00808, recipe of its appendix A. The paper gives ranges for drop path and layer decay; the values
are those of mmdet 3.3.0, projects/ConvNeXt-V2.
Expected (published, not run here): box AP 52.9, mask AP 46.6 (the same with mmdet: 52.9, 46.4).

    torchrun --nproc-per-node 8 tools/train.py configs/detection/mask_rcnn_convnextv2_b_coco.py
"""

_base_ = [
    '../_base_/models/mask_rcnn_v2.py',
    '../_base_/datasets/coco_instance_lsj.py',
    '../_base_/schedules/adamw_3x_batch32.py',  # learning rate 1e-4, decay 0.95 per layer
    '../_base_/runtime_det.py',
]
