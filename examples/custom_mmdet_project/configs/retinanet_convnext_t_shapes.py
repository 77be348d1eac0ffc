"""RetinaNet of mmdet with ConvNeXt-T in the place of ResNet-50, on this project's data set.

python tools/train.py configs/retinanet_convnext_t_shapes.py
"""

_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

# densekit.ops first: it stands in for the compiled operators that mmcv-lite lacks. With a compiled mmcv leave it out.
custom_imports = dict(imports=['densekit.ops', 'backbones', 'shapes_project'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='ConvNeXt',
        arch='tiny',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.2,
        layer_scale_init_value=1.0,
        init_cfg=dict(type='Pretrained', checkpoint='convnext_tiny.fb_in1k'),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
    bbox_head=dict(num_classes=5),
)

data_root = 'data/shapes/coco/'
train_dataloader = dict(
    dataset=dict(
        type='ShapesDataset',
        data_root=data_root,
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
    )
)
val_dataloader = dict(
    dataset=dict(
        type='ShapesDataset',
        data_root=data_root,
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img='val/'),
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator

# The constructor is of `backbones`: the learning rate falls from the head down to the first layer.
optim_wrapper = dict(
    constructor='LayerDecayOptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW', lr=0.0001, weight_decay=0.05),
    paramwise_cfg=dict(decay_rate=0.95, decay_type='layer_wise'),
)
