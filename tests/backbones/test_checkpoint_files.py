"""Files that are damaged, missing or meant to do harm, and mmengine's own."""

import argparse
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_helpers import MINI, assert_equal, official, saved, state
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.runner import save_checkpoint

from backbones import ConvNeXt, load_pretrained, read_checkpoint


@pytest.mark.parametrize('content', [[1, 2], torch.ones(2)], ids=['list', 'tensor'])
def test_not_a_dictionary(content, tmp_path):
    with pytest.raises(ValueError, match=r'holds a (list|Tensor); expected a dictionary'):
        read_checkpoint(saved(content, tmp_path))


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('part', [0.0, 0.001, 0.1, 0.5, 0.999])
def test_truncated_file(part, zipped, source, tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save(official(source), path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(ValueError, match=r'(?s)weights\.pth.*(truncated|no PyTorch file)'):
        read_checkpoint(path)


@pytest.mark.parametrize('seed', range(20))
def test_damaged_file(seed, source, tmp_path):
    """Random bytes in the pickled part lead anywhere in the unpickler; the user always gets a ValueError."""
    path = tmp_path / 'weights.pth'
    torch.save(official(source), path, _use_new_zipfile_serialization=False)
    data = bytearray(path.read_bytes())
    generator = np.random.default_rng(seed)
    data[30:400] = generator.bytes(370)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r'weights\.pth'):
        read_checkpoint(path)


@pytest.mark.parametrize('name', ['page.pth', 'page.safetensors'])
def test_not_a_checkpoint_at_all(name, tmp_path):
    (tmp_path / name).write_text('<html>404 not found</html>\n' * 20)
    with pytest.raises(ValueError, match=name):
        read_checkpoint(tmp_path / name)


def test_missing_file(target, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'nothing\.pth does not exist'):
        load_pretrained(target, tmp_path / 'nothing.pth')


@pytest.mark.parametrize('error', [MemoryError(), torch.OutOfMemoryError('CUDA out of memory'), PermissionError(13)])
def test_a_sound_file_is_not_called_damaged(error, source, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    path = saved(official(source), tmp_path)
    monkeypatch.setattr(torch, 'load', fail)
    with pytest.raises(type(error)):
        read_checkpoint(path)


@pytest.mark.parametrize('scheme', ['http', 'ftp', 'openmmlab', 'torchvision'])
def test_only_https_addresses(scheme):
    with pytest.raises(ValueError, match=r'only https:// addresses and files are read'):
        read_checkpoint(f'{scheme}://example.org/weights.pth')


# Safety.


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


@pytest.mark.parametrize('zipped', [True, False])
def test_a_payload_does_not_run(zipped, source, tmp_path):
    marker = tmp_path / 'marker'
    path = tmp_path / 'weights.pth'
    torch.save({**official(source), 'meta': Payload(marker)}, path, _use_new_zipfile_serialization=zipped)
    torch.load(path, weights_only=False)
    assert marker.exists()  # the payload works where it is let
    marker.unlink()
    with pytest.raises(ValueError, match=r'could run code') as error:
        read_checkpoint(path)
    assert 'weights_only' not in str(error.value)  # torch's own message advises to switch the safety off
    model = ConvNeXt(MINI, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    with pytest.raises(ValueError, match=r'could run code'):
        model.init_weights()
    assert not marker.exists()


class Reach:
    """Unpickles as an attribute of something that is allowed."""

    def __init__(self, owner, name):
        self.reached = owner, name

    def __reduce__(self):
        return getattr, self.reached


@pytest.mark.parametrize(
    ('owner', 'name'),
    [
        (HistoryBuffer, 'register_statistics'),
        (HistoryBuffer, '__init__'),
        (np.ndarray, 'tofile'),
        (torch.Tensor, 'mean'),
    ],
)
def test_getattr_reaches_nothing_but_statistics(owner, name, tmp_path):
    with pytest.raises(ValueError, match=rf"getattr of '{name}' is not allowed"):
        read_checkpoint(saved({'model': {}, 'meta': Reach(owner, name)}, tmp_path))


def mmengine_checkpoint(model, path):
    """As mmengine writes it: loss histories in the message hub, NumPy scalars in the metadata."""
    hub = MessageHub('test_checkpoint')
    for value in (0.5, 0.25):
        hub.update_scalar('train/loss', value)
    hub.update_info('best', np.float64(0.5))
    meta = dict(epoch=1, iter=2, cfg='model = dict()', best_score=np.float32(0.5), palette=np.zeros(3, dtype=np.uint8))
    optimizer = torch.optim.AdamW(model.parameters())
    sum(out.sum() for out in model(torch.randn(1, 3, 32, 32))).backward()
    optimizer.step()
    content = dict(meta=meta, state_dict=model.state_dict(), message_hub=hub.state_dict())
    save_checkpoint({**content, 'optimizer': optimizer.state_dict()}, str(path))


def test_mmengine_checkpoint_is_read_safely(source, target, tmp_path):
    path = tmp_path / 'epoch_1.pth'
    mmengine_checkpoint(source, path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)  # which is why read_checkpoint allows what it allows
    content = read_checkpoint(path)
    history = content['message_hub']['log_scalars']['train/loss']
    assert history.data[0].tolist() == [0.5, 0.25]
    assert history.statistics('mean') == 0.375
    assert content['meta']['best_score'] == 0.5
    load_pretrained(target, path)
    assert_equal(target, state(source), state(source))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)  # and it allows it for its own reading only


def test_options_of_a_run_are_plain_data(source, target, tmp_path):
    content = {**official(source), 'args': argparse.Namespace(lr=4e-3, model='convnext_tiny')}
    path = saved(content, tmp_path)
    assert read_checkpoint(path)['args'].lr == 4e-3
    load_pretrained(target, path)


def test_mmengine_checkpoint_written_under_numpy_1(source, tmp_path):
    mmengine_checkpoint(source, tmp_path / 'new.pth')
    with zipfile.ZipFile(tmp_path / 'new.pth') as new, zipfile.ZipFile(tmp_path / 'old.pth', 'w') as old:
        assert any(b'numpy._core.multiarray' in new.read(name) for name in new.namelist())
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b'numpy._core.multiarray', b'numpy.core.multiarray'))
    content = read_checkpoint(tmp_path / 'old.pth')
    assert content['meta']['best_score'] == 0.5
