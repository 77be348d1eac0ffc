"""Two processes write a checkpoint, each its part; run as a script this file is one of them."""

import errno
import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes

from backbones import ConvNeXt
from backbones.files import read_checkpoint
from densekit.cli import RunStopped
from densekit.engine import sharded_files, store
from densekit.engine.sharded_files import load_sharded, merge, outline, save_sharded
from densekit.engine.sharding import (
    gathered,
    load_full_optimizer_state,
    shard,
)

ROOT = Path(__file__).parents[2]
PROCESSES = 2


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, 'w')


class Net(nn.Module):
    """With GRN's (1, 1, 1, C), 33 channels for two processes, and statistics of BN."""

    def __init__(self):
        super().__init__()
        self.backbone = ConvNeXt(arch=dict(depths=(1, 1, 1, 1), channels=(8, 16, 24, 33)), use_grn=True)
        self.norm = nn.BatchNorm2d(33)


def net(seed):
    torch.manual_seed(seed)
    return Net()


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model, optimizer):
    """One step with gradients as they would come from a backward pass."""
    for i, parameter in enumerate(model.parameters()):
        torch.manual_seed(i)
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def content_of(model, optimizer):
    return {
        'state_dict': model.state_dict(),
        'optimizer': optimizer.state_dict(),
        'ema_state_dict': {'steps': torch.tensor(3), **{f'module.{k}': v * 2 for k, v in model.state_dict().items()}},
        'meta': {'iter': 5, 'text': 'é', 'list': [1, (2.5, None)]},
    }


def load(folder, model, optimizer):
    content = load_sharded(folder, model, optimizer)
    model.load_state_dict(content['state_dict'])
    load_full_optimizer_state(optimizer, content['optimizer'])
    return content


def failing(attempt):
    """The kind of error in this process, after which all are still in step."""
    try:
        attempt()
    except (Exception, RunStopped) as error:
        kind = type(error).__name__, str(error)
    else:
        kind = 'none', ''
    dist.barrier()
    return kind


def failures(folder, content):
    """What each process gets to know when one of them fails."""

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, 'No space left on device')

    rank, kinds = dist.get_rank(), {}
    tries = {
        'second cannot write': ((sharded_files._Writer, 'write_data'), 1),
        'first cannot finish': ((store, 'seal_folder'), 0),
        'no folder in common': ((sharded_files.Path, 'iterdir'), 0),
    }
    for name, (target, who) in tries.items():
        with pytest.MonkeyPatch.context() as patch:
            if rank == who:
                patch.setattr(*target, full if 'common' not in name else lambda _: [])
            kinds[name] = failing(lambda: save_sharded(folder, content, {'iter': 6}))
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(sharded_files, 'read_checkpoint', full)
        kinds['second cannot read'] = failing(lambda: load_sharded(folder))
    return kinds


def free_port():
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


def one_process(rank, work, port):
    """One of the two."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'tcp://127.0.0.1:{port}', rank=rank, world_size=PROCESSES)
    folder = work / 'iter_5'
    model = shard(net(0))
    optimizer = optimizer_of(model)
    train(model, optimizer)
    model.norm.running_mean += rank  # statistics differ between processes; the first's are saved
    content = content_of(model, optimizer)
    noted = {'saved': gathered(content)}
    save_sharded(folder, content, {'iter': 5, 'epoch': 1})

    other = shard(net(1))
    other_optimizer = optimizer_of(other)
    loaded = load(folder, other, other_optimizer)
    noted |= {
        'cut': [sum(isinstance(v, DTensor) for v in loaded[key].values()) for key in ('state_dict', 'ema_state_dict')],
        'parameters': len(list(other.parameters())),
        'loaded': gathered(loaded),
        'model': gathered(other.state_dict(keep_vars=True)),
        'optimizer': gathered(other_optimizer.state_dict()),
    }
    plain = net(2)
    plain_optimizer = optimizer_of(plain)
    load(folder, plain, plain_optimizer)
    noted['plain model'] = plain.state_dict(), plain_optimizer.state_dict()
    noted['kinds'] = failures(folder, content)
    noted['checkpoints'] = sorted(path.name for path in work.glob('iter*'))
    torch.save(noted, work / f'noted{rank}.pt')
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The folder with the checkpoint, and what each of the processes noted."""
    work = tmp_path_factory.mktemp('sharded')
    (work / 'iter_5').mkdir()
    (work / 'iter_5/old').write_text('of an earlier run')
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    done = subprocess.run(
        [sys.executable, __file__, str(work)], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return work / 'iter_5', [torch.load(work / f'noted{rank}.pt', weights_only=True) for rank in range(PROCESSES)]


@pytest.fixture
def folder(run, tmp_path):
    """A copy of the checkpoint to be damaged."""
    return Path(shutil.copytree(run[0], tmp_path / 'work' / 'iter_5'))


def assert_same(left, right):
    """Nested states are equal to the last bit, in the same order."""
    if isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    else:
        assert left == right


def test_what_is_loaded_is_what_was_saved(run):
    first = run[1][0]
    assert_same(first['loaded'], first['saved'])  # 0 ulp
    assert_same(first['model'], first['saved']['state_dict'])
    assert_same(first['optimizer'], first['saved']['optimizer'])
    with pytest.raises(AssertionError):
        assert_same(first['saved']['ema_state_dict'], first['saved']['state_dict'])


def test_each_process_reads_its_part_alone(run):
    for noted in run[1]:
        assert noted['cut'] == [noted['parameters']] * 2


def test_an_unsharded_model_takes_it(run):
    saved = run[1][0]['saved']
    for noted in run[1]:
        assert_same(noted['plain model'], (saved['state_dict'], saved['optimizer']))


def test_one_process_takes_it(run):
    model = net(3)
    optimizer = optimizer_of(model)
    content = load(run[0], model, optimizer)
    saved = run[1][0]['saved']
    assert_same(content, saved)
    assert_same(model.state_dict(), saved['state_dict'])
    assert_same(optimizer.state_dict(), saved['optimizer'])


def test_the_store_takes_it(run):
    folder, _ = run
    assert store.problem(folder) is None
    facts = store.facts_of(folder)
    assert (facts['iter'], facts['epoch']) == (5, 1)
    listed = {entry['file'] for entry in facts['files']}
    assert listed == {path.name for path in folder.iterdir()} - {'manifest.json'}  # nothing of the earlier run
    assert store.newest_valid(folder.parent) == (folder, [])


def test_the_outline_has_shapes_without_tensors(run):
    content, saved = outline(run[0]), run[1][0]['saved']
    assert {k: v.shape for k, v in content['state_dict'].items()} == {
        k: v.shape for k, v in saved['state_dict'].items()
    }
    assert content['state_dict']['backbone.stages.0.0.dwconv.weight'].is_meta
    assert content['meta'] == saved['meta']


def test_it_is_merged_into_one_file(run, tool, tmp_path, capsys):
    file = tmp_path / 'merged.pth'
    assert tool('weights', 'merge', run[0], file) == 0
    assert 'tensors put together from' in capsys.readouterr().out
    assert_same(read_checkpoint(file), run[1][0]['saved'])
    assert store.problem(file) is None
    assert store.facts_of(file)['iter'] == 5
    assert tool('weights', 'merge', run[0], file) == 2
    assert 'exists and is not overwritten' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('source', 'out', 'message'),
    [('nowhere', 'a.pth', 'is no folder'), ('.', 'a.pt', 'give a name that ends so: a.pth')],
)
def test_what_cannot_be_merged(source, out, message, tool, tmp_path, capsys):
    assert tool('weights', 'merge', tmp_path / source, tmp_path / out) == 2
    assert message in capsys.readouterr().err


def test_torchs_own_tools_can_read_the_tensors(run):
    name = 'backbone.stages.3.0.pwconv1.weight'
    saved = run[1][0]['saved']['state_dict'][name]
    content = {f'state_dict/{name}': torch.empty_like(saved)}
    with pytest.warns(UserWarning, match='a single process'):
        dcp.load(content, checkpoint_id=run[0], no_dist=True)
    assert torch.equal(content[f'state_dict/{name}'], saved)


def test_an_error_in_one_process_ends_all(run):
    first, second = (noted['kinds'] for noted in run[1])
    for kinds in (first, second):  # torch tells everybody
        kind, text = kinds['second cannot write']
        assert kind == 'CheckpointNotSaved'
        assert 'No space left on device. It needs' in text
    assert [first['first cannot finish'][0], second['first cannot finish'][0]] == ['CheckpointNotSaved', 'RunStopped']
    assert 'a folder that all nodes share' in first['no folder in common'][1]
    assert [first['second cannot read'][0], second['second cannot read'][0]] == ['RunStopped', 'OSError']
    assert run[1][0]['checkpoints'] == ['iter_5']
    assert store.problem(run[0]) is None  # what was there before is untouched


@pytest.mark.parametrize('name', ['__1_0.distcp', 'rest.pth', 'tensors.json'])
def test_damage_is_found(folder, tmp_path, name):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f'{name}: its sha256'):
        merge(folder, tmp_path / 'merged.pth')
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f'{name}: it does not exist'):
        load_sharded(folder)
    assert not (tmp_path / 'merged.pth').exists()


def test_a_folder_whose_saving_was_not_finished(folder):
    (folder / 'manifest.json').unlink()
    with pytest.raises(ValueError, match='its saving was not finished'):
        load_sharded(folder)


@pytest.mark.parametrize('done', [0, 1])
def test_a_crash_while_a_folder_is_replaced_leaves_one(folder, monkeypatch, done):
    working, calls, replace = store.partial(folder), [], os.replace
    shutil.copytree(folder, working)

    def crash(*paths):
        calls.append(paths)
        if len(calls) > done:
            raise KeyboardInterrupt
        replace(*paths)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, 'replace', crash)
        sharded_files._put_in_place(working, folder)
    store.clean(folder.parent)
    found, _ = store.newest_valid(folder.parent)
    assert found.name == ['iter_5', 'iter_5-replaced'][done]
    shutil.copytree(found, working)
    sharded_files._put_in_place(working, folder)  # the next save
    assert [path.name for path in folder.parent.iterdir()] == ['iter_5']


def test_the_description_of_the_tensors_is_never_unpickled(folder, tmp_path):
    (folder / '.metadata').write_bytes(pickle.dumps(Payload(tmp_path / 'ran')))
    store.seal_folder(folder, {})
    load_sharded(folder)
    merge(folder, tmp_path / 'merged.pth')
    assert not (tmp_path / 'ran').exists()
    dcp.FileSystemReader(folder).read_metadata()  # torch's own runs it
    assert (tmp_path / 'ran').exists()


def test_pickles_in_the_files_are_not_run(folder, tmp_path):
    written = io.BytesIO()
    torch.save({'payload': Payload(tmp_path / 'ran')}, written)
    rest = (folder / 'rest.pth').read_bytes()
    (folder / 'rest.pth').write_bytes(written.getvalue())
    store.seal_folder(folder, {})
    with pytest.raises(ValueError, match='holds Python objects that could run code'):
        load_sharded(folder)
    (folder / 'rest.pth').write_bytes(rest)
    described = json.loads((folder / 'tensors.json').read_text())
    (folder / '__0_0.distcp').write_bytes(written.getvalue())
    for tensor in described.values():
        tensor['parts'][0].update(file='__0_0.distcp', start=0, length=len(written.getvalue()))
    (folder / 'tensors.json').write_text(json.dumps(described))
    store.seal_folder(folder, {})
    with pytest.raises(ValueError, match='cannot be read'):
        load_sharded(folder)
    assert not (tmp_path / 'ran').exists()
    written.seek(0)
    torch.load(written, weights_only=False)
    assert (tmp_path / 'ran').exists()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(file='../secret.distcp'), 'outside the folder'),
        (dict(length=10), 'cannot be read'),
        (dict(offsets=[5, 0]), 'do not lie one behind the other'),
        (dict(size=[15, 8]), 'do not lie one behind the other'),
        (dict(size=[0, 8]), 'do not lie one behind the other'),
        (dict(size=None), 'is damaged'),
    ],
)
def test_a_description_that_cannot_be_right(folder, change, message):
    described = json.loads((folder / 'tensors.json').read_text())
    described['state_dict/backbone.stages.0.0.pwconv1.weight']['parts'][0].update(change)
    (folder / 'tensors.json').write_text(json.dumps(described))
    store.seal_folder(folder, {})
    with pytest.raises(ValueError, match=message):
        load_sharded(folder)


if __name__ == '__main__':
    # Forked, so that the imports are paid for once; nothing has started a thread yet.
    start_processes(one_process, (Path(sys.argv[1]), free_port()), PROCESSES, start_method='fork')
