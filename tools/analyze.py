"""Counts parameters and FLOPs by the papers' rule, beside the published figures."""

import argparse
import sys
from collections.abc import Sequence

from densekit.cli import exit_status


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(usage='%(prog)s --roadmap [--json]', description=__doc__)
    parser.add_argument(
        '--roadmap', action='store_true', required=True, help='every step from ResNet-50 and -200 to ConvNeXt-T and -B'
    )
    parser.add_argument('--json', action='store_true', help='print JSON for a table')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)

    def action() -> None:
        import json  # late, as what follows, so that --help answers at once

        from densekit.report.roadmap_table import roadmap, roadmap_table

        ladder = roadmap()
        print(json.dumps(ladder, indent=2) if args.json else roadmap_table(ladder))

    return exit_status(action)


if __name__ == '__main__':
    sys.exit(main())
