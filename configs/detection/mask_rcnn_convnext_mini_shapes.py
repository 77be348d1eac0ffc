"""Mask R-CNN with a ConvNeXt of 1.1 M parameters on the generated shapes: the demo, minutes on two CPU cores.

Not from a paper. Expected: box AP 65.5, mask AP 62.5 (measured, benchmarks/demo.md).

    python tools/train.py configs/detection/mask_rcnn_convnext_mini_shapes.py
"""

_base_ = [
    '../_base_/models/mask_rcnn.py',
    '../_base_/datasets/shapes_instance.py',
    '../_base_/runtime_det.py',
]

num_classes = 5
model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(
        arch=dict(_delete_=True, depths=(2, 2, 4, 2), channels=(24, 48, 96, 192)),
        drop_path_rate=0.0,
        # Fan-in initialization: branches this narrow start asleep at the papers' standard deviation of 0.02.
        init_cfg=dict(_delete_=True, type='Kaiming', layer=['Conv2d', 'Linear'], mode='fan_in', nonlinearity='linear'),
    ),
    neck=dict(in_channels=[24, 48, 96, 192], out_channels=64, num_outs=4),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        # 4 x stride: anchors of 16, 32, 64 and 128 pixels
        anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, finest_scale=14),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=num_classes),
        mask_roi_extractor=dict(out_channels=64, finest_scale=14),
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64, num_classes=num_classes),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=64),
        rcnn=dict(sampler=dict(num=32)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=64), rcnn=dict(max_per_img=30)),
)

max_iters = 500
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=125)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', T_max=max_iters - 50, eta_min_ratio=0.01, by_epoch=False, begin=50, end=max_iters),
]
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=0.003, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
    paramwise_cfg=dict(decay_rate=1.0, decay_type='layer_wise'),  # from random weights every layer learns alike
    clip_grad=dict(max_norm=5.0),
)
auto_scale_lr = dict(enable=False, base_batch_size=8)
default_hooks = dict(
    logger=dict(interval=10, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=125, max_keep_ckpts=2),
)
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
