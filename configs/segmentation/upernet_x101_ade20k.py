"""UperNet, ResNeXt-101-64x4d (ImageNet-1K), ADE20K, crops of 512: the recipe of upernet_convnext_t_ade20k, ResNeXt.

Not from a paper. Heads, augmentation and schedule are shared; the optimizer is that of mmseg's UperNet with ResNets
(1.2.2, configs/upernet): SGD, learning rate 0.01, weight decay 5e-4, no layer decay. Expected: not known, not run here.

    torchrun --nproc-per-node 8 tools/train.py configs/segmentation/upernet_x101_ade20k.py
"""

_base_ = [
    '../_base_/models/upernet.py',
    '../_base_/datasets/ade20k_512.py',
    '../_base_/schedules/adamw_160k.py',
    '../_base_/runtime_seg.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        type='ResNeXt',
        depth=101,
        groups=64,
        base_width=4,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        style='pytorch',
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnext101_64x4d.imagenet1k_v1'),
    ),
    decode_head=dict(in_channels=[256, 512, 1024, 2048]),
    auxiliary_head=dict(in_channels=1024),
)
optim_wrapper = dict(
    constructor='DefaultOptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='SGD', lr=0.01, momentum=0.9, weight_decay=0.0005),
    paramwise_cfg=dict(_delete_=True),
)
