"""Draws what the pipeline of a config feeds to the model, augmentation and all, 16 images to a sheet."""

import argparse
import sys
from collections.abc import Sequence

from densekit.cli import add_cfg_options, exit_status


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(usage='%(prog)s CONFIG [options]', description=__doc__)
    parser.add_argument('config', help='config file, e.g. configs/detection/cascade_convnext_t_coco.py')
    parser.add_argument(
        '--out', metavar='DIR', help='folder for the sheets (default: work_dirs/NAME OF THE CONFIG/browse)'
    )
    parser.add_argument('--number', type=int, default=64, metavar='N', help='of images (default: 64)')
    parser.add_argument('--split', choices=('train', 'val'), default='train', help='which data (default: train)')
    add_cfg_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)

    def action() -> None:
        from densekit.report.browse import browse  # late, so that --help answers at once

        browse(args.config, out=args.out, number=args.number, split=args.split, options=args.cfg_options)

    return exit_status(action)


if __name__ == '__main__':
    sys.exit(main())
