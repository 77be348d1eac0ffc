"""Heads of mmdet and mmseg that call mmcv's ops: on a ConvNeXt they build, train a step and predict."""

import densekit.ops  # mmcv.ops can be imported after it only

# isort: split
import sysconfig
from pathlib import Path

import mmcv.ops.multi_scale_deform_attn as attention
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample

import backbones  # noqa: F401  registers ConvNeXt

SITE = Path(sysconfig.get_path('purelib'))
MMDET, MMSEG = SITE / 'mmdet/.mim/configs', SITE / 'mmseg/.mim/configs'
CHANNELS = [40, 80, 160, 320]  # of the size atto
SIZE = 96
SMALL_TRANSFORMER = {'encoder.num_layers': 1, 'decoder.num_layers': 2, 'num_queries': 30}
SMALL_PIXEL_DECODER = {
    'pixel_decoder.encoder.num_layers': 1,
    'transformer_decoder.num_layers': 2,
    'num_queries': 12,
    'in_channels': CHANNELS,
}


def head(name, options):
    return {f'{name}.{key}': value for key, value in options.items()}


# Folder and file of a released config, what is smaller here, ops that a CPU calls.
DETECTORS = {
    'DINO': (
        'dino/dino-4scale_r50_8xb2-12e_coco.py',
        {**SMALL_TRANSFORMER, 'dn_cfg.group_cfg.num_dn_queries': 4},
        set(),
    ),
    'Deformable DETR': ('deformable_detr/deformable-detr_r50_16xb2-50e_coco.py', SMALL_TRANSFORMER, set()),
    'Mask2Former': (
        'mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py',
        {
            **head('panoptic_head', SMALL_PIXEL_DECODER),
            'data_preprocessor.batch_augments': None,
            'train_cfg.num_points': 256,
        },
        set(),
    ),
    'RTMDet': ('rtmdet/rtmdet_l_8xb32-300e_coco.py', {'neck.num_csp_blocks': 1}, {'nms'}),
    'RTMDet-Ins': (
        'rtmdet/rtmdet-ins_l_8xb32-300e_coco.py',
        {'neck.num_csp_blocks': 1, 'test_cfg.score_thr': 0.0, 'test_cfg.nms_pre': 20},
        {'nms'},
    ),
    'TOOD': ('tood/tood_r50_fpn_1x_coco.py', {}, {'deform_conv_forward', 'deform_conv_backward_input'}),
    'VFNet': (
        'vfnet/vfnet_r50-mdconv-c3-c5_fpn_ms-2x_coco.py',
        {},
        {'deform_conv_forward', 'deform_conv_backward_input', 'modulated_deform_conv_backward'},
    ),
    'DyHead': ('dyhead/atss_r50_fpn_dyhead_1x_coco.py', {}, {'modulated_deform_conv_backward'}),
    'CARAFE': ('carafe/mask-rcnn_r50_fpn-carafe_1x_coco.py', {}, {'carafe_forward', 'carafe_backward'}),
    'Guided Anchoring': (
        'guided_anchoring/ga-faster-rcnn_r50_fpn_1x_coco.py',
        {},
        {'deform_conv_backward_input', 'masked_im2col_forward', 'masked_col2im_forward'},
    ),
    'PISA': ('pisa/faster-rcnn_r50_fpn_pisa_1x_coco.py', {}, {'nms_match'}),
}
SLOW = {'CARAFE', 'Guided Anchoring', 'PISA'}
CASES = [pytest.param(name, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name in DETECTORS]


@pytest.fixture
def called(monkeypatch):
    """The names of the substitutes that are called while the test runs."""
    names = set()

    def spy(name, function):
        def call(*args, **kwargs):
            names.add(name)
            return function(*args, **kwargs)

        return call

    for name, function in densekit.ops.SUBSTITUTES.items():
        monkeypatch.setattr(f'mmcv._ext.{name}', spy(name, function))
    return names


def build(path, options):
    """Build the model of a released config on a ConvNeXt of size atto, smaller as the options say."""
    cfg = Config.fromfile(path, import_custom_modules=False)
    stages = cfg.model.backbone.get('out_indices', (1, 2, 3))
    cfg.model.backbone = dict(type='ConvNeXt', arch='atto', out_indices=stages)
    if 'neck' in cfg.model:
        necks = cfg.model.neck if isinstance(cfg.model.neck, list) else [cfg.model.neck]
        necks[0].in_channels = [CHANNELS[i] for i in stages]
    cfg.model.pop('pretrained', None)
    cfg.merge_from_dict({f'model.{key}': value for key, value in options.items()})
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
        model.init_weights()
    return model


def detection_batch(with_masks=True):
    """Two pictures with two objects each."""
    meta = dict(
        img_shape=(SIZE, SIZE), ori_shape=(SIZE, SIZE), scale_factor=(1, 1), batch_input_shape=(SIZE, SIZE), flip=False
    )
    boxes = torch.tensor([[8.0, 8, 48, 40], [50, 30, 90, 90]])
    masks = np.zeros((2, SIZE, SIZE), dtype=np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    samples = []
    for _ in range(2):
        sample = DetDataSample(metainfo={**meta, 'pad_shape': (SIZE, SIZE)})
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([1, 3]))
        if with_masks:
            sample.gt_instances.masks = BitmapMasks(masks, SIZE, SIZE)
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
        sample.gt_sem_seg = PixelData(sem_seg=torch.full((1, SIZE, SIZE), 100))
        samples.append(sample)
    return dict(inputs=pictures(), data_samples=samples)


def pictures():
    g = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8, generator=g) for _ in range(2)]


def train_and_predict(model, batch):
    """Take one training step, see that it reaches all parameters it can, and predict."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-3))
    losses = model.train().train_step(batch, wrapper)
    assert losses['loss'].isfinite() and losses['loss'] > 0
    grads = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert all(grad.isfinite().all() for grad in grads.values())
    changed = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert any(name.startswith('backbone.downsample_layers.0') for name in changed)
    assert len(changed) > 0.8 * len(before)
    with torch.no_grad():  # one picture at a time, as Guided Anchoring wants it
        return model.eval().test_step({key: value[:1] for key, value in batch.items()})[0]


@pytest.mark.parametrize('name', CASES)
def test_a_detector_trains_and_predicts(name, called):
    path, options, ops = DETECTORS[name]
    MessageHub.get_current_instance().update_info('epoch', 0)  # read by TOOD, written by the runner
    prediction = train_and_predict(build(MMDET / path, options), detection_batch(with_masks=name != 'RTMDet'))
    assert 'pred_instances' in prediction or 'pred_panoptic_seg' in prediction
    assert ops <= called


@pytest.mark.parametrize(
    ('path', 'options', 'ops'),
    [
        pytest.param(
            'mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py',
            {**head('decode_head', SMALL_PIXEL_DECODER), 'decode_head.train_cfg.num_points': 256},
            set(),
            id='Mask2Former',
        ),
        pytest.param(
            'psanet/psanet_r50-d8_4xb4-80k_ade20k-512x512.py',
            {
                'decode_head.in_channels': CHANNELS[3],
                'decode_head.mask_size': (3, 3),
                'auxiliary_head.in_channels': CHANNELS[2],
                'auxiliary_head.in_index': 2,
            },
            {'psamask_forward', 'psamask_backward'},
            id='PSANet',
        ),
        pytest.param(
            'ccnet/ccnet_r50-d8_4xb4-80k_ade20k-512x512.py',
            {'decode_head.in_channels': CHANNELS[3], 'auxiliary_head.in_channels': CHANNELS[2]},
            set(),
            id='CCNet',
        ),
    ],
)
def test_a_segmentor_trains_and_predicts(path, options, ops, called):
    model = build(MMSEG / path, {**options, 'data_preprocessor.size': (SIZE, SIZE)})
    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo=dict(img_shape=(SIZE, SIZE), ori_shape=(SIZE, SIZE), pad_shape=(SIZE, SIZE)))
        sample.gt_sem_seg = PixelData(data=(torch.arange(SIZE * SIZE).view(1, SIZE, SIZE) // 2000))
        samples.append(sample)
    prediction = train_and_predict(model, dict(inputs=pictures(), data_samples=samples))
    assert prediction.pred_sem_seg.data.shape == (1, SIZE, SIZE)
    assert ops <= called


def test_dino_takes_the_same_step_on_the_path_of_cuda(monkeypatch, called):
    # mmcv's attention layer calls the op on CUDA only; here it is made to call it on the CPU.
    def on_cuda(value, shapes, locations, weights):
        starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
        return attention.MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)

    path, options, _ = DETECTORS['DINO']
    results = []
    for use_op in (False, True):
        if use_op:
            monkeypatch.setattr(attention, 'multi_scale_deformable_attn_pytorch', on_cuda)
        model = build(MMDET / path, options)
        batch = model.data_preprocessor(detection_batch(), True)
        torch.manual_seed(1)  # the noise of the denoising queries
        losses = model.train().loss(batch['inputs'], batch['data_samples'])
        loss, _ = model.parse_losses(losses)
        loss.backward()
        grads = {name: value.grad for name, value in model.named_parameters()}
        results.append((losses, grads))
        assert ('ms_deform_attn_backward' in called) == use_op

    (losses, grads), (op_losses, op_grads) = results
    for name, value in losses.items():
        torch.testing.assert_close(op_losses[name], value, rtol=1e-5, atol=1e-5)
    # Sums of many terms in another order, relative to the largest of each parameter.
    for name, value in grads.items():
        torch.testing.assert_close(op_grads[name], value, rtol=0, atol=1e-4 * max(1.0, float(value.abs().max())))
    assert any('sampling_offsets' in name and value.any() for name, value in op_grads.items())
