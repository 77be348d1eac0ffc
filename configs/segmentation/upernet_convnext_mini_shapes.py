"""UperNet with a small ConvNeXt on the generated shapes: the demo, minutes on two CPU cores.

Not from a paper. Expected: mIoU 93.8 (measured, benchmarks/demo.md).

    python tools/train.py configs/segmentation/upernet_convnext_mini_shapes.py
"""

_base_ = [
    '../_base_/models/upernet.py',
    '../_base_/datasets/shapes_semantic.py',
    '../_base_/runtime_seg.py',
]

num_classes = 6  # background and five shapes
crop_size = (96, 96)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        arch=dict(_delete_=True, depths=(2, 2, 4, 2), channels=(24, 48, 96, 192)),
        drop_path_rate=0.0,
        # Fan-in initialization: branches this narrow start asleep at the papers' standard deviation of 0.02.
        init_cfg=dict(_delete_=True, type='Kaiming', layer=['Conv2d', 'Linear'], mode='fan_in', nonlinearity='linear'),
    ),
    decode_head=dict(
        type='LeanUPerHead',
        channels_last=True,  # faster on a CPU, with so few channels
        in_channels=[24, 48, 96, 192],
        channels=64,
        dropout_ratio=0.0,
        num_classes=num_classes,
    ),
    auxiliary_head=dict(in_channels=96, channels=64, dropout_ratio=0.0, num_classes=num_classes),
    test_cfg=dict(_delete_=True, mode='whole'),
)

max_iters = 400
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=100)
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
    paramwise_cfg=dict(decay_rate=1.0, decay_type='stage_wise'),  # from random weights every layer learns alike
    clip_grad=dict(max_norm=5.0),
)
auto_scale_lr = dict(enable=False, base_batch_size=8)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=100, max_keep_ckpts=2),
)
randomness = dict(seed=0)
