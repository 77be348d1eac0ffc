"""Writes one HTML page about a run, or about two side by side; it opens offline."""

import argparse
import sys
from collections.abc import Sequence

from densekit.cli import add_device, exit_status


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(usage='%(prog)s WORK_DIR [WORK_DIR_B] [options]', description=__doc__)
    parser.add_argument('work_dirs', nargs='+', metavar='WORK_DIR', help='work folder of a run; two are compared')
    parser.add_argument('--out', metavar='FILE', help='the page (default: report.html in the first work folder)')
    parser.add_argument(
        '--images',
        type=int,
        default=500,
        metavar='N',
        help='evaluate on at most N images spread over the validation set; 0: no evaluation (default: %(default)s)',
    )
    parser.add_argument(
        '--checkpoint', nargs='+', default=[], metavar='CKPT', help='one for each work folder (default: the newest)'
    )
    parser.add_argument(
        '--results',
        nargs='+',
        default=[],
        metavar='PATH',
        help="one for each work folder: COCO's file of results, or a folder of label maps; no model is run",
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        metavar='T',
        help='objects count as predicted in an image from this score on (default: %(default)s)',
    )
    add_device(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)

    def action() -> None:
        from densekit.report.page.page import report  # late, so that --help answers at once

        page = report(
            args.work_dirs,
            out=args.out,
            images=args.images,
            checkpoints=args.checkpoint,
            results=args.results,
            score_thr=args.score_thr,
            device=args.device,
        )
        sys.stdout.write(f'{page}\n')

    return exit_status(action)


if __name__ == '__main__':
    sys.exit(main())
