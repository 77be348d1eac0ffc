"""The tables of docs/scaling.md, written by ``python -m densekit.report.scaling_tables``; also for other configs."""

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from densekit.cli import exit_status, user_errors
from densekit.report.scaling import (
    PRECISIONS,
    Job,
    Machine,
    Memory,
    bytes_sent,
    compute_seconds,
    images_per_second,
    job_of,
    memory,
    send_seconds,
)

ROOT = Path(__file__).parents[2]
DOC = ROOT / 'docs' / 'scaling.md'
CONFIGS = (
    'configs/detection/cascade_convnext_xl_in22k_coco.py',
    'configs/detection/mask_rcnn_convnextv2_h_coco.py',
    'configs/segmentation/upernet_convnext_xl_in22k_640_ade20k.py',
    'configs/segmentation/upernet_convnextv2_h_in22k_640_ade20k.py',
)


def tables(jobs: Sequence[Job], gpus: Sequence[int], machine: Machine) -> dict[str, str]:
    """All tables in Markdown, by name."""
    several = [number for number in gpus if number > 1]
    return {
        'recipes': _recipes(jobs),
        'memory': _memory(jobs, several),
        'traffic': _traffic(jobs, several, machine),
        'throughput': _throughput(jobs, several, machine),
    }


def with_tables(text: str, written: dict[str, str]) -> str:
    """A text with other tables between its pairs of comments.

    Raises:
        ValueError: if a pair of comments is not there once.
    """
    for name, table in written.items():
        begin, end = f'<!-- {name}: written by python -m densekit.report.scaling_tables -->', f'<!-- end of {name} -->'
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed or begin in after or end in before + after:
            raise ValueError(f'the text has to have these two lines, each once, around the table:\n{begin}\n{end}')
        text = f'{before}{begin}\n{table}\n{end}{after}'
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrites the tables of docs/scaling.md, or prints those of other configs, GPUs and speeds.

    Returns:
        0, or 2 if something given cannot be used.
    """
    args = _parse_args(argv)
    if args.configs:
        return exit_status(lambda: _print(args.configs, args.gpus, _machine_of(args)))
    return exit_status(_rewrite)


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    default = Machine()
    speeds = {f'--tflops-{precision}': speed for precision, speed in default.tflops.items()}
    links = {'--node-link': default.node_link, '--net-link': default.net_link}
    parser = argparse.ArgumentParser(
        prog='python -m densekit.report.scaling_tables',
        description='Calculates memory, bytes sent and time of training on several GPUs. Without a CONFIG, writes the '
        'tables of docs/scaling.md.',
    )
    parser.add_argument('configs', nargs='*', metavar='CONFIG', help='config files, e.g. configs/detection/*.py')
    parser.add_argument('--gpus', nargs='+', type=int, default=[8, 64], metavar='N', help='default 8 64')
    parser.add_argument('--gpus-per-node', type=int, default=default.gpus_per_node, metavar='N', help='default 8')
    for name, speed in speeds.items():
        parser.add_argument(name, type=float, default=speed, metavar='X', help=f'sustained per GPU, default {speed:g}')
    for name, speed in links.items():
        parser.add_argument(name, type=float, default=speed, metavar='X', help=f'GB/s per GPU, default {speed:g}')
    args = parser.parse_args(argv)
    given = {key: value for key, value in vars(args).items() if key not in ('configs', 'gpus')}
    if min(*args.gpus, *given.values()) <= 0:
        parser.error('numbers of GPUs and speeds have to be above 0')
    if not args.configs and (args.gpus, _machine_of(args)) != ([8, 64], default):
        parser.error('numbers of your own need a CONFIG; the document is of fixed ones')
    return args


def _machine_of(args: argparse.Namespace) -> Machine:
    tflops = {precision: getattr(args, f'tflops_{precision}') for precision in PRECISIONS}
    return Machine(args.gpus_per_node, tflops, args.node_link, args.net_link)


def document_tables() -> dict[str, str]:
    """The tables of docs/scaling.md."""
    return tables(_jobs([str(ROOT / config) for config in CONFIGS]), (8, 64), Machine())


def _rewrite() -> None:
    written = document_tables()
    with user_errors():
        DOC.write_text(with_tables(DOC.read_text(encoding='utf-8'), written), encoding='utf-8')


def _jobs(configs: Sequence[str]) -> list[Job]:
    with user_errors(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of losses, which are not computed, and of PyTorch's future
        return [job_of(config) for config in configs]


def _recipes(jobs: Sequence[Job]) -> str:
    rows = [
        [
            f'`{job.name}`',
            str(job.batch),
            f'{job.size[0]} x {job.size[1]}',
            f'{job.gradients / 4e6:.0f}',
            *(f'{job.activations[precision] / 2**30:.1f}' for precision in PRECISIONS),
            f'{job.operations / 1e12:.1f}',
        ]
        for job in jobs
    ]
    header = ['recipe', 'images per GPU', 'size', 'trainable M', 'activations GiB, float32', 'bf16', 'TFLOP per step']
    return _markdown(header, rows)


def _memory(jobs: Sequence[Job], several: Sequence[int]) -> str:
    cases = [(1, False), (max(several, default=1), False), *((number, True) for number in several)]
    parts: dict[str, Callable[[Memory], float]] = {
        'weights': lambda held: held.weights,
        "gradients, DDP's buckets": lambda held: held.gradients,
        'AdamW': lambda held: held.state,
        'groups put together': lambda held: held.in_flight,
    }
    rows = []
    for job in jobs:
        held = [memory(job, 'float32', *case) for case in cases]
        rows += [['', part, *(_gib(of(each)) for each in held)] for part, of in parts.items()]
        rows[-len(parts)][0] = f'`{job.name}`'
        for precision in PRECISIONS:
            totals = [_gib(memory(job, precision, *case).total) for case in cases]
            rows.append(['', f'with activations, {precision}', *(f'**{total}**' for total in totals)])
    named = [f'FSDP2, {number} GPUs' for number in several]
    return _markdown(['recipe', 'GiB per GPU', '1 GPU', 'DDP, any number', *named], rows)


def _traffic(jobs: Sequence[Job], several: Sequence[int], machine: Machine) -> str:
    rows = []
    for job in jobs:
        for number in several:
            sent = [bytes_sent(job, number), bytes_sent(job, number, True), bytes_sent(job, number, True, 2)]
            cells = (f'{each / 1e9:.1f} ({1e3 * send_seconds(each, number, machine):.0f} ms)' for each in sent)
            rows.append([f'`{job.name}`' if number == several[0] else '', str(number), *cells])
    return _markdown(['recipe', 'GPUs', 'DDP', 'FSDP2', 'FSDP2, blocks sent in bfloat16'], rows)


def _throughput(jobs: Sequence[Job], several: Sequence[int], machine: Machine) -> str:
    rows = []
    for job in jobs:
        for precision in PRECISIONS:
            compute = compute_seconds(job, precision, machine)
            cells = [_three_digits(images_per_second(job, compute, 0, 1)[0])]
            for number in several:
                for sharded in (False, True):
                    send = send_seconds(bytes_sent(job, number, sharded), number, machine)
                    slow, fast = map(_three_digits, images_per_second(job, compute, send, number))
                    cells.append(slow if slow == fast else f'{slow} to {fast}')
            name = f'`{job.name}`' if precision == 'float32' else ''
            rows.append([name, precision, f'{1e3 * compute:.0f}', *cells])
    named = [f'{way}, {number} GPUs' for number in several for way in ('DDP', 'FSDP2')]
    return _markdown(['recipe', 'precision', 'computing, ms per step', '1 GPU', *named], rows)


def _gib(size: float) -> str:
    return f'{size / 2**30:.{2 if size < 2**30 else 1}f}' if size else '-'


def _three_digits(value: float) -> str:
    """Enough for a calculation, and no more."""
    return f'{round(value, 2 - math.floor(math.log10(value))):,.4g}' if value < 1000 else f'{round(value, -1):,.0f}'


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f'| {" | ".join(line)} |' for line in (header, *rows)]
    return '\n'.join([lines[0], '|---' * len(header) + '|', *lines[1:]])


def _print(configs: Sequence[str], gpus: Sequence[int], machine: Machine) -> None:
    for name, table in tables(_jobs(configs), gpus, machine).items():
        sys.stdout.write(f'{name}, calculated\n{table}\n\n')


if __name__ == '__main__':
    sys.exit(main())
