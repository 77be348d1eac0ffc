"""mmengine's Runner with what it gets wrong or passes over mended."""

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.device import get_device
from mmengine.dist import broadcast, is_distributed
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import BaseTTAModel, convert_sync_batchnorm, is_model_wrapper, revert_sync_batchnorm
from mmengine.optim import AmpOptimWrapper, OptimWrapper, OptimWrapperDict
from mmengine.registry import RUNNERS
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from mmengine.runner.checkpoint import save_checkpoint as save_remotely
from torch import Tensor, nn
from torch.utils.data import DataLoader

from backbones.files import read_checkpoint
from backbones.layer_decay import mend_fused
from densekit.cli import RunStopped
from densekit.data.checks import check_data
from densekit.data.faults import describe, raise_for
from densekit.data.loader import run_loader
from densekit.data.locate import check_dataset_files
from densekit.engine import store
from densekit.engine.checkpoint_hook import DensekitCheckpointHook
from densekit.engine.class_transfer import ClassTransfer, check_class_order, dataset_classes, plan_transfer
from densekit.engine.compiled import CompilePlan, carry_out, check_plan, read_plan
from densekit.engine.consistency import check_channels, check_classes
from densekit.engine.distributed import from_first, init_cpu_process_group
from densekit.engine.guards import FiniteGuard, StopSignalHook
from densekit.engine.heap import keep_freed_memory
from densekit.engine.loops import ResumableEpochLoop, ResumableIterLoop
from densekit.engine.memory_format import lay_out_weights
from densekit.engine.pretrained_files import check_pretrained_files
from densekit.engine.progress_line import ProgressLine
from densekit.engine.resume import OURS, check_run, is_sharded_checkpoint, restore, run_state, settled_gradients
from densekit.engine.sharded_files import load_sharded, outline, save_sharded
from densekit.engine.sharding import gathered, is_sharded, load_full_optimizer_state, shard
from densekit.engine.state import on_cpu
from densekit.engine.weights import check_fit, check_resumable, converted_weights, own_weights

# What a run gets in the place of mmengine's own; classes that a user derived from these stay.
_SAFER: dict[Any, type] = {
    CheckpointHook: DensekitCheckpointHook,
    EpochBasedTrainLoop: ResumableEpochLoop,
    IterBasedTrainLoop: ResumableIterLoop,
}
_SAFER |= {f'{scope}{old.__name__}': new for old, new in _SAFER.items() for scope in ('', 'mmengine.')}

_ALONE = 'a single process has nothing to synchronize with'


def accumulated_batches(optim_wrapper: OptimWrapper) -> int:
    """The batches whose gradients are summed for one step of the optimizer."""
    return getattr(optim_wrapper, '_accumulative_counts', 1)


class SameBuffersHook(Hook):
    """Gives every process the buffers of the first, which are the ones saved, before they validate together.

    Without SyncBN each process has running statistics of its own, and a score would be a mixture of several models.
    """

    priority = 'LOWEST'  # after averaged weights have taken the model's place

    def before_val_epoch(self, runner: Runner) -> None:
        """Broadcasts the buffers."""
        for buffer in runner.model.buffers():
            broadcast(buffer)


@RUNNERS.register_module()
class DensekitRunner(Runner):
    """Runs on CPU, one GPU or many, and refuses what would fail later or silently.

    Differs from mmengine's Runner:

    - several processes work without CUDA (gloo);
    - SyncBN becomes BN where it could not synchronize: one process, or gloo;
    - a checkpoint is read without executing anything in it, and must fit the model exactly; that of another project
      is renamed, and training takes one of other classes by their names;
    - mistakes show in the order model, weights, data, before the first data set is built;
    - a learning rate made for another global batch is pointed out;
    - ``compile`` compiles parts of the model, in training only (:mod:`densekit.engine.compiled`);
    - checkpoints are whole and checked, and a run goes on from them to the bit, from the middle of an epoch as well;
      other classes, schedule, number of processes and the like are an error (:mod:`densekit.engine.contract`);
    - it stops before it steps on numbers that are none, and, with a checkpoint, on SIGTERM
      (:mod:`densekit.engine.guards`).

    Attributes:
        validated_at: the iteration after which the last validation was completed.
        saved_at: the iteration after which the last checkpoint was written.
    """

    model: Any
    optim_wrapper: Any  # a config until prepare() builds it
    param_schedulers: Any  # likewise
    _resume: Any  # bool, or 'auto' or 'required' until the checkpoint is found
    _load_from: str | None
    validated_at: int | None = None
    saved_at: int | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._prepared: set[str] = set()
        self._weights_initialized = False
        self._classes: tuple[str, ...] | None = None  # to train on, where the weights may be of others
        self._to_resume: dict[str, Any] = {}  # what a checkpoint says of its run
        self._compile_plan: CompilePlan | None = None
        super().__init__(*args, **kwargs)
        if self.distributed:
            self.register_hook(SameBuffersHook())
        guard = FiniteGuard()
        self.register_hook(guard)
        self.register_hook(StopSignalHook(guard))
        if ProgressLine.is_of_use(self.rank):
            self.register_hook(ProgressLine())

    def setup_env(self, env_cfg: dict) -> None:
        """Starts the process group and sets limits, as mmengine does."""
        if self.distributed and not is_distributed():
            init_cpu_process_group((env_cfg.get('dist_cfg') or {}).get('timeout'))
        super().setup_env(env_cfg)
        if not torch.cuda.is_available():
            keep_freed_memory()

    def set_randomness(self, seed: int | None, diff_rank_seed: bool = False, deterministic: bool = False) -> None:
        """Seeds the generators; ``deterministic`` has CUDA use algorithms that give the same bits each time."""
        if deterministic:
            os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # without it cuBLAS refuses
        super().set_randomness(seed, diff_rank_seed, deterministic)

    def register_hook(self, hook: Hook | dict, priority: Any = None) -> None:
        """Registers a hook; mmengine's checkpoint hook becomes the one that writes safely."""
        super().register_hook(_safer(hook), priority)

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Builds the training loop; mmengine's become those that go on from any iteration."""
        if isinstance(loop, Mapping):
            by_epoch = loop.get('by_epoch', True)
            named = {'type': EpochBasedTrainLoop if by_epoch else IterBasedTrainLoop, **loop}
            if 'type' not in loop:
                named.pop('by_epoch', None)
            loop = _safer(named)
        return super().build_train_loop(loop)

    @staticmethod
    def build_dataloader(
        dataloader: DataLoader | dict, seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """Builds a data loader whose errors name the sample; that of training is made reproducible by its loop.

        Where there is CUDA, batches are put into pinned memory unless the config says otherwise: from there they are
        copied while the host goes on.
        """
        if isinstance(dataloader, dict):
            dataloader = {'pin_memory': torch.cuda.is_available(), **dataloader}
        return run_loader(Runner.build_dataloader(dataloader, seed, diff_rank_seed), seed)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Moves the model to its device and wraps it for several processes."""
        if is_model_wrapper(model):
            return super().wrap_model(model_wrapper_cfg, model)
        lay_out_weights(self.cfg, model)
        if not self.distributed:
            return self._without_sync_bn(model.to(get_device()), _ALONE)
        if self.world_size == 1 or dist.get_backend() == 'gloo':
            model = self._without_sync_bn(model, _ALONE if self.world_size == 1 else 'gloo cannot synchronize them')
            self.cfg.sync_bn = None  # mmengine would turn them back
        if self.cfg.get('sharding') is not None:  # prepare() shards it, once it has its first weights
            sync_bn = self.cfg.get('sync_bn')
            return convert_sync_batchnorm(model, sync_bn) if sync_bn else model
        if not torch.cuda.is_available():
            model_wrapper_cfg = {
                'type': 'MMDistributedDataParallel',
                'broadcast_buffers': False,
                'find_unused_parameters': self.cfg.get('find_unused_parameters', False),
                'device_ids': None,  # mmengine's default is the local GPU's
                **(model_wrapper_cfg or {}),
            }
        return super().wrap_model(model_wrapper_cfg, model)

    def get_hooks_info(self) -> str:
        """The hooks in one line; mmengine's page of them is in the way of what follows."""
        return ', '.join(type(hook).__name__ for hook in self._hooks)

    def prepare(self, *loops: str) -> None:
        """Builds all that a run needs, in the order optimizer, weights, data, so that mistakes show in that order.

        A wrong checkpoint or a missing folder is found before minutes are spent on indexing annotations.

        Args:
            *loops: which of 'train', 'val' and 'test' are about to run.

        Raises:
            FileNotFoundError: if a checkpoint or something of a data set is missing.
            ValueError: if weights do not fit, a run cannot go on from the checkpoint, or the data is faulty.
        """
        if self._prepared.issuperset(loops):
            return
        if 'train' in loops and self.cfg.get('sharding') is not None and not self.distributed:
            raise ValueError('sharding (--shard) cuts a model among processes, and this is one: use torchrun')
        self.prepare_model(*loops)
        self.prepare_data(*loops)
        if not self._prepared:
            super()._log_env(self._env_cfg)
        self._prepared.update(loops)

    def prepare_model(self, *loops: str) -> None:
        """The first half of :meth:`prepare`: optimizer and weights."""
        check_channels(self.bare_model())
        if 'train' in loops:
            self._check_compile()
            self._find_checkpoint()
        self._init_model_weights()
        if self.cfg.get('sharding') is not None and self.distributed and not is_sharded(self.bare_model()):
            options = {key: value for key, value in self.cfg.sharding.items() if key != 'sharded_checkpoints'}
            shard(self.bare_model(), **options)  # in place
        if 'train' in loops:
            self.optim_wrapper = self.build_optim_wrapper(self.optim_wrapper)
            if isinstance(self.optim_wrapper, OptimWrapperDict):
                raise ValueError('several optimizers (OptimWrapperDict) are not supported: a run could not be resumed')
            mend_fused(self.optim_wrapper.optimizer)
            if is_sharded(self.bare_model()) and isinstance(self.optim_wrapper, AmpOptimWrapper):
                raise ValueError(
                    'sharding with AmpOptimWrapper (--amp fp16) is not supported: its loss scaler sees a part of the '
                    'gradients only. Use --amp bf16, or sharding.param_dtype=bfloat16.'
                )
        if self._load_from is not None and not self._has_loaded:
            self._check_checkpoint(self._load_from, loops)

    def prepare_data(self, *loops: str) -> None:
        """The second half of :meth:`prepare`: data sets, and whether the model has their classes."""
        check_dataset_files(self.cfg, loops)
        if self.cfg.get('data_checks', True):
            self._check_data(loops)
        for loop in loops:
            built = getattr(self, f'{loop}_loop')  # with its data sets; None for a run without validation
            if built is not None:
                metainfo = getattr(built.dataloader.dataset, 'metainfo', {})
                check_classes(self.bare_model(), metainfo.get('classes'), loop)
        if 'train' in loops and self._to_resume:
            check_run(self, str(self._load_from), self._to_resume)

    def train(self) -> nn.Module:
        """Trains and validates."""
        self.prepare('train', 'val')
        try:
            return super().train()
        finally:
            for hook in self.hooks:
                if isinstance(hook, FiniteGuard | StopSignalHook | ProgressLine):
                    hook.after_run(self)  # mmengine calls it only if all went well

    def val(self) -> dict:
        """Validates."""
        self.prepare('val')
        return super().val()

    def test(self) -> dict:
        """Tests."""
        self.prepare('test')
        return super().test()

    def load_checkpoint(
        self, filename: str, map_location: Any = 'cpu', strict: bool = True, revise_keys: Any = None
    ) -> dict:
        """Loads weights that must fit the model exactly.

        Those of another project are renamed. Before training, ``load_from`` (not ``resume``) may have other classes.

        Args:
            filename: a ``.pth`` or ``.safetensors`` file, or an ``https://`` address.
            map_location: device of the tensors.
            strict: accepted because mmengine passes it; weights that do not fit are an error in any case.
            revise_keys: likewise; a leading ``module.`` is always removed.

        Returns:
            The dictionary in the file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it cannot be read, or its keys or shapes do not fit the model.
        """
        if is_sharded_checkpoint(filename):
            optimizer = self.optim_wrapper if self._resume else None
            checkpoint = load_sharded(Path(filename), self.bare_model(), optimizer, trust_pickle=self._resume)
        else:  # a run's own file is no stranger's
            checkpoint = read_checkpoint(filename, map_location, trust_pickle=self._resume)
        # mmengine's resume executes this text as Python; densekit does not run what a checkpoint says.
        checkpoint.get('meta', {}).pop('config', None)
        model = self.bare_model()
        weights, changes, transfer = self._under_own_names(filename, checkpoint)
        if transfer is not None:
            transfer.start_afresh()
            weights = transfer.apply(weights, model)
        check_fit(filename, weights, model)
        checkpoint['state_dict'] = weights  # where the hook of averaged weights looks for them as well
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        model.load_state_dict(checkpoint['state_dict'])
        self._has_loaded = True
        by_name = '' if transfer is None or transfer.changes_nothing else ', its classes by name'
        self.logger.info(f'Loaded every weight of the model from {filename}{by_name}{changes and f" ({changes})"}')
        return checkpoint

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """Goes on with the run of a checkpoint where it left off.

        Args:
            filename: a checkpoint with the state of a run.
            *args: accepted because mmengine passes them; optimizer and schedulers are always resumed.
            **kwargs: likewise.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it cannot be read or does not fit.
        """
        checkpoint = self.load_checkpoint(filename)
        self.optim_wrapper = self.build_optim_wrapper(self.optim_wrapper)
        load_full_optimizer_state(self.optim_wrapper, checkpoint['optimizer'])
        if self.param_schedulers is not None:
            self.param_schedulers = self.build_param_scheduler(self.param_schedulers)
        restore(self, checkpoint)
        self.logger.info(f'resumed epoch: {self.epoch}, iter: {self.iter}')

    def save_checkpoint(
        self,
        out_dir: str,
        filename: str,
        file_client_args: dict | None = None,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        meta: dict | None = None,
        by_epoch: bool = True,
        backend_args: dict | None = None,
    ) -> None:
        """Writes a checkpoint, whole or not at all. All processes call this, the first one writes.

        mmengine can read the file: it holds tensors and plain data only.

        Args:
            out_dir: folder, or a remote address, which mmengine writes to.
            filename: name of the file.
            file_client_args: what mmengine had before ``backend_args``; not supported.
            save_optimizer: include the optimizer, to resume.
            save_param_scheduler: include the schedulers, to resume.
            meta: 'epoch' and 'iter' if others than by ``by_epoch``.
            by_epoch: called at the end of an epoch (mmengine's counters are behind by one epoch then, or else by one
                iteration).
            backend_args: of a remote address.

        Raises:
            CheckpointNotSaved: in the first process, if it cannot be written.
            RunStopped: in the others, likewise.
        """
        ends = {'epoch': self.epoch + by_epoch, 'iter': self.iter + (not by_epoch), **(meta or {})}
        content = run_state(self, ends, save_param_scheduler)
        content['state_dict'] = self.bare_model().state_dict()
        if save_optimizer:
            content['optimizer'] = self.optim_wrapper.state_dict()
            content[OURS]['gradients'] = settled_gradients(self)
        path, facts = Path(out_dir, filename), {key: ends[key] for key in ('epoch', 'iter')}
        if is_sharded(self.bare_model()) and self.cfg.sharding.get('sharded_checkpoints'):
            self.call_hook('before_save_checkpoint', checkpoint=content)
            save_sharded(path.with_suffix(''), content, facts)
        else:
            self._save_whole(content, path, facts, f'{out_dir}/{filename}', backend_args)
        self.saved_at = ends['iter']

    def _save_whole(
        self, content: dict[str, Any], path: Path, facts: dict[str, int], address: str, backend_args: dict | None
    ) -> None:
        """Writes one file in the first process, and lets the others know how it went."""
        if is_sharded(self.bare_model()):
            self.call_hook('before_save_checkpoint', checkpoint=content)
            content = gathered(content)
        elif self.rank == 0:
            content = on_cpu(content)
            self.call_hook('before_save_checkpoint', checkpoint=content)
        failure: Exception | None = None
        if self.rank == 0:
            try:
                if backend_args or '://' in address:
                    save_remotely(content, address, backend_args=backend_args)
                else:
                    store.save(path, content, facts)
            except Exception as error:  # whatever it is, the others must not wait for it
                failure = error
        said = from_first(str(failure or ''))
        if failure is not None:
            raise failure
        if said:
            raise RunStopped(said)

    def scale_lr(self, optim_wrapper: OptimWrapper, auto_scale_lr: dict | None = None) -> None:
        """Scales the learning rate to the global batch if asked to, and says so if it ought to be.

        Unlike mmengine's, counts the batches whose gradients are accumulated.
        """
        if self._resume:  # the rates of the run that goes on are in its checkpoint
            return
        enabled = (auto_scale_lr or {}).get('enable', False)
        recipe = (auto_scale_lr or {}).get('base_batch_size')
        if enabled and not recipe:
            raise ValueError('auto_scale_lr needs base_batch_size, the global batch that its learning rate is for')
        batch = self.global_batch(optim_wrapper)
        if not recipe or batch == recipe:
            return
        said = f'The global batch is {batch} and the recipe was made for {recipe}'
        if enabled:
            self.logger.info(f'{said}: the learning rate is multiplied by {batch / recipe:.3g}.')
            for group in optim_wrapper.optimizer.param_groups:
                group['lr'] *= batch / recipe
        else:
            self.logger.warning(
                f'{said}: by the linear rule the learning rate is {recipe / batch:.3g} x what it should be. '
                '--cfg-options auto_scale_lr.enable=True scales it.'
            )

    def global_batch(self, optim_wrapper: OptimWrapper) -> int:
        """The images that one step of the optimizer sees, in all processes and accumulated batches."""
        return self.batch_size() * self.world_size * accumulated_batches(optim_wrapper)

    def batch_size(self) -> int:
        """The images in one forward pass of one process."""
        loader = self._train_dataloader
        return loader.get('batch_size', 1) if isinstance(loader, dict) else loader.batch_size

    def bare_model(self) -> nn.Module:
        """The model without what wraps it."""
        model = self.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        return model

    def _check_data(self, loops: tuple[str, ...]) -> None:
        """Looks for faults in annotations and files. One process looks, and all end if there are any."""
        said = ''
        if self.rank == 0:
            try:
                faults = check_data(self.cfg, loops)
                if warnings := [fault for fault in faults if fault.severity == 'warning']:
                    self.logger.warning(describe(warnings))
                raise_for(faults)
            except (ValueError, TypeError, OSError) as error:
                said = str(error)
        if said := from_first(said):
            raise ValueError(f'{said}\n--cfg-options data_checks=False goes on regardless.')

    def _find_checkpoint(self) -> None:
        """Turns ``resume`` into a checkpoint to go on from: one that is named, or the newest that can be used."""
        wanted = self._resume
        if not wanted:
            return
        if wanted is True and self._load_from is not None:
            if reason := from_first(store.problem(Path(self._load_from)) or ''):
                raise ValueError(f'checkpoint {self._load_from} cannot be used: {reason}')
            return
        folder = Path(self.work_dir)
        found: list[Any] = list(store.newest_valid(folder)) if self.rank == 0 else []
        path, skipped = json.loads(from_first(json.dumps([str(found[0] or ''), found[1]] if found else [])))
        for line in skipped:
            self.logger.warning(f'checkpoint passed over: {line}')
        if wanted == 'required' and not path:
            raise ValueError(
                f'--resume: no checkpoint in {folder} that can be used. Give --work-dir of the run, '
                '--resume=CHECKPOINT, or --resume=auto to start from the beginning when there is none.'
            )
        self._resume = bool(path)
        self._load_from = path or self._load_from
        if not path:
            self.logger.info(f'No checkpoint in {folder}: this run starts from the beginning.')

    def _check_checkpoint(self, filename: str, loops: tuple[str, ...]) -> None:
        """Finds out whether :meth:`load_checkpoint` is going to succeed; the model is not changed."""
        if is_sharded_checkpoint(filename):
            checkpoint = outline(Path(filename), trust_pickle=self._resume)
        else:
            checkpoint = read_checkpoint(filename, trust_pickle=self._resume)
        training = 'train' in loops
        classes = dataset_classes(getattr(self, f'_{"train" if training else loops[0]}_dataloader'))
        check_classes(self.bare_model(), classes, 'train' if training else loops[0])
        if training and not self._resume:
            self._classes = classes
        weights, _, transfer = self._under_own_names(filename, checkpoint)
        if transfer is not None:
            weights = transfer.apply(weights, self.bare_model())
        elif warning := check_class_order(filename, checkpoint, classes):
            self.logger.warning(warning)
        check_fit(filename, weights, self.bare_model())
        if training and self._resume:
            check_resumable(filename, checkpoint, self.optim_wrapper, self.param_schedulers)
            self._to_resume = {key: checkpoint.get(key) or {} for key in ('meta', OURS)}
            self._take_seed(checkpoint['meta'].get('seed'))
        if str(transfer or ''):
            self.logger.info(str(transfer))

    def _under_own_names(self, filename: str, checkpoint: dict) -> tuple[dict[str, Tensor], str, ClassTransfer | None]:
        """A checkpoint's weights, in words what was changed, and where the rows of its classes belong."""
        model = self.bare_model()
        if self._resume:
            return own_weights(filename, checkpoint), '', None
        weights, changes = converted_weights(filename, checkpoint, model)
        if not self._classes:
            return weights, changes, None
        return weights, changes, plan_transfer(filename, checkpoint, weights, model, self._classes)

    def _take_seed(self, seed: int | None) -> None:
        """Uses the seed that the run to go on with drew, if the config has none: the data's order depends on it."""
        if seed is not None and self._randomness_cfg.get('seed') is None:
            self._randomness_cfg['seed'] = seed
            self.set_randomness(**self._randomness_cfg)

    def _check_compile(self) -> None:
        """Reads ``compile`` of the config, and finds out whether this machine can do it."""
        self._compile_plan = read_plan(self.cfg.get('compile'), self.bare_model())
        if self._compile_plan is not None:
            check_plan(self._compile_plan, self.cfg, self.bare_model(), processes=self.world_size)

    def _maybe_compile(self, target: str) -> None:
        # mmengine's compiles the whole of train_step, which detectors break at every turn.
        if self._compile_plan is not None:
            carry_out(self._compile_plan, self.bare_model())

    def _log_env(self, env_cfg: dict) -> None:
        self._env_cfg = env_cfg  # logged once all is built: pages of it would bury the message of a mistake

    def _init_model_weights(self) -> None:
        # Weights that a checkpoint is about to replace need no initialization, nor a download for it.
        if not self._weights_initialized and self._load_from is None:
            if 'Pretrained' in str(getattr(self.bare_model(), 'init_cfg', None)):
                raise ValueError(
                    "model.init_cfg is of type 'Pretrained', which leaves at random what does not fit. Weights of a "
                    'whole model: --load-from (load_from in a config), of a backbone: model.backbone.init_cfg.'
                )
            check_pretrained_files(self.bare_model(), self.cfg.text or '')
            super()._init_model_weights()
        self._weights_initialized = True

    def _without_sync_bn(self, model: nn.Module, reason: str) -> nn.Module:
        count = sum(type(module).__name__ == 'SyncBatchNorm' for module in model.modules())  # torch's or mmcv's
        if count:
            self.logger.info(f'{count} SyncBN layers become BN: {reason}')
            model = revert_sync_batchnorm(model)
        return model


def _safer(part: Any) -> Any:
    """A hook's or loop's config with ours in the place of mmengine's type; anything else as it is."""
    kind = part.get('type') if isinstance(part, Mapping) else None
    return {**copy.deepcopy(dict(part)), 'type': _SAFER[kind]} if kind in _SAFER else part
