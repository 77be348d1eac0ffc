"""Measures speed and memory, ours and the peers' side by side in one interleaved run, beside the machine's limits."""

import argparse
import sys
from collections.abc import Sequence

from densekit.cli import add_cfg_options, add_device, exit_status

USAGE = """%(prog)s [--tier N...] [--budget SECONDS] [options]
       %(prog)s --backbone ARCH --images NxHxW [options]
       %(prog)s --step CONFIG --images NxHxW [options]
       %(prog)s --data CONFIG [--gpu-rate IMAGES/S...]
       %(prog)s --fit SIZE CONFIG [--images 1xHxW] [--verify]
       %(prog)s --waits CONFIG [--images NxHxW]"""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(usage=USAGE, description=__doc__)
    what = parser.add_argument_group('what (default: the tiers, as make bench and make bench-gpu)')
    what.add_argument('--tier', type=int, nargs='+', choices=range(1, 8), metavar='N', help='1 to 7 (default: all)')
    what.add_argument('--backbone', metavar='ARCH', help='a size of ConvNeXt, such as tiny')
    what.add_argument('--step', action='store_true', help='whole steps of CONFIG, beside the stock form of it')
    what.add_argument('--data', action='store_true', help='reading and augmenting images, as CONFIG does for training')
    what.add_argument('--fit', metavar='SIZE', help='which batch of CONFIG fits in a memory, such as 24GiB')
    what.add_argument('--waits', action='store_true', help='how often the host waits for a GPU; needs none')
    what.add_argument('config', nargs='?', metavar='CONFIG', help='e.g. configs/detection/mask_rcnn_convnext_t_coco.py')

    how = parser.add_argument_group('how')
    how.add_argument('--images', nargs='+', metavar='NxHxW', help='numbers and sizes of images, such as 2x800x1333')
    how.add_argument('--dtype', nargs='+', choices=('bf16', 'fp32'), help='precisions (default: bf16 on CUDA, or fp32)')
    how.add_argument('--phase', nargs='+', choices=('train', 'infer'), default=('train', 'infer'), help='default: both')
    how.add_argument('--mode', nargs='+', choices=('eager', 'compiled', 'graphed'), default=('eager',), help='of each')
    how.add_argument('--peers', nargs='+', metavar='NAME', help='only these, such as densekit timm (default: all)')
    how.add_argument('--drop-path', type=float, default=0.4, metavar='P', help='in training, default: 0.4')
    how.add_argument('--rounds', type=int, default=5, metavar='N', help='turns of each candidate, default: 5')
    how.add_argument('--budget', type=float, metavar='S', help='begin nothing more after this many seconds')
    how.add_argument('--again', action='store_true', help='measure also what the results file has')
    how.add_argument('--out', default='benchmarks/results', metavar='DIR', help='default: benchmarks/results')
    how.add_argument(
        '--gpu-rate', type=float, nargs='+', metavar='R', help='with --data: images/s of a GPU to keep busy'
    )
    how.add_argument('--verify', action='store_true', help='with --fit: take a step of what is said to fit, on CUDA')
    add_device(parser)
    add_cfg_options(parser)
    args = parser.parse_args(argv)
    chosen = [name for name in ('tier', 'backbone', 'step', 'data', 'fit', 'waits') if getattr(args, name)]
    if len(chosen) > 1:
        parser.error(f'--{chosen[0]} and --{chosen[1]} are different measurements; give one of them')
    if (args.config is not None) != (chosen[:1] in (['step'], ['data'], ['fit'], ['waits'])):
        parser.error('a CONFIG goes with --step, --data, --fit or --waits, and each of these needs one')
    if args.rounds < 1:
        parser.error(f'--rounds {args.rounds}: give 1 or more; 5 or more for figures to keep')
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)

    def action() -> None:
        from densekit.benchmark.command import run  # late, so that --help answers at once

        run(args, print)

    return exit_status(action)


if __name__ == '__main__':
    sys.exit(main())
