"""160k iterations as Swin has them: one learning rate for all layers, no weight decay on norms and positions.

SwinTransformer/Swin-Transformer-Semantic-Segmentation, configs/swin; mmseg 1.2.2, configs/swin.
"""

_base_ = './adamw_160k.py'

optim_wrapper = dict(
    constructor='DefaultOptimWrapperConstructor',
    optimizer=dict(lr=0.00006, weight_decay=0.01),
    paramwise_cfg=dict(
        _delete_=True,
        custom_keys={
            'absolute_pos_embed': dict(decay_mult=0.0),
            'relative_position_bias_table': dict(decay_mult=0.0),
            'norm': dict(decay_mult=0.0),
        },
    ),
)
