"""36 epochs of COCO (3x) as Swin has them: one learning rate for all layers, no weight decay on norms and positions.

SwinTransformer/Swin-Transformer-Object-Detection, configs/swin; mmdet 3.3.0, configs/swin. Learning rate 1e-4.
"""

_base_ = './adamw_3x.py'

optim_wrapper = dict(
    constructor='DefaultOptimWrapperConstructor',
    paramwise_cfg=dict(
        _delete_=True,
        custom_keys={
            'absolute_pos_embed': dict(decay_mult=0.0),
            'relative_position_bias_table': dict(decay_mult=0.0),
            'norm': dict(decay_mult=0.0),
        },
    ),
)
