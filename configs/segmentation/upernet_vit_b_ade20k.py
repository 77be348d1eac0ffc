"""UperNet, DeiT-B/16 (ImageNet-1K), ADE20K, crops of 512, 160k: the recipe of upernet_convnext_iso_b_ade20k with a ViT.

Not from a paper, but mmseg's with the heads, augmentation and schedule shared: there the auxiliary head reads the last
layer, and images are tested whole. Drop path, learning rate, weight decay and neck are mmseg's; no layer decay.
Expected (published by mmseg, not run here): mIoU 45.46 single-scale, 47.16 multi-scale with flips (tools/test.py
--tta); 144 M parameters, 2005 GFLOPs at 2048 x 512.

The weights are DeiT's, renamed by mmseg's converter: under their own names mmseg would leave them out. When they are
loaded, `unexpected key ... ln1` is DeiT's last norm, which has no place here.

    python "$(python -c 'import mmseg; print(mmseg.__path__[0])')/.mim/tools/model_converters/vit2mmseg.py" \
        https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth pretrain/deit_base_mmseg.pth
    torchrun --nproc-per-node 8 tools/train.py configs/segmentation/upernet_vit_b_ade20k.py
"""

_base_ = [
    '../_base_/models/upernet_vit.py',
    '../_base_/datasets/ade20k_512.py',
    '../_base_/schedules/adamw_160k_vit.py',  # learning rate 6e-5, weight decay 0.01
    '../_base_/runtime_seg.py',
]

model = dict(
    backbone=dict(
        embed_dims=768,
        num_heads=12,
        init_cfg=dict(checkpoint='pretrain/deit_base_mmseg.pth'),
    ),
    neck=dict(in_channels=[768, 768, 768, 768], out_channels=768),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768),
)
