"""A trained model of other classes, in the official layout: fine-tuned, evaluated, predicted."""

import json
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from backbones.files import read_checkpoint

pytestmark = pytest.mark.usefixtures('quick_mmengine')

SHAPES = ['circle', 'square', 'triangle', 'star', 'cross']
OTHERS = {
    'det': ['square', 'heart', 'circle', 'star', 'moon'],
    'seg': ['background', 'square', 'heart', 'circle', 'star', 'moon'],
}
LAST = {
    'det': {'roi_head.bbox_head.fc_cls': 1, 'roi_head.bbox_head.fc_reg': 4, 'roi_head.mask_head.conv_logits': 1},
    'seg': {'decode_head.conv_seg': 1, 'auxiliary_head.conv_seg': 1},
}
STILL = ['train_cfg.max_iters=1', 'train_cfg.val_interval=100', 'optim_wrapper.optimizer.lr=0']


def log_of(work_dir):
    return max(Path(work_dir).glob('*/*.log')).read_text()


def official(config, path, classes):
    """A checkpoint as mmdet 2 and mmseg 0 write one, of the config's model with random weights."""
    torch.manual_seed(0)
    cfg = Config.fromfile(config)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        model.init_weights()
    content = {'meta': {'CLASSES': tuple(classes), 'epoch': 36}, 'state_dict': model.state_dict(), 'optimizer': {}}
    torch.save(content, path)
    return path


@pytest.fixture(scope='module', params=OTHERS)
def trained(request, tiny, tmp_path_factory):
    """Task, config, and a checkpoint of which three shapes are shared with it."""
    config = getattr(tiny, request.param)
    folder = tmp_path_factory.mktemp('official')
    return request.param, config, official(config, folder / 'trained.pth', OTHERS[request.param])


@pytest.fixture(scope='module')
def detector(tiny, tmp_path_factory):
    return tiny.det, official(tiny.det, tmp_path_factory.mktemp('detector') / 'trained.pth', OTHERS['det'])


def test_before_the_first_step(trained, tool, tmp_path):
    """Every tensor is the checkpoint's, but for the rows of the classes."""
    task, config, path = trained
    assert tool('train', config, '--work-dir', tmp_path, '--load-from', path, '--cfg-options', *STILL) == 0
    before, after = (read_checkpoint(file)['state_dict'] for file in (path, tmp_path / 'iter_1.pth'))
    classes = SHAPES if task == 'det' else ['background', *SHAPES]
    changed = {f'{layer}.{name}': rows for layer, rows in LAST[task].items() for name in ('weight', 'bias')}
    for key, rows in changed.items():
        for here, name in enumerate(classes):
            part = after[key][rows * here : rows * (here + 1)]
            if name in OTHERS[task]:
                there = OTHERS[task].index(name)
                assert torch.equal(part, before[key][rows * there : rows * (there + 1)]), (key, name)
            elif key.endswith('weight'):
                assert all(not torch.equal(part, before[key][i : i + rows]) for i in range(len(before[key]) - rows))
    same = [key for key in before.keys() - changed.keys() if 'bn' not in key]  # running statistics moved
    assert all(torch.equal(after[key], before[key]) for key in same)

    log = log_of(tmp_path)
    assert f'Loaded every weight of the model from {path}, its classes by name' in log
    for layer in LAST[task]:
        assert re.search(rf'{re.escape(layer)} +\d+ +\d+ +\d+ +\d+\n', log)
    for name, fate in zip(SHAPES, ('mapped by name', 'mapped by name', 'fresh', 'kept', 'fresh'), strict=True):
        assert re.search(rf'\n{name} .* {fate}\n', f'{log}\n')


def test_fine_tuned_evaluated_predicted(detector, tiny, tool, tmp_path):
    config, path = detector
    assert tool('train', config, '--work-dir', tmp_path / 'run', '--load-from', path) == 0
    tuned = tmp_path / 'run/iter_4.pth'
    assert list(read_checkpoint(tuned)['meta']['dataset_meta']['classes']) == SHAPES
    assert tool('test', config, tuned, '--work-dir', tmp_path / 'test', '--out', tmp_path / 'metrics.json') == 0
    assert 'coco/segm_mAP' in json.loads((tmp_path / 'metrics.json').read_text())
    image = min((tiny.data / 'coco/val').glob('*.jpg'))
    assert tool('predict', config, tuned, image, '--out', tmp_path / 'out') == 0
    assert found_classes(tmp_path / 'out') <= set(SHAPES)
    # The model that it came from goes by its own names.
    assert tool('predict', config, path, image, '--out', tmp_path / 'before') == 0
    assert {'heart', 'moon'} & found_classes(tmp_path / 'before')


def found_classes(folder):
    result = json.loads((folder / 'results.json').read_text())
    names = {category['id']: category['name'] for category in result['categories']}
    return {names[annotation['category_id']] for annotation in result['annotations']}


def test_scores_are_not_those_of_other_classes(detector, tool, tmp_path, capsys):
    config, path = detector
    assert tool('test', config, path, '--work-dir', tmp_path) == 2
    error = capsys.readouterr().err
    assert 'has other labels for the classes of the data set (there, here): circle (2, 0), square (0, 1)' in error
    assert '--load-from maps classes by name' in error


def test_another_number_of_classes(detector, tool, tmp_path, capsys):
    """Of a run's own classes only the names may differ from those of its heads, not the number."""
    config, path = detector
    content = read_checkpoint(path)
    for key, rows in {
        f'{layer}.{name}': rows for layer, rows in LAST['det'].items() for name in ('weight', 'bias')
    }.items():
        content['state_dict'][key] = content['state_dict'][key][: -2 * rows]  # three classes are left
    content['meta']['CLASSES'] = OTHERS['det'][:3]
    torch.save(content, tmp_path / 'three.pth')
    given = ['--work-dir', tmp_path, '--load-from', tmp_path / 'three.pth', '--dry-run']
    given += ['--cfg-options', 'param_scheduler=[]']  # the demo's is longer than four iterations
    assert tool('train', config, *given) == 0
    assert re.search(r'\ntriangle .* fresh\n', log_of(tmp_path))
    assert tool('test', config, tmp_path / 'three.pth', '--work-dir', tmp_path) == 2
    assert (
        'of another shape (file, model): roi_head.bbox_head.fc_cls.weight (4, 256) for (6, 256)'
        in capsys.readouterr().err
    )
    heads = ['model.roi_head.bbox_head.num_classes=7', 'model.roi_head.mask_head.num_classes=7']
    assert tool('train', config, *given, '--cfg-options', *heads) == 2
    assert 'the train data set has 5 classes' in capsys.readouterr().err


def test_openmmlabs_names_are_evaluated_as_ours(detector, tool, tmp_path, capsys):
    config, path = detector
    content = read_checkpoint(path)
    content['meta']['CLASSES'] = SHAPES
    names = {'dwconv': 'depthwise_conv', 'pwconv1': 'pointwise_conv1', 'pwconv2': 'pointwise_conv2'}
    torch.save(content, tmp_path / 'ours.pth')
    weights = content['state_dict']
    weights = {re.sub('|'.join(names), lambda found: names[found[0]], key): value for key, value in weights.items()}
    torch.save({**content, 'state_dict': weights}, tmp_path / 'theirs.pth')
    metrics = []
    for name in ('ours', 'theirs'):
        out = tmp_path / f'{name}.json'
        assert tool('test', config, tmp_path / f'{name}.pth', '--work-dir', tmp_path, '--out', out) == 0
        metrics.append(json.loads(out.read_text()))
        assert ('the backbone had openmmlab names' in capsys.readouterr().out) == (name == 'theirs')
    assert {**metrics[0], 'time': 0, 'data_time': 0} == {**metrics[1], 'time': 0, 'data_time': 0}


def test_heads_that_are_not_known(detector, tool, tmp_path, capsys, monkeypatch):
    """Their rows stay where they are, so that classes in another order would be trained as others."""
    config, path = detector
    monkeypatch.setattr('densekit.engine.runner.plan_transfer', lambda *_: None)
    assert tool('train', config, '--work-dir', tmp_path, '--load-from', path, '--dry-run') == 2
    assert 'has other labels for the classes of the data set' in capsys.readouterr().err
