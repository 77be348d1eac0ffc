"""160k iterations as Mask2Former has them: a tenth of the learning rate in the backbone, short gradients, no warm-up.

mmseg 1.2.2, configs/mask2former/mask2former_r50_8xb2-160k_ade20k-512x512 (arXiv 2112.01527). There is no decay from
layer to layer; the queries are not decayed.
"""

max_iters = 160000
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=16000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    dict(type='PolyLR', power=0.9, begin=0, end=max_iters, eta_min=0.0, by_epoch=False),
]
optim_wrapper = dict(
    type='OptimWrapper',  # float32, as in mmseg
    constructor='LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=0.0001, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
    paramwise_cfg=dict(
        decay_rate=1.0,
        custom_keys={
            'backbone': dict(lr_mult=0.1),
            'query_embed': dict(decay_mult=0.0),
            'query_feat': dict(decay_mult=0.0),
            'level_embed': dict(decay_mult=0.0),
        },
    ),
    clip_grad=dict(max_norm=0.01, norm_type=2),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)  # 8 GPUs x 2 images
