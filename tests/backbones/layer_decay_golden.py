"""Layer-wise decay as published: which parameters share a depth, and the learning rate of each depth."""

# Depth by name, from get_num_layer_layer_wise in facebookresearch/ConvNeXt: every third block of stages.2 is a depth.
LAYER_WISE = {
    'tiny': [
        ['backbone.downsample_layers.0'],
        ['backbone.stages.0'],
        ['backbone.downsample_layers.1', 'backbone.stages.1'],
        ['backbone.downsample_layers.2', 'backbone.stages.2.0', 'backbone.stages.2.1', 'backbone.stages.2.2'],
        ['backbone.stages.2.3', 'backbone.stages.2.4', 'backbone.stages.2.5'],
        ['backbone.stages.2.6', 'backbone.stages.2.7', 'backbone.stages.2.8'],
        ['backbone.downsample_layers.3', 'backbone.stages.3'],
        ['backbone.norm0', 'backbone.norm1', 'backbone.norm2', 'backbone.norm3', 'neck', 'head'],
    ],
    'base': [
        ['backbone.downsample_layers.0'],
        ['backbone.stages.0'],
        ['backbone.downsample_layers.1', 'backbone.stages.1'],
        ['backbone.downsample_layers.2', 'backbone.stages.2.0', 'backbone.stages.2.1', 'backbone.stages.2.2'],
        ['backbone.stages.2.3', 'backbone.stages.2.4', 'backbone.stages.2.5'],
        ['backbone.stages.2.6', 'backbone.stages.2.7', 'backbone.stages.2.8'],
        ['backbone.stages.2.9', 'backbone.stages.2.10', 'backbone.stages.2.11'],
        ['backbone.stages.2.12', 'backbone.stages.2.13', 'backbone.stages.2.14'],
        ['backbone.stages.2.15', 'backbone.stages.2.16', 'backbone.stages.2.17'],
        ['backbone.stages.2.18', 'backbone.stages.2.19', 'backbone.stages.2.20'],
        ['backbone.stages.2.21', 'backbone.stages.2.22', 'backbone.stages.2.23'],
        ['backbone.stages.2.24', 'backbone.stages.2.25', 'backbone.stages.2.26'],
        ['backbone.downsample_layers.3', 'backbone.stages.3'],
        ['backbone.norm0', 'backbone.norm1', 'backbone.norm2', 'backbone.norm3', 'neck', 'head'],
    ],
}
STAGE_WISE = [
    ['backbone.downsample_layers'],
    ['backbone.stages.0'],
    ['backbone.stages.1'],
    ['backbone.stages.2'],
    ['backbone.stages.3'],
    ['backbone.norm0', 'backbone.norm1', 'backbone.norm2', 'backbone.norm3', 'neck', 'head'],
]

# The factors of the published recipes, to five decimals.
T_95 = [0.69834, 0.73509, 0.77378, 0.81451, 0.85737, 0.9025, 0.95, 1]
T_70 = [0.08235, 0.11765, 0.16807, 0.2401, 0.343, 0.49, 0.7, 1]
B_70 = [0.00969, 0.01384, 0.01977, 0.02825, 0.04035, 0.05765, *T_70]
B_80 = [0.05498, 0.06872, 0.0859, 0.10737, 0.13422, 0.16777, 0.20972, 0.26214, 0.32768, 0.4096, 0.512, 0.64, 0.8, 1]
GOLDEN = [
    ('tiny', 'layer_wise', 0.95, T_95),
    ('tiny', 'layer_wise', 0.7, T_70),
    ('base', 'layer_wise', 0.7, B_70),
    ('base', 'layer_wise', 0.8, B_80),
    ('tiny', 'stage_wise', 0.9, [0.4783, 0.53144, 0.59049, 0.6561, 0.729, 1]),
    ('base', 'stage_wise', 0.9, [0.25419, 0.28243, 0.31381, 0.34868, 0.38742, 1]),
]
