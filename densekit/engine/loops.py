"""mmengine's training loops with samples and model seeded for each step, so that a run can go on from any of them."""

from collections.abc import Sequence
from typing import Any

from mmengine.dist import get_rank
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from densekit.data.loader import run_loader, worker_errors
from densekit.data.sampling import KeyedBatches, NamedSamples, seed_everything

# Keeps the random numbers of a step apart from those of a sample, which have another number of integers.
_STEP = 1


def _built(runner: Any, dataloader: DataLoader | dict, endless: bool) -> DataLoader:
    """The loader as mmengine builds it, reproducible."""
    diff_rank_seed = runner._randomness_cfg.get('diff_rank_seed', False)
    built = Runner.build_dataloader(dataloader, runner.seed, diff_rank_seed)
    if built.batch_sampler is None:
        return built
    return run_loader(built, runner.seed, batches=KeyedBatches(built.batch_sampler, endless))


def _start_at(dataloader: DataLoader, epoch: int, batch: int) -> None:
    batches = dataloader.batch_sampler
    if isinstance(batches, KeyedBatches):
        batches.start_at(epoch, batch)
    elif batch:
        raise ValueError(
            'a run can go on from the middle of an epoch only with a data set that has an index and a batch size; '
            'resume from a checkpoint of the end of an epoch'
        )


def _tell_lost(dataloader: DataLoader) -> None:
    """Says how many samples came to nothing in the pass that ends here."""
    if isinstance(dataloader.dataset, NamedSamples):
        dataloader.dataset.tell_lost()


def _validate(loop: Any, at: int, end: int) -> None:
    """Validates if it is time to, by mmengine's rule, and has not been done at this iteration before."""
    runner = loop.runner
    loop._decide_current_val_interval()
    due = at >= loop.val_begin and (at % loop.val_interval == 0 or at == end)
    if runner.val_loop is not None and due and runner.validated_at != loop._iter:
        runner.val_loop.run()
        runner.validated_at = loop._iter


@LOOPS.register_module()
class ResumableEpochLoop(EpochBasedTrainLoop):
    """Training counted in epochs that goes on from any iteration, to the bit.

    Args:
        runner: the runner.
        dataloader: config of the data loader, or one that is built.
        **kwargs: of mmengine's EpochBasedTrainLoop.
    """

    def __init__(self, runner: Any, dataloader: DataLoader | dict, **kwargs: Any) -> None:
        super().__init__(runner, _built(runner, dataloader, endless=False), **kwargs)

    @worker_errors()
    def run(self) -> Any:
        """Trains. A validation that was due when the run ended comes first."""
        self.runner.call_hook('before_train')
        if self._epoch > 0 and self._iter == self._epoch * len(self.dataloader):
            _validate(self, self._epoch, self._max_epochs)
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            _validate(self, self._epoch, self._max_epochs)
        self.runner.call_hook('after_train')
        return self.runner.model

    def run_epoch(self) -> None:
        """Trains for an epoch, or for what is left of it."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        begun = self._iter - self._epoch * len(self.dataloader)
        assert 0 <= begun <= len(self.dataloader), f'iteration {self._iter} is not in epoch {self._epoch}'
        _start_at(self.dataloader, self._epoch, begun)
        if begun < len(self.dataloader):
            for idx, data_batch in enumerate(self.dataloader, begun):
                self.run_iter(idx, data_batch)
        _tell_lost(self.dataloader)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def run_iter(self, idx: int, data_batch: Sequence[dict]) -> None:
        """One step, with random numbers of its own."""
        seed_everything(self.runner.seed, self._iter, get_rank(), _STEP, 0)
        super().run_iter(idx, data_batch)


@LOOPS.register_module()
class ResumableIterLoop(IterBasedTrainLoop):
    """Training counted in iterations that goes on from any of them, to the bit, without loading what it skips.

    Args:
        runner: the runner.
        dataloader: config of the data loader, or one that is built.
        **kwargs: of mmengine's IterBasedTrainLoop.
    """

    def __init__(self, runner: Any, dataloader: DataLoader | dict, **kwargs: Any) -> None:
        super().__init__(runner, _built(runner, dataloader, endless=True), **kwargs)

    @worker_errors()
    def run(self) -> Any:
        """Trains. A validation that was due when the run ended comes first."""
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')
        _start_at(self.dataloader, 0, self._iter)
        if self._iter > 0:
            _validate(self, self._iter, self._max_iters)
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            self.run_iter(next(self.dataloader_iterator))
            if self._iter % max(len(self.dataloader), 1) == 0:
                _tell_lost(self.dataloader)
            _validate(self, self._iter, self._max_iters)
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')
        return self.runner.model

    def run_iter(self, data_batch: Sequence[dict]) -> None:
        """One step, with random numbers of its own."""
        seed_everything(self.runner.seed, self._iter, get_rank(), _STEP, 0)
        super().run_iter(data_batch)
