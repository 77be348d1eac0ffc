"""Reproducible samples: what a sample becomes depends on seed, epoch and index alone, and a run can begin anywhere.

Nothing about data workers needs saving, because a sample's random numbers are seeded right before its transforms run:
they differ from epoch to epoch, and are the same for any number of workers, persistent or not, and after a resume.
(mmengine seeds workers when they start: without persistent workers each epoch repeats the augmentation of the first,
with them a resumed epoch does.)
"""

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.dist import get_rank, get_world_size
from torch.utils.data import Dataset, Sampler, get_worker_info


class SampleKey(NamedTuple):
    """Names one use of one sample.

    Attributes:
        sample: its index in the data set.
        epoch: how often the data set has been gone through before.
        repeat: how often this process has used this index in this epoch before, for samplers that draw one repeatedly.
    """

    sample: int
    epoch: int
    repeat: int


class SampleError(ValueError):
    """A sample cannot be read, transformed or scored; the text names its file."""


def seed_everything(*entropy: int) -> None:
    """Seeds Python's, NumPy's and torch's global generators, those of CUDA included, from any number of integers."""
    state = np.random.SeedSequence(entropy).generate_state(4)
    random.seed(int(state[0]) << 32 | int(state[1]))
    np.random.seed(state)
    torch.manual_seed((int(state[2]) << 32 | int(state[3])) >> 1)


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seeds the generators of the CPU within this context and puts them back as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    state = np.random.SeedSequence(entropy).generate_state(4)
    random.seed(int(state[0]) << 32 | int(state[1]))
    np.random.seed(state)
    torch.default_generator.manual_seed((int(state[2]) << 32 | int(state[3])) >> 1)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class NamedSamples(Dataset):
    """A data set whose samples are reproducible, and whose errors name the file; all else is the inner data set's.

    Args:
        inner: any data set with an index.
        seed: of the run.
        num_workers: of the data loader.
    """

    _OWN = ('inner', 'seed', 'reading')

    def __init__(self, inner: Any, seed: int, num_workers: int = 0) -> None:
        self.inner = inner
        self.seed = seed
        # Which index each worker is at, seen by the main process too: a worker that is killed cannot tell any more.
        self.reading = torch.full((max(num_workers, 1),), -1, dtype=torch.int64).share_memory_()

    def __getitem__(self, key: SampleKey | int) -> Any:
        index = key.sample if isinstance(key, SampleKey) else key
        worker = get_worker_info()
        self.reading[worker.id if worker else 0] = index
        try:
            if not isinstance(key, SampleKey):
                return self.inner[index]
            with seeded(self.seed, key.epoch, key.sample, key.repeat):
                return self.inner[index]
        except Exception as error:
            raise SampleError(f'{self.name(index)} cannot be used: {type(error).__name__}: {error}') from error

    def __len__(self) -> int:
        return len(self.inner)

    def name(self, index: int) -> str:
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
        elif hasattr(self.sampler, 'indices'):  # mmengine's InfiniteSampler, and what is made after it
            yield from self._infinite(skip)
        else:
            epoch, skip = divmod(skip, len(self.batches))
            while True:
                if hasattr(self.sampler, 'set_epoch'):
                    self.sampler.set_epoch(epoch)
                yield from self._pass(epoch, skip)
                epoch, skip = epoch + 1, 0

    def __len__(self) -> int:
        return len(self.batches)

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
