"""No file given to us executes code: each kind of payload, at every door that reads such a file.

A payload makes a folder. First it is shown to work where it is let; then no door may make it. Folders of sharded
checkpoints, whose metadata are a pickle, are a kind of their own: their tests are beside those of their reader.
"""

import io
import os
import pickle
import zipfile
from email.message import Message

import mmengine
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import CheckpointLoader

import backbones.files
import densekit.engine.safe_files  # noqa: F401
from backbones import ConvNeXt, load_pretrained, read_checkpoint

pytestmark = pytest.mark.usefixtures('quick_mmengine')

ADDRESS = 'https://example.org/weights.pth'
NO_ADDRESS = 'cannot be used: it does not exist'  # what --resume says: a run goes on from a file


class Call:
    """Unpickles as the result of a call, whose function and arguments may be results of calls as well."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call

    def __call__(self):
        """So that a pickle takes it for a function."""


def get(owner, name):
    return Call(getattr, owner, name)


def reduce_exec(marker):
    return Call(os.mkdir, str(marker))


def getattr_chain(marker):
    """Names getattr and a class that checkpoints hold, nothing else, and gets from there to everything."""
    module = get(get(HistoryBuffer, '__init__'), '__globals__')
    builtins = Call(get(module, '__getitem__'), '__builtins__')
    run = Call(get(builtins, '__getitem__'), 'exec')
    return Call(run, f'import os; os.mkdir({str(marker)!r})')


def nested_bytes(marker):
    """A tensor's bytes that are a checkpoint, which torch reads without its restriction."""
    inner = io.BytesIO()
    torch.save(reduce_exec(marker), inner)
    return Call(torch.storage._load_from_bytes, inner.getvalue())


PICKLED = [reduce_exec, getattr_chain, nested_bytes]


@pytest.fixture
def marker(tmp_path):
    return tmp_path / 'marker'


def ran(marker):
    """Whether a payload ran; takes its trace away."""
    if marker.exists():
        marker.rmdir()
        return True
    return False


@pytest.fixture(scope='module')
def weights(tiny):
    """Of the model of the tiny detector's config, and the backbone's own."""
    cfg = Config.fromfile(tiny.det)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model).state_dict()


# Every door that takes a file of weights: called with its path, it returns a message, or raises.


def by_tool(name, *options):
    def door(path, tool, capsys, tiny, folder):
        arguments = [str(option).replace('FILE', str(path)).replace('FOLDER', str(folder)) for option in options]
        status = tool(name, *[tiny.det if argument == 'CONFIG' else argument for argument in arguments])
        screen = capsys.readouterr()
        assert (status, 'Traceback' in screen.err) == (2, False), screen.err
        return screen.err

    return door


def by_config(text):
    """``tools/train.py`` with a config that names the file."""

    def door(path, tool, capsys, tiny, folder):
        config = folder / 'names_it.py'
        config.write_text(f'_base_ = {tiny.det!r}\n{text.replace("FILE", str(path))}\n')
        return by_tool('train', str(config), '--work-dir', 'FOLDER/run')(path, tool, capsys, tiny, folder)

    return door


def by_call(function):
    def door(path, *_):
        with pytest.raises(ValueError) as error:
            function(str(path))
        return str(error.value)

    return door


PRETRAINED = "type='Pretrained', checkpoint='FILE'"
DOORS = {
    'read_checkpoint': by_call(read_checkpoint),
    'load_pretrained': by_call(lambda path: load_pretrained(ConvNeXt('atto'), path)),
    'train --load-from': by_tool('train', 'CONFIG', '--work-dir', 'FOLDER/run', '--load-from', 'FILE'),
    'train --resume': by_tool('train', 'CONFIG', '--work-dir', 'FOLDER/run', '--resume=FILE'),
    'train, init_cfg of the backbone': by_config(
        f'model = dict(backbone=dict(init_cfg=dict(_delete_=True, {PRETRAINED})))'
    ),
    'train, init_cfg of a module of mmdet': by_config(f'model = dict(neck=dict(init_cfg=dict({PRETRAINED})))'),
    'train, load_from of a config': by_config("load_from = 'FILE'"),
    'test': by_tool('test', 'CONFIG', 'FILE', '--work-dir', 'FOLDER/run'),
    'predict': by_tool('predict', 'CONFIG', 'FILE', 'image.png', '--out', 'FOLDER/out'),
    'weights convert': by_tool('weights', 'convert', 'FILE', 'FOLDER/out.safetensors'),
}


@pytest.fixture(params=DOORS)
def door(request, tool, capsys, tiny, tmp_path):
    return lambda path: DOORS[request.param](path, tool, capsys, tiny, tmp_path)


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'old format'])
@pytest.mark.parametrize('payload', PICKLED)
def test_the_payloads_work(payload, zipped, marker, tmp_path):
    """Where they are let; and torch's own restriction, which everything here rests on, stops them."""
    path = tmp_path / 'weights.pth'
    torch.save({'meta': payload(marker)}, path, _use_new_zipfile_serialization=zipped)
    torch.load(path, weights_only=False)
    assert ran(marker)
    with pytest.raises(ValueError, match='could run code'):
        read_checkpoint(path)
    assert not ran(marker)


@pytest.mark.parametrize('payload', PICKLED)
def test_a_checkpoint_with_a_payload(payload, door, weights, marker, tmp_path, monkeypatch):
    # What some put into their shell so that old files load; it must not reach ours.
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    path = tmp_path / 'weights.pth'
    torch.save({'state_dict': weights, 'meta': payload(marker)}, path)
    message = door(path)
    assert not ran(marker)
    assert str(path) in message
    assert 'could run code' in message
    assert 'weights_only' not in message  # torch's own message advises to switch the safety off


def test_mmengines_own_loader_of_weights_lets_it_run(marker, tmp_path, monkeypatch):
    """Why a module of mmdet is a door of its own."""
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    path = tmp_path / 'weights.pth'
    torch.save({'meta': reduce_exec(marker)}, path)
    with pytest.warns(UserWarning, match='TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'):
        mmengine.runner.checkpoint.load_from_local(str(path), 'cpu')
    assert ran(marker)
    with pytest.raises(ValueError, match='could run code'):
        CheckpointLoader.load_checkpoint(str(path))
    assert not ran(marker)


# Text in a checkpoint.

UNVALIDATED = ['val_cfg=None', 'val_dataloader=None', 'val_evaluator=None']


@pytest.fixture(scope='module')
def run(tiny, tmp_path_factory):
    """A checkpoint from which a run can go on."""
    folder = tmp_path_factory.mktemp('run')
    from densekit.engine.launch import train

    train(tiny.det, work_dir=str(folder), options=[*UNVALIDATED, 'train_cfg.max_iters=1'])
    return read_checkpoint(folder / 'iter_1.pth')


@pytest.mark.parametrize('meta', ['config', 'cfg'])
@pytest.mark.parametrize('arguments', [['--resume=FILE'], ['--load-from', 'FILE']], ids=' '.join)
def test_the_text_of_a_config_in_a_checkpoint(meta, arguments, run, tool, tiny, marker, tmp_path):
    text = f'made = __import__("os").mkdir({str(marker)!r})\n'
    Config.fromstring(text, '.py')  # as mmengine does with meta.config on resume
    assert ran(marker)
    path = tmp_path / 'weights.pth'
    torch.save({**run, 'meta': {**run['meta'], meta: text}}, path)
    given = [argument.replace('FILE', str(path)) for argument in arguments]
    tool('train', tiny.det, '--work-dir', tmp_path, *given, '--cfg-options', *UNVALIDATED, 'train_cfg.max_iters=2')
    assert not ran(marker)
    assert (tmp_path / 'iter_2.pth').is_file()  # it went past the place


# YAML and pickles of annotations.


def yaml_of(marker):
    return f'!!python/object/apply:os.mkdir [{marker}]\n'


def test_yaml_is_data(marker, tmp_path):
    path = tmp_path / 'annotations.yaml'
    path.write_text(yaml_of(marker))
    with path.open() as file:
        yaml.load(file, Loader=yaml.UnsafeLoader)
    assert ran(marker)
    with path.open() as file:
        mmengine.fileio.handlers.YamlHandler().load_from_fileobj(file)  # mmengine's, which ours replaces
    assert ran(marker)
    for load in (mmengine.load, Config.fromfile):
        with pytest.raises(ValueError, match=r'(?s)a YAML file cannot be read: .*python/object/apply.*Only plain data'):
            load(path)
    config = tmp_path / 'config.py'
    config.write_text("_base_ = './annotations.yaml'\n")
    with pytest.raises(ValueError, match='Only plain data'):
        Config.fromfile(config)
    assert not ran(marker)
    path.write_text('classes: [cat, dog]\nscale: 1.5\n')
    assert mmengine.load(path) == {'classes': ['cat', 'dog'], 'scale': 1.5}


@pytest.mark.parametrize('payload', PICKLED)
def test_a_pickle_is_data(payload, marker, tmp_path):
    path = tmp_path / 'annotations.pkl'
    path.write_bytes(pickle.dumps(payload(marker)))
    with path.open('rb') as file:
        mmengine.fileio.handlers.PickleHandler().load_from_fileobj(file)  # mmengine's, which ours replaces
    assert ran(marker)
    for kwargs in ({}, {'file_format': 'pkl'}, {'file_format': 'pickle'}):
        with pytest.raises(ValueError, match=r'a pickle is not read: .*which is no plain data.*save .* as JSON'):
            mmengine.load(path, **kwargs)
    assert not ran(marker)


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_are_read(protocol, tmp_path):
    """What data sets in OpenMMLab's format consist of."""
    import numpy as np

    boxes = np.arange(8, dtype=np.float32).reshape(2, 4)
    plain = {'metainfo': {'classes': ('a', 'b')}, 'data_list': [{'rle': b'x\x80', 'empty': b'', 'ids': {1}, 'n': 2.5}]}
    content = {**plain, 'boxes': boxes, 'width': np.int64(3)}
    (tmp_path / 'a.pkl').write_bytes(pickle.dumps(content, protocol=protocol))
    found = mmengine.load(tmp_path / 'a.pkl')
    assert {key: found[key] for key in plain} == plain
    assert np.array_equal(found['boxes'], boxes)
    assert found['boxes'].dtype == np.float32
    assert found['width'] == 3


DATASET = "dict(_delete_=True, type='BaseDetDataset', data_root='', ann_file='FILE', pipeline=[])"


@pytest.mark.parametrize('form', ['yaml', 'yml', 'pkl', 'pickle'])
def test_annotations_that_a_config_names(form, marker, tmp_path, tool, capsys, tiny):
    path = tmp_path / f'annotations.{form}'
    path.write_bytes(yaml_of(marker).encode() if form.startswith('y') else pickle.dumps(reduce_exec(marker)))
    message = by_config(f'train_dataloader = dict(dataset={DATASET})')(path, tool, capsys, tiny, tmp_path)
    assert not ran(marker)
    assert 'Only plain data' in message


@pytest.mark.parametrize('name', ['train', 'analyze'])
def test_a_config_in_yaml_is_not_taken(name, marker, tmp_path, tool, capsys):
    path = tmp_path / 'config.yaml'
    path.write_text(yaml_of(marker))
    assert tool(name, path) == 2
    assert 'is no .py file' in capsys.readouterr().err
    assert not ran(marker)


def test_a_metafile_beside_a_config(marker, tmp_path):
    from densekit.report.metafile import find_recipe

    (tmp_path / 'metafile.yml').write_text(f'recipes: {yaml_of(marker)}')
    with pytest.raises((ValueError, yaml.YAMLError), match='python/object/apply'):
        find_recipe(tmp_path / 'config.py')
    assert not ran(marker)


# Downloads.


class Response(io.BytesIO):
    headers = Message()

    def __init__(self, data, address):
        super().__init__(data)
        self.geturl = lambda: address


@pytest.fixture
def internet(weights, monkeypatch, tmp_path):
    """Serves good weights, from whatever address ``leads_to`` says; no hash of them is known."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    monkeypatch.delenv('DENSEKIT_WEIGHTS', raising=False)
    file = io.BytesIO()
    torch.save({'state_dict': weights}, file)
    leads_to = {}

    def urlopen(request, timeout):
        return Response(file.getvalue(), leads_to.get('address', request.full_url))

    monkeypatch.setattr(backbones.files, 'urlopen', urlopen)
    return leads_to


def test_a_redirect_to_http(internet, door, tmp_path):
    internet['address'] = 'http://elsewhere.org/weights.pth'
    message = door(ADDRESS)
    assert 'it leads to http://elsewhere.org/weights.pth, which is not https' in message or NO_ADDRESS in message
    assert not [path for path in (tmp_path / 'home').rglob('*.pth*') if path.suffix != '.lock']


def test_http_from_the_start(internet, door):
    message = door('http://example.org/weights.pth')
    assert 'only https:// addresses and files are read' in message or NO_ADDRESS in message


def test_without_the_redirect_it_is_read(internet):
    assert 'state_dict' in read_checkpoint(ADDRESS)


# Archives.


def test_a_member_of_an_archive_with_a_path_of_its_own(door, weights, tmp_path, marker):
    """A checkpoint is a zip; nothing of it is unpacked."""
    path, escape = tmp_path / 'inner' / 'weights.pth', '../marker'
    path.parent.mkdir()
    torch.save({'state_dict': weights}, tmp_path / 'good.pth')
    with zipfile.ZipFile(path, 'w') as archive:
        archive.write(tmp_path / 'good.pth', 'weights.pth')
        archive.writestr(escape, 'payload')
    with zipfile.ZipFile(path) as archive:
        (path.parent / escape).write_bytes(archive.read(escape))  # what a careless reader does
    assert marker.is_file()
    marker.unlink()
    before = set(tmp_path.rglob('*'))
    assert f'checkpoint {path}' in door(path)
    assert not marker.exists()
    assert not [new for new in set(tmp_path.rglob('*')) - before if new.name in ('good.pth', 'weights.pth')]


def test_a_good_checkpoint_with_such_a_member(weights, tmp_path, marker):
    path = tmp_path / 'inner' / 'weights.pth'
    path.parent.mkdir()
    torch.save({'state_dict': weights}, path)
    with zipfile.ZipFile(path, 'a') as archive:
        archive.writestr('weights/../../marker', 'payload')
    assert read_checkpoint(path)['state_dict'].keys() == weights.keys()
    assert not marker.exists()
    assert [found.name for found in path.parent.iterdir()] == ['weights.pth']
