"""UperNet, ConvNeXt-L (ImageNet-22K), ADE20K, crops of 640, 160k iterations.

Table 4 of arXiv 2201.03545; facebookresearch/ConvNeXt at 048efce, upernet_convnext_large_640_160k_ade20k_*.
Expected (published, not run here): mIoU 53.2 single-scale, 53.7 multi-scale with flips (tools/test.py --tta); 235 M
parameters, 2458 GFLOPs at 2560 x 640.

    torchrun --nproc-per-node 8 tools/train.py configs/segmentation/upernet_convnext_l_in22k_640_ade20k.py
"""

_base_ = [
    '../_base_/models/upernet.py',
    '../_base_/datasets/ade20k_640.py',
    '../_base_/schedules/adamw_160k.py',  # learning rate 1e-4, decay 0.9 per stage
    '../_base_/runtime_seg.py',
]

model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(
        arch='large',
        init_cfg=dict(checkpoint='https://dl.fbaipublicfiles.com/convnext/convnext_large_22k_224.pth'),
    ),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
    test_cfg=dict(crop_size=(640, 640), stride=(426, 426)),  # windows overlap by a third
)
optim_wrapper = dict(
    type='OptimWrapper',  # float32, as the paper has it for this size
)
