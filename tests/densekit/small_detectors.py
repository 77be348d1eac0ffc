"""The recipes of two-stage detectors with narrow layers and few boxes."""

from pathlib import Path

from densekit.engine.config import load_config

CONFIGS = Path(__file__).parents[2] / 'configs/detection'
RECIPES = {'mask_rcnn': 'mask_rcnn_convnext_t_coco.py', 'cascade': 'cascade_convnext_t_coco.py'}


def small(recipe, *, found=0.05):
    """A recipe with narrow layers."""
    cfg = load_config(str(CONFIGS / RECIPES[recipe]), [])
    model = cfg.model
    model.backbone.update(arch=dict(depths=(1, 1, 1, 1), channels=(8, 16, 24, 32)), drop_path_rate=0.0, init_cfg=None)
    model.neck.update(in_channels=[8, 16, 24, 32], out_channels=16)
    model.rpn_head.update(in_channels=16, feat_channels=16)
    heads = model.roi_head
    for part in (heads.bbox_roi_extractor, heads.mask_roi_extractor):
        part.out_channels = 16
    heads.mask_head.update(num_convs=1, in_channels=16, conv_out_channels=16)
    for head in heads.bbox_head if isinstance(heads.bbox_head, list) else [heads.bbox_head]:
        head.update(in_channels=16, fc_out_channels=32)
        if 'conv_out_channels' in head:
            head.conv_out_channels = 16
    model.train_cfg.rpn_proposal.max_per_img = model.test_cfg.rpn.max_per_img = 100
    model.test_cfg.rcnn.update(score_thr=found, max_per_img=20)
    return cfg
