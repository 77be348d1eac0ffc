"""The catalogue on the command line; what would come from the network is made here."""

import io
import re
from email.message import Message
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

import backbones.files
import densekit
from backbones import ConvNeXt, load_pretrained
from backbones.zoo import ZOO

ROOT = Path(__file__).parents[2]
MINI = dict(depths=(1, 2, 3, 1), channels=(8, 16, 24, 32))
CONTENT = save({'weight': torch.arange(6.0)})


class Response(io.BytesIO):
    """What urlopen gives."""

    headers = Message()

    def __init__(self, address):
        super().__init__(CONTENT)
        self.address = address

    def geturl(self):
        return self.address


@pytest.fixture(autouse=True)
def downloads(tmp_path, monkeypatch):
    """The addresses asked for, in a folder without weights."""
    asked = []

    def urlopen(request, **_kwargs):
        asked.append(request.full_url)
        return Response(request.full_url)

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('DENSEKIT_WEIGHTS', raising=False)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'cache'))
    monkeypatch.setattr(backbones.files, 'urlopen', urlopen)
    monkeypatch.setattr(backbones.files, 'print_log', lambda *_, **__: None)  # to the stream of an earlier test
    return asked


@pytest.fixture
def weights(tool, capsys):
    """Runs the tool and gives what it printed."""

    def run(*argv, status=0):
        assert tool('weights', *argv) == status
        shown = capsys.readouterr()
        assert 'Traceback' not in shown.err
        return shown.err if status else shown.out

    return run


def mini(**kwargs):
    """A small ConvNeXt whose every value differs from a fresh one's."""
    model = ConvNeXt(MINI, **{'layer_scale_init_value': 0.5, **kwargs})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return model


def openmmlab(model):
    """The weights of a detector as OpenMMLab names them."""
    names = {'dwconv': 'depthwise_conv', 'pwconv1': 'pointwise_conv1', 'pwconv2': 'pointwise_conv2'}
    state = model.state_dict()
    renamed = {re.sub('|'.join(names), lambda match: names[match[0]], key): value for key, value in state.items()}
    return {
        'meta': {'epoch': 12},
        'state_dict': {
            **{f'backbone.{key}': value.clone() for key, value in renamed.items()},
            'neck.lateral_convs.0.conv.weight': torch.ones(4, 8, 1, 1),
            'rpn_head.rpn_conv.bias': torch.ones(4),
        },
    }


def test_list_is_one_line_for_each_within_the_screen(weights, downloads):
    lines = weights('list').splitlines()
    assert [line.split()[0] for line in lines[2:-3]] == list(ZOO)
    assert max(map(len, lines)) <= 120
    assert lines[2].split() == ['convnext_tiny.fb_in1k', 'ImageNet-1k', '224', '27.8', '82.1', 'apache-2.0']
    assert f'{len(ZOO)} of {len(ZOO)}.' in lines[-2]
    assert downloads == []


@pytest.mark.parametrize('pattern', ['tv_in1k', '*TINY*_in22k_*384', 'v2_huge'])
def test_list_of_a_part(weights, pattern):
    names = [line.split()[0] for line in weights('list', pattern).splitlines()[2:-3]]
    expected = {
        'tv_in1k': [f'convnext_{size}.tv_in1k' for size in ('tiny', 'small', 'base', 'large')],
        '*TINY*_in22k_*384': ['convnext_tiny.fb_in22k_ft_in1k_384', 'convnextv2_tiny.fcmae_ft_in22k_in1k_384'],
        'v2_huge': [name for name in ZOO if name.startswith('convnextv2_huge')],
    }
    assert names == expected[pattern]


def test_list_of_nothing(weights):
    said = weights('list', 'convnext_tiny_1k_224', status=2)
    assert said.startswith("error: no name of the catalogue has 'convnext_tiny_1k_224' in it. Did you mean 'convnext_")
    assert '`python tools/weights.py list` shows all' in said


@pytest.mark.parametrize('name', ['convnextv2_atto.fcmae', 'convnext_xxlarge.clip_laion2b_soup'])
def test_show_has_the_lines_for_a_config(weights, name):
    shown = weights('show', name)
    for value in (ZOO[name].address, ZOO[name].license, f'{ZOO[name].parameters:,}', f'{ZOO[name].resolution} px'):
        assert value in shown
    lines = re.search(r'(backbone=dict\(.*\),)\n\n', shown, re.DOTALL)[1]
    model = eval(f'dict({lines})', {'__builtins__': {}, 'dict': dict})
    assert tuple(map(tuple, model['data_preprocessor'].values())) == ZOO[name].normalization
    backbone = model['backbone']
    assert backbone.pop('init_cfg') == dict(type='Pretrained', checkpoint=name)
    assert backbone == dict(type='ConvNeXt', **ZOO[name].kwargs)


def test_show_says_where_a_copy_lies(weights, monkeypatch):
    name = 'convnext_tiny.fb_in1k'
    shown = weights('show', name)
    assert re.search('local copy +none\n', shown)
    assert shown.endswith(
        'put the file into a folder, name that in DENSEKIT_WEIGHTS, and call it\n  convnext_tiny.fb_in1k.safetensors\n'
    )
    weights('fetch', name)
    assert re.search(r'local copy +\S+cache/checkpoints/\w+/model\.safetensors\n', weights('show', name))
    Path('mine').mkdir()
    Path('mine', f'{name}.pth').touch()
    monkeypatch.setenv('DENSEKIT_WEIGHTS', 'mine')
    shown = weights('show', name)
    assert re.search(f'local copy +mine/{name}.pth\n', shown)
    assert 'put the file into mine (DENSEKIT_WEIGHTS) and call it\n' in shown


def test_fetch_says_where_and_under_which_license(weights, downloads):
    names = ['convnext_tiny.dinov3_lvd1689m', 'convnext_base.fb_in22k_pth']
    lines = weights('fetch', *names).splitlines()
    assert [line for line in lines if 'license' in line] == lines[-2:]
    for name, line in zip(names, lines[-2:], strict=True):
        path = re.fullmatch(rf'{name}: (\S+) \(0\.0 MB\), license {ZOO[name].license}', line)[1]
        assert Path(path).read_bytes() == CONTENT
    assert downloads == [ZOO[name].address for name in names]
    weights('fetch', *names)
    assert len(downloads) == 2


def test_fetch_to_a_folder_that_another_machine_reads(weights, downloads, monkeypatch, tmp_path):
    names = ['convnext_tiny.fb_in22k', 'convnext_small.fb_in22k', 'convnext_base.fb_in22k_pth']
    shown = weights('fetch', *names, '--to', 'usb/weights')
    assert 'convnext_small.fb_in22k: usb/weights/convnext_small.fb_in22k.safetensors (' in shown
    assert shown.endswith('DENSEKIT_WEIGHTS=usb/weights makes them found there.\n')
    assert sorted(path.name for path in Path('usb/weights').iterdir()) == sorted(ZOO[name].file for name in names)

    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'elsewhere'))
    monkeypatch.setenv('DENSEKIT_WEIGHTS', 'usb/weights')
    for name in names:
        assert backbones.files.local_file(name) == Path('usb/weights', ZOO[name].file)
    weights('fetch', *names, '--to', 'usb/weights')
    assert len(downloads) == len(names)


def test_names_are_checked_before_the_first_download(weights, downloads):
    said = weights('fetch', 'convnext_tiny.fb_in1k', 'convnext_small.fb_in1', status=2)
    assert said.startswith("error: 'convnext_small.fb_in1' is not in the catalogue of weights. Did you mean 'convnext_")
    assert "error: 'nothing' is not in the catalogue of weights. `python" in weights('show', 'nothing', status=2)
    Path('file').touch()
    said = weights('fetch', 'convnext_tiny.fb_in1k', '--to', 'file', status=2)
    assert 'folder file cannot be written' in said
    assert said.endswith('give another one: --to FOLDER\n')
    assert downloads == []


def test_fetch_without_a_connection(weights, monkeypatch):
    def urlopen(*_args, **_kwargs):
        raise OSError('no network')

    monkeypatch.setattr(backbones.files, 'urlopen', urlopen)
    said = weights('fetch', 'convnext_tiny.fb_in1k', '--to', 'weights', status=2)
    assert 'cannot be downloaded (no network)' in said
    assert 'DENSEKIT_WEIGHTS' in said
    assert list(Path('weights').iterdir()) == []


@pytest.mark.parametrize('use_grn', [False, True])
def test_converted_weights_are_those_of_the_source(weights, use_grn):
    source = mini(use_grn=use_grn)
    torch.save(openmmlab(source), 'detector.pth')
    said = weights('convert', 'detector.pth', 'ours.safetensors')
    size = sum(value.numel() for value in source.state_dict().values())
    assert said == (
        f'ours.safetensors: {len(source.state_dict())} tensors, {size:,} values, from openmmlab names; '
        '2 tensors left out on purpose: neck.lateral_convs.0.conv.weight, rpn_head.rpn_conv.bias\n'
    )
    assert not list(Path().glob('.partial*'))
    Path('plain').touch()
    assert Path('ours.safetensors').stat().st_mode == Path('plain').stat().st_mode

    target = mini(use_grn=use_grn)
    report = load_pretrained(target, 'ours.safetensors')
    assert report.missing == report.dropped == report.reshaped == []
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key
    with safe_open('ours.safetensors', 'pt') as file:
        assert file.metadata() == dict(
            format='pt', source_format='openmmlab', source_file='detector.pth', densekit_version=densekit.__version__
        )


def test_converted_weights_of_the_catalogue_keep_their_license(weights, monkeypatch):
    name = 'convnext_base.eupe_lvd1689m'
    monkeypatch.setenv('DENSEKIT_WEIGHTS', '.')
    torch.save(mini().state_dict(), f'{name}.pth')
    assert weights('convert', name, 'ours.safetensors').endswith('from official names; nothing left out\n')
    with safe_open('ours.safetensors', 'pt') as file:
        assert file.metadata()['source_name'] == name
        assert file.metadata()['license'] == 'fair-noncommercial-research-license'


def test_convert_refuses_before_it_reads(weights):
    Path('there.safetensors').write_text('kept')
    for out, reason in (
        ('there.safetensors', 'there.safetensors exists and is not overwritten; delete it or give another name'),
        ('missing/out.safetensors', 'there is no folder missing; make it or give another one'),
        ('out.pth', 'weights are written as safetensors; give a name that ends so: out.safetensors'),
    ):
        assert reason in weights('convert', 'nothing.pth', out, status=2)
    assert Path('there.safetensors').read_text() == 'kept'
    assert 'checkpoint nothing.pth does not exist' in weights('convert', 'nothing.pth', 'out.safetensors', status=2)


def test_convert_leaves_nothing_behind_a_failure(weights, monkeypatch):
    torch.save({'layer.weight': torch.ones(2)}, 'other.pth')
    said = weights('convert', 'other.pth', 'out.safetensors', status=2)
    assert said.startswith('error: checkpoint other.pth: these are not the weights of a ConvNeXt')

    def full(_tensors, path, **_kwargs):
        Path(path).write_bytes(b'half of it')
        raise OSError('no space left on device')

    torch.save(mini().state_dict(), 'mine.pth')
    monkeypatch.setattr('densekit.weight_commands.save_file', full)
    assert 'no space left' in weights('convert', 'mine.pth', 'out.safetensors', status=2)
    assert sorted(path.name for path in Path().iterdir()) == ['mine.pth', 'other.pth']


def test_the_screen_of_a_user(command):
    done = command(ROOT / 'tools/weights.py', 'list', 'atto')
    assert done.returncode == 0, done.stderr
    assert done.stderr == ''
    assert done.stdout.count('convnext') == len([name for name in ZOO if 'atto' in name])
    done = command(ROOT / 'tools/weights.py')
    assert done.returncode == 2
    assert 'the following arguments are required: COMMAND' in done.stderr


def test_help_needs_nothing_but_the_standard_library(command):
    code = f'import sys, runpy; sys.argv = ["weights.py", "--help"]; runpy.run_path({str(ROOT / "tools/weights.py")!r}'
    code += ', run_name="__main__")'
    done = command('-X', 'importtime', '-c', code)
    assert done.returncode == 0
    assert 'convert' in done.stdout
    assert 'densekit.cli' in done.stderr
    assert not re.search(r'\| +(torch|mmengine|backbones)\b', done.stderr)
