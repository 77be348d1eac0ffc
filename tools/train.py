"""Trains a recipe on CPU, on one GPU, or below torchrun or srun on many."""

import argparse
import sys
from collections.abc import Sequence

from densekit.cli import add_cfg_options, exit_status


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(usage='%(prog)s CONFIG [options]', description=__doc__)
    parser.add_argument('config', help='config file, e.g. configs/detection/cascade_convnext_t_coco.py')
    parser.add_argument('--work-dir', metavar='D', help='logs and checkpoints (default: work_dirs/NAME OF THE CONFIG)')
    parser.add_argument(
        '--load-from',
        metavar='CKPT',
        help='start a new run from the weights of a whole model; classes that it has too keep theirs, by name',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='',
        metavar='auto|CKPT',
        help='go on from the newest checkpoint of the work folder; --resume=auto starts afresh if there is none; '
        '--resume=CKPT goes on from that one',
    )
    parser.add_argument(
        '--allow-changed',
        nargs='+',
        default=[],
        metavar='PART',
        help='let a resumed run differ from what it was: model optim_wrapper param_scheduler classes images seed '
        'world_size global_batch',
    )
    parser.add_argument(
        '--shard', action='store_true', help='cut model and optimizer among the processes (FSDP2), for L, XL and H'
    )
    parser.add_argument(
        '--compile',
        action='store_true',
        help='compile backbone, neck and dense heads; needs a C++ compiler (docs/speed.md)',
    )
    parser.add_argument(
        '--log',
        action='append',
        default=[],
        choices=('tensorboard', 'wandb'),
        help='send losses and scores there as well; may be given twice',
    )
    parser.add_argument('--amp', choices=('bf16', 'fp16', 'off'), help='precision (default: as in the config)')
    parser.add_argument(
        '--dry-run',
        action='store_true',
        help='build and check all that training needs, show it in tables, stop; status 1 if it contradicts itself',
    )
    add_cfg_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    problems: list[str] = []

    def action() -> None:
        from densekit.engine.launch import train  # late, so that --help answers at once

        problems.extend(
            train(
                args.config,
                work_dir=args.work_dir,
                load_from=args.load_from,
                resume=args.resume,
                amp=args.amp,
                dry_run=args.dry_run,
                allow_changed=args.allow_changed,
                shard=args.shard,
                compile=args.compile,
                log=args.log,
                options=args.cfg_options,
            )
        )

    return exit_status(action) or int(bool(problems))


if __name__ == '__main__':
    sys.exit(main())
