"""What parts of a training step take, as mmdet, mmseg and torch have them and as densekit has: time and peak memory.

    python benchmarks/step_parts.py [--rounds 7] [--threads 1]

Both take turns in one process. Memory is measured in a process of its own for each; on a CPU that
needs Linux. Writes step_parts.md.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import densekit.ops  # noqa: F401

# isort: split
from mmcv.ops import roi_align
from mmdet.structures.mask import BitmapMasks, mask_target
from mmengine.config import ConfigDict
from mmengine.logging import MMLogger
from mmseg.models.decode_heads import UPerHead

from backbones import ConvNeXt
from densekit.models.mask_targets import mask_targets
from densekit.models.roi_pooling import RoIAlignByProducts
from densekit.models.uper_head import LeanUPerHead

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
Work = Callable[[], object]


def targets_of_masks() -> tuple[Work, Work]:
    """Three stages of a cascade, one image of 800 x 1333 with 20 masks, 128 positive boxes."""
    rng = np.random.default_rng(0)
    bitmaps = (rng.random((20, 800, 1333)) < 0.5).astype(np.uint8)
    corner = torch.rand(128, 2, device=DEVICE) * 600
    boxes = torch.cat([corner, corner + 30 + 170 * torch.rand(128, 2, device=DEVICE)], dim=1)
    indices = torch.randint(20, (128,), device=DEVICE)
    cfg = ConfigDict(mask_size=28)

    def three(function: Callable) -> Work:
        def run() -> None:
            masks = BitmapMasks(bitmaps, 800, 1333)
            for _ in range(3):
                function([boxes], [indices], [masks], cfg)

        return run

    return three(mask_target), three(mask_targets)


def pooling(images: int, channels: int, side: int, boxes: int, size: int) -> tuple[Work, Work]:
    """RoIAlign and its gradient at stride 4, boxes of 10 pixels to a half of the image."""
    x = torch.randn(images, channels, side, side, device=DEVICE, requires_grad=True)
    image = torch.randint(images, (boxes, 1), device=DEVICE).float()
    corner = torch.rand(boxes, 2, device=DEVICE) * 2 * side
    sides = 10 * (0.2 * side) ** torch.rand(boxes, 2, device=DEVICE)
    rois = torch.cat([image, corner, corner + sides], dim=1)
    grad = torch.randn(boxes, channels, size, size, device=DEVICE)

    def with_gradient(function: Callable) -> Work:
        return lambda: torch.autograd.grad(function(), x, grad)

    return (
        with_gradient(lambda: roi_align(x, rois, (size, size), 0.25, 0, 'avg', True)),
        with_gradient(lambda: RoIAlignByProducts.apply(x, rois, size, size, 0.25, 0)),
    )


def optimizer() -> tuple[Work, Work]:
    """A step of AdamW over ConvNeXt-T."""
    steps = []
    for fused in (False, True):
        model = ConvNeXt('tiny').to(DEVICE)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        steps.append(torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=fused).step)
    return steps[0], steps[1]


def head(
    classes: int, channels: int, widths: list[int], images: int, side: int, channels_last: bool
) -> tuple[Work, Work]:
    """UPerHead forward and backward, on features in channels_last."""
    options = dict(
        in_channels=widths,
        in_index=[0, 1, 2, 3],
        channels=channels,
        num_classes=classes,
        norm_cfg=dict(type='BN'),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', avg_non_ignore=True),
    )
    inputs = [
        torch.randn(images, width, side >> i, side >> i, device=DEVICE).to(memory_format=torch.channels_last)
        for i, width in enumerate(widths)
    ]
    stock = UPerHead(**options).to(DEVICE)
    ours = LeanUPerHead(channels_last=channels_last, **options).to(DEVICE)
    ours.load_state_dict(stock.state_dict())

    def step(model: torch.nn.Module) -> Work:
        def run() -> None:
            features = [x.requires_grad_() for x in inputs]
            torch.autograd.grad(model(features).square().mean(), [*features, *model.parameters()])

        return run

    return step(stock), step(ours)


SMALL, TINY = [24, 48, 96, 192], [96, 192, 384, 768]
PARTS: dict[str, Callable[[], tuple[Work, Work]]] = {
    'mask targets of one image, three stages': targets_of_masks,
    'RoIAlign, 200 boxes of 7 x 7 on 8 x 64 x 24 x 24': lambda: pooling(8, 64, 24, 200, 7),
    'RoIAlign, 64 boxes of 14 x 14 on 2 x 256 x 64 x 64': lambda: pooling(2, 256, 64, 64, 14),
    'AdamW over ConvNeXt-T': optimizer,
    'UPerHead of the demo': lambda: head(6, 64, SMALL, 8, 24, False),
    'UPerHead of the demo, channels_last': lambda: head(6, 64, SMALL, 8, 24, True),
    'UPerHead of ConvNeXt-T at 2 x 256 x 256': lambda: head(150, 512, TINY, 2, 64, False),
    'UPerHead of ConvNeXt-T at 2 x 256 x 256, channels_last': lambda: head(150, 512, TINY, 2, 64, True),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=7, help='of each, taking turns')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--parts', default='', help='only those with this in their names; writes nothing')
    parser.add_argument('--once', nargs=2, metavar=('PART', 'WHO'), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    MMLogger.get_instance('step_parts', log_level='WARNING')
    if args.once:
        print(once(args.once[0], int(args.once[1])))
        return 0
    device = torch.cuda.get_device_name() if DEVICE.type == 'cuda' else f'{args.threads} CPU threads'
    lines = [
        '# Parts of a training step',
        '',
        f'Medians of {args.rounds} (least and most), taking turns. Memory: the peak, above what was in use.',
        '',
        f'- Device: {device} ({platform.machine()}), Python {platform.python_version()}, torch {torch.__version__}',
        f'- Command: `python benchmarks/step_parts.py --rounds {args.rounds} --threads {args.threads}`',
        '',
        '| part | stock, ms | densekit, ms | ratio | stock, MiB | densekit, MiB |',
        '|---|---:|---:|---:|---:|---:|',
    ]
    print('\n'.join(lines))
    for name, build in PARTS.items():
        if args.parts in name:
            torch.manual_seed(0)
            lines.append(f'| {name} | {row(*times(build(), args.rounds))} | {" | ".join(memory(name))} |')
            print(lines[-1], flush=True)
    if not args.parts:
        Path(__file__).with_suffix('.md').write_text('\n'.join([*lines, '']))
    return 0


def times(pair: tuple[Work, Work], rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each."""
    found: tuple[list[float], list[float]] = [], []
    for i in range(rounds + 2):
        for work, seconds in zip(pair, found, strict=True):
            finish()
            start = time.perf_counter()
            work()
            finish()
            if i >= 2:  # the first ones warm up
                seconds.append(1000 * (time.perf_counter() - start))
    return found


def row(stock: list[float], ours: list[float]) -> str:
    texts = [f'{statistics.median(ms):.2f} ({min(ms):.2f} - {max(ms):.2f})' for ms in (stock, ours)]
    return ' | '.join([*texts, f'{statistics.median(stock) / statistics.median(ours):.2f} x'])


def finish() -> None:
    if DEVICE.type == 'cuda':
        torch.cuda.synchronize()


def memory(name: str) -> list[str]:
    """MiB that each takes, in a process of its own."""
    command = [sys.executable, __file__, '--threads', str(torch.get_num_threads()), '--once', name]
    return [subprocess.run([*command, who], check=True, capture_output=True, text=True).stdout.strip() for who in '01']


def once(name: str, who: int) -> str:
    work = PARTS[name]()[who]
    if DEVICE.type == 'cuda':
        work()
        finish()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return f'{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f}'
    before = status('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')  # the peak from here on
    work()
    return f'{(status("VmHWM") - before) / 2**10:.0f}'


def status(key: str) -> int:
    """KiB of this process."""
    text = Path('/proc/self/status').read_text()
    return int(text.partition(f'{key}:')[2].split()[0])


if __name__ == '__main__':
    sys.exit(main())
