"""Every mistake that a user can make: one message on standard error, exit status 2, no traceback."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from densekit.engine.config import load_config

pytestmark = pytest.mark.usefixtures('quick_mmengine')

ROOT = Path(__file__).parents[2]
MASK_RCNN = ROOT / 'configs/detection/mask_rcnn_convnext_t_coco.py'
UPERNET = ROOT / 'configs/segmentation/upernet_convnext_t_ade20k.py'
NO_DOWNLOAD = 'model.backbone.init_cfg=None'


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """A folder without any data, where what a tool leaves behind is seen."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def mistake(tool, capsys):
    """Runs a tool that has to refuse, and gives its message."""

    def run(name, *argv):
        assert tool(name, *argv) == 2
        shown = capsys.readouterr().err
        assert 'Traceback' not in shown
        assert shown.count('error: ') == 1
        return shown[shown.index('error: ') :].removeprefix('error: ').strip()

    return run


@pytest.fixture(scope='module')
def weights(tiny, tmp_path_factory):
    """A checkpoint of the tiny detector."""
    from mmengine.registry import MODELS, DefaultScope

    cfg = load_config(tiny.det)
    path = tmp_path_factory.mktemp('weights') / 'det.pth'
    with DefaultScope.overwrite_default_scope('mmdet'):
        torch.save({'state_dict': MODELS.build(cfg.model).state_dict()}, path)
    return path


def test_an_unknown_arch(mistake):
    said = mistake('train', MASK_RCNN, '--cfg-options', 'model.backbone.arch=smal')
    assert said.startswith("arch 'smal' is unknown. Did you mean 'small'? Choose from atto, ")


def test_a_config_that_does_not_exist(mistake):
    said = mistake('train', str(MASK_RCNN).replace('mask_rcnn', 'maskrcnn'))
    assert 'maskrcnn_convnext_t_coco.py does not exist. Did you mean' in said
    assert said.endswith(f'{MASK_RCNN}?')
    assert 'does not exist' in mistake('test', 'nothing.py', 'nothing.pth')
    assert 'does not exist' in mistake('predict', 'nothing.py', 'nothing.pth', 'a.jpg', '--out', 'out')
    assert list(Path().iterdir()) == []


def test_a_config_with_a_mistake(mistake):
    Path('mine.py').write_text(f"_base_ = '{MASK_RCNN}'\nmodel = dict(backbone=dict(drop_path_rat=0.1))\n")
    assert 'model.backbone.drop_path_rat: did you mean drop_path_rate?' in mistake('train', 'mine.py')
    Path('mine.py').write_text(f"_base_ = '{MASK_RCNN}'\nmodel = dict(backbone=dict(arch='small')\n")
    said = mistake('train', 'mine.py')
    assert 'config mine.py cannot be read' in said
    assert 'line 2' in said
    said = mistake('train', MASK_RCNN, '--cfg-options', 'train_dataloder.batch_size=4')
    assert 'the config has no train_dataloder. Did you mean train_dataloader?' in said


def test_a_type_that_does_not_exist(mistake):
    said = mistake('train', MASK_RCNN, '--cfg-options', 'model.backbone.type=ConvNext')
    assert said.startswith('KeyError: ')
    assert 'ConvNext is not in the mmdet::model registry' in said


@pytest.mark.parametrize('config', [MASK_RCNN, UPERNET], ids=['COCO', 'ADE20K'])
def test_data_that_is_not_there(mistake, tmp_path, config):
    said = mistake('train', config, '--cfg-options', NO_DOWNLOAD)
    assert f'Relative paths start at {tmp_path}' in said
    if config == UPERNET:
        assert 'data/ade/ADEChallengeData2016/annotations/validation: no such folder' in said
        assert 'ADE20K (SceneParse150) is expected as\n  data/ade/ADEChallengeData2016/\n    images/training/' in said
        assert 'Download: http://data.csail.mit.edu' in said
    else:
        assert 'data/coco/annotations/instances_train2017.json: no such file' in said
        assert 'COCO 2017 is expected as\n  data/coco/\n    annotations/instances_train2017.json' in said
        assert 'https://cocodataset.org/#download' in said


def test_generated_data_of_other_parameters(mistake, tiny, tmp_path):
    shutil.copytree(tiny.data, tmp_path / 'data')
    options = [f'{loop}_dataloader.dataset.data_root={tmp_path}/data' for loop in ('train', 'val')]
    annotations = tmp_path / 'data/coco/annotations/instances_val.json'
    options += ['train_dataloader.dataset.shapes.size=32', f'val_evaluator.ann_file={annotations}']
    said = mistake('train', tiny.det, '--cfg-options', *options)
    assert f'{tmp_path}/data is not the shapes data set asked for' in said
    assert 'Delete this folder' in said


def test_a_checkpoint_that_cannot_be_used(mistake, tiny, weights):
    said = mistake('test', tiny.det, 'missing.pth')
    assert said.startswith('checkpoint missing.pth does not exist; give the path of a .safetensors or .pth file, ')

    Path('cut.pth').write_bytes(weights.read_bytes()[:100_000])
    for tool in ('test', 'predict'):
        said = mistake(tool, tiny.det, 'cut.pth', *(['a.jpg', '--out', 'out'] if tool == 'predict' else []))
        assert said.startswith('checkpoint cut.pth cannot be read (100,000 bytes)')
        assert 'Copy or download it again' in said
    assert 'checkpoint cut.pth cannot be read' in mistake('train', tiny.det, '--load-from', 'cut.pth')
    assert 'checkpoint cut.pth cannot be used: it is truncated' in mistake('train', tiny.det, '--resume=cut.pth')

    said = mistake('test', tiny.seg, weights)
    assert f'checkpoint {weights} does not fit the BatchedSlideEncoderDecoder of this config; nothing was' in said
    assert 'missing in the file: decode_head.' in said
    assert 'unknown to the model: neck.' in said
    assert 'Give the config that the checkpoint was trained with' in said


def test_weights_of_the_backbone_that_cannot_be_had(mistake, tiny, weights, monkeypatch):
    absent = [
        'model.backbone.init_cfg._delete_=True',
        'model.backbone.init_cfg.type=Pretrained',
        'model.backbone.init_cfg.checkpoint=absent.pth',
    ]
    assert mistake('train', tiny.det, '--cfg-options', *absent).startswith('checkpoint absent.pth does not exist')

    def offline(*_args, **_kwargs):
        raise OSError('no network')

    monkeypatch.setattr('backbones.files.urlopen', offline)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: 'cache')
    said = mistake('train', MASK_RCNN)
    assert 'convnext_tiny_1k_224.pth cannot be downloaded (no network). Put the file at cache/checkpoints/' in said


def test_weights_that_have_to_be_made_first(mistake, tmp_path):
    """The config says how; one that inherits it gets the same message. A file that is there goes to its reader."""
    recipe = ROOT / 'configs/segmentation/upernet_vit_s_ade20k.py'
    Path('mine.py').write_text(f'_base_ = {str(recipe)!r}\nmodel = dict(backbone=dict(num_layers=12))\n')
    for config in (recipe, 'mine.py'):
        said = mistake('train', config)
        assert said.startswith('model.backbone.init_cfg: checkpoint pretrain/deit_small_mmseg.pth does not exist.')
        _, command, address, other = said.splitlines()
        assert 'tools/model_converters/vit2mmseg.py' in command
        assert f'{command}\n{address}' in recipe.read_text()
        assert '--cfg-options model.backbone.init_cfg.checkpoint=FILE' in other
    said = mistake('train', recipe, '--cfg-options', 'model.backbone.init_cfg.checkpoint=other.pth')
    assert said.startswith('model.backbone.init_cfg: checkpoint other.pth does not exist. The file may lie elsewhere')
    Path('pretrain').mkdir()
    Path('pretrain/deit_small_mmseg.pth').write_bytes(b'no weights')
    assert mistake('train', recipe).startswith('checkpoint pretrain/deit_small_mmseg.pth')


def test_weights_of_the_backbone_are_not_fetched_when_others_replace_them(tool, tiny, weights, tmp_path):
    absent = ['model.backbone.init_cfg._delete_=True', 'model.backbone.init_cfg.type=Pretrained']
    absent += ['model.backbone.init_cfg.checkpoint=absent.pth', 'train_cfg.max_iters=1', 'train_cfg.val_interval=9']
    assert tool('train', tiny.det, '--work-dir', 'run', '--load-from', weights, '--cfg-options', *absent) == 0


def test_images_that_cannot_be_read(mistake, tiny, weights):
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save('good.png')
    Path('cut.png').write_bytes(Path('good.png').read_bytes()[:40])
    Path('text.jpg').write_text('no picture')
    Path('folder.png').mkdir()
    images = ['cut.png', 'good.png', 'missing.jpg', 'text.jpg', 'folder.png']
    said = mistake('predict', tiny.det, weights, *images, '--out', 'out').splitlines()
    assert said[0] == '4 of 5 images could not be read. The other 1 are in out.'
    assert [line.split()[1] for line in said[1:]] == ['cut.png', 'missing.jpg', 'text.jpg', 'folder.png']
    assert sorted(path.name for path in Path('out').iterdir()) == ['good.png', 'results.json']
    assert 'Nothing was predicted' in mistake('predict', tiny.det, weights, 'missing.jpg', '--out', 'nothing')
    assert not Path('nothing').exists()


def test_a_folder_that_cannot_be_written(mistake, tiny, weights):
    Path('file').write_text('in the way')
    for folder in ('file', 'file/below'):
        said = mistake('train', tiny.det, '--work-dir', folder)
        assert f'folder {folder} cannot be written' in said
        assert said.endswith('give another one: --work-dir FOLDER')
        assert f'folder {folder} cannot be written' in mistake('test', tiny.det, weights, '--work-dir', folder)
        said = mistake('predict', tiny.det, weights, 'good.png', '--out', folder)
        assert said.endswith('give another one: --out FOLDER')
    assert 'folder file cannot be written' in mistake('test', tiny.det, weights, '--out', 'file/metrics.json')
    Path('work_dirs').write_text('the default is in the way')
    assert 'folder work_dirs/tiny_det cannot be written' in mistake('train', tiny.det)


def test_mistakes_show_in_order(mistake, tmp_path):
    """Arguments, config and model, checkpoint, data: with all of them wrong, mending one shows the next."""
    Path('file').touch()
    steps = [
        ({'--load-from': ['--load-from', 'missing.pth']}, '--load-from starts a new run and --resume goes on'),
        ({'--work-dir': ['--work-dir', 'run']}, 'folder file/run cannot be written'),
        ({'options': ['model.backbone.arch=smal']}, "--cfg-options 'noequals' is no key=value"),
        ({'config': [MASK_RCNN]}, 'config nothing.py does not exist'),
        ({'options': ['model.backbone.arch=small']}, "arch 'smal' is unknown"),
        ({'--load-from': []}, 'checkpoint missing.pth does not exist'),
        ({'options': [NO_DOWNLOAD]}, 'cannot be downloaded'),
        ({}, 'Data that the config names is not there'),
    ]
    given = {
        'config': ['nothing.py'],
        '--load-from': ['--load-from', 'missing.pth', '--resume'],
        '--work-dir': ['--work-dir', 'file/run'],
        'options': ['noequals'],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'cache'))
        patch.setattr(torch.hub, 'download_url_to_file', _no_network)
        for mended, said in steps:
            argv = [*given['config'], *given['--load-from'], *given['--work-dir'], '--cfg-options', *given['options']]
            assert said in mistake('train', *argv)
            given.update(mended)


def _no_network(*_args, **_kwargs):
    raise OSError('no network')


def test_the_screen_of_a_user(command, tiny, monkeypatch):
    """The same from a terminal, where upstream's warnings and our log are on the screen too."""
    done = command(ROOT / 'tools/train.py', UPERNET, '--work-dir', 'run', '--cfg-options', NO_DOWNLOAD)
    assert done.returncode == 2
    assert 'Traceback' not in done.stdout + done.stderr
    assert 'error: Data that the config names is not there' in done.stderr
    assert 'System environment' not in done.stdout  # pages that would be between the message and the command
    assert len((done.stdout + done.stderr).splitlines()) < 60

    done = command(ROOT / 'tools/train.py', UPERNET, '--amp', 'fp32')
    assert done.returncode == 2
    assert "argument --amp: invalid choice: 'fp32'" in done.stderr


def test_the_traceback_on_demand(tool, capsys, monkeypatch):
    monkeypatch.setenv('DENSEKIT_TRACEBACK', '1')
    assert tool('train', MASK_RCNN, '--cfg-options', 'model.backbone.arch=smal') == 2
    shown = capsys.readouterr().err
    assert 'Traceback (most recent call last)' in shown
    assert 'backbones/convnext.py' in shown
    assert shown.rstrip().splitlines()[-1].startswith("error: arch 'smal' is unknown")
    assert sys.exc_info() == (None, None, None)
