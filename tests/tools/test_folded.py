"""Predictor and tools/test.py with folded blocks find what they find without."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from untrained import random_weights

from backbones.folding import FoldedBlock
from densekit import predictor as predictor_module
from densekit.engine import fold_hook
from densekit.predictor import Predictor
from densekit.report.pictures import read_image

pytestmark = pytest.mark.usefixtures('quick_mmengine')


def no_identities(model):
    """Gives the affine maps and layer scales that are folded values that matter."""
    for name, parameter in model.named_parameters():
        if name.startswith('backbone.stages') and name.endswith(('gamma', 'norm.weight', 'norm.bias')):
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)


@pytest.fixture(scope='module')
def det(tiny, tmp_path_factory):
    return tiny.det, random_weights(tiny.det, tmp_path_factory.mktemp('det') / 'det.pth', no_identities)


@pytest.fixture(scope='module')
def seg(tiny, tmp_path_factory):
    return tiny.seg, random_weights(tiny.seg, tmp_path_factory.mktemp('seg') / 'seg.pth', no_identities)


@pytest.fixture(scope='module')
def resnet(tiny, tmp_path_factory):
    """The segmentor with another backbone."""
    folder = tmp_path_factory.mktemp('resnet')
    config = folder / 'resnet.py'
    backbone = "dict(_delete_=True, type='mmseg.ResNet', depth=18, out_indices=(0, 1, 2, 3))"
    heads = 'decode_head=dict(in_channels=[64, 128, 256, 512]), auxiliary_head=dict(in_channels=256)'
    config.write_text(f"_base_ = '{tiny.seg}'\nmodel = dict(backbone={backbone}, {heads})\n")
    return str(config), random_weights(config, folder / 'resnet.pth', no_identities)


def same(found, expected):
    if isinstance(found, np.ndarray):
        return (found == expected).mean() > 0.999
    return (
        len(found.scores) == len(expected.scores) > 0
        and np.allclose(found.scores, expected.scores, atol=1e-5)
        and np.allclose(found.boxes, expected.boxes, atol=1e-3)
        and np.array_equal(found.labels, expected.labels)
        and (found.masks == expected.masks).mean() > 0.999
    )


def folded_blocks(model):
    return sum(isinstance(module, FoldedBlock) for module in model.modules())


@pytest.mark.parametrize('kernels', ['auto', 'eager'])
@pytest.mark.parametrize('name', ['det', 'seg'])
def test_a_predictor_finds_the_same(name, kernels, request, tiny):
    given, options = request.getfixturevalue(name), [f'model.backbone.kernels={kernels}']
    image = read_image(sorted((tiny.data / 'coco/val').glob('*.jpg'))[0])
    folded, plain = (Predictor(*given, options=options, fold=fold) for fold in (True, False))
    assert (folded.folded, plain.folded) == (True, False)
    assert (folded_blocks(folded.model), folded_blocks(plain.model)) == (4, 0)
    assert same(folded(image), plain(image))
    with torch.no_grad():  # the comparison can fail
        next(m for m in folded.model.modules() if isinstance(m, FoldedBlock)).dwconv.weight.neg_()
    assert not same(folded(image), plain(image))


def test_a_predictor_leaves_what_it_cannot_fold(det, resnet, monkeypatch):
    assert not Predictor(*resnet).folded
    with monkeypatch.context() as patch:
        patch.setattr(predictor_module.folding, 'runs_on_triton', lambda model: True)
        assert not Predictor(*det).folded
    load = predictor_module.load_model
    monkeypatch.setattr(predictor_module, 'load_model', lambda *args: (load(*args)[0].half(), {}))
    monkeypatch.setattr(predictor_module, '_classes_and_palette', lambda *args: ([], []))
    predictor = Predictor(*det)
    assert not predictor.folded and folded_blocks(predictor.model) == 0


def test_predict_folds_unless_told_not_to(det, tool, tiny, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr('densekit.report.predict_command.Predictor', lambda *_, fold, **__: seen.append(fold) or stop())
    image = sorted((tiny.data / 'coco/val').glob('*.jpg'))[0]
    for options in ([], ['--no-fold']):
        assert tool('predict', *det, image, '--out', tmp_path / 'out', *options) == 2
    assert seen == [True, False]


def stop():
    raise ValueError('that is enough')


@pytest.fixture
def scores(tool, tmp_path, monkeypatch):
    """Runs tools/test.py; returns its figures and how many folded blocks were called in it."""
    calls = []
    forward = FoldedBlock.forward
    monkeypatch.setattr(FoldedBlock, 'forward', lambda self, x: calls.append(1) or forward(self, x))

    def run(given, *options):
        out = tmp_path / 'scores.json'
        calls.clear()
        assert tool('test', *given, '--work-dir', tmp_path, '--out', out, *options) == 0
        return json.loads(out.read_text()), len(calls)

    return run


@pytest.fixture
def averaged(det, tmp_path):
    """The detector with mmengine's averaged weights, which a test puts into the model's place."""
    config = tmp_path / 'averaged.py'
    config.write_text(f"_base_ = '{det[0]}'\ncustom_hooks = [dict(type='EMAHook')]\n")
    return str(config), det[1]


@pytest.mark.parametrize(
    ('name', 'options'), [('det', []), ('det', ['--tta']), ('seg', []), ('seg', ['--tta']), ('averaged', [])]
)
def test_scores_are_the_same(name, options, request, scores):
    given = request.getfixturevalue(name)
    plain, none = scores(given, *options)
    folded, calls = scores(given, '--fold', *options)
    assert none == 0 and calls > 0
    figures = {key: value for key, value in plain.items() if isinstance(value, float)}
    assert figures and {key: folded[key] for key in figures} == pytest.approx(figures, abs=1e-2, nan_ok=True)


@pytest.mark.parametrize(
    ('name', 'options', 'said'),
    [
        ('resnet', [], 'cannot be folded: it holds no ConvNeXt block'),
        ('det', ['--cfg-options', 'test_cfg.fp16=True'], 'test_cfg.fp16 would lose the layer scales'),
    ],
)
def test_what_cannot_be_folded_is_said_before_the_test(name, options, said, request, tool, tmp_path, capsys):
    assert tool('test', *request.getfixturevalue(name), '--fold', '--work-dir', tmp_path, *options) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ('function', 'said'), [('is_sharded', 'sharded model'), ('folding.runs_on_triton', 'Triton kernels')]
)
def test_sharded_models_and_triton_kernels_are_refused(function, said, mini_runner, monkeypatch):
    fold_hook.fold_for_test(mini_runner)
    monkeypatch.setattr(f'densekit.engine.fold_hook.{function}', lambda model: True)
    with pytest.raises(ValueError, match=said):
        fold_hook.fold_for_test(mini_runner)


@pytest.fixture
def mini_runner():
    from backbones import ConvNeXt

    model = torch.nn.Sequential(ConvNeXt('atto'))
    return SimpleNamespace(
        model=model, bare_model=lambda: model, test_loop=SimpleNamespace(fp16=False), register_hook=lambda hook: None
    )


def test_the_model_is_back_after_the_test(mini_runner):
    model, hook = mini_runner.model, fold_hook.FoldHook()
    mini_runner.model = torch.nn.parallel.DataParallel(model)
    wrapped = mini_runner.model
    hook.before_test_epoch(mini_runner)
    assert folded_blocks(mini_runner.model) == 12 and folded_blocks(model) == 0
    hook.after_test_epoch(mini_runner)
    assert mini_runner.model is wrapped
