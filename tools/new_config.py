"""Writes a config for your own images: checks them, shows what is in them, chooses heads, schedule, learning rate."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from densekit.cli import exit_status

EXAMPLES = """
examples:
  python tools/new_config.py --images photos --annotations photos/instances.json
  python tools/new_config.py --images photos --masks labels --classes road tree sky --size s
  python tools/new_config.py --images images --annotations labels --format yolo
"""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage='%(prog)s --images DIR (--annotations FILE.json | --masks DIR) [options]',
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--images', required=True, metavar='DIR', help='folder of the images')
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument('--annotations', metavar='FILE', help='COCO file, or the folder of the files of --format')
    source.add_argument('--masks', metavar='DIR', help='folder of label maps: PNGs whose values are numbers of classes')
    parser.add_argument(
        '--format', choices=('coco', 'voc', 'yolo', 'labelme'), default='coco', help='of the annotations (default coco)'
    )
    parser.add_argument('--val-images', metavar='DIR', help='images to validate (default: those of --images)')
    parser.add_argument('--val-annotations', metavar='FILE', help='their annotations (default: a part is set aside)')
    parser.add_argument('--val-masks', metavar='DIR', help='their label maps (default: a part is set aside)')
    parser.add_argument(
        '--val-fraction', type=float, default=0.2, metavar='F', help='part that is set aside (default 0.2)'
    )
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='of choosing that part (default 0)')
    parser.add_argument(
        '--task', choices=('detection', 'segmentation'), help='(default: detection with annotations, else segmentation)'
    )
    parser.add_argument('--size', default='t', metavar='S', help='of ConvNeXt: a f p n t s b l xl h (default t)')
    parser.add_argument('--batch', type=int, default=4, metavar='N', help='images a step on one GPU (default 4)')
    parser.add_argument(
        '--classes', nargs='+', metavar='NAME', help='names, for label maps and YOLO in the order of their numbers'
    )
    parser.add_argument('--boxes-only', action='store_true', help='detect boxes, though there are masks')
    parser.add_argument('--ignore-zero', action='store_true', help='label 0 of the label maps is no class')
    parser.add_argument('--out', metavar='FILE.py', help='config to write (default: NAME OF THE MODEL AND DATA.py)')
    parser.add_argument('--overwrite', action='store_true', help='write it though it is there')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    problems: list[str] = []

    def action() -> None:
        from densekit.data.new_config import new_config  # late, so that --help answers at once
        from densekit.data.own_request import Request

        command = ['python', 'tools/new_config.py', *(sys.argv[1:] if argv is None else argv)]
        request = Request(**vars(args), command=command, checkout=Path(__file__).resolve().parents[1])
        problems.extend(new_config(request))

    return exit_status(action) or int(bool(problems))


if __name__ == '__main__':
    sys.exit(main())
