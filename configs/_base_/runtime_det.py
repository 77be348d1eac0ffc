"""What every detection run shares: scope, hooks, logging, checkpoints, backend."""

# densekit.ops does nothing where mmcv has its compiled ops.
custom_imports = dict(
    imports=[
        'densekit.ops',
        'backbones',
        'densekit.engine',
        'densekit.models',
        'densekit.data',
        'densekit.evaluation.coco',
    ],
    allow_failed_imports=False,
)
runner_type = 'DensekitRunner'
default_scope = 'mmdet'

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=3),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='DetVisualizationHook'),
    masks=dict(type='RleMasksHook'),  # masks that are only scored are not drawn
)
env_cfg = dict(
    cudnn_benchmark=False,  # multi-scale training meets hundreds of shapes
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),  # gloo on machines without CUDA
)
# The runner names it after the run, so that two runs in one process do not write into the folder of the first.
visualizer = dict(type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
log_processor = dict(type='LogProcessor', window_size=50, by_epoch=True)
log_level = 'INFO'
load_from = None
resume = False
