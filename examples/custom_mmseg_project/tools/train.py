"""Trains a config, as mmseg's own tools/train.py does."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.runner import Runner

sys.path.insert(0, str(Path(__file__).parents[1]))  # where shapes_project is


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='folder for logs and checkpoints')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, help='key=value changes')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains."""
    args = parse_args(argv)
    cfg = Config.fromfile(args.config)  # imports what custom_imports names
    cfg.merge_from_dict(args.cfg_options)
    cfg.work_dir = args.work_dir or os.path.join('work_dirs', Path(args.config).stem)
    Runner.from_cfg(cfg).train()


if __name__ == '__main__':
    main()
