import copy
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from mmseg.registry import MODELS as MMSEG_MODELS
from mmseg.structures import SegDataSample
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from backbones import load_pretrained
from backbones.isotropic import ConvNeXtIsotropic
from densekit.engine.config import load_config

CONFIGS = Path(__file__).parents[2] / 'configs'
MINI = dict(depth=3, channels=16)
SCALED = dict(layer_scale_init_value=1.0)


@pytest.fixture
def iso(randomize):
    """Builds a small isotropic ConvNeXt with random weights, the same ones each time."""

    def build(**options):
        model = ConvNeXtIsotropic(**{'arch': MINI, 'out_channels': 8, **SCALED, **options})
        randomize(model)
        return model

    return build


class Classifier(nn.Module):
    """The trunk of a backbone with the norm and the head of 1000 classes that the published models have."""

    def __init__(self, backbone):
        super().__init__()
        self.stem, self.blocks = backbone.stem, backbone.blocks
        self.norm = nn.LayerNorm(self.stem.out_channels, eps=1e-6)
        self.head = nn.Linear(self.stem.out_channels, 1000)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.stem(x)).mean((2, 3))))


def image(height=64, width=96, channels=3):
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


# As published: parameters, multiply-adds at 224 px in G, layer scale.


@pytest.mark.parametrize(
    ('arch', 'parameters', 'gflops', 'has_gamma'),
    [
        ('small', 22_308_712, 4.29, False),
        ('base', 87_083_752, 16.90, False),
        ('large', 305_942_504, 59.70, True),
    ],
)
def test_size_and_cost_are_as_published(arch, parameters, gflops, has_gamma):
    with torch.device('meta'):
        model = Classifier(ConvNeXtIsotropic(arch))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert round(counter.get_total_flops() / 2e9, 2) == gflops  # the counter takes a multiply-add for two
    assert any(name.endswith('.gamma') for name, _ in model.named_parameters()) == has_gamma


# Names and shapes in the authors' files, for any channels C and depth.
OFFICIAL = {
    r'stem.weight': 'C 3 16 16',
    r'stem.bias': 'C',
    r'blocks.j.gamma': 'C',
    r'blocks.j.dwconv.weight': 'C 1 7 7',
    r'blocks.j.dwconv.bias': 'C',
    r'blocks.j.norm.weight': 'C',
    r'blocks.j.norm.bias': 'C',
    r'blocks.j.pwconv1.weight': '4C C',
    r'blocks.j.pwconv1.bias': '4C',
    r'blocks.j.pwconv2.weight': 'C 4C',
    r'blocks.j.pwconv2.bias': 'C',
    r'norm.weight': 'C',
    r'norm.bias': 'C',
    r'head.weight': '1000 C',
    r'head.bias': '1000',
}


def official_weights(depth, channels, gamma):
    """Random weights under the official names."""
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for name, shape in OFFICIAL.items():
        if name.endswith('gamma') and not gamma:
            continue
        sides = [{'C': channels, '4C': 4 * channels}.get(side) or int(side) for side in shape.split()]
        for j in range(depth) if '.j.' in name else [0]:
            weights[name.replace('.j.', f'.{j}.')] = torch.randn(sides, generator=generator) / 4
    return weights


@pytest.mark.parametrize('gamma', [True, False])
def test_names_and_shapes_are_the_official_ones(gamma):
    model = Classifier(ConvNeXtIsotropic(MINI, layer_scale_init_value=float(gamma)))
    official = official_weights(3, 16, gamma)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in official.items()}


def test_official_files_load_but_for_the_classifier(iso):
    model, official = iso(), official_weights(3, 16, gamma=True)
    pyramid = copy.deepcopy(model.pyramid.state_dict())
    report = load_pretrained(model, {'model': official})
    assert set(report.dropped) == {'norm.weight', 'norm.bias', 'head.weight', 'head.bias'}
    assert set(report.missing) == {f'pyramid.{name}' for name in pyramid}
    ours = model.state_dict()
    for name in report.loaded:
        assert torch.equal(ours[name], official[name]), name
    assert len(report.loaded) + 4 == len(official)
    torch.testing.assert_close(model.pyramid.state_dict(), pyramid, rtol=0, atol=0)


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (dict(layer_scale_init_value=0.0), 'with 3 blocks of 16 channels, with layer scale; the model is .* without'),
        (dict(arch=dict(depth=2, channels=16)), r'with 3 blocks of 16 channels.*the model is .*with 2 blocks of 16'),
    ],
)
def test_weights_of_another_size_are_named(iso, options, said):
    with pytest.raises(ValueError, match=f'The weights are of isotropic ConvNeXt {said}'):
        load_pretrained(iso(**options), {'model': official_weights(3, 16, gamma=True)})


def test_weights_are_described_by_name():
    with torch.device('meta'):
        weights = ConvNeXtIsotropic('large').state_dict()
    assert ConvNeXtIsotropic.describe_weights(weights) == 'isotropic ConvNeXt large, with layer scale'
    assert ConvNeXtIsotropic.describe_weights({'stages.0.0.gamma': torch.ones(1)}) == 'no isotropic ConvNeXt'


def test_pretrained_goes_through_the_strict_loader(tmp_path):
    torch.save({'model': official_weights(2, 16, gamma=True)}, tmp_path / 'other.pth')
    cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'other.pth'))
    with pytest.raises(ValueError, match='does not fit this ConvNeXtIsotropic'):
        ConvNeXtIsotropic(MINI, **SCALED, init_cfg=cfg).init_weights()


# The same features, written down anew from the papers in plain functions.


def layer_norm(x, weight, bias, eps=1e-6):
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).square().mean(1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * weight[:, None, None] + bias[:, None, None]


def plain_trunk(w, x, depth=3, eps=1e-6, gamma=True):
    channels = len(w['stem.bias'])
    x = F.conv2d(x, w['stem.weight'], w['stem.bias'], stride=16)
    for j in range(depth):
        p = {name.removeprefix(f'blocks.{j}.'): value for name, value in w.items() if name.startswith(f'blocks.{j}.')}
        y = F.conv2d(x, p['dwconv.weight'], p['dwconv.bias'], padding=3, groups=channels)
        y = layer_norm(y, p['norm.weight'], p['norm.bias'], eps)
        y = torch.einsum('oc,nchw->nohw', p['pwconv1.weight'], y) + p['pwconv1.bias'][:, None, None]
        y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
        y = torch.einsum('oc,nchw->nohw', p['pwconv2.weight'], y) + p['pwconv2.bias'][:, None, None]
        x = x + (y * p['gamma'][:, None, None] if gamma else y)
    return x


def doubled(x, weight, bias):
    """A deconvolution of kernel and stride 2: every pixel becomes a patch of 2 x 2 by itself."""
    n, _, h, w = x.shape
    return torch.einsum('nchw,coij->nohiwj', x, weight).reshape(n, -1, 2 * h, 2 * w) + bias[:, None, None]


def plain_pyramid(weights, x):
    """The four levels from the map of an even height and width."""
    n, c, h, w = x.shape
    level = [
        {name.removeprefix(f'pyramid.{i}.'): value for name, value in weights.items() if f'pyramid.{i}.' in name}
        for i in range(4)
    ]
    half = doubled(x, level[0]['0.weight'], level[0]['0.bias'])
    half = F.gelu(layer_norm(half, level[0]['1.weight'], level[0]['1.bias']))
    maps = [
        doubled(half, level[0]['3.weight'], level[0]['3.bias']),
        doubled(x, level[1]['0.weight'], level[1]['0.bias']),
        x,
        x.reshape(n, c, h // 2, 2, w // 2, 2).amax((3, 5)),
    ]
    outputs = []
    for feature, p, first in zip(maps, level, (4, 1, 0, 1), strict=True):
        y = torch.einsum('oc,nchw->nohw', p[f'{first}.weight'][:, :, 0, 0], feature)
        y = layer_norm(y, p[f'{first + 1}.weight'], p[f'{first + 1}.bias'])
        y = F.conv2d(y, p[f'{first + 2}.weight'], padding=1)
        outputs.append(layer_norm(y, p[f'{first + 3}.weight'], p[f'{first + 3}.bias']))
    return outputs


def difference(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@torch.no_grad()
def test_same_trunk_as_written_plainly(iso):
    model = iso().eval()
    weights, x = model.state_dict(), 0.1 * image()
    ours = model.blocks(model.stem(x))
    assert difference(ours, plain_trunk(weights, x)) < 1e-5
    # What the comparison must not let pass.
    assert difference(ours, plain_trunk(weights, x, eps=1e-3)) > 1e-4
    assert difference(ours, plain_trunk(weights, x, gamma=False)) > 1e-2
    assert difference(ours, plain_trunk(weights, x, depth=2)) > 1e-2


@torch.no_grad()
def test_same_trunk_without_layer_scale(iso):
    model = iso(layer_scale_init_value=0).eval()
    assert difference(model.blocks(model.stem(image())), plain_trunk(model.state_dict(), image(), gamma=False)) < 1e-5


@torch.no_grad()
def test_same_pyramid_as_written_plainly(iso):
    model = iso().eval()
    weights = model.state_dict()
    trunk = plain_trunk(weights, image())
    ours = model(image())
    assert max(map(difference, ours, plain_pyramid(weights, trunk))) < 1e-5
    # Not of a map that was normalized, and not of the block before.
    assert min(map(difference, ours, plain_pyramid(weights, F.layer_norm(trunk, (6,))))) > 1e-2
    assert min(map(difference, ours, plain_pyramid(weights, plain_trunk(weights, image(), depth=2)))) > 1e-2


def test_pyramid_begins_as_torch_does_and_the_trunk_as_published():
    model = ConvNeXtIsotropic(dict(depth=2, channels=128))
    assert model.blocks[1].pwconv1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.stem.bias.abs().max() == 0
    # Uniform up to 1 / sqrt(fan-in); the fan-in of a 1x1 convolution of 128 channels is 128.
    assert model.pyramid['2'][0].weight.abs().max().item() == pytest.approx(128**-0.5, rel=0.01)
    assert all(conv.bias is None for conv in model.pyramid.modules() if type(conv) is nn.Conv2d)


# Any size.


@pytest.mark.parametrize('size', [(64, 64), (65, 97), (63, 130), (32, 48), (31, 50), (7, 50), (1, 1), (3, 70)])
def test_output_shapes_for_any_input_size(iso, size):
    outputs = iso()(image(*size))
    for out, stride in zip(outputs, (4, 8, 16, 32), strict=True):
        assert tuple(out.shape) == (2, 8, *(max(side // stride, 1) for side in size))
        assert torch.isfinite(out).all()


@torch.no_grad()
@pytest.mark.parametrize('size', [(50, 71), (31, 17), (5, 40)])
def test_images_are_padded_to_the_coarsest_stride(iso, size):
    x, (height, width) = image(*size), size
    padded = torch.zeros(2, 3, -(-height // 32) * 32, -(-width // 32) * 32)
    padded[:, :, :height, :width] = x
    model = iso().eval()
    for out, whole in zip(model(x), model(padded), strict=True):
        assert torch.equal(out, whole[:, :, : out.shape[2], : out.shape[3]])


def test_the_last_pixel_counts(iso):
    x = image(63, 63).requires_grad_()
    sum(out.square().sum() for out in iso()(x)).backward()
    assert x.grad[:, :, -1, -1].abs().min() > 0


@torch.no_grad()
def test_exported_for_any_size(iso):
    model = iso().eval()
    sides = {2: torch.export.Dim('height', min=64, max=2048), 3: torch.export.Dim('width', min=64, max=2048)}
    exported = torch.export.export(model, (image(75, 99),), dynamic_shapes=(sides,)).module()
    for size in ((64, 96), (65, 130), (95, 79)):
        torch.testing.assert_close(exported(image(*size)), model(image(*size)), rtol=1e-4, atol=1e-4)


def test_other_input_channels_patch_size_and_output_channels(iso):
    model = iso(in_channels=5, stem_patch_size=8, out_channels=12)
    assert model.strides == (2, 4, 8, 16)
    assert model.channels == (12, 12, 12, 12)
    assert [tuple(out.shape[1:]) for out in model(image(32, 48, channels=5))] == [
        (12, 16, 24), (12, 8, 12), (12, 4, 6), (12, 2, 3),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ('given', 'levels'),
    [([0, 1, 2, 3], (0, 1, 2, 3)), ([3, 1], (1, 3)), ([-1, 0], (0, 3)), ((-4, -2), (0, 2)), (3, (3,)), (-1, (3,))],
)
def test_out_indices(iso, given, levels):
    kept = copy.copy(given)
    model = iso(out_indices=given)
    assert given == kept  # the caller's list is left alone
    assert model.channels == (8,) * len(levels)
    assert model.strides == tuple(4 * 2**i for i in levels)
    assert tuple(model.pyramid) == tuple(str(i) for i in levels)  # and no other parameters

    everything = iso()
    everything.load_state_dict(model.state_dict(), strict=False)
    outputs = everything(image())
    torch.testing.assert_close(model(image()), tuple(outputs[i] for i in levels), rtol=0, atol=0)


# Training.


def step(model):
    torch.manual_seed(3)  # of the drop path
    outputs = model(image())
    sum(out.square().mean() * (1 + i) for i, out in enumerate(outputs)).backward()
    return outputs, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (1,), (3,)])
def test_every_parameter_gets_a_gradient(iso, out_indices):
    _, grads = step(iso(out_indices=out_indices))
    assert [name for name, grad in grads.items() if grad is None or not grad.abs().sum() > 0] == []


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize(('frozen_blocks', 'frozen'), [(0, 0), (-1, 0), (2, 2), (3, 3)])
def test_frozen_blocks_stay_frozen(iso, frozen_blocks, frozen, training):
    model = iso(frozen_blocks=frozen_blocks, drop_path_rate=0.1)
    model.requires_grad_(True)
    assert model.train() is model
    assert model.eval() is model
    assert model.train(training) is model
    assert model.stem.training == (training and not frozen)
    assert [block.training for block in model.blocks] == [training and j >= frozen for j in range(3)]
    _, grads = step(model)
    for name, parameter in model.named_parameters():
        block = int(name.split('.')[1]) if name.startswith('blocks.') else (-1 if name.startswith('stem') else 3)
        is_frozen = frozen > 0 and block < frozen
        assert parameter.requires_grad == (not is_frozen), name
        assert (grads[name] is None) == is_frozen, name


def test_frozen_after_construction(iso):
    model = iso(frozen_blocks=1)
    assert not any(p.requires_grad for module in (model.stem, model.blocks[0]) for p in module.parameters())
    assert all(p.requires_grad for p in model.blocks[1].parameters())


@pytest.mark.parametrize('frozen_blocks', [0, 2])
def test_checkpointing_changes_nothing(iso, frozen_blocks):
    options = dict(drop_path_rate=0.5, frozen_blocks=frozen_blocks)
    model = iso(with_cp=True, **options).train()
    calls = []
    model.blocks[2].dwconv.register_forward_hook(lambda *_: calls.append(1))
    outputs, grads = step(model)
    plain_outputs, plain_grads = step(iso(**options).train())
    torch.testing.assert_close(outputs, plain_outputs, rtol=0, atol=0)
    torch.testing.assert_close(grads, plain_grads, rtol=0, atol=0)
    assert len(calls) == 2


def test_drop_path_rises_and_is_at_work_in_training_only(iso):
    model = iso(drop_path_rate=0.5)
    assert isinstance(model.blocks[0].drop_path, nn.Identity)
    assert [block.drop_path.drop_prob for block in model.blocks[1:]] == pytest.approx([0.25, 0.5])
    torch.manual_seed(0)
    assert not torch.equal(model.train()(image())[0], model(image())[0])
    assert torch.equal(model.eval()(image())[0], model(image())[0])


def test_layer_scale_is_as_published_unless_asked_for():
    with torch.device('meta'):
        assert ConvNeXtIsotropic('large', layer_scale_init_value=0).blocks[0].gamma is None
    assert ConvNeXtIsotropic(MINI).blocks[0].gamma is None
    assert ConvNeXtIsotropic(MINI, layer_scale_init_value=1e-6).blocks[2].gamma.tolist() == pytest.approx([1e-6] * 16)


def test_activation_and_eps_reach_every_layer():
    model = ConvNeXtIsotropic(MINI, norm_cfg=dict(type='LN2d', eps=1e-5), act_cfg=dict(type='ReLU'))
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert sum(isinstance(m, nn.ReLU) for m in model.modules()) == 4
    assert not any(isinstance(m, nn.GELU) for m in model.modules())


@torch.no_grad()
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize('scale', [1.0, 1e4])
def test_half_precision(iso, dtype, tolerance, scale):
    """Also where activations are so large that their squares overflow float16."""
    model = iso()
    x = image().clamp(-3, 3)
    model.stem.weight.mul_(scale)
    references = model(x)
    assert scale == 1 or model.stem(x).abs().max() > 1e4
    for out, reference in zip(model.to(dtype)(x.to(dtype)), references, strict=True):
        assert out.dtype == dtype
        assert ((out.float() - reference).norm() / reference.norm()).item() < tolerance


# Layer decay. The scales at rate 0.7 and 12 blocks are those published for 12 layers.
DECAY_07_L12 = (
    .00969, .01384, .01977, .02825, .04035, .05765, .08235, .11765, .16807, .2401, .343, .49, .7, 1,
)  # fmt: skip


@pytest.mark.parametrize(
    ('name', 'layer_wise', 'stage_wise'),
    [
        ('stem.weight', 0, 0),
        ('stem.bias', 0, 0),
        ('stem', 0, 0),
        ('blocks.0.gamma', 1, 1),
        ('blocks.1.dwconv.weight', 2, 1),
        ('blocks.11.norm.weight', 12, 1),
        ('pyramid.0.0.weight', 13, 2),
        ('pyramid.3.4.bias', 13, 2),
        ('', 13, 2),
    ],
)
def test_layer_depth(name, layer_wise, stage_wise):
    model = ConvNeXtIsotropic(dict(depth=12, channels=4))
    assert model.layer_depth(name) == model.layer_depth(name, 'layer_wise') == (layer_wise, 14)
    assert model.layer_depth(name, 'stage_wise') == (stage_wise, 3)


@pytest.mark.parametrize('mode', ['layer_wise', 'stage_wise'])
def test_layer_decay_constructor_takes_it(mode):
    model = nn.ModuleDict(dict(backbone=ConvNeXtIsotropic(dict(depth=12, channels=4)), head=nn.Linear(4, 4)))
    wrapper = build_optim_wrapper(
        model,
        dict(
            optimizer=dict(type='AdamW', lr=2e-4, weight_decay=0.05),
            constructor='LayerDecayOptimWrapperConstructor',
            paramwise_cfg=dict(decay_rate=0.7, decay_type=mode),
        ),
    )
    groups = wrapper.optimizer.param_groups
    scales = {name: group['lr'] / 2e-4 for group in groups for name in group['param_names']}
    assert set(scales) == {name for name, _ in model.named_parameters()}
    for name, scale in scales.items():
        block = re.match(r'backbone\.blocks\.(\d+)', name)
        depth = int(block[1]) + 1 if block else 0 if 'stem' in name else 13
        expected = DECAY_07_L12[depth] if mode == 'layer_wise' else {0: 0.49, 13: 1}.get(depth, 0.7)
        assert scale == pytest.approx(expected, abs=6e-6), name
    assert {g['weight_decay'] for g in groups for name in g['param_names'] if '.norm.' in name} == {0}


# In detectors and segmentors.


def tiny_backbone(**options):
    return dict(type='ConvNeXtIsotropic', arch=dict(depth=2, channels=16), out_channels=64, **options)


def detection_batch():
    sample = DetDataSample(
        metainfo=dict(img_shape=(96, 80), ori_shape=(96, 80), pad_shape=(96, 80), scale_factor=(1.0, 1.0))
    )
    boxes = torch.tensor([[4.0, 6.0, 36.0, 44.0], [30.0, 10.0, 74.0, 60.0]])
    masks = np.zeros((2, 96, 80), dtype=np.uint8)
    masks[:, 10:40, 30:36] = 1
    sample.gt_instances = InstanceData(
        bboxes=boxes, labels=torch.tensor([0, 3]), masks=BitmapMasks(masks, height=96, width=80)
    )
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    return dict(inputs=[torch.randint(0, 256, (3, 96, 80), dtype=torch.uint8)], data_samples=[sample])


def segmentation_batch():
    labels = torch.zeros(1, 96, 96, dtype=torch.long)
    labels[:, :40] = 3
    sample = SegDataSample(metainfo=dict(img_shape=(96, 96), ori_shape=(96, 96)), gt_sem_seg=PixelData(data=labels))
    images = [torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8) for _ in range(2)]
    return dict(inputs=images, data_samples=[sample, sample.clone()])


def check_a_training_step(cfg, batch):
    """One step of the config's own optimizer changes every tensor of the backbone; then the model predicts."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    assert type(model.backbone) is ConvNeXtIsotropic
    before = {name: value.detach().clone() for name, value in model.backbone.named_parameters()}
    losses = model.train().train_step(copy.deepcopy(batch), wrapper)
    assert all(loss.isfinite() for loss in losses.values())
    assert [name for name, value in model.backbone.named_parameters() if torch.equal(value, before[name])] == []
    predictions = model.eval().test_step(batch)
    assert len(predictions) == len(batch['inputs'])
    return model


@pytest.mark.parametrize('has_neck', [True, False])
def test_mask_rcnn_takes_a_training_step(has_neck):
    cfg = load_config(str(CONFIGS / 'detection/mask_rcnn_convnext_mini_shapes.py'))
    cfg.model.backbone = tiny_backbone()
    if has_neck:
        cfg.model.neck.in_channels = [64] * 4
    else:
        cfg.model.neck = None
    check_a_training_step(cfg, detection_batch())


def test_upernet_takes_a_training_step():
    cfg = load_config(str(CONFIGS / 'segmentation/upernet_convnext_mini_shapes.py'))
    cfg.model.backbone = tiny_backbone()
    cfg.model.decode_head.in_channels = [64] * 4
    cfg.model.auxiliary_head.in_channels = 64
    model = check_a_training_step(cfg, segmentation_batch())
    assert model.eval()(torch.randn(1, 3, 75, 101)).shape[:2] == (1, 6)  # a size that no stride divides


@pytest.mark.parametrize('registry', [MODELS, MMDET_MODELS, MMSEG_MODELS], ids=['mmengine', 'mmdet', 'mmseg'])
def test_found_from_every_registry(registry):
    assert isinstance(registry.build(dict(type='ConvNeXtIsotropic', arch=MINI)), ConvNeXtIsotropic)


# Mistakes.


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (dict(arch='tiny'), r"arch 'tiny' is unknown\. Isotropic ConvNeXt has small, base, large; or give dict"),
        (dict(arch=None), r'arch=None: give a name or a dict'),
        (dict(arch=dict(depths=3, channels=16)), r'exactly depth and channels'),
        (dict(arch=dict(depth=0, channels=16)), r'depth=0 and channels=16; give a depth of at least 1'),
        (dict(arch=dict(depth=3, channels=18)), r'channels=18; .*multiple of 4'),
        (dict(arch=dict(depth=(3, 3, 9, 3), channels=16)), r'depth=\(3, 3, 9, 3\)'),
        (dict(stem_patch_size=6), r'stem_patch_size=6: give a multiple of 4'),
        (dict(stem_patch_size=0), r'stem_patch_size=0'),
        (dict(out_channels=0), r'out_channels=0: give a positive number'),
        (dict(norm_cfg=dict(type='BN')), r"norm_cfg.*'BN'.*LN2d"),
        (dict(act_cfg=dict(type='Swisch')), r"'Swisch'.*GELU, ReLU"),
        (dict(drop_path_rate=1.0), r'drop_path_rate=1\.0'),
        (dict(layer_scale_init_value=-1.0), r'layer_scale_init_value=-1\.0'),
        (dict(layer_scale_init_value=float('nan')), r'layer_scale_init_value=nan'),
        (dict(out_indices=(0, 4)), r'out_indices=\(0, 4\)'),
        (dict(out_indices=(3, -1)), r'out_indices=\(3, -1\)'),
        (dict(out_indices=()), r'at least one'),
        (dict(frozen_blocks=4), r'frozen_blocks=4: give 0 \(or -1\) for none, up to 3 for all blocks'),
        (dict(frozen_blocks=-2), r'frozen_blocks=-2'),
    ],
)
def test_mistakes_are_explained(options, said):
    with pytest.raises(ValueError, match=said):
        ConvNeXtIsotropic(**{'arch': MINI, **options})


def test_layer_depth_refuses_an_unknown_mode():
    with pytest.raises(ValueError, match=r"'layerwise'.*'layer_wise' or 'stage_wise'"):
        ConvNeXtIsotropic(MINI).layer_depth('blocks.0.gamma', 'layerwise')


def test_arguments_are_those_of_convnext_where_both_have_them():
    from backbones import ConvNeXt

    ours, theirs = (inspect.signature(cls).parameters for cls in (ConvNeXtIsotropic, ConvNeXt))
    assert set(ours) - set(theirs) == {'out_channels', 'frozen_blocks'}
    differing = {name for name in set(ours) & set(theirs) if ours[name].default != theirs[name].default}
    assert differing == {'arch', 'stem_patch_size', 'layer_scale_init_value'}
