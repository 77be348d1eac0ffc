"""Configs of mmdet and mmseg as they are released: ours must take them, and must not find mistakes where none are."""

import sysconfig
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData

from backbones import ConvNeXt
from densekit.engine.config import load_config
from densekit.engine.config_check import check_types

SITE = Path(sysconfig.get_path('purelib'))
MMDET, MMSEG = SITE / 'mmdet/.mim/configs', SITE / 'mmseg/.mim/configs'
STOCK_DET = MMDET / 'convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py'
STOCK_CASCADE = MMDET / 'convnext/cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py'
STOCK_SEG = MMSEG / 'convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py'

# As unlike one another as the two projects have them. Their own custom_imports (mmpretrain) are not needed to be read.
DIVERSE = [
    *sorted((MMDET / 'convnext').glob('*.py')),
    *sorted((MMSEG / 'convnext').glob('*.py')),
    MMDET / 'dino/dino-4scale_r50_8xb2-12e_coco.py',
    MMDET / 'detr/detr_r50_8xb2-150e_coco.py',
    MMDET / 'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    MMDET / 'mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py',
    MMDET / 'mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py',
    MMDET / 'rtmdet/rtmdet_s_8xb32-300e_coco.py',
    MMDET / 'rtmdet/rtmdet-ins_s_8xb32-300e_coco.py',
    MMDET / 'cascade_rcnn/cascade-mask-rcnn_x101-32x4d_fpn_1x_coco.py',
    MMDET / 'swin/mask-rcnn_swin-t-p4-w7_fpn_amp-ms-crop-3x_coco.py',
    MMDET / 'htc/htc_r50_fpn_1x_coco.py',
    MMDET / 'panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py',
    MMDET / 'guided_anchoring/ga-faster-rcnn_r50_fpn_1x_coco.py',
    MMDET / 'vfnet/vfnet_r50-mdconv-c3-c5_fpn_ms-2x_coco.py',
    MMDET / 'dcn/mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py',
    MMDET / 'yolox/yolox_s_8xb8-300e_coco.py',
    MMDET / 'yolo/yolov3_d53_8xb8-ms-608-273e_coco.py',
    MMDET / 'ssd/ssd300_coco.py',
    MMDET / 'retinanet/retinanet_r50_fpn_1x_coco.py',
    MMDET / 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    MMDET / 'dyhead/atss_swin-l-p4-w12_fpn_dyhead_ms-2x_coco.py',
    MMDET / 'lvis/mask-rcnn_r50_fpn_sample1e-3_ms-1x_lvis-v1.py',
    MMDET / 'simple_copy_paste/mask-rcnn_r50_fpn_rpn-2conv_4conv1fc_syncbn-all_32xb2-ssj-scp-90k_coco.py',
    MMDET / 'soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py',
    MMSEG / 'swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    MMSEG / 'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
    MMSEG / 'deeplabv3plus/deeplabv3plus_r50-d8_4xb4-160k_ade20k-512x512.py',
    MMSEG / 'mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512.py',
    MMSEG / 'maskformer/maskformer_r50-d32_8xb2-160k_ade20k-512x512.py',
    MMSEG / 'pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py',
    MMSEG / 'point_rend/pointrend_r50_4xb4-160k_ade20k-512x512.py',
    MMSEG / 'bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py',
]


@pytest.mark.parametrize('path', DIVERSE, ids=[f'{path.parent.name}/{path.stem}' for path in DIVERSE])
def test_no_false_alarm(path):
    check_types(Config.fromfile(path, import_custom_modules=False))


@pytest.mark.parametrize(
    ('path', 'said'),
    [
        (MMDET / 'pascal_voc/faster-rcnn_r50_fpn_1x_voc0712-cocofmt.py', r'val_evaluator\.eval_mode: CocoMetric takes'),
        (MMDET / 'v3det/fcos_swinb_fpn_8x4_sample1e-3_mstrain_v3det_2x.py', r'neck\.force_grad_on_level: FPN takes'),
    ],
)
def test_released_configs_that_cannot_be_built_are_found(path, said):
    with pytest.raises(ValueError, match=said):
        check_types(Config.fromfile(path, import_custom_modules=False))


def ours(path: Path, folder: Path) -> Config:
    """A released config, changed in the type of its backbone and in custom_imports alone."""
    changed = folder / path.name
    changed.write_text(
        f"_base_ = '{path}'\n"
        "custom_imports = dict(imports=['densekit.ops', 'backbones'])\n"
        "model = dict(backbone=dict(type='ConvNeXt'))\n"
    )
    original = Config.fromfile(path, import_custom_modules=False)
    cfg = load_config(str(changed))
    assert original.model.backbone.pop('type') == 'mmpretrain.ConvNeXt'
    assert {**original.model.backbone, 'type': 'ConvNeXt'} == cfg.model.backbone
    # Without a network the weights of the backbone cannot be fetched; nothing else is changed.
    cfg.model.backbone.init_cfg = None
    return cfg


def test_a_stock_mask_rcnn_takes_a_training_step(tmp_path):
    cfg = ours(STOCK_DET, tmp_path)
    # mmengine's AmpOptimWrapper refuses to run without a GPU.
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    cfg.optim_wrapper.type = 'OptimWrapper'
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper)  # mmdet's constructor: our names are those it knows
    assert type(model.backbone) is ConvNeXt
    scales = {group['lr'] / 1e-4 for group in wrapper.optimizer.param_groups}
    assert min(scales) == pytest.approx(0.95**7)
    assert len(scales) > 5

    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    sample = DetDataSample(
        metainfo=dict(
            img_shape=(64, 64), ori_shape=(64, 64), scale_factor=(1, 1), batch_input_shape=(64, 64), pad_shape=(64, 64)
        )
    )
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[:, 8:40, 8:40] = 1
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[8.0, 8.0, 40.0, 40.0]]),
        labels=torch.tensor([1]),
        masks=BitmapMasks(masks.numpy(), 64, 64),
    )
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    losses = model.train().train_step(
        dict(inputs=[torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)], data_samples=[sample]), wrapper
    )
    assert losses['loss'].isfinite()
    assert losses['loss_mask'] > 0
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    for part in (
        'backbone.downsample_layers.0',
        'backbone.stages.3',
        'backbone.norm0',
        'neck',
        'rpn_head',
        'roi_head.mask_head',
    ):
        assert any(name.startswith(part) for name in changed), part


@pytest.mark.parametrize('path', [STOCK_CASCADE, STOCK_SEG], ids=['cascade', 'upernet'])
def test_other_stock_configs_build(tmp_path, path):
    cfg = ours(path, tmp_path)
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert type(model.backbone) is ConvNeXt
    # The published classifier has 28,589,128: without its head and its last norm, with a norm for each stage.
    expected = 28_589_128 - (768 * 1000 + 1000) - 2 * 768 + 2 * (96 + 192 + 384 + 768)
    assert sum(value.numel() for value in model.backbone.parameters()) == expected
