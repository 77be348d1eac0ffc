"""What a ConvNeXt block keeps for its backward pass: ours and the peers', counted under the rules of CUDA's autocast.

    python benchmarks/block_memory.py

Prints Markdown; no GPU is needed. The blocks run on fake tensors, which have shapes, dtypes and a device but no
numbers, so that autocast decides as on CUDA: LayerNorm is float32 there, and bfloat16 on a CPU. Counted is every
storage that autograd keeps, once. What grows with the image is told from what does not (weights and their copies) by
two sizes. Not counted is what lives for a moment, in either pass.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator, Set
from fractions import Fraction
from typing import NamedTuple

import timm.models.convnext
import torch
import torchvision.models.convnext
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from backbones.convnext import ARCHS, ConvNeXtBlock
from backbones.kernels.block import convnext_block

Forward = Callable[[Tensor], Tensor]
Builder = Callable[[int], Forward]


class Kept(NamedTuple):
    """What a block of C channels keeps, in bytes: of each pixel ``per_channel * C + per_pixel``.

    Attributes:
        per_channel: of each pixel and channel.
        per_pixel: of each pixel, whatever C.
        copies: of each weight of the linear layers, in copies of it.
    """

    per_channel: Fraction
    per_pixel: Fraction
    copies: Fraction


@contextlib.contextmanager
def autocast(device: str, dtype: torch.dtype) -> Iterator[None]:
    """torch.autocast, which refuses 'cuda' on a machine that has none."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


def saved(forward: Forward, x: Tensor, parameters: Set[int] = frozenset(), dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes that autograd keeps of a forward pass under autocast, without those of the parameters themselves.

    Args:
        forward: the block.
        x: the residual stream, ``(N, C, H, W)``.
        parameters: the storages of the block's parameters, by ``Storage._cdata``.
        dtype: autocast's.
    """
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # which holds the storage, so that none takes its number
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(x.device.type, dtype):
        out = forward(x)
    assert out.grad_fn is not None
    return sum(t.untyped_storage().nbytes() for number, t in kept.items() if number not in parameters)


def count(build: Builder, dtype: torch.dtype = torch.bfloat16, device: str = 'cuda') -> Kept:
    """Counts on fake tensors of a residual stream in float32, as it is behind every block under autocast."""
    with FakeTensorMode(), torch.device(device):
        narrow, wide = (_line(build(c), c, dtype) for c in (64, 128))
    per_channel = (wide[0] - narrow[0]) / 64
    # The second difference tells the linear layers' weights, 8 C^2, from what grows with C.
    return Kept(per_channel, narrow[0] - 64 * per_channel, Fraction(wide[1] - 2 * narrow[1], 8 * (128**2 - 2 * 64**2)))


def _line(block: Forward, channels: int, dtype: torch.dtype) -> tuple[Fraction, Fraction]:
    """Bytes of each pixel, and for no pixel."""
    parameters = {p.untyped_storage()._cdata for p in getattr(block, 'parameters', list)()}
    sizes = [(2, channels, side, 8) for side in (16, 32)]
    few, many = (saved(block, torch.randn(size, requires_grad=True), parameters, dtype) for size in sizes)
    slope = Fraction(many - few, 2 * 16 * 8)
    return slope, few - slope * 2 * 16 * 8


class _Ours(nn.Module):
    """A block on the kernels, without the question whether they can run here."""

    def __init__(self, channels: int, use_grn: bool, recompute: bool) -> None:
        super().__init__()
        self.block = our_block(channels, use_grn)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        b = self.block
        return convnext_block(x, b.dwconv, b.norm, b.pwconv1, b.grn, b.pwconv2, b.gamma, b.drop_path, self.recompute)


class _Checkpointed(nn.Module):
    """A block that keeps its input alone and repeats the whole forward pass."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        # Reentrant, because that form shows to the hooks what it keeps.
        out: Tensor = checkpoint(self.block, x, use_reentrant=True, preserve_rng_state=False)
        return out


def our_block(channels: int, use_grn: bool, kernels: str = 'eager') -> ConvNeXtBlock:
    scale = 0.0 if use_grn else 1.0
    return ConvNeXtBlock(
        channels,
        drop_path=0.1,
        layer_scale=scale,
        use_grn=use_grn,
        eps=1e-6,
        act=nn.GELU(),
        with_cp=False,
        kernels=kernels,
    ).train()


def ours(use_grn: bool = False, recompute: bool = False) -> Builder:
    return lambda channels: _Ours(channels, use_grn, recompute)


def timm_block(channels: int, **options: object) -> nn.Module:
    options = {'ls_init_value': 1.0, **options}
    return timm.models.convnext.ConvNeXtBlock(channels, channels, drop_path=0.1, **options).train()


def torchvision_block(channels: int) -> nn.Module:
    return torchvision.models.convnext.CNBlock(channels, 1.0, 0.1).train()


def transformers_block(channels: int) -> nn.Module:
    from transformers import ConvNextConfig
    from transformers.models.convnext.modeling_convnext import ConvNextLayer

    return ConvNextLayer(ConvNextConfig(), channels, drop_path=0.1).train()


PEERS: dict[str, Builder] = {
    'timm': timm_block,
    'timm, conv_mlp': lambda channels: timm_block(channels, conv_mlp=True),
    'torchvision': torchvision_block,
    'transformers': transformers_block,
}
V1: dict[str, Builder] = {
    **PEERS,
    'ours, eager': lambda channels: our_block(channels, use_grn=False),
    'ours, kernels': ours(),
    'ours, kernels, with_cp': ours(recompute=True),
    'timm, checkpointed': lambda channels: _Checkpointed(timm_block(channels)),
}
V2: dict[str, Builder] = {
    'timm': lambda channels: timm_block(channels, use_grn=True, ls_init_value=None),
    'ours, eager': lambda channels: our_block(channels, use_grn=True),
    'ours, kernels': ours(use_grn=True),
    'ours, kernels, with_cp': ours(use_grn=True, recompute=True),
}


def gib(kept: Kept, arch: str, images: int, height: int, width: int) -> tuple[float, float]:
    """GiB of all blocks of a backbone whose stem has stride 4: activations, and copies of weights."""
    activations = copies = Fraction(0)
    for stage, (depth, channels) in enumerate(zip(*ARCHS[arch], strict=True)):
        pixels = images * (height // (4 << stage)) * (width // (4 << stage))
        activations += depth * pixels * (kept.per_channel * channels + kept.per_pixel)
        copies += depth * 8 * channels**2 * kept.copies
    return float(activations / 2**30), float(copies / 2**30)


def table(*rows: list[str]) -> None:
    for i, row in enumerate(rows):
        print('| ' + ' | '.join(row) + ' |')
        if i == 0:
            print('|' + '---|' * len(row))
    print()


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f'torch {torch.__version__}, timm {timm.__version__}, torchvision {torchvision.__version__}\n')
    for title, forms, dtype in (
        ('V1, autocast to bfloat16', V1, torch.bfloat16),
        ('V1, autocast to float16', V1, torch.float16),
        ('V2 (GRN, no layer scale), autocast to bfloat16', V2, torch.bfloat16),
    ):
        counted = {name: count(build, dtype) for name, build in forms.items()}
        least = min(k.per_channel for name, k in counted.items() if name in PEERS)
        print(f'## {title}\n')
        head = ['a block of C channels', 'bytes of a pixel', 'of the least peer', 'T, GiB', 'B, GiB']
        rows = [[*head, 'copies of a weight, bytes', 'T, GiB', 'B, GiB']]
        for name, k in counted.items():
            (tiny, tiny_copies), (base, base_copies) = (gib(k, arch, 2, 800, 1344) for arch in ('tiny', 'base'))
            per_pixel = f'{float(k.per_channel):g} C' + (f' + {float(k.per_pixel):g}' if k.per_pixel else '')
            cells = [name, per_pixel, f'{float(k.per_channel / least):.2f}', f'{tiny:.2f}', f'{base:.2f}']
            rows.append([*cells, f'{float(k.copies):.2g}', f'{tiny_copies:.2f}', f'{base_copies:.2f}'])
        table(*rows)


if __name__ == '__main__':
    main()
