"""Mask R-CNN, ConvNeXt-T (ImageNet-1K), for a few hundred images in COCO's format, on one GPU.

Not from a paper: what guards against learning few images by heart are frozen stem and first two stages, a strong layer
decay and little drop path in the rest, a small learning rate and a short schedule. Expected: not known, not run here.
Better still, begin with a trained detector: --load-from, with the file of mask_rcnn_convnext_t_coco.

    python tools/train.py configs/detection/mask_rcnn_convnext_t_quick_coco.py
"""

_base_ = [
    '../_base_/models/mask_rcnn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/runtime_det_iter.py',
]

model = dict(backbone=dict(frozen_stages=2, drop_path_rate=0.2))
train_dataloader = dict(batch_size=4, sampler=dict(type='InfiniteSampler'))

max_iters = 3000  # 40 epochs of 300 images
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=500)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = [
    # warm-up over the first 200 iterations, then linearly to zero
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=200),
    dict(type='PolyLR', power=1.0, begin=200, end=max_iters, eta_min=0.0, by_epoch=False),
]
optim_wrapper = dict(
    type='AutocastOptimWrapper',
    constructor='LayerDecayOptimWrapperConstructor',
    # half of mask_rcnn_convnext_t_coco's for a quarter of its batch
    optimizer=dict(type='AdamW', lr=0.00005, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
    paramwise_cfg=dict(decay_rate=0.8, decay_type='layer_wise'),
)
auto_scale_lr = dict(enable=False, base_batch_size=4)
default_hooks = dict(checkpoint=dict(interval=500))
