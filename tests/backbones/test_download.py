"""Weights from addresses, folders and the catalogue: the whole and right file, or an error that says what to do."""

import dataclasses
import hashlib
import io
import multiprocessing
import re
import time
from email.message import Message
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import assert_equal, official, state
from safetensors.torch import save, save_file

import backbones.files
from backbones import ZOO, load_pretrained, read_checkpoint
from backbones.files import cached_copy, local_file

NAME = 'convnext_tiny.fb_in1k'
ADDRESS = 'https://example.org/a/weights.pth?x=1'


class Response(io.BytesIO):
    """What ``urlopen`` returns; ``says`` is the length in the header."""

    def __init__(self, data, address, says):
        super().__init__(data)
        self.address, self.headers = address, Message()
        if says is not None:
            self.headers['Content-Length'] = str(says)

    def geturl(self):
        return self.address


class Internet:
    """Stands for ``urlopen``: serves ``data`` and counts."""

    def __init__(self, data):
        self.data, self.asked = data, []
        self.says = len(data)
        self.leads_to = None

    def __call__(self, request, timeout):
        self.asked.append(request.full_url)
        return Response(self.data, self.leads_to or request.full_url, self.says)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty cache and no folder of weights."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    monkeypatch.delenv('DENSEKIT_WEIGHTS', raising=False)
    return tmp_path / 'home'


@pytest.fixture
def internet(source, monkeypatch):
    file = io.BytesIO()
    torch.save(official(source), file)
    internet = Internet(file.getvalue())
    monkeypatch.setattr(backbones.files, 'urlopen', internet)
    return internet


@pytest.fixture
def offline(monkeypatch):
    def refuse(request, timeout):
        raise OSError('no route to host')

    monkeypatch.setattr(backbones.files, 'urlopen', refuse)


def kept(home):
    return [path.name for path in home.rglob('*') if path.is_file() and path.suffix != '.lock']


def test_an_address_is_fetched_once(internet, home, source, target):
    for _ in range(2):
        load_pretrained(target, ADDRESS)
    assert_equal(target, state(source), ['stages.0.0.gamma'])
    assert internet.asked == [ADDRESS]
    assert kept(home) == ['weights.pth']


def test_files_of_one_name_from_two_hosts(internet):
    others = ADDRESS.replace('example', 'another.example')
    first, second = local_file(ADDRESS), local_file(others)
    assert first.name == second.name
    assert first != second
    assert internet.asked == [ADDRESS, others]


@pytest.mark.parametrize('part', [0.0, 0.5, 0.99])
def test_a_broken_connection_leaves_nothing(part, internet, home):
    internet.says = len(internet.data)
    whole = internet.data
    internet.data = whole[: int(part * len(whole))]
    with pytest.raises(ValueError, match=r'the connection broke after [\d,]+ of [\d,]+ bytes'):
        read_checkpoint(ADDRESS)
    assert kept(home) == []
    internet.data = whole
    assert 'model' in read_checkpoint(ADDRESS)  # and nothing of it is in the way


def test_a_redirect_to_http_is_refused(internet, home):
    internet.leads_to = 'http://example.org/a/weights.pth'
    with pytest.raises(ValueError, match=r'leads to http://example.org/a/weights.pth, which is not https'):
        read_checkpoint(ADDRESS)
    assert kept(home) == []


@pytest.mark.parametrize('scheme', ['http', 'ftp', 'openmmlab', 'torchvision', 'file'])
def test_only_https_addresses(scheme):
    with pytest.raises(ValueError, match=r'only https:// addresses and files are read'):
        read_checkpoint(f'{scheme}://example.org/weights.pth')


def test_offline_says_which_file_to_put_where(offline, tmp_path, monkeypatch, source):
    said = r'no route to host.*Put the file at (.*weights\.pth), or as weights\.pth into a folder'
    with pytest.raises(ValueError, match=said) as error:
        read_checkpoint(ADDRESS)
    place = Path(re.search(said, str(error.value))[1])
    torch.save(official(source), place)
    assert 'model' in read_checkpoint(ADDRESS)
    place.unlink()

    torch.save(official(source), tmp_path / 'weights.pth')
    monkeypatch.setenv('DENSEKIT_WEIGHTS', str(tmp_path))
    assert 'model' in read_checkpoint(ADDRESS)
    monkeypatch.setenv('DENSEKIT_WEIGHTS', str(tmp_path / 'nowhere'))
    with pytest.raises(ValueError, match=r'DENSEKIT_WEIGHTS names .*nowhere, which is no folder'):
        read_checkpoint(ADDRESS)


def test_a_name_of_the_catalogue(internet, target, source):
    internet.data = save({key: value.contiguous() for key, value in official(source)['model'].items()})
    internet.says = len(internet.data)
    load_pretrained(target, NAME)
    assert_equal(target, state(source), ['stages.0.0.gamma'])
    assert internet.asked == [ZOO[NAME].address]


def test_a_misspelt_name(offline):
    with pytest.raises(FileNotFoundError, match=r"convnext_tyni\.fb_in1k does not exist.*Did you mean 'convnext_tiny"):
        read_checkpoint('convnext_tyni.fb_in1k')


@pytest.mark.parametrize('form', ['file', 'folder', 'original'])
def test_a_catalogue_name_offline(form, offline, tmp_path, monkeypatch, source, target):
    with pytest.raises(ValueError, match=rf'weights {NAME}: .*no route to host.*as {NAME}\.') as error:
        load_pretrained(target, NAME)
    assert 'DENSEKIT_WEIGHTS' in str(error.value)
    weights = {key: value.contiguous() for key, value in official(source)['model'].items()}
    place = {
        'file': tmp_path / f'{NAME}.safetensors',
        'folder': tmp_path / NAME / 'model.safetensors',
        'original': tmp_path / ZOO[NAME].file,
    }[form]
    place.parent.mkdir(exist_ok=True)
    save_file(weights, place)
    monkeypatch.setenv('DENSEKIT_WEIGHTS', str(tmp_path))
    load_pretrained(target, NAME)
    assert_equal(target, state(source), ['stages.0.0.gamma'])


@pytest.mark.parametrize('right', [True, False])
@pytest.mark.parametrize('local', [True, False])
def test_the_checksum_of_the_catalogue(right, local, internet, home, tmp_path, monkeypatch):
    digest = hashlib.sha256(internet.data).hexdigest() if right else 64 * '0'
    entry = next(weights for weights in ZOO.values() if weights.address.endswith('.pth'))
    monkeypatch.setitem(ZOO, entry.name, dataclasses.replace(entry, sha256=digest[:8]))
    if local:
        (tmp_path / entry.file).write_bytes(internet.data)
        monkeypatch.setenv('DENSEKIT_WEIGHTS', str(tmp_path))
    if right:
        assert local_file(entry.name).is_file()
    else:
        with pytest.raises(ValueError, match=r'is not the published file: its sha256 is'):
            local_file(entry.name)
        assert kept(home) == []


def test_a_folder(source, target, tmp_path):
    weights = {key: value.contiguous() for key, value in official(source)['model'].items()}
    with pytest.raises(FileNotFoundError, match=r'folder without a file of weights'):
        load_pretrained(target, tmp_path)
    (tmp_path / 'config.json').write_text('{}')
    torch.save(weights, tmp_path / 'pytorch_model.bin')
    load_pretrained(target, tmp_path)
    save_file(weights, tmp_path / 'model.safetensors')  # preferred
    (tmp_path / 'pytorch_model.bin').write_text('no weights')
    assert_equal(target, state(source), load_pretrained(target, tmp_path).loaded)
    save_file(weights, tmp_path / 'another.safetensors')
    with pytest.raises(ValueError, match=r'several files of weights; give one: .*another\.safetensors, .*model'):
        load_pretrained(target, tmp_path)


def test_a_folder_with_parts(source, tmp_path):
    for i in (1, 2):
        save_file({'weight': torch.ones(1)}, tmp_path / f'model-0000{i}-of-00002.safetensors')
    with pytest.raises(ValueError, match=r'in several parts.*max_shard_size'):
        local_file(str(tmp_path))


def test_an_empty_name(tmp_path, monkeypatch, source):
    torch.save(official(source), tmp_path / 'weights.pth')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="checkpoint '' names nothing"):
        local_file('')


def test_a_cache_that_cannot_be_made(internet, tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'file'))
    with pytest.raises(ValueError, match=r'cannot be made .*TORCH_HOME names another place'):
        local_file(ADDRESS)


@pytest.mark.parametrize('form', ['folder', 'address'])
def test_the_checksum_holds_however_the_file_is_named(form, internet, tmp_path, monkeypatch, home):
    entry = dataclasses.replace(ZOO[NAME], sha256=64 * '0')
    monkeypatch.setitem(ZOO, NAME, entry)
    if form == 'folder':
        (tmp_path / NAME).mkdir()
        (tmp_path / NAME / 'model.safetensors').write_bytes(internet.data)
        monkeypatch.setenv('DENSEKIT_WEIGHTS', str(tmp_path))
    with pytest.raises(ValueError, match='is not the published file'):
        local_file(NAME if form == 'folder' else entry.address)
    assert kept(home) == []


def slow_download(results):
    """One of several processes that want the same file."""

    class Slow(Internet):
        def __call__(self, request, timeout):
            time.sleep(0.3)
            return super().__call__(request, timeout)

    internet = Slow(b'weights')
    backbones.files.urlopen = internet
    assert local_file(ADDRESS).read_bytes() == b'weights'
    results.put(len(internet.asked))


def test_of_several_processes_one_downloads(home):
    context = multiprocessing.get_context('fork')
    results = context.Queue()
    processes = [context.Process(target=slow_download, args=(results,)) for _ in range(3)]
    for process in processes:
        process.start()
    assert sorted(results.get(timeout=60) for _ in processes) == [0, 0, 1]
    for process in processes:
        process.join()
    assert kept(home) == [cached_copy(ADDRESS).name]


def test_a_pickle_on_an_older_torch(source, target, tmp_path, monkeypatch):
    torch.save(official(source), tmp_path / 'weights.pth')
    save_file(official(source)['model'], tmp_path / 'weights.safetensors')
    monkeypatch.setattr(torch, '__version__', '2.9.1')
    monkeypatch.delenv('DENSEKIT_TRUST_PICKLE', raising=False)
    with pytest.raises(ValueError, match=r'in torch 2\.9\.1 .*CVE-2026-24747.*DENSEKIT_TRUST_PICKLE=1'):
        load_pretrained(target, tmp_path / 'weights.pth')
    load_pretrained(target, tmp_path / 'weights.safetensors')
    load_pretrained(target, tmp_path / 'weights.pth', trust_pickle=True)
    monkeypatch.setenv('DENSEKIT_TRUST_PICKLE', '1')
    load_pretrained(target, tmp_path / 'weights.pth')
