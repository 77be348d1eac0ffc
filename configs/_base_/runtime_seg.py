"""What every segmentation run shares: scope, hooks, logging, checkpoints, backend."""

# densekit.ops does nothing where mmcv has its compiled ops.
custom_imports = dict(
    imports=[
        'densekit.ops',
        'backbones',
        'densekit.engine',
        'densekit.models.label_maps',
        'densekit.models.slide',
        'densekit.models.uper_head',
        'densekit.data',
        'densekit.evaluation',
    ],
    allow_failed_imports=False,
)
runner_type = 'DensekitRunner'
default_scope = 'mmseg'

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=16000, max_keep_ckpts=3),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
    label_maps=dict(type='LabelMapsHook'),  # logits that nothing looks at are not kept
)
env_cfg = dict(
    cudnn_benchmark=True,  # every crop has the same size
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),  # gloo on machines without CUDA
)
# The runner names it after the run, so that two runs in one process do not write into the folder of the first.
visualizer = dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
log_processor = dict(by_epoch=False)
log_level = 'INFO'
load_from = None
resume = False
