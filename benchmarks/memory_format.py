"""Whole steps with the weights of neck and heads in NCHW and in channels_last, in one interleaved run.

OMP_WAIT_POLICY=PASSIVE python benchmarks/memory_format.py [CONFIG...] [--images 2x128x128] [--rounds 15]
"""

import argparse
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import densekit.ops  # noqa: E402, F401

# isort: split
from densekit.benchmark import machine  # noqa: E402
from densekit.benchmark.case import parse_images  # noqa: E402
from densekit.benchmark.steps import StepCase  # noqa: E402
from densekit.benchmark.timing import interleaved  # noqa: E402
from densekit.engine.heap import keep_freed_memory  # noqa: E402
from densekit.engine.memory_format import lay_out_weights  # noqa: E402

CONFIGS = [
    ROOT / 'configs/detection/mask_rcnn_convnext_mini_shapes.py',
    ROOT / 'configs/segmentation/upernet_convnext_mini_shapes.py',
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('configs', nargs='*', default=CONFIGS, metavar='CONFIG')
    parser.add_argument('--images', default='2x128x128', metavar='NxHxW')
    parser.add_argument('--dtype', choices=('fp32', 'bf16'), default='fp32')
    parser.add_argument('--phase', nargs='+', choices=('train', 'infer'), default=('train', 'infer'))
    parser.add_argument('--rounds', type=int, default=15, metavar='N')
    parser.add_argument('--device', metavar='D')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='k=v')
    args = parser.parse_args()
    device = machine.choose(args.device)
    if device.type == 'cpu':
        keep_freed_memory()
    print('| | NCHW, ms | channels_last, ms | ratio of medians | median of the ratios within rounds |')
    print('|---|---:|---:|---:|---:|')
    for config in args.configs:
        for training in (phase == 'train' for phase in args.phase):
            case = StepCase(
                str(config), parse_images(args.images), args.dtype, training, options=tuple(args.cfg_options)
            )
            steps = {}
            for wanted in (False, True):
                steps[wanted] = case.build(device)
                lay_out_weights(dict(channels_last=wanted), steps[wanted].model)
            times, failures = interleaved({str(k): step for k, step in steps.items()}, device, rounds=args.rounds)
            assert not failures, failures
            plain, ours = (times[str(wanted)].rounds for wanted in (False, True))
            ratio = median(a / b for a, b in zip(plain, ours, strict=True))
            cells = [f'{1e3 * median(plain):.1f}', f'{1e3 * median(ours):.1f}', f'{median(plain) / median(ours):.3f} x']
            what = f'{Path(config).stem}, {"training" if training else "inference"}, {args.images}'
            print(f'| {what} | {" | ".join(cells)} | {ratio:.3f} x |', flush=True)
    print(f'\n{machine.name(device)}.')


if __name__ == '__main__':
    main()
