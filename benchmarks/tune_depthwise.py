"""The depthwise kernels' tables, tried out on this machine's GPU: which strip widths and how many programs at a time.

    python benchmarks/tune_depthwise.py       # 7 x 7 at stages 0 and 2 of ConvNeXt-T and stage 0 of B, 800 x 1333
    python benchmarks/tune_depthwise.py --images 8 2 --stages 0 1 2 3 --out tune.json
    TRITON_INTERPRET=1 python benchmarks/tune_depthwise.py --smoke      # does the script run? no GPU needed

For each stage and direction, choices for the tables in backbones/kernels/depthwise_plan.py are compared with float64,
then timed beside torch's convolution in both memory formats, in turn, on tensors that are in no cache. What is best on
the whole belongs into the tables. "Floor" is the time of the multiply-adds alone at the float32 peak given. Each choice
is compiled first, some seconds each. With LayerNorm behind the forward pass one kernel is tried beside two, and beside
both what the plan makes of the tables as they are.
"""

import argparse
import functools
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

STAGES = tuple(
    (c << i, *side) for c in (96, 128) for i, side in enumerate([(200, 334), (100, 167), (50, 84), (25, 42)])
)
CACHE = 2**28  # bytes that the copies of a tensor have at least
COLUMNS = {'convolve': (4, 6, 8), 'together': (4, 6, 8), 'correlate': (2, 4, 6)}
RESIDENT = (3, 4)
QUEUE = 10_000_000  # cycles that the device waits, until all calls are in its queue
DIRECTIONS = ('forward', 'forward and norm', 'input gradient', 'weight gradient')
KINDS = {'forward and norm': ('convolve', 'together'), 'weight gradient': ('correlate',)}
EPS = 1e-6

Case = tuple[Tensor, Tensor, Tensor, Tensor]  # input, weight, bias, gradient of the result
Candidate = tuple[Callable[[], AbstractContextManager[None]], list[Callable[[], Any]]]  # within what, and the calls


@contextmanager
def tables(kind: str, size: int, columns: int, resident: int) -> Iterator[None]:
    """Takes other entries for the time being."""
    from backbones.kernels import depthwise_plan as plan

    changed = {
        'convolve': ((plan.CONVOLVE_COLUMNS, columns), (plan.CONVOLVE_RESIDENT, resident)),
        'together': ((plan.CONVOLVE_COLUMNS, columns), (plan.TOGETHER_RESIDENT, resident)),
        'correlate': ((plan.CORRELATE_COLUMNS, columns), (plan.CORRELATE_RESIDENT, resident)),
    }[kind]
    if kind == 'convolve':
        changed += ((plan.CONVOLVE_RESIDENT_OLDER, resident),)
    old = [table[size] for table, _ in changed]
    cached = plan.convolve_plan, plan.correlate_plan, plan.together_plan, plan.together_pays
    try:
        for table, value in changed:
            table[size] = value
        [function.cache_clear() for function in cached]
        yield
    finally:
        for (table, _), value in zip(changed, old, strict=True):
            table[size] = value
        [function.cache_clear() for function in cached]


def ours(direction: str, case: Case, kind: str) -> Tensor:
    from backbones.kernels import depthwise_triton as kernels

    x, weight, bias, grad = case
    if direction == 'forward':
        return kernels.forward(x, weight, bias, x.dtype)
    if direction == 'forward and norm':
        together = {'convolve': False, 'together': True}.get(kind)
        return kernels.forward_and_normalize(x, weight, bias, EPS, x.dtype, together)[0]
    if direction == 'input gradient':
        return kernels.input_gradient(grad, weight, x.dtype)
    return kernels.weight_gradient(x, grad, weight, True)[0]


def torchs(direction: str, case: Case) -> Tensor:
    x, weight, bias, grad = case
    pad, groups = weight.shape[-1] // 2, x.shape[1]
    if direction.startswith('forward'):
        out = F.conv2d(x, weight, bias, padding=pad, groups=groups)
        return out if direction == 'forward' else F.layer_norm(out.permute(0, 2, 3, 1), (groups,), eps=EPS)
    mask = (direction == 'input gradient', direction == 'weight gradient', direction == 'weight gradient')
    sizes = (weight.shape[:1], (1, 1), (pad, pad), (1, 1), False, (0, 0), groups, mask)
    found = torch.ops.aten.convolution_backward(grad, x, weight, *sizes)
    return found[0] if direction == 'input gradient' else found[1]


def make(num: int, stage: tuple[int, int, int], size: int, dtype: torch.dtype, device: str, nhwc: bool) -> Case:
    form = torch.channels_last if nhwc else torch.contiguous_format
    x, grad = (torch.randn(num, *stage, device=device).to(dtype, memory_format=form) for _ in range(2))
    return x, torch.randn(stage[0], 1, size, size, device=device), torch.randn(stage[0], device=device), grad


def wrong(direction: str, case: Case, kind: str) -> float:
    """The norm of the error relative to float64."""
    mine = ours(direction, case, kind).double()
    right = torchs(direction, tuple(t.double().contiguous() for t in case))
    return float((mine - right).norm() / right.norm())


def seconds(candidates: dict[str, Candidate], rounds: int, cuda: bool) -> dict[str, float]:
    """The median of each, in turn; the calls of a candidate have tensors of their own.

    A candidate's context is entered once for all of its calls: remaking plans in each would time the host.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for within, calls in candidates.values():
        with within():
            for call in calls:
                call()
    if not cuda:
        return dict.fromkeys(candidates, 0.0)
    for _ in range(rounds):
        for name, (within, calls) in candidates.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            with within():
                torch.cuda._sleep(QUEUE)
                start.record()
                for call in calls:
                    call()
                end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 1000 / len(calls))
    return {name: statistics.median(values) for name, values in times.items()}


def compare(args: argparse.Namespace, num: int, stage: tuple[int, int, int], direction: str) -> dict[str, Any]:
    """All choices for one shape and direction."""
    dtype, cuda = getattr(torch, args.dtype), args.device == 'cuda'
    elements = num * stage[0] * stage[1] * stage[2]
    copies = min(max(2, CACHE // (elements * dtype.itemsize)), 16) if cuda else 1
    layouts = {nhwc: [make(num, stage, args.size, dtype, args.device, nhwc) for _ in range(copies)] for nhwc in (0, 1)}
    candidates: dict[str, Candidate] = {}
    for name, nhwc in (('torch nchw', 0), ('torch nhwc', 1)):
        cast = [tuple(t.to(dtype) for t in case) for case in layouts[nhwc]]
        candidates[name] = nullcontext, [functools.partial(torchs, direction, case) for case in cast]
    if direction == 'forward and norm':
        calls = [functools.partial(ours, direction, case, 'planned') for case in layouts[1]]
        candidates['as planned'] = nullcontext, calls
    kinds = KINDS.get(direction, ('convolve',))
    for kind, columns, resident in ((k, c, r) for k in kinds for c, r in itertools.product(COLUMNS[k], RESIDENT)):
        within = functools.partial(tables, kind, args.size, columns, resident)
        name = f'{columns} columns, {resident} programs' + (', one kernel' if kind == 'together' else '')
        candidates[name] = within, [functools.partial(ours, direction, case, kind) for case in layouts[1]]
        with within():
            case = make(1, (stage[0], 9, min(stage[2], 99)), args.size, dtype, args.device, True)
            error = wrong(direction, case, kind)
        if not error < (1e-5 if dtype == torch.float32 or kind == 'correlate' else 1e-2):
            sys.exit(f'{direction}, {name}: differs from float64 by {error:.2g}')
    floor = elements * args.size**2 * 2 / (args.peak * 1e12)
    measured = seconds(candidates, args.rounds, cuda)
    return {'images': num, 'stage': stage, 'direction': direction, 'floor': floor, 'seconds': measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, nargs='+', default=[8, 2])
    parser.add_argument('--stages', type=int, nargs='+', default=[0, 2, 4], help="T's are 0 to 3, B's 4 to 7")
    parser.add_argument('--size', type=int, default=7, help='of the filter')
    parser.add_argument('--dtype', default='bfloat16', choices=('float16', 'bfloat16', 'float32'))
    parser.add_argument('--peak', type=float, default=67.0, help="float32 TFLOP/s; 67 is the H200's data sheet")
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--smoke', action='store_true', help='tiny shapes on the CPU, in the interpreter, untimed')
    parser.add_argument('--out', type=Path, help='a JSON file')
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    stages = tuple(STAGES[i] for i in args.stages)
    if args.smoke:
        args.device, args.images, args.size, stages = 'cpu', [1], 3, ((16, 2, 3),)
    torch.manual_seed(0)
    rows = []
    for num, stage, direction in itertools.product(args.images, stages, DIRECTIONS):
        rows.append(row := compare(args, num, stage, direction))
        print(f'{num} x {"x".join(map(str, stage))} {direction}: the floor is {row["floor"] * 1e6:.1f} us')
        for name, value in sorted(row['seconds'].items(), key=lambda item: item[1]):
            share = row['floor'] / value if value else float('nan')
            print(f'    {name:34} {value * 1e6:9.1f} us   {share:.2f} of the floor', flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == '__main__':
    main()
