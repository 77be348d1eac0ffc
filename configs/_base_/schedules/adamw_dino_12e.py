"""12 epochs of COCO as DINO has them: AdamW, a tenth of the learning rate in the backbone, short gradients.

mmdet 3.3.0, configs/dino/dino-4scale_r50_8xb2-12e_coco (arXiv 2203.03605). There is no decay from layer to layer.
"""

max_epochs = 12
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    dict(type='MultiStepLR', begin=0, end=max_epochs, by_epoch=True, milestones=[11], gamma=0.1),
]
optim_wrapper = dict(
    type='OptimWrapper',  # float32: boxes are refined by small steps
    constructor='LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=0.0001, betas=(0.9, 0.999), weight_decay=0.0001, fused=True),
    paramwise_cfg=dict(decay_rate=1.0, custom_keys={'backbone': dict(lr_mult=0.1)}),
    clip_grad=dict(max_norm=0.1, norm_type=2),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)  # 8 GPUs x 2 images
