"""Mask2Former for instance segmentation on ConvNeXt-T, 80 classes.

mmdet 3.3.0, configs/mask2former/mask2former_r50_8xb2-lsj-50e_coco: the panoptic model without stuff.
"""

_base_ = './mask2former.py'

num_classes = 80

model = dict(
    data_preprocessor=dict(
        pad_seg=False,
        batch_augments=[
            dict(
                type='BatchFixedSizePad',
                size=(1024, 1024),
                img_pad_value=0,
                pad_mask=True,
                mask_pad_value=0,
                pad_seg=False,
            ),
        ],
    ),
    panoptic_head=dict(
        num_things_classes=num_classes,
        num_stuff_classes=0,
        loss_cls=dict(class_weight=[1.0] * num_classes + [0.1]),  # the last is "nothing"
    ),
    panoptic_fusion_head=dict(num_things_classes=num_classes, num_stuff_classes=0),
    test_cfg=dict(panoptic_on=False),
)
