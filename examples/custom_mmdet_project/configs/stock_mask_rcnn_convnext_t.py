"""mmdet's own ConvNeXt config: the type of the backbone is changed, and with it what is imported.

mmdet's names mmpretrain.ConvNeXt, which needs mmpretrain; all its arguments stay as they are. This one is for COCO.

    python tools/train.py configs/stock_mask_rcnn_convnext_t.py
"""

_base_ = 'mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py'

custom_imports = dict(imports=['densekit.ops', 'backbones'], allow_failed_imports=False)
model = dict(backbone=dict(type='ConvNeXt'))
