"""Draws what a model finds in images and videos, and writes it as JSON in COCO's format."""

import argparse
import sys
from collections.abc import Sequence

from densekit.cli import add_cfg_options, add_device, exit_status


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage='%(prog)s CONFIG CHECKPOINT IMAGE... --out DIR [options]', description=__doc__
    )
    parser.add_argument('config', help='config file that the checkpoint was trained with')
    parser.add_argument('checkpoint', help='.pth file of the whole model')
    parser.add_argument('images', nargs='+', metavar='IMAGE', help="images, videos, folders, 'patterns/**/*.jpg'")
    parser.add_argument('--out', required=True, metavar='DIR', help='folder for the pictures and results.json')
    parser.add_argument('--score-thr', type=float, default=0.3, metavar='S', help='draw objects from this score on')
    parser.add_argument(
        '--batch-size', type=int, default=1, metavar='N', help='images of one size that the model takes at once'
    )
    parser.add_argument(
        '--no-fold',
        action='store_true',
        help='leave the ConvNeXt blocks as trained; folded they are faster and equal but for the last digits',
    )
    add_device(parser)
    add_cfg_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)

    def action() -> None:
        from densekit.report.predict_command import predict  # late, so that --help answers at once

        predict(
            args.config,
            args.checkpoint,
            args.images,
            out=args.out,
            score_thr=args.score_thr,
            batch_size=args.batch_size,
            device=args.device,
            options=args.cfg_options,
            fold=not args.no_fold,
        )

    return exit_status(action)


if __name__ == '__main__':
    sys.exit(main())
