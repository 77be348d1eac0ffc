"""mmengine's Runner with what it gets wrong or passes over mended. The training loop itself is untouched."""

from typing import Any

import torch
import torch.distributed as dist
from mmengine.dist import is_distributed
from mmengine.model import BaseTTAModel, is_model_wrapper, revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import nn

from backbones.checkpoint import read_checkpoint, state_dict_of
from densekit.data.locate import check_dataset_files
from densekit.engine.distributed import init_cpu_process_group


@RUNNERS.register_module()
class DensekitRunner(Runner):
    """Runs on CPU, one GPU or many, and refuses what would fail later or silently.

    Differs from mmengine's Runner:

    - several processes work without CUDA (gloo);
    - SyncBN becomes BN where it could not synchronize: one process, or gloo;
    - a checkpoint is read without executing anything in it, and must fit the model exactly;
    - mistakes show in the order model, weights, data, before the first data set is built;
    - a learning rate made for another global batch is pointed out.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._prepared: set[str] = set()
        self._weights_initialized = False
        super().__init__(*args, **kwargs)

    def setup_env(self, env_cfg: dict) -> None:
        """Starts the process group and sets limits, as mmengine does."""
        if self.distributed and not is_distributed():
            init_cpu_process_group()
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Moves the model to its device and wraps it for several processes."""
        if self.distributed and not is_model_wrapper(model):
            backend = dist.get_backend()
            if backend == 'gloo' or self.world_size == 1:
                model = self._without_sync_bn(model, 'one process' if self.world_size == 1 else 'the gloo backend')
            if not torch.cuda.is_available():
                model_wrapper_cfg = {
                    'type': 'MMDistributedDataParallel',
                    'broadcast_buffers': False,
                    'find_unused_parameters': self.cfg.get('find_unused_parameters', False),
                    'device_ids': None,  # mmengine's default is the local GPU's
                    **(model_wrapper_cfg or {}),
                }
        return super().wrap_model(model_wrapper_cfg, model)

    def prepare(self, *loops: str) -> None:
        """Finds a wrong checkpoint or a missing folder before minutes are spent on indexing annotations.

        Args:
            *loops: which of 'train', 'val' and 'test' are about to run.

        Raises:
            FileNotFoundError: if a checkpoint or something of a data set is missing.
            ValueError: if weights do not fit.
        """
        if self._prepared.issuperset(loops):
            return
        self._init_model_weights()
        if self._load_from is not None and not self._has_loaded:
            self._fitting_weights(self._load_from, read_checkpoint(self._load_from))
        check_dataset_files(self.cfg, loops)
        self._prepared.update(loops)

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
        checkpoint = read_checkpoint(filename, map_location)
        # mmengine's resume executes this text as Python; densekit does not run what a checkpoint says.
        checkpoint.get('meta', {}).pop('config', None)
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        self._bare_model().load_state_dict(self._fitting_weights(filename, checkpoint))
        self._has_loaded = True
        self.logger.info(f'Loaded every weight of the model from {filename}')
        return checkpoint

    def scale_lr(self, optim_wrapper: OptimWrapper, auto_scale_lr: dict | None = None) -> None:
        """Scales the learning rate to the global batch if asked to, and says so if it ought to be."""
        super().scale_lr(optim_wrapper, auto_scale_lr)
        if not auto_scale_lr or auto_scale_lr.get('enable', False):
            return
        batch, recipe = self._global_batch(optim_wrapper), auto_scale_lr['base_batch_size']
        if batch != recipe:
            self.logger.warning(
                f'The global batch is {batch} and the recipe was made for {recipe}: by the linear rule the learning '
                f'rate is {recipe / batch:.3g} x what it should be. '
                '--cfg-options auto_scale_lr.enable=True scales it.'
            )

    def _global_batch(self, optim_wrapper: OptimWrapper) -> int:
        loader = self._train_dataloader
        per_process = loader['batch_size'] if isinstance(loader, dict) else loader.batch_size
        return per_process * self.world_size * getattr(optim_wrapper, '_accumulative_counts', 1)

    def _init_model_weights(self) -> None:
        # Weights that a checkpoint is about to replace need no initialization, nor a download for it.
        if not self._weights_initialized and self._load_from is None:
            super()._init_model_weights()
        self._weights_initialized = True

    def _bare_model(self) -> nn.Module:
        model = self.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        return model

    def _fitting_weights(self, filename: str, checkpoint: dict) -> dict[str, torch.Tensor]:
        try:
            weights = state_dict_of(checkpoint)
        except ValueError as error:
            raise ValueError(f'checkpoint {filename}: {error}') from error
        check_fit(filename, weights, self._bare_model())
        return weights

    def _without_sync_bn(self, model: nn.Module, reason: str) -> nn.Module:
        count = sum(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
        if count:
            self.logger.info(f'{count} SyncBN layers become BN: {reason} cannot synchronize statistics')
            model = revert_sync_batchnorm(model)
        return model


def check_fit(filename: str, weights: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Compares the weights of a whole detector or segmentor with a model.

    Raises:
        ValueError: if a key is missing, unknown or of another shape; the message lists the first few of each.
    """
    own = model.state_dict()
    misfits = {
        'of another shape (file, model)': [
            f'{key} {tuple(value.shape)} for {tuple(own[key].shape)}'
            for key, value in weights.items()
            if key in own and value.shape != own[key].shape
        ],
        'missing in the file': [key for key in own if key not in weights],
        'unknown to the model': [key for key in weights if key not in own],
    }
    if any(misfits.values()):
        lines = [f'checkpoint {filename} does not fit the {type(model).__name__} of this config; nothing was loaded.']
        for what, keys in misfits.items():
            if keys:
                more = f' and {len(keys) - 5} more' if len(keys) > 5 else ''
                lines.append(f'  {len(keys)} {what}: {", ".join(keys[:5])}{more}')
        lines.append(
            'Give the config that the checkpoint was trained with. (Weights of a backbone alone belong into '
            'model.backbone.init_cfg.)'
        )
        raise ValueError('\n'.join(lines))
