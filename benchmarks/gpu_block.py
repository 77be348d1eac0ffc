"""The parts of a ConvNeXt block on a GPU: fused kernels against PyTorch's, in time and in share of the memory's speed.

    python benchmarks/gpu_block.py                      # stages of T and B, 8 images of 800 x 1344, bfloat16
    python benchmarks/gpu_block.py --batch 2 --channels 96 192
    python benchmarks/gpu_block.py --budget 300 --out benchmarks/results    # a JSON file named after the GPU
    TRITON_INTERPRET=1 python benchmarks/gpu_block.py --smoke   # does it run? every line once, without a GPU

Rounds are interleaved; each line is the median over the rounds of events around ``--repeats`` calls, with other tensors
each call so that no call finds its input in the cache. The device waits until the calls are in its queue, so that small
ones do not time the host. "Floor" is the bytes that must move over ``--bandwidth``.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

STAGES = {96: 4, 128: 4, 192: 8, 256: 8, 384: 16, 512: 16, 768: 32, 1024: 32}  # channels: stride
QUEUE = 100_000_000  # cycles that the device waits, about 50 ms: 20 training steps of a block are in its queue by then


def measure(forms: dict[str, Callable[[int], object]], rounds: int, repeats: int, cuda: bool) -> dict[str, float]:
    """Microseconds of a call of each form."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for i in range(rounds + 1):  # the first warms up
        for name, form in forms.items():
            if cuda:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                torch.cuda._sleep(QUEUE)
                start.record()
                for j in range(repeats):
                    form(j)
                end.record()
                torch.cuda.synchronize()
                took = 1e3 * start.elapsed_time(end)
            else:
                begin = time.perf_counter()
                for j in range(repeats):
                    form(j)
                took = 1e6 * (time.perf_counter() - begin)
            if i:
                times[name].append(took / repeats)
    return {name: statistics.median(values) for name, values in times.items()}


def cases(rows: int, channels: int, copies: int, dtype: torch.dtype, device: str):
    """Name, bytes that must move, and the forms of each part."""
    from backbones.kernels import mlp_triton, pointwise_triton

    new = lambda *shape, dtype=dtype: torch.randn(*shape, device=device).to(dtype)  # noqa: E731
    size = 2 if dtype != torch.float32 else 4
    x = [new(rows, channels, dtype=torch.float32) for _ in range(copies)]
    y = [new(rows, channels) for _ in range(copies)]
    h, g = ([new(rows, 4 * channels) for _ in range(copies)] for _ in range(2))
    w = new(channels, 4 * channels) / channels**0.5
    bias = new(channels, dtype=torch.float32)
    norm = [pointwise_triton.normalize(t, 1e-6, dtype) for t in y]
    act, wide = rows * channels * size, 4 * rows * channels * size

    def gelu_backward(i: int) -> object:
        out, dh = F.gelu(h[i]), torch.ops.aten.gelu_backward(g[i], h[i])
        return out, dh, dh.sum(0)

    def norm_backward(i: int) -> object:
        mean = torch.zeros(rows, 1, device=device)
        args = (y[i].float(), x[i], [channels], mean, norm[i][1][:, None], None, None, [True, False, False])
        return torch.ops.aten.native_layer_norm_backward(*args)

    return {
        'LayerNorm': (
            2 * act,
            {
                'ours': lambda i: pointwise_triton.normalize(y[i], 1e-6, dtype),
                'torch': lambda i: F.layer_norm(y[i].float(), (channels,)).to(dtype),
            },
        ),
        'LayerNorm backward': (
            3 * act,
            {'ours': lambda i: pointwise_triton.normalize_backward(*norm[i], y[i], dtype), 'torch': norm_backward},
        ),
        'GELU': (2 * wide, {'ours': lambda i: pointwise_triton.gelu_forward(h[i]), 'torch': lambda i: F.gelu(h[i])}),
        'GELU backward, again, and sum': (
            4 * wide,
            {'ours': lambda i: pointwise_triton.gelu_backward(h[i], g[i]), 'torch': gelu_backward},
        ),
        'residual': (
            act + 8 * rows * channels,
            {
                'ours': lambda i: pointwise_triton.residual(x[i], y[i], bias, None, None, 1, torch.float32),
                'torch': lambda i: x[i] + bias * y[i],
            },
        ),
        'residual backward': (
            act + 4 * rows * channels,
            {
                'ours': lambda i: pointwise_triton.residual_backward(x[i], None, bias, None, None, 1, dtype),
                'torch': lambda i: ((x[i] * bias).to(dtype), x[i].sum(0)),
            },
        ),
        'fc2 with GELU': (
            wide + act,
            {
                'ours': lambda i: mlp_triton.linear(h[i], w),
                'cuBLAS and ours': lambda i: pointwise_triton.gelu_forward(h[i]) @ w.t(),
                'torch': lambda i: F.gelu(h[i]) @ w.t(),
            },
        ),
        'fc2 backward with GELU': (
            2 * act + 3 * wide,
            {
                'ours': lambda i: (mlp_triton.input_gradient(y[i], w, h[i]), mlp_triton.weight_gradient(y[i], h[i])),
                'cuBLAS and ours': lambda i: (o := pointwise_triton.gelu_backward(h[i], y[i] @ w), y[i].t() @ o[0]),
                'torch': lambda i: (torch.ops.aten.gelu_backward(y[i] @ w, h[i]), y[i].t() @ F.gelu(h[i])),
            },
        ),
    }


def blocks(images: int, side: tuple[int, int], channels: int, dtype: torch.dtype, device: str, use_grn: bool):
    """Forward and backward pass of one block under autocast, in each form."""
    from backbones.convnext import ConvNeXtBlock

    def step(block: torch.nn.Module, inputs: list[torch.Tensor]) -> Callable[[int], None]:
        def run(i: int) -> None:
            with torch.autocast(device, dtype):
                out = block(inputs[i])
            out.backward(inputs[i].detach())
            block.zero_grad(set_to_none=True)  # else the next run adds to them, which no training step does
            inputs[i].grad = None

        return run

    torch.compiler.reset()  # the limit of recompilations is per function; beyond it blocks would run eager
    x = [
        torch.randn(images, channels, *side, device=device)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
        for _ in range(2)
    ]
    forms = {}
    for name, kernels in (('ours', 'triton'), ('eager', 'eager'), ('compiled', 'eager')):
        block = (
            ConvNeXtBlock(
                channels,
                drop_path=0.1,
                layer_scale=0.0 if use_grn else 1.0,
                use_grn=use_grn,
                eps=1e-6,
                act=torch.nn.GELU(),
                with_cp=False,
                kernels=kernels,
            )
            .to(device)
            .train()
        )
        forms[name] = step(torch.compile(block, dynamic=False) if name == 'compiled' else block, x)
    return forms


def measured(args: argparse.Namespace, channels: int, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """All lines of a stage: what, microseconds of each form and, for the parts, the floor; printed as they come."""
    cuda, copies, rounds, repeats = device == 'cuda', 3, args.rounds, args.repeats
    batch, side = args.batch, (800 // STAGES[channels], 1344 // STAGES[channels])
    if args.smoke:
        batch, side, copies, rounds, repeats = 1, (2, 3), 1, 1, 1
    lines = []
    for name, (moved, forms) in cases(batch * side[0] * side[1], channels, copies, dtype, device).items():
        if 'with GELU' in name and channels > 256:
            continue
        rotated = {k: (lambda i, f=f: f(i % copies)) for k, f in forms.items()}
        took = measure(rotated, rounds, repeats, cuda)
        floor = 1e6 * moved / args.bandwidth
        lines.append({'channels': channels, 'images': batch, 'what': name, 'floor': floor, 'microseconds': took})
        print(
            f'C {channels:4} {name:30} floor {floor:8.1f} us',
            *(f'| {k} {t:9.1f} us ({100 * floor / t:3.0f} %)' for k, t in took.items()),
            flush=True,
        )
    for use_grn in (False, True):
        forms = blocks(batch, side, channels, torch.bfloat16, device, use_grn)
        if args.smoke:
            forms.pop('compiled')
        rotated = {k: (lambda i, f=f: f(i % 2)) for k, f in forms.items()}
        took = measure(rotated, rounds, repeats, cuda)
        name = f'block V{1 + use_grn}, forward + backward'
        lines.append({'channels': channels, 'images': batch, 'what': name, 'microseconds': took})
        print(f'C {channels:4} {name}', *(f'| {k} {t:9.1f} us' for k, t in took.items()), flush=True)
    return lines


def save(out: Path, device: str, lines: list[dict[str, Any]]) -> None:
    """Writes what there is, with machine, commit and command; in a folder the file is named after the machine."""
    from densekit.benchmark import machine
    from densekit.files import write_whole

    if out.suffix != '.json':
        out /= f'{machine.slug(torch.device(device))}-block.json'
    out.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(['python', 'benchmarks/gpu_block.py', *sys.argv[1:]])
    stamp = {**machine.describe(torch.device(device)), 'revision': machine.revision(), 'command': command}
    write_whole(out, json.dumps({**stamp, 'lines': lines}, indent=1) + '\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--channels', type=int, nargs='+', default=list(STAGES), choices=list(STAGES))
    parser.add_argument('--bandwidth', type=float, default=4.3e12, help='bytes per second of a large copy')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--repeats', type=int, default=20)
    parser.add_argument('--budget', type=float, default=float('inf'), help='seconds after which no stage begins')
    parser.add_argument('--smoke', action='store_true', help='one stage, tiny, nothing compiled')
    parser.add_argument('--out', type=Path, help='a JSON file, or a folder')
    args = parser.parse_args()
    device, dtype = ('cuda', torch.bfloat16) if torch.cuda.is_available() else ('cpu', torch.float32)
    begin = time.monotonic()
    print(torch.__version__, torch.cuda.get_device_name() if device == 'cuda' else 'cpu', dtype)
    todo, lines = args.channels[:1] if args.smoke else list(args.channels), []
    while todo and time.monotonic() - begin < args.budget:
        lines += measured(args, todo.pop(0), device, dtype)
        if args.out:
            save(args.out, device, lines)
    if todo:
        print(f'not measured: the budget is spent; give --channels {" ".join(map(str, todo))}')


if __name__ == '__main__':
    main()
