"""Checks the data of a recipe: annotations, classes, label maps and files; exit status 1 if anything is wrong."""

import argparse
import sys
from collections.abc import Sequence

from densekit.cli import add_cfg_options, exit_status


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(usage='%(prog)s CONFIG [options]', description=__doc__)
    parser.add_argument('config', help='config file, e.g. configs/detection/cascade_convnext_t_coco.py')
    parser.add_argument('--headers', action='store_true', help='open every image, and compare its size')
    parser.add_argument('--decode', action='store_true', help='decode every image and label map (minutes)')
    parser.add_argument('--json', metavar='FILE', help='write every fault as JSON')
    add_cfg_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    found: list[int] = []

    def action() -> None:
        from densekit.data.check_command import check  # late, so that --help answers at once

        options = dict(headers=args.headers, decode=args.decode, out=args.json, options=args.cfg_options)
        found.append(check(args.config, **options))

    return exit_status(action) or int(any(found))


if __name__ == '__main__':
    sys.exit(main())
