"""Counts parameters and FLOPs by the papers' rule, beside the published figures; without data, weights or a GPU."""

import argparse
import sys
from collections.abc import Sequence

from densekit.cli import exit_status


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(usage='%(prog)s CONFIG... | --roadmap [--json]', description=__doc__)
    parser.add_argument('configs', nargs='*', metavar='CONFIG', help='config files, e.g. configs/detection/*.py')
    parser.add_argument(
        '--roadmap', action='store_true', help='instead: every step from ResNet-50 and -200 to ConvNeXt-T and -B'
    )
    parser.add_argument('--json', action='store_true', help='print JSON for a table')
    args = parser.parse_args(argv)
    if bool(args.configs) == args.roadmap:
        parser.error('give config files or --roadmap')
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)

    def action() -> None:
        import json  # late, as what follows, so that --help answers at once

        if args.roadmap:
            from densekit.report.roadmap_table import roadmap, roadmap_table

            found, table = roadmap(), roadmap_table
        else:
            from densekit.report.analysis import analysis_table, analyze

            found, table = analyze(args.configs), analysis_table
        print(json.dumps(found, indent=2) if args.json else table(found))

    return exit_status(action)


if __name__ == '__main__':
    sys.exit(main())
