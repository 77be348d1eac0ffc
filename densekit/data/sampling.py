"""Reproducible samples: what a sample becomes depends on seed, epoch and index alone, and a run can begin anywhere.

Nothing about data workers needs saving, because a sample's random numbers are seeded right before its transforms run:
they differ from epoch to epoch, and are the same for any number of workers, persistent or not, and after a resume.
(mmengine seeds workers when they start: without persistent workers each epoch repeats the augmentation of the first,
with them a resumed epoch does.)
"""

import itertools
import logging
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.dataset import BaseDataset
from mmengine.dist import get_rank, get_world_size
from mmengine.logging import print_log
from torch.utils.data import Dataset, Sampler, get_worker_info

# Samples below which nothing is concluded from the share of them that came to nothing.
_ENOUGH = 20


class SampleKey(NamedTuple):
    """Names one use of one sample.

    Attributes:
        sample: its index in the data set; several for samples within samples, such as frames of videos.
        epoch: how often the data set has been gone through before.
        repeat: how often this process has used this index in this epoch before, for samplers that draw one repeatedly.
    """

    sample: int | tuple[int, ...]
    epoch: int
    repeat: int


class SampleError(ValueError):
    """A sample cannot be read, transformed or scored; the text names its file."""


def seed_everything(*entropy: int) -> None:
    """Seeds Python's, NumPy's and torch's global generators, those of CUDA included, from any number of integers."""
    torch.manual_seed(_seed_all_but_torch(entropy))


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seeds the generators of the CPU within this context and puts them back as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    torch.default_generator.manual_seed(_seed_all_but_torch(entropy))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _seed_all_but_torch(entropy: tuple[int, ...]) -> int:
    """Seeds Python's and NumPy's generators, and returns the seed for torch's."""
    state = np.random.SeedSequence(entropy).generate_state(4)
    random.seed(int(state[0]) << 32 | int(state[1]))
    np.random.seed(state)
    return (int(state[2]) << 32 | int(state[3])) >> 1


class NamedSamples(Dataset):
    """A data set whose samples are reproducible, and whose errors name the file; all else is the inner data set's.

    Args:
        inner: any data set with an index.
        seed: of the run.
        num_workers: of the data loader.
    """

    _OWN = ('inner', 'seed', 'reading', 'outcomes')

    def __init__(self, inner: Any, seed: int, num_workers: int = 0) -> None:
        self.inner = inner
        self.seed = seed
        # Which index each worker is at, seen by the main process too: a worker that is killed cannot tell any more.
        self.reading = torch.full((max(num_workers, 1),), -1, dtype=torch.int64).share_memory_()
        # By worker: how often a sample was prepared, and how often that came to nothing.
        self.outcomes = torch.zeros((max(num_workers, 1), 2), dtype=torch.int64).share_memory_()
        for dataset in _base_datasets(inner):
            # Seen from within, as mmengine's BaseDataset takes another sample at random and says nothing.
            dataset.prepare_data = partial(_prepare, self.outcomes, dataset)

    def __getitem__(self, key: SampleKey | int | tuple[int, ...]) -> Any:
        index = key.sample if isinstance(key, SampleKey) else key
        self.reading[_worker()] = -1 if isinstance(index, tuple) else index
        try:
            if not isinstance(key, SampleKey):
                return self.inner[index]
            with seeded(self.seed, *_entropy(key)):
                return self.inner[index]
        except Exception as error:
            raise SampleError(f'{self.name(index)} cannot be used: {type(error).__name__}: {error}') from error

    def __len__(self) -> int:
        return len(self.inner)

    def tell_lost(self) -> None:
        """Logs how many samples came to nothing since the last call, in this process and its workers.

        mmengine's BaseDataset replaces a sample of which the transforms leave nothing by another, at random.

        Raises:
            SampleError: if that was most of them.
        """
        prepared, lost = self.outcomes.sum(dim=0).tolist()
        self.outcomes.zero_()
        if not lost:
            return
        text = (
            f'{lost:,} of {prepared:,} samples came to nothing in their transforms; others, at random, took their place'
        )
        if prepared >= _ENOUGH and lost > prepared / 2:
            raise SampleError(
                f'{text}. That is most of the data: see which transform of train_dataloader.dataset.pipeline returns '
                'None (a filter of boxes or a crop that is too strict, or images that cannot be read).'
            )
        print_log(text, 'current', logging.WARNING)

    def name(self, index: int | tuple[int, ...]) -> str:
        """``sample 17 (train2017/000000000072.jpg)``, for messages."""
        try:
            info = self.inner.get_data_info(index)
            return f'sample {index} ({info["img_path"]})'
        except Exception:  # a data set of any kind; its index is all that is known
            return f'sample {index}'

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__') or name in NamedSamples._OWN:  # while unpickled, and for what Python looks for
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in NamedSamples._OWN:
            super().__setattr__(name, value)
        else:  # such as the pipeline, which hooks of mmdet exchange
            setattr(self.inner, name, value)


def _worker() -> int:
    """The number of this data worker, 0 in the main process."""
    worker = get_worker_info()
    return worker.id if worker else 0


def _entropy(key: SampleKey) -> tuple[int, ...]:
    """The integers that seed one use of a sample, unlike those of any other and, by their number, of a step."""
    if isinstance(key.sample, tuple):
        return key.epoch, key.repeat, *key.sample, 0, 0
    return key.epoch, key.sample, key.repeat


def _base_datasets(dataset: Any) -> Iterator[BaseDataset]:
    """The data sets of mmengine inside wrappers."""
    if isinstance(dataset, BaseDataset):
        yield dataset
    else:
        for part in getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]:
            if part is not None:
                yield from _base_datasets(part)


def _prepare(outcomes: torch.Tensor, dataset: BaseDataset, index: int) -> Any:
    """A data set's own prepare_data, counted."""
    prepared = type(dataset).prepare_data(dataset, index)
    outcomes[_worker(), 0] += 1
    outcomes[_worker(), 1] += prepared is None
    return prepared


class KeyedBatches(Sampler[list[SampleKey]]):
    """Batches of sample keys from a sampler of batches of indices, from any point of the training on.

    Args:
        batches: mmengine's or mmdet's batch sampler, or torch's around one of their samplers.
        endless: begin the data set anew when it has been gone through, for training counted in iterations.
    """

    def __init__(self, batches: Any, endless: bool = False) -> None:
        self.batches = batches
        self.endless = endless
        self.epoch = 0
        self.skip = 0

    @property
    def sampler(self) -> Any:
        """The sampler of indices; mmengine sets its epoch."""
        return self.batches.sampler

    def start_at(self, epoch: int, batch: int) -> None:
        """Makes the next iteration begin elsewhere. Nothing of what is skipped is loaded.

        Args:
            epoch: counted from 0.
            batch: of this epoch in this process, counted from 0; for endless ones, of the training.
        """
        self.epoch, self.skip = epoch, batch

    def __iter__(self) -> Iterator[list[SampleKey]]:
        skip, self.skip = self.skip, 0
        if not self.endless:
            yield from self._pass(self.epoch, skip)
        elif isinstance(getattr(self.sampler, 'indices', None), Iterator):  # as mmengine's InfiniteSampler has them
            yield from self._infinite(skip)
        else:
            yield from itertools.islice(self._passes(), skip, None)

    def __len__(self) -> int:
        return len(self.batches)

    def _passes(self) -> Iterator[list[SampleKey]]:
        """All from the first on: of some samplers, such as mmdet's MultiSourceSampler, one pass has no end."""
        for epoch in itertools.count():
            if hasattr(self.sampler, 'set_epoch'):
                self.sampler.set_epoch(epoch)
            batch = None
            for batch in self._pass(epoch, 0):
                yield batch
            if batch is None:
                raise ValueError('the sampler gives no batch: the data set is empty, or smaller than a batch')

    def _pass(self, epoch: int, skip: int) -> Iterator[list[SampleKey]]:
        used: Counter[int] = Counter()
        for position, batch in enumerate(self.batches):
            keys = []
            for index in batch:
                keys.append(SampleKey(index, epoch, used[index]))
                used[index] += 1
            if position >= skip:
                yield keys

    def _infinite(self, skip: int) -> Iterator[list[SampleKey]]:
        size, rank, processes = len(self.sampler.dataset), get_rank(), get_world_size()
        used: Counter[int] = Counter()
        drawn, epoch = 0, 0
        for position, batch in enumerate(self.batches):
            keys = []
            for index in batch:
                # The processes take turns in one endless sequence, so this is how often it has been gone through.
                if (now := (drawn * processes + rank) // size) != epoch:
                    epoch = now
                    used.clear()
                keys.append(SampleKey(index, epoch, used[index]))
                used[index] += 1
                drawn += 1
            if position >= skip:
                yield keys
