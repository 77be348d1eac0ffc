"""COCO 2017 with boxes and masks, large-scale jitter: scaled by 0.1 to 2.0, cropped to 1024 x 1024; 4 images a GPU.

ConvNeXt V2 paper, arXiv 2301.00808, appendix A; mmdet 3.3.0, projects/ConvNeXt-V2 and configs/common/lsj-100e_coco-
instance.py. Expects data/coco/{annotations,train2017,val2017}.
"""

_base_ = './coco_instance.py'

image_size = (1024, 1024)
train_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomResize', scale=image_size, ratio_range=(0.1, 2.0), keep_ratio=True),
    dict(
        type='RandomCrop',
        crop_type='absolute',  # smaller images stay whole
        crop_size=image_size,
        recompute_bbox=True,
        allow_negative_crop=True,
    ),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(0.01, 0.01)),  # what the crop left without an area
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=train_pipeline))
