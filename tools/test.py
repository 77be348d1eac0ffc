"""Evaluates a checkpoint: box and mask AP, or mIoU."""

import argparse
import sys
from collections.abc import Sequence

from densekit.cli import add_cfg_options, exit_status


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(usage='%(prog)s CONFIG CHECKPOINT [options]', description=__doc__)
    parser.add_argument('config', help='config file that the checkpoint was trained with')
    parser.add_argument('checkpoint', help='.pth file of the whole model')
    parser.add_argument('--tta', action='store_true', help='several scales and flips')
    parser.add_argument(
        '--fold',
        action='store_true',
        help='fold the ConvNeXt blocks, which is faster; figures may differ from those of a validation in the last '
        'digits',
    )
    parser.add_argument('--out', metavar='FILE', help='write the metrics as JSON, those of each class as well')
    parser.add_argument(
        '--results', metavar='DIR', help="write what was found, for COCO's or ADE20K's test server, besides scoring it"
    )
    parser.add_argument(
        '--format-only', metavar='DIR', help='the same without scoring, for a test set without ground truth'
    )
    parser.add_argument('--work-dir', metavar='D', help='logs (default: work_dirs/NAME OF THE CONFIG)')
    add_cfg_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)

    def action() -> None:
        from densekit.engine.launch import test  # late, so that --help answers at once

        test(
            args.config,
            args.checkpoint,
            tta=args.tta,
            fold=args.fold,
            out=args.out,
            results=args.results,
            format_only=args.format_only,
            work_dir=args.work_dir,
            options=args.cfg_options,
        )

    return exit_status(action)


if __name__ == '__main__':
    sys.exit(main())
