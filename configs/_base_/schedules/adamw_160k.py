"""160k iterations with AdamW and stage-wise decay, as every segmentor of the ConvNeXt paper.

Appendix A.3 of arXiv 2201.03545; facebookresearch/ConvNeXt at 048efce, semantic_segmentation/configs. The learning
rate is that of UperNet with ConvNeXt-T. No gradient clipping.
"""

max_iters = 160000
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=16000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    # warm-up over the first 1500 iterations, then linearly to zero
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, begin=1500, end=max_iters, eta_min=0.0, by_epoch=False),
]
optim_wrapper = dict(
    type='AutocastOptimWrapper',  # bf16 where the paper has fp16
    constructor='LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=0.0001, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
    paramwise_cfg=dict(decay_rate=0.9, decay_type='stage_wise'),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)  # 8 GPUs x 2 images
