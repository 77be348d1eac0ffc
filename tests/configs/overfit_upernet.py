"""UperNet with a ConvNeXt-Atto, overfitted to the three ADE20K photographs of DENSEKIT_SAMPLES.

The 15 classes that occur there, 352 x 256 pixels, no augmentation, random initialization.
"""

_base_ = [
    '../../configs/_base_/models/upernet.py',
    '../../configs/_base_/datasets/ade20k_512.py',
    '../../configs/_base_/runtime_seg.py',
]

model = dict(
    data_preprocessor=dict(size=(256, 352)),
    backbone=dict(
        arch='atto',
        drop_path_rate=0.0,
        init_cfg=dict(_delete_=True, type='Kaiming', layer=['Conv2d', 'Linear'], mode='fan_in', nonlinearity='linear'),
    ),
    decode_head=dict(
        in_channels=[40, 80, 160, 320],
        channels=64,
        dropout_ratio=0.0,
        num_classes=15,
        # Signboard and streetlight cover 119 and 158 of 270,336 pixels at this size: cross entropy learns them last,
        # the Lovasz loss counts every class that is present alike.
        loss_decode=[
            dict(type='CrossEntropyLoss', loss_weight=1.0, loss_name='loss_ce'),
            dict(type='LovaszLoss', reduction='none', loss_weight=1.0, loss_name='loss_lovasz'),
        ],
    ),
    auxiliary_head=None,
    test_cfg=dict(_delete_=True, mode='whole'),
)

samples = '{{$DENSEKIT_SAMPLES:.}}/ade20k_val_sample'
photographs = dict(
    data_root=samples,
    metainfo=dict(
        classes=[
            *['wall', 'building', 'sky', 'tree', 'road', 'grass', 'sidewalk', 'earth', 'plant', 'car'],
            *['signboard', 'bus', 'streetlight', 'escalator', 'van'],
        ]
    ),
    data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale=(352, 256), keep_ratio=False),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(352, 256), keep_ratio=False),
    dict(type='LoadAnnotations'),  # after Resize: scored at the original size
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=3, num_workers=0, persistent_workers=False, dataset=dict(pipeline=train_pipeline, **photographs)
)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(pipeline=test_pipeline, **photographs))
test_dataloader = val_dataloader

max_iters = 400
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=80)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', T_max=max_iters - 30, eta_min_ratio=0.01, by_epoch=False, begin=30, end=max_iters),
]
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=0.003, betas=(0.9, 0.95), weight_decay=0.05),
    paramwise_cfg=dict(decay_rate=1.0, decay_type='stage_wise'),  # from random weights every layer learns alike
    clip_grad=dict(max_norm=5.0),
)
auto_scale_lr = dict(enable=False, base_batch_size=3)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=max_iters, max_keep_ckpts=1),
)
randomness = dict(seed=0)
