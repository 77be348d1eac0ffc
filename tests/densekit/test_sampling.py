"""What a sample becomes depends on seed, epoch and index alone."""

import itertools
import random
import re

import numpy as np
import pytest
import torch

import densekit.ops  # noqa: F401

# isort: split
from mmdet.datasets.samplers import MultiSourceSampler
from mmengine.dataset import BaseDataset, ConcatDataset, DefaultSampler, InfiniteSampler, pseudo_collate, worker_init_fn
from torch.utils.data import BatchSampler, DataLoader, Sampler

from densekit.data import sampling
from densekit.data.loader import RunLoader, WorkerError, run_loader
from densekit.data.sampling import KeyedBatches, NamedSamples, SampleError, SampleKey, seed_everything, seeded

SIZE, BATCH = 12, 2


class Noisy(BaseDataset):
    """Each sample is its index and a number from each of the three generators."""

    loaded: list[int] = []

    def __init__(self, broken=-1):
        self.broken = broken
        super().__init__(pipeline=[self.draw], serialize_data=False)

    def load_data_list(self):
        return [{'number': i, 'img_path': f'{i}.jpg'} for i in range(SIZE)]

    def draw(self, results):
        Noisy.loaded.append(results['number'])
        if results['number'] == self.broken:
            raise OSError('truncated')
        return results['number'], (random.random(), np.random.rand(), torch.rand(()).item())


def loader(endless=False, workers=0, persistent=False, seed=5, sampler=None, keyed=True, dataset=None, **kwargs):
    dataset = dataset or Noisy()
    sampler = sampler or (InfiniteSampler if endless else DefaultSampler)(dataset, shuffle=True, seed=1)
    plain = DataLoader(
        dataset,
        batch_sampler=BatchSampler(sampler, BATCH, drop_last=False),
        num_workers=workers,
        persistent_workers=persistent,
        collate_fn=pseudo_collate,
        **kwargs,
    )
    return run_loader(plain, seed, batches=KeyedBatches(plain.batch_sampler, endless) if keyed else None)


def epoch(built, number, batch=0):
    """The samples of an epoch by their index, and their order."""
    built.batch_sampler.sampler.set_epoch(number)
    built.batch_sampler.start_at(number, batch)
    samples = [(int(n), tuple(float(v) for v in values)) for n, values in map_batches(built)]
    return dict(samples), [n for n, _ in samples]


def map_batches(batches):
    for numbers, values in batches:
        yield from zip(numbers, zip(*values, strict=True), strict=True)


def test_workers_make_no_difference():
    expected = [epoch(loader(), number) for number in range(2)]
    for workers, persistent in [(1, False), (2, False), (2, True)]:
        built = loader(workers=workers, persistent=persistent)
        assert [epoch(built, number) for number in range(2)] == expected


def test_epochs_seeds_and_indices_differ():
    first, second = (epoch(loader(), number)[0] for number in range(2))
    other = epoch(loader(seed=6), 0)[0]
    values = [value for drawn in (first, second, other) for value in drawn.values()]
    assert len(set(values)) == 3 * SIZE
    for generator in range(3):  # each of the three by itself
        assert len({value[generator] for value in values}) == 3 * SIZE
    assert epoch(loader(), 1)[0] == second


def test_without_keys_every_epoch_is_the_same():
    """The negative control: mmengine's loader, whose workers are seeded when they start."""

    def plain():
        init = lambda worker: worker_init_fn(worker, 2, 0, 5)  # noqa: E731
        dataset = Noisy()
        sampler = DefaultSampler(dataset, shuffle=False)
        return DataLoader(
            dataset, BATCH, sampler=sampler, num_workers=2, worker_init_fn=init, collate_fn=pseudo_collate
        )

    first, second = (dict(map_batches(plain())) for _ in range(2))
    assert first == second


def test_a_later_start_gives_the_rest_and_loads_nothing_else():
    whole, order = epoch(loader(), 1)
    Noisy.loaded.clear()
    rest, rest_order = epoch(loader(), 1, batch=4)
    assert Noisy.loaded == rest_order == order[4 * BATCH :]
    assert rest == {number: whole[number] for number in rest_order}
    assert epoch(loader(), 1, batch=SIZE // BATCH)[0] == {}


def take(built, batches):
    stream = iter(built)
    return [next(stream) for _ in range(batches)]


def test_an_endless_sampler_starts_anywhere():
    total = 3 * SIZE // BATCH
    whole = take(loader(endless=True), total)
    for begin in (1, SIZE // BATCH, SIZE // BATCH + 2):
        later = loader(endless=True)
        later.batch_sampler.start_at(0, begin)
        assert take(later, total - begin) == whole[begin:]
    drawn = list(map_batches(whole))
    assert len({values for _, values in drawn}) == len(drawn)  # in its third epoch as well


def test_an_endless_run_of_a_finite_sampler():
    total = 3 * SIZE // BATCH
    sampler = DefaultSampler(Noisy(), shuffle=True, seed=1)
    whole = take(loader(endless=True, sampler=sampler), total)
    later = loader(endless=True, sampler=DefaultSampler(Noisy(), shuffle=True, seed=1))
    later.batch_sampler.start_at(0, SIZE // BATCH + 1)
    assert take(later, total - SIZE // BATCH - 1) == whole[SIZE // BATCH + 1 :]
    orders = [[n for n, _ in map_batches(whole[i : i + SIZE // BATCH])] for i in range(0, total, SIZE // BATCH)]
    assert len({tuple(order) for order in orders}) == 3


class Sources(Sampler):
    """Endless, of two sources in turn, as mmdet's MultiSourceSampler."""

    def __iter__(self):
        order = torch.Generator().manual_seed(7)
        while True:
            yield from torch.randperm(SIZE, generator=order).tolist()[: SIZE // 2]

    def __len__(self):
        return SIZE


def test_an_endless_sampler_of_another_kind_starts_anywhere():
    total = 3 * SIZE // BATCH
    whole = take(loader(endless=True, sampler=Sources()), total)
    for begin in (1, SIZE // BATCH, 2 * SIZE // BATCH + 1):
        later = loader(endless=True, sampler=Sources())
        later.batch_sampler.start_at(0, begin)
        assert take(later, total - begin) == whole[begin:]
    drawn = list(map_batches(whole))
    assert len({values for _, values in drawn}) == len(drawn)


def test_mmdets_sources_start_anywhere():
    def stream(begin=0):
        sampler = MultiSourceSampler(ConcatDataset([Noisy(), Noisy()]), 4, [1, 3], seed=3)
        batches = KeyedBatches(BatchSampler(sampler, 4, drop_last=False), endless=True)
        batches.start_at(0, begin)
        return itertools.islice(batches, 20 - begin)

    whole = list(stream())
    for begin in (5, 6, 11):
        assert list(stream(begin)) == whole[begin:]


def test_a_sampler_without_batches_is_no_endless_wait():
    for batches in (BatchSampler([], BATCH, drop_last=False), BatchSampler([1], BATCH, drop_last=True)):
        with pytest.raises(ValueError, match='the sampler gives no batch'):
            next(iter(KeyedBatches(batches, endless=True)))


class Frames:
    """Its samples have two indices, as those of mmdet's videos."""

    def __getitem__(self, index):
        assert isinstance(index, tuple)
        return index, (random.random(), np.random.rand(), torch.rand(()).item())

    def __len__(self):
        return 2


@pytest.mark.parametrize('workers', [0, 1])
def test_samples_of_two_indices(workers):
    indices = [(video, frame) for video in range(2) for frame in range(3)]

    def samples():
        built = loader(workers=workers, dataset=Frames(), sampler=indices)
        return [sample for batch in built for sample in zip(*batch[1], strict=True)]

    first = samples()
    assert first == samples()
    assert len({tuple(map(float, values)) for values in first}) == len(indices)


def test_errors_of_samples_of_two_indices():
    with pytest.raises(SampleError, match=r'^sample \(1, 2\) cannot be used: TypeError'):
        NamedSamples(Division(), 0)[SampleKey((1, 2), 0, 0)]


class Sifted(Noisy):
    """Of samples below a number nothing is left."""

    def __init__(self, lost):
        self.lost = lost
        super().__init__()

    def draw(self, results):
        return None if results['number'] < self.lost else super().draw(results)


def told(built, monkeypatch):
    """What is logged of an epoch."""
    lines = []
    monkeypatch.setattr(sampling, 'print_log', lambda text, *args: lines.append(text))
    list(built)
    built.dataset.tell_lost()
    return lines


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('wrap', [lambda dataset: dataset, lambda dataset: ConcatDataset([dataset, Noisy()])])
def test_samples_that_come_to_nothing_are_counted(monkeypatch, workers, wrap):
    dataset = wrap(Sifted(2))
    built = loader(workers=workers, dataset=dataset, persistent=workers > 0)
    for number in range(2):  # each counted anew
        built.batch_sampler.start_at(number, 0)
        (text,) = told(built, monkeypatch)
        lost, prepared = map(int, re.match(r'(\d+) of (\d+) samples came to nothing', text).groups())
        assert lost >= 2 and prepared == len(dataset) + lost  # those put in their place may be lost as well
    assert told(loader(workers=workers), monkeypatch) == []


def test_most_of_the_data_lost_is_an_error(monkeypatch):
    with pytest.raises(SampleError, match=r'^\d+ of \d+ samples came to nothing .* which transform'):
        told(loader(dataset=Sifted(10)), monkeypatch)
    assert len(told(loader(dataset=Sifted(3)), monkeypatch)) == 1


class Twice:
    """A sampler that draws every index twice, as one that balances classes does."""

    def __iter__(self):
        return iter([i for i in range(SIZE) for _ in range(2)])

    def __len__(self):
        return 2 * SIZE

    def set_epoch(self, number):
        pass


def test_repeated_draws_differ():
    drawn = list(map_batches(loader(sampler=Twice())))
    assert len(drawn) == len({values for _, values in drawn}) == 2 * SIZE
    assert drawn == list(map_batches(loader(sampler=Twice(), workers=2)))


def keys_of(monkeypatch, rank, processes, batches, size=SIZE):
    for module in (sampling, 'mmengine.dataset.sampler'):
        name = module if isinstance(module, str) else module.__name__
        for function, value in (('rank', rank), ('world_size', processes)):
            patched = 'get_dist_info' if isinstance(module, str) else f'get_{function}'
            answer = (rank, processes) if isinstance(module, str) else value
            monkeypatch.setattr(f'{name}.{patched}', lambda answer=answer: answer)
    sampler = InfiniteSampler(list(range(size)), shuffle=True, seed=1)
    stream = iter(KeyedBatches(BatchSampler(sampler, BATCH, drop_last=False), endless=True))
    return [next(stream) for _ in range(batches)]


@pytest.mark.parametrize('size', [12, 13])
def test_processes_share_the_epochs_of_an_endless_sampler(monkeypatch, size):
    """Of every epoch each index is drawn once, by one of the processes, and so one process draws the same."""
    two = [key for rank in range(2) for batch in keys_of(monkeypatch, rank, 2, 26, size) for key in batch]
    alone = [key for batch in keys_of(monkeypatch, 0, 1, 52, size) for key in batch]
    assert sorted(two) == sorted(alone)
    for number in range(104 // size):
        assert [key.sample for key in sorted(alone) if key.epoch == number] == list(range(size))
    assert {key.repeat for key in alone} == {0}


def test_generators_are_put_back():
    seed_everything(1)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    seed_everything(1)
    with seeded(9):
        inside = random.random(), np.random.rand(), torch.rand(()).item()
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected
    assert not set(inside) & set(expected)


def test_a_step_and_a_sample_share_no_numbers():
    seed_everything(5, 2, 0, 1, 0)  # of a step: seed, iteration, rank and two more
    step = random.random(), np.random.rand(), torch.rand(()).item()
    with seeded(5, 2, 0, 1):  # of a sample: seed, epoch, index, repeat
        assert not {random.random(), np.random.rand(), torch.rand(()).item()} & set(step)


def test_errors_name_the_file():
    message = r'sample 3 \(.*3.jpg\) cannot be used: OSError: truncated'
    for workers in (0, 1):
        with pytest.raises(SampleError, match=f'^{message}$'):
            list(loader(workers=workers, dataset=Noisy(broken=3)))
    for workers in (0, 1):  # texts of several lines stay whole
        with pytest.raises(SampleError, match=r'^sample 0 cannot be used: ValueError: first\nsecond$'):
            list(loader(workers=workers, dataset=Lines(), sampler=range(2)))
    with pytest.raises(SampleError, match=r'^sample 1 cannot be used: ZeroDivisionError'):
        NamedSamples(Division(), 0)[SampleKey(1, 0, 0)]


class Lines:
    def __getitem__(self, index):
        raise ValueError('first\nsecond')

    def __len__(self):
        return 2


def test_other_errors_of_workers_stay_what_they_are():
    built = loader(workers=1)
    built.collate_fn = uncollatable
    with pytest.raises(RuntimeError, match=r'Caught RuntimeError in DataLoader worker(?s:.*)unequal') as raised:
        list(built)
    assert not isinstance(raised.value, WorkerError)


def uncollatable(samples):
    raise RuntimeError('unequal sizes')


class Division:
    def __getitem__(self, index):
        return index / 0

    def __len__(self):
        return 2


def test_the_data_set_shows_through():
    samples = loader().dataset
    assert samples.metainfo == {}
    assert samples.get_data_info(2)['img_path'] == '2.jpg'
    samples.pipeline = 'exchanged'
    assert samples.inner.pipeline == 'exchanged'
    with pytest.raises(AttributeError):
        samples.nothing  # noqa: B018


def first_worker(worker):
    torch.manual_seed(worker)


def test_spawned_workers():
    """Workers that begin with nothing of this process; epochs go on with those that are there."""
    built = loader(workers=1, persistent=True, multiprocessing_context='spawn', worker_init_fn=first_worker)
    assert isinstance(built, RunLoader)
    assert epoch(built, 0) == epoch(loader(), 0)
    (before,) = built.workers
    assert epoch(built, 1) == epoch(loader(), 1)
    assert built.workers == [before]
    built.kill_workers()
    assert not before.is_alive()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_pinned_memory():
    built = loader(workers=2, persistent=True, pin_memory=True)
    for number in range(2):
        assert epoch(built, number) == epoch(loader(), number)
    built.kill_workers()


def test_a_dead_worker_is_told_with_its_sample():
    built = loader(workers=1, endless=True)
    stream = iter(built)
    next(stream)
    built.workers[0].kill()
    with pytest.raises(WorkerError, match=r'worker 0: sample \d+ \(\d+.jpg\)'):
        for _ in range(10):
            next(stream)
    assert not any(worker.is_alive() for worker in built.workers)
