"""Rows of the last layers go by the names of the classes; everything else stays strict."""

import re

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from densekit.engine import class_transfer
from densekit.engine.class_transfer import (
    check_class_order,
    checkpoint_classes,
    class_layers,
    dataset_classes,
    plan_transfer,
)
from densekit.engine.weights import check_fit

HERE = ('circle', 'square', 'triangle', 'star', 'cross')
THERE = ('star', 'heart', 'circle', 'moon', 'square', 'ring', 'cross')
LABELS = (2, 4, None, 0, 6)  # of HERE in THERE
CASCADE = 'configs/detection/cascade_convnext_t_coco.py'
DETECTOR = 'configs/detection/mask_rcnn_convnext_mini_shapes.py'
SEGMENTOR = 'configs/segmentation/upernet_convnext_mini_shapes.py'
LAYERS = {
    'mask': ['bbox_head.fc_cls', 'bbox_head.fc_reg', 'mask_head.conv_logits'],
    'cascade': [
        *(f'bbox_head.{stage}.{layer}' for stage in range(3) for layer in ('fc_cls', 'fc_reg')),
        *(f'mask_head.{stage}.conv_logits' for stage in range(3)),
    ],
    'upernet': ['decode_head.conv_seg', 'auxiliary_head.conv_seg'],
}
ROWS = {'fc_cls': 1, 'fc_reg': 4, 'conv_logits': 1, 'conv_seg': 1}


def build(kind, number, seed=0, shared=False):
    """A small model of so many classes, with random weights; ``shared``: all have the same boxes and masks."""
    torch.manual_seed(seed)
    if kind == 'upernet':
        cfg = Config.fromfile(SEGMENTOR)
        heads = [cfg.model.decode_head, cfg.model.auxiliary_head]
    else:
        cfg = Config.fromfile(DETECTOR if kind == 'mask' else CASCADE)
        roi_head = cfg.model.roi_head
        boxes = roi_head.bbox_head if kind == 'cascade' else [roi_head.bbox_head]
        heads = [*boxes, roi_head.mask_head]
        if kind == 'cascade':
            cfg.model.backbone.arch = 'atto'
            cfg.model.neck.in_channels = [40, 80, 160, 320]
            for head in heads:
                head.conv_out_channels = 8
        for head in boxes:
            head.update(reg_class_agnostic=shared, fc_out_channels=16)
        roi_head.mask_head.class_agnostic = shared
    for head in heads:
        head.num_classes = number
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model)


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def plan(model, weights, classes, names=None):
    checkpoint = {'meta': {'CLASSES': names}} if names else {}
    return plan_transfer('file.pth', checkpoint, weights, model, classes)


@pytest.mark.parametrize('kind', LAYERS)
def test_rows_go_by_name(kind):
    weights, model = state(build(kind, len(THERE), seed=1)), build(kind, len(HERE))
    own = state(model)
    moved = plan(model, weights, HERE, THERE).apply(weights, model)
    check_fit('file.pth', moved, model)
    prefix = '' if kind == 'upernet' else 'roi_head.'
    changed = {f'{prefix}{layer}.{name}' for layer in LAYERS[kind] for name in ('weight', 'bias')}
    for key in changed:
        rows = ROWS[key.split('.')[-2]]
        for here, there in enumerate(LABELS):
            part = moved[key][rows * here : rows * (here + 1)]
            source = own[key][rows * here : rows * (here + 1)]
            if there is not None:
                source = weights[key][rows * there : rows * (there + 1)]
            assert torch.equal(part, source), (key, here)
        if 'fc_cls' in key:
            assert torch.equal(moved[key][-1], weights[key][-1])
    assert all(torch.equal(moved[key], weights[key]) for key in weights.keys() - changed)
    assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())  # not changed yet


@pytest.mark.parametrize('kind', LAYERS)
def test_a_permuted_model_says_the_same(kind):
    """The same classes in another order, which fit without a word: scores, boxes and masks follow the names."""
    permuted = tuple(reversed(HERE))
    source, model = build(kind, 5, seed=1).eval(), build(kind, 5).eval()
    transfer = plan(model, state(source), permuted, HERE)
    model.load_state_dict(transfer.apply(state(source), model))
    order = [HERE.index(name) for name in permuted]
    with torch.no_grad():
        if kind == 'upernet':
            image = torch.randn(1, 3, 64, 64)
            torch.testing.assert_close(model(image), source(image)[:, order])
            return
        features = torch.randn(2, 64 if kind == 'mask' else 256, 7, 7)
        here, there = (m.roi_head.bbox_head for m in (model, source))
        for one, other in zip(here, there, strict=True) if kind == 'cascade' else [(here, there)]:
            (scores, boxes), (expected, expected_boxes) = one(features), other(features)
            torch.testing.assert_close(scores, expected[:, [*order, 5]])
            torch.testing.assert_close(boxes.view(2, 5, 4), expected_boxes.view(2, 5, 4)[:, order])
        here, there = (m.roi_head.mask_head for m in (model, source))
        for one, other in zip(here, there, strict=True) if kind == 'cascade' else [(here, there)]:
            torch.testing.assert_close(one(features), other(features)[:, order])


def test_the_same_classes_change_nothing():
    model = build('mask', 5)
    transfer = plan(model, state(model), HERE, HERE)
    assert transfer.changes_nothing
    assert str(transfer) == ''
    twice = ('other', *HERE[1:4], 'other')
    assert plan(model, state(model), twice, twice).changes_nothing


def test_what_all_classes_share_is_not_moved():
    weights, model = (build('cascade', number, shared=True) for number in (7, 5))
    assert {layer.name.rpartition('.')[2] for layer in class_layers(model)} == {'fc_cls'}
    weights = state(weights)
    moved = plan(model, weights, HERE, THERE).apply(weights, model)
    check_fit('file.pth', moved, model)
    key = 'roi_head.bbox_head.1.fc_reg.weight'
    assert torch.equal(moved[key], weights[key])


def test_boxes_shared_by_the_only_class_are_not_taken_for_its_own():
    model = build('cascade', 1, shared=True)
    assert {layer.name.rpartition('.')[2] for layer in class_layers(model)} == {'fc_cls'}


def test_the_rest_stays_strict():
    weights, model = state(build('mask', 7)), build('mask', 5)
    weights['roi_head.bbox_head.fc_cls.weight'] = weights['roi_head.bbox_head.fc_cls.weight'][:, :8]
    with pytest.raises(ValueError, match=r'1 of another shape .*fc_cls\.weight \(8, 8\) for \(6, 16\)'):
        check_fit('file.pth', plan(model, weights, HERE, THERE).apply(weights, model), model)

    weights = state(build('mask', 7))
    weights['neck.lateral_convs.0.conv.bias'] = torch.zeros(3)
    with pytest.raises(ValueError, match=r'1 of another shape .*lateral_convs\.0\.conv\.bias \(3,\)'):
        check_fit('file.pth', plan(model, weights, HERE, THERE).apply(weights, model), model)

    weights = state(build('mask', 7))
    del weights['roi_head.mask_head.conv_logits.bias']
    with pytest.raises(ValueError, match=r'1 missing in the file: roi_head\.mask_head\.conv_logits\.bias'):
        check_fit('file.pth', plan(model, weights, HERE, THERE).apply(weights, model), model)

    weights['roi_head.mask_head.conv_logits.weight'] = torch.zeros(3, 64, 1, 1)  # heads of 7 and of 3 classes
    assert plan(model, weights, HERE, THERE) is None


def test_names_and_rows_have_to_agree():
    with pytest.raises(ValueError, match=r'file\.pth names 3 classes and has heads for 7'):
        plan(build('mask', 5), state(build('mask', 7)), HERE, THERE[:3])


def test_files_without_names():
    """COCO's 80 and ADE20K's 150 are known by their number, others are not."""
    coco = plan(build('mask', 3), state(build('mask', 80)), ('dog', 'unicorn', 'person'))
    assert coco.sources == (16, None, 0)
    assert "file.pth names no classes; its 80 are taken to be COCO's" in str(coco)
    ade = plan(build('upernet', 3), state(build('upernet', 150)), ('building', 'unicorn', 'wall'))
    assert ade.sources == (1, None, 0)
    assert "its 150 are taken to be ADE20K's" in str(ade)
    for kind, number in (('mask', 150), ('upernet', 80), ('mask', 7)):
        other = plan(build(kind, 5), state(build(kind, number)), HERE)
        assert other.sources == (None,) * 5
        assert f"file.pth names no classes, and its {number} are neither COCO's nor ADE20K's" in str(other)
    same = plan(build('mask', 5), state(build('mask', 5)), HERE)
    assert same.changes_nothing
    assert str(same) == 'file.pth names no classes; its 5 are taken to be those of the data set.'


def test_the_table():
    model = build('mask', 5)
    there = ('star', 'square', 'Triangle', 'circle', 'moon')
    assert str(plan(model, state(build('mask', 5)), HERE, there)) == (
        'The checkpoint is of other classes, which go by their names.\n'
        'rows of                         all  kept  mapped by name  fresh\n'
        '------------------------------  ---  ----  --------------  -----\n'
        'roi_head.bbox_head.fc_cls         6     2               2      2\n'
        'roi_head.bbox_head.fc_reg        20     4               8      8\n'
        'roi_head.mask_head.conv_logits    5     1               2      2\n'
        '\n'
        'class     label  in the checkpoint\n'
        '--------  -----  -----------------  --------------\n'
        'circle        0                  3  mapped by name\n'
        'square        1                  1  kept\n'
        'triangle      2                  -  fresh\n'
        'star          3                  0  mapped by name\n'
        'cross         4                  -  fresh\n'
        "Names have to be the same to the letter: for 'triangle' there is 'Triangle'"
    )


def test_of_many_classes_only_the_fresh_ones_are_named():
    coco = class_transfer._assumed('', 80, class_layers(build('mask', 80)), ())[0]
    here = (*coco[:40], 'unicorn', *coco[41:70], 'dragon')
    said = str(plan(build('mask', 71), state(build('mask', 80)), here, coco))
    assert said.splitlines()[-1] == '71 classes: 69 kept, 0 mapped by name, 2 fresh (unicorn, dragon)'
    assert len(said.splitlines()) == 8


@pytest.mark.parametrize(('kind', 'head'), [('mask', 'roi_head.mask_head'), ('upernet', 'decode_head')])
def test_fresh_rows_are_initialized_as_the_heads_do_it(kind, head, monkeypatch):
    sent = []
    monkeypatch.setattr(class_transfer, 'broadcast', lambda tensor: sent.append(tensor.shape))
    weights, model = state(build(kind, 7)), build(kind, 5)
    own = state(model)
    transfer = plan(model, weights, HERE, THERE)
    transfer.start_afresh()
    layers = [f'{layer.name}.' for layer in transfer.layers]
    assert len(sent) == 2 * len(layers)  # every process gets those of the first
    initialized = model.state_dict()
    assert all(
        torch.equal(value, own[key]) for key, value in initialized.items() if key.startswith(('backbone', 'neck'))
    )
    for key, value in initialized.items():
        if key.startswith(tuple(layers)):
            assert not torch.equal(value, own[key])
            assert not value.any() or key.endswith('weight')
    # Of whichever kind the head's is, and not PyTorch's.
    weight = initialized[f'{head}.conv_{"seg" if kind == "upernet" else "logits"}.weight']
    assert weight.std() == pytest.approx(0.01 if kind == 'upernet' else (2 / 5) ** 0.5, rel=0.2)


def test_nothing_is_initialized_where_every_row_is_known(monkeypatch):
    model = build('mask', 5)
    own = state(model)
    transfer = plan(model, own, tuple(reversed(HERE)), HERE)
    transfer.start_afresh()
    assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())


def test_a_model_without_such_heads_loads_as_it_is():
    assert plan(nn.Linear(2, 5), {'weight': torch.zeros(5, 2)}, HERE, THERE) is None


@pytest.mark.parametrize(
    ('checkpoint', 'classes'),
    [
        ({'meta': {'dataset_meta': {'classes': ['a', 'b']}}}, ('a', 'b')),
        ({'meta': {'dataset_meta': {'CLASSES': ('a', 'b')}}}, ('a', 'b')),
        ({'meta': {'CLASSES': ('a', 'b'), 'epoch': 36}}, ('a', 'b')),
        ({'meta': {'CLASSES': None}}, None),
        ({'meta': {}}, None),
        ({'state_dict': {}}, None),
    ],
)
def test_names_in_a_checkpoint(checkpoint, classes):
    assert checkpoint_classes(checkpoint) == classes


def test_names_of_a_data_set_that_is_not_built(tmp_path):
    (tmp_path / 'names.txt').write_text('a\nb\n')
    with DefaultScope.overwrite_default_scope('mmdet'):
        assert dataset_classes(Config.fromfile(DETECTOR).train_dataloader) == HERE
        assert len(dataset_classes({'dataset': {'type': 'CocoDataset'}})) == 80
        chosen = {'type': 'CocoDataset', 'metainfo': {'classes': ('cat', 'dog')}}
        assert dataset_classes({'dataset': chosen}) == ('cat', 'dog')
        for wrapped in ({'type': 'RepeatDataset', 'dataset': chosen}, {'type': 'ConcatDataset', 'datasets': [chosen]}):
            assert dataset_classes({'dataset': wrapped}) == ('cat', 'dog')
        listed = {'type': 'CocoDataset', 'metainfo': {'classes': str(tmp_path / 'names.txt')}}
        assert dataset_classes({'dataset': listed}) == ('a', 'b')
    with DefaultScope.overwrite_default_scope('mmseg'):
        assert dataset_classes(Config.fromfile(SEGMENTOR).train_dataloader) == ('background', *HERE)
    for nameless in (None, {'dataset': [1, 2]}, {'dataset': {'type': 'NoSuchDataset'}}):
        assert dataset_classes(nameless) is None


def test_the_order_of_the_classes_is_checked():
    def check(names, classes):
        return check_class_order('file.pth', {'meta': {'CLASSES': names}}, classes)

    assert check(HERE, HERE) == check(None, HERE) == check(HERE, None) == check(HERE[:3], HERE) == ''
    with pytest.raises(ValueError, match=re.escape('(there, here): square (2, 1), triangle (1, 2). Results')):
        check(('circle', 'triangle', 'square', 'star', 'cross'), HERE)
    renamed = check(('disc', *HERE[1:]), HERE)
    assert renamed == (
        'file.pth names classes otherwise than the data set, which is taken to mean the same: disc for circle'
    )
