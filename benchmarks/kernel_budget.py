"""Registers, spills and shared memory of every Triton kernel, compiled for a device that need not be there.

    python benchmarks/kernel_budget.py           # the depthwise kernels, 7 x 7, channels of atto to huge
    python benchmarks/kernel_budget.py --channels 96 --size 3 5 7 9 11 --dtype float32
    python benchmarks/kernel_budget.py --kernels pointwise grn mlp --channels 96 --capability 80 90
    python benchmarks/kernel_budget.py --loops                   # and what the inner loops are made of

Compiles what the launch functions of backbones/kernels would launch, for Hopper (compute capability 9.0) or whatever
is asked for. A spill is an error. "Programs" is how many fit on a multiprocessor by registers, shared memory and
threads. "Multiply-adds" is the share of float32 FMA among the instructions of the innermost loop with the largest
share: what part of the peak that loop can reach at best. "At the border" is the smallest share among the loops with at
least half as many of them: of a convolution the loop beside the border, the only one that narrow maps run, but not the
normalization of what it wrote.
"""

import argparse
import collections
import importlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

CHANNELS = (40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 352, 384, 512, 640, 704, 768, 1024, 1408, 1536, 2048, 2816)
REGISTERS, THREADS, PROGRAMS = 65536, 2048, 32  # of a multiprocessor of compute capability 8.0 and of 9.0
SHARED = {80: 164 * 1024, 90: 228 * 1024}
OPTIONS = ('num_warps', 'num_stages', 'num_ctas', 'maxnreg')


def compiled(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], capability: int) -> Any:
    """Compiles one launch; arguments are specialized as Triton does it when it launches."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in options.items() if name not in OPTIONS}
    signature, attributes = {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, args, strict=False)):
        if value is None or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f'*{triton.runtime.jit.type_canonicalisation_dict[str(value.dtype)[6:]]}'
            attributes[(i,)] = [['tt.divisibility', 16]]
        else:
            signature[parameter.name] = 'fp32' if isinstance(value, float) else 'i32'
            if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [['tt.divisibility', 16]]
    signature = {p.name: signature.get(p.name, 'constexpr') for p in kernel.params}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    launch_options = {name: value for name, value in options.items() if name in OPTIONS}
    return triton.compile(source, target=GPUTarget('cuda', capability, 32), options=launch_options)


def tool(name: str, *args: str) -> str:
    """What one of the programs beside Triton's compiler prints."""
    import triton

    program = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / name
    return subprocess.run([program, *args], check=True, capture_output=True, text=True).stdout


def measure(built: Any, warps: int, capability: int) -> dict[str, Any]:
    """What the machine code needs."""
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(built.asm['cubin'])
        file.flush()
        usage = tool('cuobjdump', '--dump-resource-usage', file.name)
        code = tool('nvdisasm', '-c', file.name)
    used = {key: int(value) for key, value in re.findall(r'(REG|STACK|LOCAL):(\d+)', usage)}
    registers, shared, threads = used['REG'], built.metadata.shared, 32 * warps
    per_program = warps * (-(-registers * 32 // 256) * 256)  # handed out to warps by 256
    fits = min(REGISTERS // per_program, SHARED[capability] // (shared + 1024), THREADS // threads, PROGRAMS)
    loops = inner_loops(code)
    walks = [loop for loop in loops if 2 * loop['FFMA'] >= max(other['FFMA'] for other in loops)]
    return {
        'registers': registers,
        'stack': used['STACK'],
        'spills': used['LOCAL'] + len(re.findall(r'\b(?:LDL|STL)\b', code)),
        'shared memory': shared,
        'programs': fits,
        'multiply-adds': round(share(loops[0]), 2),
        'at the border': round(share(walks[-1]), 2),
        'loop': dict(loops[0].most_common()),
        'sums': sums(built.asm['ttgir']),
    }


def sums(code: str) -> list[str]:
    """Of each reduction the shape and how it lies in the threads, which is the order that it adds up in."""
    layouts = dict(re.findall(r'^(#\w+) = (.*)$', code, re.MULTILINE))
    return [f'{m[1]} {layouts[m[2]]}' for m in re.finditer(r'\}\) : \(tensor<([^>]*), (#\w+)>\) -> tensor', code)]


def share(loop: collections.Counter[str]) -> float:
    """Of the multiply-adds among the instructions of a loop."""
    return loop['FFMA'] / max(loop.total(), 1)


def inner_loops(code: str) -> list[collections.Counter[str]]:
    """The instructions of each loop with multiply-adds that contains no other, the largest share of them first.

    If there is none, of an empty one.
    """
    labels: dict[str, int] = {}
    names: list[str] = []
    jumps: list[tuple[int, int]] = []
    for line in code.splitlines():
        if label := re.match(r'\s*(\.L_x_\d+):', line):
            labels[label[1]] = len(names)
        elif instruction := re.match(r'\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)(.*)', line):
            target = re.search(r'`\((\.L_x_\d+)\)', instruction[2])
            if instruction[1] == 'BRA' and target and labels.get(target[1], len(names)) < len(names):
                jumps.append((labels[target[1]], len(names) + 1))
            names.append(instruction[1])
    inner = [a for a in jumps if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in jumps)]
    loops = [collections.Counter(names[start:end]) for start, end in inner]
    return sorted((loop for loop in loops if loop['FFMA']), key=share, reverse=True) or [collections.Counter()]


def launches(module: str, channels: int, sizes: list[int], dtype: torch.dtype, capability: int) -> list[Any]:
    """What the launch functions of a module would launch, with a label."""
    kernels = importlib.import_module(f'backbones.kernels.{module}_triton')
    if module != 'depthwise':
        return [('', launch) for launch in kernels.configurations(channels, dtype)]
    target = divmod(capability, 10)
    return [(f'{k}x{k}', launch) for k in sizes for launch in kernels.configurations(channels, k, dtype, target)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kernels', nargs='+', default=['depthwise'], help='modules of backbones/kernels')
    parser.add_argument('--channels', nargs='+', type=int, default=list(CHANNELS))
    parser.add_argument('--size', nargs='+', type=int, default=[7], help='of the depthwise filter')
    parser.add_argument('--only', nargs='+', help='kernels by name')
    parser.add_argument('--dtype', default='bfloat16', choices=('float16', 'bfloat16', 'float32'))
    parser.add_argument('--capability', nargs='+', type=int, default=[90], choices=SHARED, help='90 for Hopper')
    parser.add_argument('--loops', action='store_true', help='show the instructions of that loop')
    parser.add_argument('--json', action='store_true')
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))

    rows, seen = [], set()
    for module, channels, capability in itertools.product(args.kernels, args.channels, args.capability):
        found = launches(module, channels, args.size, getattr(torch, args.dtype), capability)
        for label, (kernel, values, options) in found:
            if args.only and kernel.fn.__name__ not in args.only:
                continue
            built = compiled(kernel, values, options, capability)
            if built.hash in seen:
                continue
            seen.add(built.hash)
            row = {'kernel': f'{kernel.fn.__name__} {label}'.strip(), 'channels': channels, 'capability': capability}
            row |= measure(built, options.get('num_warps', 4), capability)
            rows.append(row)
            if not args.json:
                print(
                    ' | '.join(f'{key} {value}' for key, value in row.items() if key not in ('loop', 'sums')),
                    flush=True,
                )
            if args.loops:
                print('   ', row['loop'])
    if args.json:
        print(json.dumps(rows))
    if spilled := [row for row in rows if row['spills']]:
        sys.exit(f'{len(spilled)} of {len(rows)} kernels spill registers')


if __name__ == '__main__':
    main()
