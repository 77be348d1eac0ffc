"""12 epochs of COCO (1x), otherwise as 3x."""

_base_ = './adamw_3x.py'

max_epochs = 12
train_cfg = dict(max_epochs=max_epochs)

param_scheduler = [
    # warm-up over the first 1000 iterations, from a thousandth
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    # a tenth after 8 and after 11 of the 12 epochs
    dict(type='MultiStepLR', begin=0, end=max_epochs, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
