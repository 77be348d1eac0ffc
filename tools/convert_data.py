"""Makes a COCO file of Pascal VOC's, YOLO's or LabelMe's files, and label maps of maps in colours."""

import argparse
import sys
from collections.abc import Sequence

from densekit.cli import exit_status, user_errors


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage='%(prog)s FORMAT --annotations DIR [--images DIR] --out FILE.json|DIR [options]', description=__doc__
    )
    parser.add_argument(
        'format', choices=('voc', 'yolo', 'labelme', 'colours'), metavar='FORMAT', help='voc, yolo, labelme or colours'
    )
    parser.add_argument(
        '--annotations',
        required=True,
        metavar='DIR',
        help='folder of the .xml, .txt, .json or .png files, an image each',
    )
    parser.add_argument('--images', metavar='DIR', help='folder of the images (default: that of the annotations)')
    parser.add_argument('--out', required=True, metavar='FILE.json', help='file to write; for colours a new folder')
    parser.add_argument(
        '--classes',
        nargs='+',
        metavar='NAME',
        help='names of the classes in the order of their ids (default: for yolo those of data.yaml or classes.txt, '
        'otherwise those that occur)',
    )
    parser.add_argument('--overwrite', action='store_true', help='write FILE.json though it is there')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)

    def action() -> None:
        from densekit.data.convert import convert_to_file  # late, so that --help answers at once
        from densekit.data.convert_colours import convert_colours

        with user_errors():
            if args.format == 'colours':
                if args.images or args.classes or args.overwrite:
                    raise ValueError(
                        '--images, --classes and --overwrite are not for colours: the maps alone are read, and the '
                        'folder is new'
                    )
                print(convert_colours(args.annotations, args.out))
                return
            print(convert_to_file(args.format, args.annotations, args.images, args.out, args.classes, args.overwrite))

    return exit_status(action)


if __name__ == '__main__':
    sys.exit(main())
