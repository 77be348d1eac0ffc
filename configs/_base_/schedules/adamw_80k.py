"""80k iterations, otherwise as 160k."""

_base_ = './adamw_160k.py'

max_iters = 80000
train_cfg = dict(max_iters=max_iters, val_interval=8000)

param_scheduler = [
    # warm-up over the first 1500 iterations, then linearly to zero
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, begin=1500, end=max_iters, eta_min=0.0, by_epoch=False),
]
