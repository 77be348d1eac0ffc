"""RTMDet-L, ConvNeXt-B (ImageNet-22K, fine-tuned on -1K at 384 pixels), COCO at 640 x 640, 100 epochs.

Not from a paper: mmdet 3.3.0, configs/rtmdet/rtmdet_l_convnext_b_4xb32-100e_coco. Expected (published by mmdet, not run
here): box AP 53.1.

    torchrun --nproc-per-node 4 tools/train.py configs/detection/rtmdet_l_convnext_b_coco.py
"""

_base_ = [
    '../_base_/models/rtmdet_l.py',
    '../_base_/datasets/coco_boxes_640.py',
    '../_base_/schedules/adamw_rtmdet_100e.py',  # learning rate 1e-3, decay 0.8 per layer
    '../_base_/runtime_det.py',
]
default_hooks = dict(checkpoint=dict(interval=10))
