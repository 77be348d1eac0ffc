"""FCN of mmseg on ConvNeXt-T in the place of a dilated ResNet-50, on this project's data set.

python tools/train.py configs/fcn_convnext_t_shapes.py
"""

_base_ = 'mmseg::fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py'

# densekit.ops first: it stands in for the compiled operators that mmcv-lite lacks. With a compiled mmcv leave it out.
custom_imports = dict(imports=['densekit.ops', 'backbones', 'shapes_project'], allow_failed_imports=False)

norm_cfg = dict(type='BN', requires_grad=True)  # mmseg has SyncBN, which needs a GPU
model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='ConvNeXt',
        arch='tiny',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.2,
        layer_scale_init_value=1.0,
        init_cfg=dict(type='Pretrained', checkpoint='convnext_tiny.fb_in1k'),
    ),
    decode_head=dict(in_channels=768, num_classes=6, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=384, num_classes=6, norm_cfg=norm_cfg),
)

data_root = 'data/shapes/ade'  # laid out as ADE20K is, whose folders the base names
train_dataloader = dict(dataset=dict(type='ShapesDataset', data_root=data_root))
val_dataloader = dict(dataset=dict(type='ShapesDataset', data_root=data_root))
test_dataloader = val_dataloader

# The constructor is of `backbones`: the learning rate falls from the head down to the first stage.
optim_wrapper = dict(
    constructor='LayerDecayOptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW', lr=0.0001, weight_decay=0.05),
    paramwise_cfg=dict(decay_rate=0.9, decay_type='stage_wise'),
)
