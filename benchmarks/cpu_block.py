"""Speed of ConvNeXt's forms on a CPU: the depthwise weight gradient, the linear layers, the whole backbone.

    python benchmarks/cpu_block.py [gradient] [linear] [backbone] [--rounds 9] [--threads N]

Prints Markdown. Each figure is a median; the forms compared take turns within a round, so that a busy moment meets all
of them. Peers are installed packages with random weights, each in NCHW and in channels_last.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from transformers import ConvNextBackbone, ConvNextConfig

from backbones import ConvNeXt
from backbones.folding import fold
from backbones.kernels import cpu

NHWC = torch.channels_last
# (N, C, H, W) of T's stages for 224 x 224 and 800 x 1333, and of atto's for 128 x 128
SHAPES = [(1, 96, 56, 56), (1, 192, 28, 28), (1, 384, 14, 14), (1, 768, 7, 7)]
SHAPES += [(1, 96, 200, 334), (1, 192, 100, 167), (1, 384, 50, 84), (1, 768, 25, 42)]
SHAPES += [(8, 40, 32, 32), (8, 80, 16, 16), (8, 160, 8, 8), (8, 320, 4, 4)]
# size, images, side
BACKBONES = [('tiny', 1, 224), ('tiny', 2, 224), ('tiny', 1, 512), ('atto', 8, 128)]
DEPTHS = {'tiny': (3, 3, 9, 3), 'atto': (2, 2, 6, 2)}
WIDTHS = {'tiny': (96, 192, 384, 768), 'atto': (40, 80, 160, 320)}


def medians(forms: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each form."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for form in forms.values():
        form()
    for _ in range(rounds):
        for name, form in forms.items():
            started = time.perf_counter()
            form()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def table(*rows: list[str]) -> None:
    for i, row in enumerate(rows):
        print('| ' + ' | '.join(row) + ' |', flush=True)
        if i == 0:
            print('|' + '---|' * len(row))
    print()


def gradient(rounds: int) -> None:
    """The weight gradient of a depthwise convolution."""
    for dtype in (torch.float32, torch.bfloat16):
        print(f'## Depthwise weight gradient, channels_last, {str(dtype)[6:]}: stock ms / ours ms = ratio\n')
        rows = [['(N, C, H, W)', *(f'{k} x {k}' for k in (5, 7, 9, 11))]]
        for shape in SHAPES:
            rows.append([str(shape)])
            x, g = (torch.randn(shape).to(dtype).contiguous(memory_format=NHWC) for _ in range(2))
            for k in (5, 7, 9, 11):
                w = torch.zeros(shape[1], 1, k, k, dtype=dtype)
                t = medians(
                    {
                        'stock': lambda x=x, g=g, w=w: cpu._stock_backward(g, x, w, 1, [False, True, False]),
                        'ours': lambda x=x, g=g, k=k: cpu.depthwise_weight_gradient(x, g, k),
                    },
                    rounds,
                )
                rows[-1].append(f'{1e3 * t["stock"]:.2f} / {1e3 * t["ours"]:.2f} = {t["stock"] / t["ours"]:.2f}')
        table(*rows)


def linear(rounds: int) -> None:
    """Linear layers of the block: MKL (F.linear) against oneDNN, and with GELU or the addition inside."""
    print('## Linear layers, float32: F.linear ms / oneDNN ms = ratio\n')
    rows = [
        ['(N, C, H, W)', 'C to 4C, training', '4C to C, training', 'with GELU', 'packed', 'with addition', 'packed']
    ]
    for n, c, h, w in SHAPES:
        m = n * h * w
        x, y = torch.randn(m, c), torch.randn(m, 4 * c)
        w1, w2, b1, b2 = torch.randn(4 * c, c), torch.randn(c, 4 * c), torch.randn(4 * c), torch.randn(c)
        p1, p2 = cpu.packed(w1, m), cpu.packed(w2, m)

        def training(run: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], object]:
            given = [t.clone().requires_grad_() for t in tensors]
            seed = torch.randn(*tensors[0].shape[:-1], len(tensors[1]))
            return lambda: torch.autograd.grad(run(*given), given, seed)

        t = medians(
            {
                'stock1': training(F.linear, x, w1, b1),
                'ours1': training(cpu.linear, x, w1, b1),
                'stock2': training(F.linear, y, w2, b2),
                'ours2': training(cpu.linear, y, w2, b2),
                'gelu': lambda x=x, w1=w1, b1=b1: F.gelu(F.linear(x, w1, b1)),
                'our gelu': lambda x=x, w1=w1, b1=b1: cpu.linear_gelu(x, w1, b1),
                'packed gelu': lambda x=x, p1=p1, b1=b1: cpu.linear_gelu(x, p1, b1),
                'add': lambda x=x, y=y, w2=w2, b2=b2: x + F.linear(y, w2, b2),
                'our add': lambda x=x, y=y, w2=w2, b2=b2: cpu.linear_add(y, w2, b2, x),
                'packed add': lambda x=x, y=y, p2=p2, b2=b2: cpu.linear_add(y, p2, b2, x),
            },
            rounds,
        )
        pairs = [('stock1', 'ours1'), ('stock2', 'ours2'), ('gelu', 'our gelu'), ('gelu', 'packed gelu')]
        pairs += [('add', 'our add'), ('add', 'packed add')]
        cells = [f'{1e3 * t[a]:.2f} / {1e3 * t[b]:.2f} = {t[a] / t[b]:.2f}' for a, b in pairs]
        rows.append([str((n, c, h, w)), *cells])
    table(*rows)


class TorchvisionFeatures(nn.Module):
    """The four feature maps of torchvision's ConvNeXt."""

    def __init__(self, arch: str) -> None:
        super().__init__()
        settings = zip(WIDTHS[arch], (*WIDTHS[arch][1:], None), DEPTHS[arch], strict=True)
        blocks = [torchvision.models.convnext.CNBlockConfig(*setting) for setting in settings]
        self.features = torchvision.models.ConvNeXt(blocks, layer_scale=1.0).features

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i % 2:
                outputs.append(x)
        return outputs


class TransformersFeatures(nn.Module):
    """The four feature maps of transformers' ConvNeXt."""

    def __init__(self, arch: str) -> None:
        super().__init__()
        names = ['stage1', 'stage2', 'stage3', 'stage4']
        config = ConvNextConfig(hidden_sizes=list(WIDTHS[arch]), depths=list(DEPTHS[arch]), out_features=names)
        self.backbone = ConvNextBackbone(config)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.backbone(x).feature_maps


def models(arch: str) -> dict[str, nn.Module]:
    options = dict(depths=DEPTHS[arch], dims=WIDTHS[arch], features_only=True)
    return {
        'ours': ConvNeXt(arch, layer_scale_init_value=1.0),
        'ours, eager': ConvNeXt(arch, layer_scale_init_value=1.0, kernels='eager'),
        'timm': timm.create_model('convnext_tiny', **options),
        'timm, conv_mlp': timm.create_model('convnext_tiny', conv_mlp=True, **options),
        'torchvision': TorchvisionFeatures(arch),
        'transformers': TransformersFeatures(arch),
    }


def inference_step(model: nn.Module, x: Tensor) -> Callable[[], object]:
    def step() -> object:
        with torch.inference_mode():
            return model(x)

    return step


def training_step(model: nn.Module, x: Tensor, autocast: bool) -> Callable[[], object]:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            outputs = model(x)
        sum(out.float().square().mean() for out in outputs).backward()

    return step


def backbone(rounds: int) -> None:
    """Whole backbones; the ratio is that of the fastest peer."""
    for arch, images, side in BACKBONES:
        built = models(arch)
        image = torch.randn(images, 3, side, side)
        for mode in ('inference', 'training', 'training under bfloat16 autocast'):
            forms: dict[str, Callable[[], object]] = {}
            for name, model in built.items():
                for layout in ('', ', channels_last') if not name.startswith('ours') else ('',):
                    # A copy in its own memory format; .to() would change the one model.
                    x, form = image, model.train(mode != 'inference')
                    if layout:
                        x, form = x.contiguous(memory_format=NHWC), copy.deepcopy(model).to(memory_format=NHWC)
                    inference = mode == 'inference'
                    forms[name + layout] = (
                        inference_step(form, x) if inference else training_step(form, x, 'auto' in mode)
                    )
            if mode == 'inference':
                forms['ours, folded'] = inference_step(fold(built['ours']), image)
            t = medians(forms, rounds)
            best = min((name for name in t if not name.startswith('ours')), key=lambda name: t[name])
            print(f'## ConvNeXt-{arch}, {images} x 3 x {side} x {side}, {mode}: fastest peer {best}\n')
            rows = [[name, f'{1e3 * s:.1f}', f'{t[best] / s:.2f}'] for name, s in sorted(t.items(), key=lambda i: i[1])]
            table(['form', 'ms', 'times as fast as the fastest peer'], *rows)


def main() -> None:
    parts = {'gradient': gradient, 'linear': linear, 'backbone': backbone}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('parts', nargs='*', help='all, if none is named')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if unknown := set(args.parts) - set(parts):
        parser.error(f'{", ".join(sorted(unknown))}: choose from {", ".join(parts)}')
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    capability = torch.backends.cpu.get_cpu_capability()
    print(f'torch {torch.__version__}, {args.threads} threads, {capability}, median of {args.rounds} rounds\n')
    for name in args.parts or parts:
        parts[name](args.rounds)


if __name__ == '__main__':
    main()
