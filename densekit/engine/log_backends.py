"""Where a run's numbers go besides its log: TensorBoard and Weights & Biases, by mmengine's backends."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import VISBACKENDS
from mmengine.visualization import WandbVisBackend
from mmengine.visualization.vis_backend import force_init_env

# The backend, the module that it imports once the run has begun, and the package that brings that module.
BACKENDS = {
    'tensorboard': ('TensorboardVisBackend', 'torch.utils.tensorboard', 'tensorboard'),
    'wandb': ('NumbersToWandb', 'wandb', 'wandb'),
}


@VISBACKENDS.register_module()
class NumbersToWandb(WandbVisBackend):
    """mmengine's backend for Weights & Biases, which sends config and numbers, and not the code of the current folder.

    It ends its run by ``wandb.finish()``; mmengine 0.10 calls ``wandb.join()``, which has been removed since.
    """

    @force_init_env
    def add_config(self, config: Config, **_kwargs: Any) -> None:
        """Sends the config."""
        self._wandb.config.update(config.to_dict(), allow_val_change=True)

    def close(self) -> None:
        """Ends the run, once everything has been sent."""
        if hasattr(self, '_wandb'):
            self._wandb.finish()


def check_backends(names: Sequence[str]) -> None:
    """Checks that what is asked for can be imported, before anything of the run is built.

    Args:
        names: keys of :data:`BACKENDS`.

    Raises:
        ValueError: if a name is unknown, or its package cannot be imported.
    """
    for name in names:
        if name not in BACKENDS:
            raise ValueError(f'--log {name}: choose from {", ".join(BACKENDS)}')
        _, module, package = BACKENDS[name]
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(
                f'--log {name} needs a package that cannot be imported ({error}): pip install {package}'
            ) from error


def add_backends(cfg: Config, names: Sequence[str]) -> None:
    """Adds backends to the visualizer of a config, beside those that it has.

    Args:
        cfg: changed in place; without a visualizer it gets mmengine's, which keeps the numbers in the work folder.
        names: keys of :data:`BACKENDS`.
    """
    if not names:
        return
    if cfg.get('visualizer') is None:
        cfg.visualizer = {'type': 'mmengine.Visualizer', 'vis_backends': [{'type': 'LocalVisBackend'}]}
    given = cfg.visualizer.get('vis_backends') or []
    backends = [given] if isinstance(given, dict) else list(given)
    there = {str(backend['type']).rpartition('.')[2] for backend in backends}
    for name in dict.fromkeys(names):
        backend: dict[str, Any] = {'type': BACKENDS[name][0]}
        if name == 'wandb':  # else it makes a name up
            backend['init_kwargs'] = {'name': Path(cfg.work_dir).name}
        if backend['type'] not in there:
            backends.append(backend)
    cfg.visualizer.vis_backends = backends
