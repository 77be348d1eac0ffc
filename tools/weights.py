"""Lists, shows, fetches and converts published weights, and merges sharded checkpoints."""

import argparse
import sys
from collections.abc import Sequence

from densekit.cli import exit_status, user_errors


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    list_ = commands.add_parser('list', help='the weights of the catalogue, one a line')
    list_.add_argument('pattern', nargs='?', metavar='PATTERN', help="part of a name, such as tiny or 'v2_*in22k'")
    show = commands.add_parser('show', help='all that is known of some weights, and how a config names them')
    show.add_argument('name', metavar='NAME', help='name in the catalogue, e.g. convnext_tiny.fb_in1k')
    fetch = commands.add_parser('fetch', help='download weights')
    fetch.add_argument('names', nargs='+', metavar='NAME', help='names in the catalogue')
    fetch.add_argument('--to', metavar='FOLDER', help='copy them there, for a machine without a connection')
    convert = commands.add_parser('convert', help="write weights under densekit's names")
    convert.add_argument('source', metavar='SOURCE', help='file, folder, https:// address or name in the catalogue')
    convert.add_argument('--prefix', default='', help='take only the tensors whose names begin so')
    convert.add_argument('out', metavar='OUT.safetensors', help='file to write; it must not exist')
    merge = commands.add_parser('merge', help='make one file of a sharded checkpoint')
    merge.add_argument('folder', metavar='FOLDER', help='of the checkpoint, e.g. work_dirs/run/iter_1000')
    merge.add_argument('out', metavar='OUT.pth', help='file to write; it must not exist')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)

    def action() -> None:
        from densekit import weight_commands  # late, so that --help answers at once

        with user_errors():
            if args.command == 'list':
                print(weight_commands.table(args.pattern))
            elif args.command == 'show':
                print(weight_commands.describe(args.name))
            elif args.command == 'fetch':
                for line in weight_commands.fetch(args.names, to=args.to):
                    print(line, flush=True)
            elif args.command == 'merge':
                print(weight_commands.merge(args.folder, args.out))
            else:
                print(weight_commands.convert(args.source, args.out, prefix=args.prefix))

    return exit_status(action)


if __name__ == '__main__':
    sys.exit(main())
