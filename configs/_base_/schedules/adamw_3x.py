"""36 epochs of COCO (3x) with AdamW and layer-wise decay, as every detector of the ConvNeXt paper.

Appendix A.3 of arXiv 2201.03545; facebookresearch/ConvNeXt at 048efce, object_detection/configs. Learning rate and
decay rate are those of Mask R-CNN with ConvNeXt-T. No gradient clipping.
"""

max_epochs = 36
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    # warm-up over the first 1000 iterations, from a thousandth
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    # a tenth after 27 and after 33 of the 36 epochs
    dict(type='MultiStepLR', begin=0, end=max_epochs, by_epoch=True, milestones=[27, 33], gamma=0.1),
]
optim_wrapper = dict(
    type='AutocastOptimWrapper',  # bf16 where the paper has fp16
    constructor='LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=0.0001, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
    paramwise_cfg=dict(decay_rate=0.95, decay_type='layer_wise'),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)  # 8 GPUs x 2 images
