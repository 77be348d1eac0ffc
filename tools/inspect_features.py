"""Shows what each stage of a backbone emits for an image, how far it sees, and where a prediction comes from."""

import argparse
import sys
from collections.abc import Sequence

from densekit.cli import add_cfg_options, add_device, exit_status


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(usage='%(prog)s CONFIG CHECKPOINT IMAGE --out DIR [options]', description=__doc__)
    parser.add_argument('config', help='config file that the checkpoint was trained with')
    parser.add_argument('checkpoint', help='.pth file of the whole model')
    parser.add_argument('image', help='image file')
    parser.add_argument('--out', required=True, metavar='DIR', help='folder for the sheets')
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        '--detection', type=int, metavar='N', help='explain this detection, best first from 0 (default 0; detectors)'
    )
    target.add_argument(
        '--pixel',
        type=int,
        nargs=2,
        metavar=('X', 'Y'),
        help="explain this pixel's class (default the centre; segmentors)",
    )
    add_device(parser)
    add_cfg_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)

    def action() -> None:
        from densekit.report.feature_sheets import inspect  # late, so that --help answers at once

        inspect(
            args.config,
            args.checkpoint,
            args.image,
            out=args.out,
            detection=args.detection,
            pixel=tuple(args.pixel) if args.pixel else None,
            device=args.device,
            options=args.cfg_options,
        )

    return exit_status(action)


if __name__ == '__main__':
    sys.exit(main())
