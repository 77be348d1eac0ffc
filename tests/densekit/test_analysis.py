"""Counts on the meta device are those of a real run; what cannot be counted says so."""

from pathlib import Path

import densekit.ops  # noqa: F401  before mmdet

# isort: split
import mmdet
import mmseg
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import BaseDataElement, InstanceData
from torch.utils.flop_counter import FlopCounterMode

from densekit.cli import UserError
from densekit.engine.config import load_config
from densekit.report.analysis import analysis_table, analyze, count, image_size
from densekit.report.complexity import count_multiply_adds
from densekit.report.meta import build_on_meta

CONFIGS = Path(__file__).parents[2] / 'configs'
MINI = str(CONFIGS / 'detection/mask_rcnn_convnext_mini_shapes.py')
SIZE = (64, 96)
RESNET_18 = dict(type='ResNet', depth=18, num_stages=4, init_cfg=None)


def stock(package, path, **model):
    cfg = Config.fromfile(Path(package.__file__).parent / '.mim/configs' / path)
    cfg.merge_from_dict({'model': model})
    return cfg


def dino():
    cfg = stock(
        mmdet,
        'dino/dino-4scale_r50_8xb2-12e_coco.py',
        num_queries=20,
        encoder=dict(num_layers=2),
        decoder=dict(num_layers=2),
    )
    cfg.model.backbone = dict(**RESNET_18, out_indices=(1, 2, 3))
    cfg.model.neck.in_channels = [128, 256, 512]
    return cfg


def mask2former(package, path, head):
    cfg = stock(package, path)
    cfg.model.backbone = dict(**RESNET_18, out_indices=(0, 1, 2, 3))
    cfg.model[head].in_channels = [64, 128, 256, 512]
    cfg.model[head].pixel_decoder.encoder.num_layers = 1
    return cfg


def real_run(cfg):
    """Multiply-adds by PyTorch's own counter, of the model on the CPU with values."""
    samples = [
        BaseDataElement(metainfo=dict(img_shape=SIZE, ori_shape=SIZE, batch_input_shape=SIZE, scale_factor=(1.0, 1.0)))
    ]
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        features = model.extract_feat(torch.rand(1, 3, *SIZE))
        if hasattr(model, 'roi_head'):
            model.rpn_head(features)
            corners = torch.rand(1000, 2) * 40
            proposals = InstanceData(bboxes=torch.cat([corners, corners + 20], dim=1))
            model.roi_head(features, [proposals], samples)  # mmdet's own, which takes 100 of them for the masks
        elif hasattr(model, 'encoder'):
            model.bbox_head(**model.forward_transformer(features, samples))
        else:
            (model.panoptic_head if hasattr(model, 'panoptic_head') else model.decode_head)(features, samples)
    return counter.get_total_flops() // 2


MODELS_OF_EACH_KIND = {
    'proposals': lambda: load_config(MINI),
    'dino': dino,
    'mask2former': lambda: mask2former(mmdet, 'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py', 'panoptic_head'),
    'mask2former mmseg': lambda: mask2former(
        mmseg, 'mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py', 'decode_head'
    ),
}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', MODELS_OF_EACH_KIND)
def test_counts_are_those_of_a_real_run(kind):
    cfg = MODELS_OF_EACH_KIND[kind]()
    counted, of_attention, not_counted = count(build_on_meta(cfg), SIZE)
    assert counted == real_run(cfg) > 0
    assert (of_attention > 0) == (kind != 'proposals')
    assert not_counted is None


def test_a_stage_with_windows_is_counted_with_and_without_its_attention():
    """Swin-T on 224 x 224, whose multiply-adds its paper gives as 4.5 G with the attention, of which 0.14 G is."""
    cfg = Config(dict(model=dict(type='mmdet.SwinTransformer')))
    model = build_on_meta(cfg)
    model.forward = lambda image, samples, mode: type(model).forward(model, image)
    counted, of_attention, _ = count(model, (224, 224))
    tokens = [56 * 56, 28 * 28, 14 * 14, 7 * 7]
    pairs = sum(n * 49 * 96 * 2**i * depth for i, (n, depth) in enumerate(zip(tokens, (2, 2, 6, 2), strict=True)))
    assert of_attention == 2 * pairs  # queries by keys, and their softmax by values
    assert round(counted / 1e9, 1) == 4.5


def test_mmdets_own_tool_has_1431_g_more_for_cascade():
    cfg = load_config(str(CONFIGS / 'detection/cascade_convnext_t_coco.py'))
    heads = build_on_meta(cfg).roi_head.mask_head
    one = sum(count_multiply_adds(head, torch.empty(1, 256, 14, 14, device='meta')) for head in heads)
    assert len(heads) == 3
    assert round((1000 - 100) * one / 1e9) == 1431


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(
    ('path', 'reason'),
    [('htc/htc_r50_fpn_1x_coco.py', 'semantic_head'), ('sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py', 'EmbeddingRPN')],
)
def test_a_model_under_no_rule_is_not_counted_and_says_why(path, reason):
    counted, of_attention, not_counted = count(build_on_meta(stock(mmdet, path)), SIZE)
    assert counted is None and of_attention is None
    assert reason in not_counted


@pytest.mark.parametrize(
    ('config', 'size'),
    [
        ('detection/cascade_convnext_t_coco.py', (800, 1280)),
        ('segmentation/upernet_convnext_t_ade20k.py', (512, 2048)),
        ('segmentation/upernet_convnext_b_in22k_640_ade20k.py', (640, 2560)),
        ('detection/mask_rcnn_convnext_mini_shapes.py', (96, 96)),
    ],
)
def test_image_size(config, size):
    assert image_size(load_config(str(CONFIGS / config))) == size


def test_without_resizing_there_is_no_size():
    cfg = load_config(MINI)
    cfg.test_dataloader.dataset.pipeline.pop(1)
    with pytest.raises(ValueError, match='no Resize'):
        image_size(cfg)


def test_an_error_names_its_config(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text(f"_base_ = '{MINI}'\nmodel = dict(neck=dict(in_channelz=[1]))\n")
    with pytest.raises(UserError, match=r'mine\.py: the config(.|\n)*in_channelz'):
        analyze([MINI, str(path)])


def test_a_config_of_ones_own_has_no_published_figures(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text(f"_base_ = '{MINI}'\n")
    (analysis,) = analyze([str(path)])
    assert analysis['paper'] is None
    (tmp_path / 'metafile.yml').write_text('Models:\n- Name: of OpenMMLab\n')
    assert analyze([str(path)]) == [analysis]


COUNTED = {
    'config': 'a/upernet_convnext_xl_in22k_640_ade20k.py',
    'height': 640,
    'width': 2560,
    'parameters': 391_140_000,
    'parameters_without_auxiliary_head': 388_700_000,
    'multiply_adds': 3_334_250_000_000,
    'multiply_adds_of_attention': 0,
    'not_counted': None,
    'paper': {'table': 'arXiv 2201.03545, Table 4', 'parameters': 391, 'gflops': 3335, 'metrics': {}},
}


def test_table():
    nothing = {'parameters_without_auxiliary_head': 391_140_000, 'multiply_adds': None, 'paper': None}
    table, remarks = analysis_table([COUNTED, {**COUNTED, **nothing}]).split('\n\n')
    header, rule, first, second = table.splitlines()
    assert first.split() == [
        *('upernet_convnext_xl_in22k_640_ade20k', '2560x640', '391.1', '388.7', '391'),
        *('3334.2', '3335', '-0.8', '0.0'),
    ]
    assert second.split()[2:] == ['391.1', '-', '-', '-', '-', '-', '-']
    columns = [i for i, character in enumerate(rule) if character == ' ']
    assert all(line[i] == ' ' for line in (header, first, second) for i in columns)
    assert max(map(len, (*table.splitlines(), *remarks.splitlines()))) <= 120
    assert '1431' in remarks


def test_table_says_what_is_not_counted():
    _, missing, _ = analysis_table([COUNTED, {**COUNTED, 'multiply_adds': None, 'not_counted': 'why'}]).split('\n\n')
    assert missing == 'Not counted:\nupernet_convnext_xl_in22k_640_ade20k: why'
