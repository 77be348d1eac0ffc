"""Time and memory of saving a checkpoint: densekit's (atomic, fsync, SHA-256) against mmengine's.

    python benchmarks/saving.py

The two alternate, each in a fresh process; saving.md has what was measured.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MEGABYTE = 1_000_000


def kilobytes_at_most() -> int:
    """The most memory that this process has had."""
    status = Path('/proc/self/status').read_text()
    return int(status.split('VmHWM:')[1].split()[0])


def save_once(who: str, megabytes: int, folder: Path) -> dict[str, float]:
    """One warm-up with a small checkpoint, then the measured one: weights and two moments of AdamW per weight."""
    import torch
    from mmengine.runner import save_checkpoint

    from densekit.engine import store

    def save(content: dict, path: Path) -> None:
        if who == 'mmengine':
            save_checkpoint(content, str(path))
        else:
            store.save(path, content, {'iter': 1})

    torch.manual_seed(0)
    save({'state_dict': {'weight': torch.randn(500_000)}}, folder / 'warm.pth')
    size = megabytes * MEGABYTE // 4 // 180
    content = {part: {str(index): torch.randn(size) for index in range(60)} for part in ('state_dict', 'exp', 'square')}
    before = kilobytes_at_most()
    start, busy = time.perf_counter(), time.process_time()
    save(content, folder / 'iter_1.pth')
    seconds, processor = time.perf_counter() - start, time.process_time() - busy
    memory = (kilobytes_at_most() - before) * 1024 / MEGABYTE
    return {'seconds': seconds, 'processor': processor, 'megabytes': memory}


def measure(who: str, megabytes: int) -> dict[str, float]:
    """The same in a fresh process."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        command = [sys.executable, __file__, '--once', who, '--megabytes', str(megabytes), '--folder', folder]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--megabytes', type=int, default=240)
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--once', help=argparse.SUPPRESS)
    parser.add_argument('--folder', type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(save_once(args.once, args.megabytes, args.folder)))
        return
    found: dict[str, list[dict[str, float]]] = {'densekit': [], 'mmengine': []}
    for _ in range(args.rounds):
        for who, results in found.items():
            results.append(measure(who, args.megabytes))
    for who, results in found.items():
        each = ', '.join(f'{result["seconds"]:.2f}' for result in results)
        middle = {name: statistics.median(result[name] for result in results) for name in results[0]}
        print(
            f'{who}: median {middle["seconds"]:.3f} s ({each}), processor {middle["processor"]:.3f} s, '
            f'memory grows by {middle["megabytes"]:.0f} MB'
        )
    ratios = [ours['seconds'] / theirs['seconds'] for ours, theirs in zip(*found.values(), strict=True)]
    print(f'densekit / mmengine: median of the rounds {statistics.median(ratios):.2f}')


if __name__ == '__main__':
    main()
