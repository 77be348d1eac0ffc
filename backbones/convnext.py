"""ConvNeXt V1 and V2 as a backbone for dense prediction.

Papers: "A ConvNet for the 2020s" (arXiv 2201.03545), "ConvNeXt V2" (arXiv 2301.00808).
Source of the architecture: facebookresearch/ConvNeXt at 048efce (MIT), models/convnext.py and
object_detection/mmdet/models/backbones/convnext.py. Differs from it:

- per-stage norms exist only for the requested outputs (unused parameters make DistributedDataParallel fail);
- LayerNorm statistics are float32 in every dtype;
- stages can be frozen, blocks can be checkpointed, late stages can be dilated;
- an input too small for five halvings is padded with zeros instead of refused.

Layouts: N images, C channels, H rows, W columns.
"""

import difflib
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.model.weight_init import PretrainedInit
from mmengine.registry import MODELS
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backbones.kernels import block as triton_block
from backbones.kernels import choice, cpu
from backbones.layers import GRN, LayerNorm2d

ARCHS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    # blocks of each stage, channels of each stage
    'atto': ((2, 2, 6, 2), (40, 80, 160, 320)),  # V2, Table 15
    'femto': ((2, 2, 6, 2), (48, 96, 192, 384)),
    'pico': ((2, 2, 6, 2), (64, 128, 256, 512)),
    'nano': ((2, 2, 8, 2), (80, 160, 320, 640)),
    'tiny': ((3, 3, 9, 3), (96, 192, 384, 768)),  # V1, section 3
    'small': ((3, 3, 27, 3), (96, 192, 384, 768)),
    'base': ((3, 3, 27, 3), (128, 256, 512, 1024)),
    'large': ((3, 3, 27, 3), (192, 384, 768, 1536)),
    'xlarge': ((3, 3, 27, 3), (256, 512, 1024, 2048)),
    'huge': ((3, 3, 27, 3), (352, 704, 1408, 2816)),  # V2
    'xxlarge': ((3, 4, 30, 3), (384, 768, 1536, 3072)),  # OpenCLIP
}

ACTIVATIONS: dict[str, type[nn.Module]] = {'GELU': nn.GELU, 'ReLU': nn.ReLU, 'SiLU': nn.SiLU, 'Hardswish': nn.Hardswish}

NUM_STAGES = 4

# Named objects, so that "not given" can be told from "1e-6 was asked for" (see ConvNeXt, use_grn and norm_cfg).
DEFAULT_LAYER_SCALE = float('1e-6')
DEFAULT_NORM: Mapping[str, Any] = dict(type='LN2d', eps=1e-6)


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution that keeps height and width.

    Args:
        channels: C.
        kernel_size: odd.
        dilation: of the kernel.
        eager: leave everything to ``F.conv2d``.
    """

    def __init__(self, channels: int, kernel_size: int, dilation: int, *, eager: bool) -> None:
        padding = dilation * (kernel_size // 2)
        super().__init__(channels, channels, kernel_size, padding=padding, dilation=dilation, groups=channels)
        self.eager = eager

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(N, C, H, W)`` to ``(N, C, H, W)``."""
        assert self.bias is not None
        if self.eager or not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(x)
        if not (cpu.is_plain(x, self.weight, self.bias) and self._is_as_built()):
            return super().forward(x)
        if not cpu.depthwise_pays(x, self.kernel_size[0]):
            return super().forward(x)
        x, weight, bias = cpu.autocast(x, self.weight, self.bias)
        return cpu.depthwise_conv2d(x, weight, bias, self.dilation[0])

    def _is_as_built(self) -> bool:
        """Whether nobody gave it another stride or padding since."""
        (size, _), (dilation, _) = self.kernel_size, self.dilation
        whole = self.stride == (1, 1) and self.padding_mode == 'zeros' and self.dilation == (dilation, dilation)
        return whole and self.padding == (dilation * (size // 2),) * 2


class Linear(nn.Linear):
    """A linear layer.

    Args:
        in_features: C_in.
        out_features: C_out.
        eager: leave everything to ``F.linear``.
    """

    def __init__(self, in_features: int, out_features: int, *, eager: bool) -> None:
        super().__init__(in_features, out_features)
        self.eager = eager

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(..., C_in)`` to ``(..., C_out)``."""
        if self.eager or not cpu.is_plain(x, self.weight, self.bias):
            return super().forward(x)
        if not cpu.linear_pays(x, self.weight):
            return super().forward(x)
        return cpu.linear(*cpu.autocast(x, self.weight, self.bias))


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, LayerNorm, expansion by 4, activation, (GRN,) projection, layer scale, residual.

    Source: the second of the two equivalent forms in the official code, with the pointwise convolutions as Linear
    layers on ``(N, H, W, C)``.

    Args:
        channels: C.
        drop_path: probability of dropping the branch of a sample in training.
        layer_scale: initial value of the per-channel scale of the branch; 0 for none.
        use_grn: put a GRN behind the activation, as V2 does.
        eps: of the LayerNorm.
        act: the activation module.
        with_cp: recompute the block in the backward pass.
        kernel_size: of the depthwise convolution, odd.
        dilation: of the depthwise convolution.
        kernels: a name in ``choice.KERNELS``; see :class:`ConvNeXt`.
    """

    def __init__(
        self,
        channels: int,
        *,
        drop_path: float,
        layer_scale: float,
        use_grn: bool,
        eps: float,
        act: nn.Module,
        with_cp: bool,
        kernel_size: int = 7,
        dilation: int = 1,
        kernels: str = 'auto',
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.kernels = kernels
        eager = kernels != 'auto'
        self.dwconv = DepthwiseConv2d(channels, kernel_size, dilation, eager=eager)
        self.norm = nn.LayerNorm(channels, eps=eps)
        self.pwconv1 = Linear(channels, 4 * channels, eager=eager)
        self.act = act
        self.grn = GRN(4 * channels) if use_grn else None
        self.pwconv2 = Linear(4 * channels, channels, eager=eager)
        self.gamma = nn.Parameter(torch.full((channels,), layer_scale)) if layer_scale > 0 else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(N, C, H, W)`` to ``(N, C, H, W)``."""
        if self._runs_on_triton(x):
            layers: dict[str, Any] = self._modules
            dwconv, norm, pwconv1, pwconv2 = (layers[name] for name in ('dwconv', 'norm', 'pwconv1', 'pwconv2'))
            parts = (dwconv, norm, pwconv1, layers.get('grn'), pwconv2, self.gamma, layers['drop_path'])
            return triton_block.convnext_block(x, *parts, recompute=self.with_cp)
        if self.with_cp and torch.is_grad_enabled():
            # Reentrant checkpointing gives parameters no gradient where the input needs none, as behind a frozen stem.
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if self.kernels == 'auto' and cpu.is_plain(x) and self._drops_paths():
            return self._forward_on_cpu(x)
        x_nhwc = self.dwconv(x).permute(0, 2, 3, 1)
        x_nhwc = self.act(self.pwconv1(self.norm(x_nhwc)))
        if self.grn is not None:
            x_nhwc = self.grn(x_nhwc)
        x_nhwc = self.pwconv2(x_nhwc)
        if self.gamma is not None:
            x_nhwc = self.gamma * x_nhwc
        return x + self.drop_path(x_nhwc.permute(0, 3, 1, 2))

    def _runs_on_triton(self, x: Tensor) -> bool:
        if not triton_block.runs(self.kernels, x):
            return False
        if reason := self._altered():
            choice.say_once(f'Some ConvNeXt blocks run without Triton kernels (kernels={self.kernels!r}): {reason}')
            return False
        return triton_block.supports(self.kernels, self.dwconv, self.act)

    def _altered(self) -> str | None:
        if reason := altered(self, _AS_BUILT):
            return reason
        drop_path: Any = self._modules['drop_path']
        return None if getattr(drop_path, 'scale_by_keep', True) else 'drop_path has scale_by_keep=False'

    def _drops_paths(self) -> bool:
        """Whether nothing else stands in the place of drop path, and nothing looks at it."""
        return _computes_as(self.drop_path, DropPath, nn.Identity) and not _has_hooks(self.drop_path)

    def _forward_on_cpu(self, x: Tensor) -> Tensor:
        """The same in fewer passes over memory."""
        x_nhwc, fused = x.permute(0, 2, 3, 1), self._can_fuse(x)
        branch = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        if fused:
            branch = cpu.linear_gelu(branch, self.pwconv1.weight, self.pwconv1.bias)
        else:
            branch = self.act(self.pwconv1(branch))
        if self.grn is not None:
            branch = self.grn(branch)
        if fused and self.gamma is None:
            return cpu.linear_add(branch, self.pwconv2.weight, self.pwconv2.bias, x_nhwc).permute(0, 3, 1, 2)
        branch = self.pwconv2(branch)
        # Layer scale and drop path as one factor of the branch, (N, 1, 1, C) or less.
        scale = self.gamma
        if isinstance(self.drop_path, DropPath) and self.drop_path.training:
            dropped = self.drop_path(x.new_ones(len(x), 1, 1, 1))
            scale = dropped if scale is None else scale * dropped
        x_nhwc = x_nhwc + branch if scale is None else torch.addcmul(x_nhwc, scale, branch)
        return x_nhwc.permute(0, 3, 1, 2)

    def _can_fuse(self, x: Tensor) -> bool:
        """Whether nothing asks for what lies between the operators: no gradient, no hook, no other layer."""
        layers = ((self.pwconv1, Linear), (self.act, nn.GELU), (self.pwconv2, Linear))
        return (
            not (torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())))
            and not torch.is_autocast_enabled('cpu')
            and all(_computes_as(layer, kind) and not _has_hooks(layer) for layer, kind in layers)
            and getattr(self.act, 'approximate', None) == 'none'
            and cpu.is_plain(*self.pwconv1.parameters(), *self.pwconv2.parameters())
            and x.dtype == self.pwconv1.weight.dtype
            and cpu.can_fuse_linear(x)
        )


# For each layer of a block, the forward functions in whose place the kernels compute.
_AS_BUILT: dict[str, tuple[Callable[..., Tensor], ...]] = {
    'dwconv': (DepthwiseConv2d.forward,),
    'norm': (nn.LayerNorm.forward,),
    'pwconv1': (Linear.forward,),
    'act': tuple(act.forward for act in ACTIVATIONS.values()),
    'grn': (GRN.forward,),
    'pwconv2': (Linear.forward,),
    'drop_path': (DropPath.forward, nn.Identity.forward),
}


def altered(block: ConvNeXtBlock, names: Iterable[str]) -> str | None:
    """What is no longer as it was built and so is to run, such as an adapter or a hook, in words.

    Every block on the kernels asks at every step, so this reads dictionaries, where attributes of modules take several
    times as long, and remembers nothing, so that nothing is missed.

    Args:
        block: with its layers.
        names: of the layers in whose place something else computes.
    """
    for name in names:
        layer = block._modules.get(name)
        if layer is None:  # no GRN
            continue
        own = vars(layer)
        if type(layer).forward not in _AS_BUILT[name] or 'forward' in own:
            return f'{name} was replaced'
        if _has_own_hooks(own):
            return f'{name} has a hook'
        for parameter in own['_parameters'].values():
            if parameter is None:
                return f'{name} lacks its weight or bias'
    return 'every module has a hook' if nn.modules.module._has_any_global_hook() else None


def _computes_as(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether the module computes what one of these does: neither a subclass nor the object has its own forward."""
    return any(type(module).forward is kind.forward for kind in kinds) and 'forward' not in vars(module)


def _has_hooks(module: nn.Module) -> bool:
    return _has_own_hooks(vars(module)) or nn.modules.module._has_any_global_hook()


def _has_own_hooks(own: Mapping[str, Any]) -> bool:
    """Of a module's ``vars``."""
    hooks = own['_forward_hooks'] or own['_forward_pre_hooks'] or own['_backward_hooks'] or own['_backward_pre_hooks']
    return bool(hooks)


class SameConv2d(nn.Conv2d):
    """A convolution of stride 1 that keeps height and width for an even kernel too.

    Where the padding is odd, the larger half goes to the right and below, as timm has it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(N, C_in, H, W)`` to ``(N, C_out, H, W)``."""
        rows, columns = (d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True))
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return super().forward(x)


@MODELS.register_module()
class ConvNeXt(BaseModule):
    """ConvNeXt that emits one LayerNormed feature map per requested stage.

    Parameter names are the official ones, so official checkpoints load without renaming. The arguments are those of
    mmpretrain's ConvNeXt; a config for that one runs here after changing ``type``.

    Args:
        arch: a name in ``ARCHS`` or ``dict(depths=(..4..), channels=(..4..))``.
        in_channels: of the image. Weights for three channels are adapted to another number when they are loaded.
        stem_patch_size: kernel and stride of the first convolution; stage i has stride ``stem_patch_size * 2**i``.
        norm_cfg: ``dict(type='LN2d', eps=...)``; LayerNorm is the only kind. Not given, eps is 1e-6, and 1e-5 for
            xxlarge, as its weights were trained with.
        act_cfg: ``dict(type=..., **arguments)``, with a type in ``ACTIVATIONS``.
        linear_pw_conv: accepted for compatibility. Linear layers and 1x1 convolutions are the same function of the
            same parameters; Linear layers are computed, and weights of either form load.
        use_grn: ConvNeXt V2. Then there is no layer scale unless ``layer_scale_init_value`` is given.
        drop_path_rate: of the last block; it rises linearly from 0 at the first.
        layer_scale_init_value: 0 for no layer scale. The papers' detectors and segmentors use 1.
        out_indices: stages to emit, in any order, negative ones counted from the end. Outputs are finest first.
            Stages behind the last one keep their parameters, so that weights fit, but are frozen and not computed.
        frozen_stages: freezes the stem and the first n stages (0 or -1: nothing). Output norms stay trainable.
        gap_before_final_norm: must be False: dense features are not pooled.
        with_cp: recompute the blocks' activations in the backward pass instead of keeping them; of all stages, or of
            those named, such as (0, 1), negative ones counted from the end. The first keep the most. Blocks on the
            Triton kernels keep the normalized input of their linear layers too, and repeat the first of these alone.
        init_cfg: mmengine's. ``dict(type='Pretrained', checkpoint=..., prefix=...)`` goes through
            :class:`backbones.checkpoint.PretrainedBackbone`, which fails unless the weights fit.
        kernel_size: of the depthwise convolutions, odd, 3 to 11.
        output_stride: 32, 16 or 8: the largest stride. Stages that would exceed it keep their resolution and dilate
            their convolutions instead, as timm does, with the same weights.
        kernels: 'eager' for plain PyTorch, which the others are tested against; 'auto' for the form that is fastest
            for the device and dtype, equal within rounding, with Triton kernels where they are proven
            (``backbones.kernels.choice.PROVEN``); 'triton' for those in any case: on CUDA from compute capability 8.0,
            with exact GELU and without dilation, and an error elsewhere; a block that was altered, by an adapter or a
            hook, runs as it is and the log says so once. There a counter of FLOPs sees one operator per block, for
            which it has no formula. Parameters and checkpoints are the same.

    Attributes:
        channels: C of each output.
        strides: of each output, in pixels of the input.

    Raises:
        ValueError: if an argument is not allowed; the message says what is.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Sequence[int]] = 'tiny',
        in_channels: int = 3,
        stem_patch_size: int = 4,
        norm_cfg: Mapping[str, Any] = DEFAULT_NORM,
        act_cfg: Mapping[str, Any] = dict(type='GELU'),
        linear_pw_conv: bool = True,
        use_grn: bool = False,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = DEFAULT_LAYER_SCALE,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = 0,
        gap_before_final_norm: bool = False,
        with_cp: bool | Sequence[int] = False,
        init_cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        kernel_size: int = 7,
        output_stride: int = 32,
        kernels: str = 'auto',
    ) -> None:
        super().__init__(init_cfg=_with_strict_loader(init_cfg))
        self.depths, widths = _sizes(arch)
        self.out_indices = _stage_indices(out_indices)
        self.frozen_stages = _frozen_stages(frozen_stages)
        if gap_before_final_norm:
            raise ValueError('gap_before_final_norm=True pools the features away; a dense backbone needs False')
        _check_rates(drop_path_rate, layer_scale_init_value)
        if use_grn and layer_scale_init_value is DEFAULT_LAYER_SCALE:
            layer_scale_init_value = 0.0
        if not isinstance(kernel_size, int) or kernel_size not in (3, 5, 7, 9, 11):
            raise ValueError(f'kernel_size={kernel_size!r}: give 3, 5, 7, 9 or 11')
        if not (isinstance(in_channels, int) and in_channels >= 1 and isinstance(stem_patch_size, int)):
            raise ValueError(f'in_channels={in_channels!r}, stem_patch_size={stem_patch_size!r}: give whole numbers')
        if not 1 <= stem_patch_size <= 32:
            raise ValueError(f'stem_patch_size={stem_patch_size}: give 1 to 32; the paper has 4')
        if norm_cfg is DEFAULT_NORM and arch == 'xxlarge':
            norm_cfg = dict(type='LN2d', eps=1e-5)
        eps = _layer_norm_eps(norm_cfg)
        strides, dilations = _strides_and_dilations(stem_patch_size, output_stride)

        self.downsample_layers = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(in_channels, widths[0], stem_patch_size, stem_patch_size), _norm(widths[0], eps))]
        )
        for i, (c_in, c_out) in enumerate(itertools.pairwise(widths), start=1):
            conv: nn.Conv2d = nn.Conv2d(c_in, c_out, 2, 2)
            if strides[i] == strides[i - 1]:
                conv = SameConv2d(c_in, c_out, 2, dilation=max(dilations[i] // 2, 1))
            self.downsample_layers.append(nn.Sequential(_norm(c_in, eps), conv))

        rates = iter(torch.linspace(0, drop_path_rate, sum(self.depths), device='cpu').tolist())
        block = functools.partial(
            ConvNeXtBlock,
            layer_scale=layer_scale_init_value,
            use_grn=use_grn,
            eps=eps,
            kernel_size=kernel_size,
            kernels=choice.check_kernels(kernels),
        )
        checkpointed = _checkpointed_stages(with_cp)
        self.stages = nn.ModuleList()
        for i, (depth, width, dilation) in enumerate(zip(self.depths, widths, dilations, strict=True)):
            stage = functools.partial(block, width, dilation=dilation, with_cp=i in checkpointed)
            blocks = [stage(drop_path=next(rates), act=_activation(act_cfg)) for _ in range(depth)]
            self.stages.append(nn.Sequential(*blocks))
        for i in self.out_indices:
            self.add_module(f'norm{i}', _norm(widths[i], eps))

        self.channels = tuple(widths[i] for i in self.out_indices)
        self.strides = tuple(strides[i] for i in self.out_indices)
        self._smallest = (stem_patch_size, *(b // a for a, b in itertools.pairwise(strides)))  # sizes of input
        self.apply(_init_parameters)
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Computes the features of a batch of images.

        Args:
            x: ``(N, in_channels, H, W)`` of any height and width.

        Returns:
            One ``(N, channels[k], H // strides[k], W // strides[k])`` per entry of ``out_indices``, finest first
            (at least 1 x 1 each).
        """
        outputs = []
        for i in range(self.out_indices[-1] + 1):
            x = self.downsample_layers[i](_at_least(x, self._smallest[i]))
            x = self.stages[i](x)
            if i in self.out_indices:
                outputs.append(getattr(self, f'norm{i}')(x))
        return tuple(outputs)

    def train(self, mode: bool = True) -> 'ConvNeXt':
        """Sets the training mode; what is frozen stays frozen and in evaluation mode."""
        super().train(mode)
        self._freeze()
        return self

    def layer_depth(self, name: str, mode: str = 'layer_wise') -> tuple[int, int]:
        """The depth of a parameter, for layer-wise learning-rate decay.

        With L layers there are ``L + 2`` depths; the last stands for everything after the blocks. L is 6 when the
        third stage has at most 9 blocks, else ``max(12, 3 + ceil(blocks / 3))``: every third block of that stage is a
        depth of its own. ``stage_wise`` puts the stem and every downsampling at 0 and stage s at s + 1, so that with
        L = 6 or 12 there is a gap between the last stage and the head, as in the published recipes.

        Source: get_num_layer_layer_wise, get_num_layer_stage_wise in facebookresearch/ConvNeXt at 048efce,
        object_detection/mmcv_custom and semantic_segmentation/mmcv_custom.

        Args:
            name: of a parameter or module, relative to this backbone.
            mode: 'layer_wise' or 'stage_wise'.

        Returns:
            The depth, and the number of depths.

        Raises:
            ValueError: if the mode is neither of the two.
        """
        if mode not in ('layer_wise', 'stage_wise'):
            raise ValueError(f"mode {mode!r} is unknown; choose 'layer_wise' or 'stage_wise'")
        blocks = self.depths[2]
        layers = 6 if blocks <= 9 else max(12, 3 + math.ceil(blocks / 3))
        num_depths = layers + 2
        match = re.match(r'(downsample_layers|stages)\.(\d+)(?:\.(\d+))?', name)
        if match is None:
            return num_depths - 1, num_depths
        kind, stage, block = match[1], int(match[2]), int(match[3] or 0)
        if mode == 'stage_wise':
            return (0 if kind == 'downsample_layers' else stage + 1), num_depths
        if kind == 'downsample_layers':
            return (0, 2, 3, layers)[stage], num_depths
        return (1, 2, 3 + block // 3, layers)[stage], num_depths

    @staticmethod
    def describe_weights(weights: Mapping[str, Tensor]) -> str:
        """Says in words of which ConvNeXt some weights are, such as 'ConvNeXt V2 atto with layer scale'.

        Args:
            weights: names and tensors, under our names.
        """
        blocks = [set() for _ in range(NUM_STAGES)]  # type: list[set[str]]
        for key in weights:
            if match := re.match(r'stages\.(\d)\.(\d+)\.', key):
                blocks[int(match[1])].add(match[2])
        depths = tuple(map(len, blocks))
        keys = [f'stages.{i}.0.dwconv.bias' for i in range(NUM_STAGES)]
        channels = tuple(weights[key].shape[0] if key in weights else 0 for key in keys)
        if not any(channels):
            return 'no ConvNeXt'
        names = [name for name, sizes in ARCHS.items() if sizes == (depths, channels)]
        size = names[0] if names else f'with {depths} blocks of {channels} channels'
        version = 'V2' if any('.grn.' in key for key in weights) else 'V1'
        scale = 'with' if any(key.endswith('.gamma') and '.grn.' not in key for key in weights) else 'without'
        return f'ConvNeXt {version} {size}, {scale} layer scale'

    def _freeze(self) -> None:
        for i in (*range(self.frozen_stages), *range(self.out_indices[-1] + 1, NUM_STAGES)):
            for module in (self.downsample_layers[i], self.stages[i]):
                module.eval()
                module.requires_grad_(False)


def _check_rates(drop_path_rate: float, layer_scale_init_value: float) -> None:
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f'drop_path_rate={drop_path_rate} is not in [0, 1)')
    if not 0 <= layer_scale_init_value < math.inf:
        raise ValueError(f'layer_scale_init_value={layer_scale_init_value}: give a positive number, or 0 for none')


def _norm(channels: int, eps: float) -> LayerNorm2d:
    return LayerNorm2d(channels, eps=eps)


def _init_parameters(module: nn.Module) -> None:
    """Truncated normal with std 0.02 and zero biases, as in the official code."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _at_least(x: Tensor, size: int) -> Tensor:
    """Pads ``(N, C, H, W)`` on the right and below so that a kernel of ``size`` fits once."""
    rows, columns = max(size - x.shape[2], 0), max(size - x.shape[3], 0)
    return F.pad(x, (0, columns, 0, rows)) if rows or columns else x


def _sizes(arch: str | Mapping[str, Sequence[int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Blocks and channels of each stage."""
    if isinstance(arch, str):
        if arch not in ARCHS:
            hint = f' Did you mean {nearest!r}?' if (nearest := _nearest_arch(arch)) else ''
            raise ValueError(
                f'arch {arch!r} is unknown.{hint} Choose from {", ".join(ARCHS)}, '
                'or give dict(depths=(d1, d2, d3, d4), channels=(c1, c2, c3, c4)).'
            )
        return ARCHS[arch]
    if not isinstance(arch, Mapping) or set(arch) != {'depths', 'channels'}:
        raise ValueError(f'arch={arch!r}: give a name or a dict of exactly depths and channels, four numbers each')
    depths, channels = tuple(arch['depths']), tuple(arch['channels'])
    if len(depths) != NUM_STAGES or len(channels) != NUM_STAGES or min(*depths, *channels) < 1:
        raise ValueError(f'arch has depths={depths} and channels={channels}; give four positive numbers each')
    return depths, channels


def _nearest_arch(arch: str) -> str | None:
    """The size meant by a misspelling, a file name's letters (t, xl) or another project's name (convnext_tiny)."""
    name = re.sub(r'^convnext(v2)?[-_.]', '', arch.lower())
    abbreviated = [size for size in ARCHS if name and size.startswith({'xl': 'xlarge'}.get(name, name))]
    return next(iter(abbreviated + difflib.get_close_matches(name, ARCHS, n=1)), None)


def _strides_and_dilations(stem_patch_size: int, output_stride: int) -> tuple[list[int], list[int]]:
    """Of each stage. Source: ConvNeXt in timm 1.0.31, timm/models/convnext.py."""
    if output_stride not in (8, 16, 32) or output_stride < stem_patch_size:
        raise ValueError(
            f'output_stride={output_stride}: give 32, 16 or 8, and not less than the stem, which has '
            f'stem_patch_size={stem_patch_size}'
        )
    strides, dilations = [stem_patch_size], [1]
    for _ in range(NUM_STAGES - 1):
        dilated = strides[-1] >= output_stride
        strides.append(strides[-1] if dilated else 2 * strides[-1])
        dilations.append(2 * dilations[-1] if dilated else dilations[-1])
    return strides, dilations


def _stage_indices(out_indices: int | Sequence[int]) -> tuple[int, ...]:
    given = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
    indices = tuple(sorted(i + NUM_STAGES if i < 0 else i for i in given))
    if not indices or len(set(indices)) != len(indices) or indices[0] < 0 or indices[-1] >= NUM_STAGES:
        raise ValueError(f'out_indices={given}: give different stages from 0 to 3 (or -4 to -1), at least one')
    return indices


def _checkpointed_stages(with_cp: bool | Sequence[int]) -> tuple[int, ...]:
    if isinstance(with_cp, bool):
        return tuple(range(NUM_STAGES)) if with_cp else ()
    message = f'with_cp={with_cp!r}: give True, False, or different stages from 0 to 3 (or -4 to -1), such as (0, 1)'
    if not isinstance(with_cp, Sequence) or not all(type(i) is int for i in with_cp):
        raise ValueError(message)
    try:
        return _stage_indices(with_cp) if with_cp else ()
    except ValueError as error:
        raise ValueError(message) from error


def _frozen_stages(frozen_stages: int) -> int:
    if not -1 <= frozen_stages <= NUM_STAGES:
        raise ValueError(f'frozen_stages={frozen_stages}: give 0 (or -1) for none, up to 4 for all stages')
    return max(frozen_stages, 0)


def _layer_norm_eps(norm_cfg: Mapping[str, Any]) -> float:
    unknown = set(norm_cfg) - {'type', 'eps'}
    if norm_cfg.get('type') not in ('LN2d', 'LN') or unknown:
        raise ValueError(f"norm_cfg={dict(norm_cfg)}: ConvNeXt has LayerNorm only; give dict(type='LN2d', eps=1e-6)")
    return float(norm_cfg.get('eps', 1e-6))


def _activation(act_cfg: Mapping[str, Any]) -> nn.Module:
    arguments = dict(act_cfg)
    kind = arguments.pop('type', None)
    if kind not in ACTIVATIONS:
        raise ValueError(f'act_cfg has type {kind!r}; choose from {", ".join(ACTIVATIONS)}')
    try:
        return ACTIVATIONS[kind](**arguments)
    except TypeError as error:
        raise ValueError(f'act_cfg={dict(act_cfg)}: {error}') from error


def _with_strict_loader(
    init_cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
) -> list[dict[str, Any]] | None:
    """Replaces mmengine's 'Pretrained', which only warns when weights do not fit, by ours, and puts it last."""
    if init_cfg is None:
        return None
    cfgs = [dict(cfg) for cfg in ([init_cfg] if isinstance(init_cfg, Mapping) else init_cfg)]
    for cfg in cfgs:
        # As a class, or as a name that may begin with a scope, such as 'mmengine.Pretrained'.
        if cfg.get('type') is PretrainedInit or str(cfg.get('type')).split('.')[-1] == 'Pretrained':
            cfg['type'] = 'PretrainedBackbone'
    return sorted(cfgs, key=lambda cfg: cfg.get('type') == 'PretrainedBackbone')
