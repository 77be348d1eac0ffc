"""mmengine's Runner with what it gets wrong or passes over mended. The training loop itself is untouched."""

from typing import Any

import torch
import torch.distributed as dist
from mmengine.device import get_device
from mmengine.dist import broadcast, is_distributed
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper, revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import Tensor, nn

from backbones.files import read_checkpoint
from densekit.data.locate import check_dataset_files
from densekit.engine.class_transfer import ClassTransfer, check_class_order, dataset_classes, plan_transfer
from densekit.engine.consistency import check_channels, check_classes
from densekit.engine.distributed import init_cpu_process_group
from densekit.engine.weights import check_fit, check_resumable, converted_weights, own_weights

_ALONE = 'a single process has nothing to synchronize with'


def accumulated_batches(optim_wrapper: OptimWrapper) -> int:
    """The batches whose gradients are summed for one step of the optimizer."""
    return getattr(optim_wrapper, '_accumulative_counts', 1)


class SameBuffersHook(Hook):
    """Gives every process the buffers of the first, which are the ones saved, before they validate together.

    Without SyncBN each process has running statistics of its own, and a score would be a mixture of several models.
    """

    priority = 'VERY_HIGH'

    def before_val(self, runner: Runner) -> None:
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
    - a learning rate made for another global batch is pointed out.
    """

    optim_wrapper: Any  # a config until prepare() builds it

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._prepared: set[str] = set()
        self._weights_initialized = False
        self._classes: tuple[str, ...] | None = None  # to train on, where the weights may be of others
        super().__init__(*args, **kwargs)
        if self.distributed:
            self.register_hook(SameBuffersHook())

    def setup_env(self, env_cfg: dict) -> None:
        """Starts the process group and sets limits, as mmengine does."""
        if self.distributed and not is_distributed():
            init_cpu_process_group()
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Moves the model to its device and wraps it for several processes."""
        if is_model_wrapper(model):
            return super().wrap_model(model_wrapper_cfg, model)
        if not self.distributed:
            return self._without_sync_bn(model.to(get_device()), _ALONE)
        if self.world_size == 1 or dist.get_backend() == 'gloo':
            model = self._without_sync_bn(model, _ALONE if self.world_size == 1 else 'gloo cannot synchronize them')
            self.cfg.sync_bn = None  # mmengine would turn them back
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
            ValueError: if weights do not fit, or a run cannot go on from the checkpoint.
        """
        if self._prepared.issuperset(loops):
            return
        self.prepare_model(*loops)
        self.prepare_data(*loops)
        if not self._prepared:
            super()._log_env(self._env_cfg)
        self._prepared.update(loops)

    def prepare_model(self, *loops: str) -> None:
        """The first half of :meth:`prepare`: optimizer and weights."""
        check_channels(self.bare_model())
        if 'train' in loops:
            self.optim_wrapper = self.build_optim_wrapper(self.optim_wrapper)
        self._init_model_weights()
        if self._load_from is not None and not self._has_loaded:
            self._check_checkpoint(self._load_from, loops)

    def prepare_data(self, *loops: str) -> None:
        """The second half of :meth:`prepare`: data sets, and whether the model has their classes."""
        check_dataset_files(self.cfg, loops)
        for loop in loops:
            built = getattr(self, f'{loop}_loop')  # with its data sets; None for a run without validation
            if built is not None:
                metainfo = getattr(built.dataloader.dataset, 'metainfo', {})
                check_classes(self.bare_model(), metainfo.get('classes'), loop)

    def train(self) -> nn.Module:
        """Trains and validates."""
        self.prepare('train', 'val')
        return super().train()

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
        checkpoint = read_checkpoint(
            filename, map_location, trust_pickle=self._resume
        )  # a run's own file is no stranger's
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

    def scale_lr(self, optim_wrapper: OptimWrapper, auto_scale_lr: dict | None = None) -> None:
        """Scales the learning rate to the global batch if asked to, and says so if it ought to be.

        Unlike mmengine's, counts the batches whose gradients are accumulated.
        """
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
        return loader['batch_size'] if isinstance(loader, dict) else loader.batch_size

    def bare_model(self) -> nn.Module:
        """The model without what wraps it."""
        model = self.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        return model

    def _check_checkpoint(self, filename: str, loops: tuple[str, ...]) -> None:
        """Finds out whether :meth:`load_checkpoint` is going to succeed; the model is not changed."""
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
            check_resumable(filename, checkpoint, self.optim_wrapper)
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
            super()._init_model_weights()
        self._weights_initialized = True

    def _without_sync_bn(self, model: nn.Module, reason: str) -> nn.Module:
        count = sum(type(module).__name__ == 'SyncBatchNorm' for module in model.modules())  # torch's or mmcv's
        if count:
            self.logger.info(f'{count} SyncBN layers become BN: {reason}')
            model = revert_sync_batchnorm(model)
        return model
