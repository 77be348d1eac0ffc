"""160k iterations as mmseg's ViTs have them: one learning rate for all layers, no weight decay on the position table.

mmseg 1.2.2, configs/vit. Their exception for norms is left out: it reads `norm`, and the ViT calls them ln1 and ln2.
"""

_base_ = './adamw_160k.py'

optim_wrapper = dict(
    constructor='DefaultOptimWrapperConstructor',
    optimizer=dict(lr=0.00006, weight_decay=0.01),
    paramwise_cfg=dict(
        _delete_=True,
        custom_keys={
            'pos_embed': dict(decay_mult=0.0),
            'cls_token': dict(decay_mult=0.0),
        },
    ),
)
