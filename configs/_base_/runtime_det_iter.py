"""What a detection run shares that is counted in iterations, not in epochs."""

_base_ = './runtime_det.py'

default_hooks = dict(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False),
)
log_processor = dict(by_epoch=False)
