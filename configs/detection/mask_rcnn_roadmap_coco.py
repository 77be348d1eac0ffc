"""Mask R-CNN, any step of the road from ResNet-50 to ConvNeXt-T, from random weights, COCO, 3x.

Not from a paper: arXiv 2201.03545 has the steps on ImageNet only (`tools/analyze.py --roadmap` shows them), and no
weights of them are published. The recipe of mask_rcnn_convnext_t_coco but for what training from random weights needs:
one learning rate for all layers, the drop path of ConvNeXt-T's training on ImageNet (TRAINING.md of
facebookresearch/ConvNeXt), SyncBN in the steps that have BatchNorm. Expected: not known, not run here.

    torchrun --nproc-per-node 8 tools/train.py configs/detection/mask_rcnn_roadmap_coco.py

with, for another step, `--cfg-options model.backbone.step=kernel_7`. The first steps emit more channels, which the neck
has to be told as well:

    resnet to depthwise             model.neck.in_channels=[256,512,1024,2048]
    width                           model.neck.in_channels=[384,768,1536,3072]
    inverted_bottleneck to the end  as it is
"""

_base_ = [
    '../_base_/models/mask_rcnn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw_3x.py',
    '../_base_/runtime_det.py',
]

model = dict(
    backbone=dict(type='ConvNeXtRoadmap', step='separate_downsampling', drop_path_rate=0.1, init_cfg=None),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=1.0))
sync_bn = 'torch'
