"""Files of weights that a config names for its parts and that are not there, and how its text says to get them."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from backbones.zoo import ZOO


def check_pretrained_files(model: nn.Module, text: str) -> None:
    """Checks that the files exist that mmengine's ``Pretrained`` initializer is going to read.

    Those of densekit's backbones are not looked at: they have an initializer, and messages, of their own.

    Args:
        model: built, not initialized.
        text: of the config and of those that it inherits.

    Raises:
        FileNotFoundError: if one is missing.
    """
    for name, module in model.named_modules():
        given = getattr(module, 'init_cfg', None)
        for init in [given] if isinstance(given, Mapping) else given or []:
            path = init.get('checkpoint')
            if init.get('type') != 'Pretrained' or not isinstance(path, str) or '://' in path or path in ZOO:
                continue
            if not Path(path).expanduser().exists():
                raise FileNotFoundError(
                    f'model.{name}.init_cfg: checkpoint {path} does not exist. {_how(path, text)}The file may lie '
                    f'elsewhere: --cfg-options model.{name}.init_cfg.checkpoint=FILE. Without it, '
                    f'model.{name}.init_cfg=None, {type(module).__name__} starts from random weights.'
                )


def _how(path: str, text: str) -> str:
    """The command in the text of a config that makes a file."""
    lines = text.splitlines()
    for end, line in enumerate(lines):
        if path not in line or 'checkpoint=' in line.replace(' ', ''):
            continue
        start = end
        while start and lines[start - 1].endswith('\\'):
            start -= 1
        command = '\n'.join(lines[start : end + 1])
        if command.startswith('    '):  # indented, as commands are in the docstrings of configs
            return f'The config says how to make it:\n{command}\n'
    return ''
