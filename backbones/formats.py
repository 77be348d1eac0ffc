"""Other projects' names of a ConvNeXt's weights, and ours.

One table of two columns for each project: a pattern for a whole key, and our name for it, ``None`` where a tensor is
dropped on purpose. The first match counts; a key that matches nothing is an error.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from backbones.files import some

Names = tuple[tuple[str, str | None], ...]

# Ours are the official ones, and the norms of the stages.
_OWN: Names = (
    (r'(downsample_layers\.\d\.\d\.(?:weight|bias))', r'\1'),
    (r'(stages\.\d\.\d+\.(?:dwconv|norm|pwconv1|pwconv2)\.(?:weight|bias))', r'\1'),
    (r'(stages\.\d\.\d+\.gamma)', r'\1'),
    (r'(stages\.\d\.\d+\.grn\.(?:gamma|beta))', r'\1'),
    (r'(norm[0-3]\.(?:weight|bias))', r'\1'),
)

_OFFICIAL: Names = (
    *_OWN,
    (r'(?:norm|head)\.(?:weight|bias)', None),  # the classifier and the norm before it
)

_ISOTROPIC: Names = (
    (r'(stem\.(?:weight|bias))', r'\1'),
    (r'(blocks\.\d+\.(?:dwconv|norm|pwconv1|pwconv2)\.(?:weight|bias))', r'\1'),
    (r'(blocks\.\d+\.gamma)', r'\1'),
    (r'(pyramid\..+)', r'\1'),  # of a trained detector of ours
    (r'(?:norm|head)\.(?:weight|bias)', None),
)

# The steps before ConvNeXt, as ConvNeXtRoadmap names them.
_ROADMAP: Names = (
    (r'(downsample_layers\.0\.[01]\.(?:weight|bias|running_mean|running_var|num_batches_tracked))', r'\1'),
    (r'(stages\.\d\.\d+\.conv[123]\.(?:weight|bias))', r'\1'),
    (r'(stages\.\d\.\d+\.norm[123]\.(?:weight|bias|running_mean|running_var|num_batches_tracked))', r'\1'),
    (r'(stages\.\d\.\d+\.shortcut\.[01]\.(?:weight|bias|running_mean|running_var|num_batches_tracked))', r'\1'),
)

# Trained on dense features, so the norm behind the last stage is that stage's. EUPE is distilled with the same code.
_DINOV3: Names = (
    (r'norms\.3\.(weight|bias)', r'norm3.\1'),
    (r'norms\.[0-2]\.(?:weight|bias)', None),
    (r'norm\.(?:weight|bias)', None),  # norms.3 again
    (r'projectors\..+', None),  # of the distillation
    *_OFFICIAL,
)

_MAE = r'(?:encoder\.)?'
# MinkowskiEngine's modules keep their parameters one level deeper, and each of its convolutions a `kernel`.
_FCMAE: Names = (
    (_MAE + r'(downsample_layers\.\d\.\d)\.(?:ln\.)?(weight|bias)', r'\1.\2'),
    (_MAE + r'(downsample_layers\.\d\.1)\.kernel', r'\1.weight'),
    (_MAE + r'(stages\.\d\.\d+\.dwconv)\.(weight|bias)', r'\1.\2'),
    (_MAE + r'(stages\.\d\.\d+\.dwconv)\.kernel', r'\1.weight'),
    (_MAE + r'(stages\.\d\.\d+\.norm)\.(?:ln\.)?(weight|bias)', r'\1.\2'),
    (_MAE + r'(stages\.\d\.\d+\.pwconv[12])\.(?:linear\.)?(weight|bias)', r'\1.\2'),
    (_MAE + r'(stages\.\d\.\d+\.(?:grn\.)?gamma)', r'\1'),
    (_MAE + r'(stages\.\d\.\d+\.grn\.beta)', r'\1'),
    (_MAE + r'(?:norm|head)\.(?:weight|bias)', None),
    (r'(?:decoder|pred|proj)\..+|mask_token', None),  # of the reconstruction
)

_OPENMMLAB: Names = (
    (r'(stages\.\d\.\d+)\.depthwise_conv\.(weight|bias)', r'\1.dwconv.\2'),
    (r'(stages\.\d\.\d+)\.pointwise_conv([12])\.(weight|bias)', r'\1.pwconv\2.\3'),
    *_OWN,
    (r'head\.fc\.(?:weight|bias)', None),
    (r'(?:norm|head)\.(?:weight|bias)', None),
)

# With underscores in what `features_only=True` makes.
_TIMM: Names = (
    (r'stem[._](\d)\.(weight|bias)', r'downsample_layers.0.\1.\2'),
    (r'stages[._](\d)\.downsample\.(\d)\.(weight|bias)', r'downsample_layers.\1.\2.\3'),
    (r'stages[._](\d)\.blocks\.(\d+)\.conv_dw\.(weight|bias)', r'stages.\1.\2.dwconv.\3'),
    (r'stages[._](\d)\.blocks\.(\d+)\.norm\.(weight|bias)', r'stages.\1.\2.norm.\3'),
    (r'stages[._](\d)\.blocks\.(\d+)\.mlp\.fc([12])\.(weight|bias)', r'stages.\1.\2.pwconv\3.\4'),
    (r'stages[._](\d)\.blocks\.(\d+)\.mlp\.grn\.weight', r'stages.\1.\2.grn.gamma'),
    (r'stages[._](\d)\.blocks\.(\d+)\.mlp\.grn\.bias', r'stages.\1.\2.grn.beta'),
    (r'stages[._](\d)\.blocks\.(\d+)\.gamma', r'stages.\1.\2.gamma'),
    (r'norm_pre\.(?:weight|bias)', None),
    (r'head\.(?:norm|fc|pre_logits\.fc)\.(?:weight|bias)', None),
)

_TORCHVISION: Names = (
    (r'features\.0\.([01])\.(weight|bias)', r'downsample_layers.0.\1.\2'),
    *((rf'features\.{2 * i}\.([01])\.(weight|bias)', rf'downsample_layers.{i}.\1.\2') for i in (1, 2, 3)),
    *((rf'features\.{2 * i + 1}\.(\d+)\.block\.0\.(weight|bias)', rf'stages.{i}.\1.dwconv.\2') for i in range(4)),
    *((rf'features\.{2 * i + 1}\.(\d+)\.block\.2\.(weight|bias)', rf'stages.{i}.\1.norm.\2') for i in range(4)),
    *((rf'features\.{2 * i + 1}\.(\d+)\.block\.3\.(weight|bias)', rf'stages.{i}.\1.pwconv1.\2') for i in range(4)),
    *((rf'features\.{2 * i + 1}\.(\d+)\.block\.5\.(weight|bias)', rf'stages.{i}.\1.pwconv2.\2') for i in range(4)),
    *((rf'features\.{2 * i + 1}\.(\d+)\.layer_scale', rf'stages.{i}.\1.gamma') for i in range(4)),
    (r'classifier\.[02]\.(?:weight|bias)', None),
)

_HF = r'(?:convnext(?:v2)?\.)?'  # before the names of every model but the bare backbone
_HUGGINGFACE: Names = (
    (_HF + r'embeddings\.patch_embeddings\.(weight|bias)', r'downsample_layers.0.0.\1'),
    (_HF + r'embeddings\.layernorm\.(weight|bias)', r'downsample_layers.0.1.\1'),
    (_HF + r'encoder\.stages\.(\d)\.downsampling_layer\.(\d)\.(weight|bias)', r'downsample_layers.\1.\2.\3'),
    (_HF + r'encoder\.stages\.(\d)\.layers\.(\d+)\.(dwconv|pwconv[12])\.(weight|bias)', r'stages.\1.\2.\3.\4'),
    (_HF + r'encoder\.stages\.(\d)\.layers\.(\d+)\.layernorm\.(weight|bias)', r'stages.\1.\2.norm.\3'),
    (_HF + r'encoder\.stages\.(\d)\.layers\.(\d+)\.layer_scale_parameter', r'stages.\1.\2.gamma'),
    (_HF + r'encoder\.stages\.(\d)\.layers\.(\d+)\.grn\.(?:weight|gamma)', r'stages.\1.\2.grn.gamma'),
    (_HF + r'encoder\.stages\.(\d)\.layers\.(\d+)\.grn\.(?:bias|beta)', r'stages.\1.\2.grn.beta'),
    *((rf'hidden_states_norms\.stage{i + 1}\.(weight|bias)', rf'norm{i}.\1') for i in range(4)),
    (_HF + r'layernorm\.(?:weight|bias)', None),
    (r'classifier\.(?:weight|bias)', None),
)

_HUGGINGFACE_DINOV3: Names = (
    (r'(?:model\.)?stages\.(\d)\.downsample_layers\.(\d)\.(weight|bias)', r'downsample_layers.\1.\2.\3'),
    (r'(?:model\.)?stages\.(\d)\.layers\.(\d+)\.depthwise_conv\.(weight|bias)', r'stages.\1.\2.dwconv.\3'),
    (r'(?:model\.)?stages\.(\d)\.layers\.(\d+)\.layer_norm\.(weight|bias)', r'stages.\1.\2.norm.\3'),
    (r'(?:model\.)?stages\.(\d)\.layers\.(\d+)\.pointwise_conv([12])\.(weight|bias)', r'stages.\1.\2.pwconv\3.\4'),
    (r'(?:model\.)?stages\.(\d)\.layers\.(\d+)\.gamma', r'stages.\1.\2.gamma'),
    (r'layer_norm\.(weight|bias)', r'norm3.\1'),
)


def _dense(name: str, value: Tensor) -> Tensor:
    """A sparse convolution's kernel and GRN as dense ones.

    MinkowskiEngine numbers the positions of a kernel column by column: ``(k * k, C_in, C_out)`` for a convolution,
    ``(k * k, C)`` for a depthwise one. Source: remap_checkpoint_keys in facebookresearch/ConvNeXt-V2 utils.py.
    """
    size = math.isqrt(value.shape[0])
    if name.endswith('dwconv.weight') and value.ndim == 2:
        return value.reshape(size, size, -1).permute(2, 1, 0).unsqueeze(1)
    if name.startswith('downsample_layers') and value.ndim == 3:
        return value.reshape(size, size, *value.shape[1:]).permute(3, 2, 1, 0)
    return value


def _as_is(_name: str, value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Format:
    """How a project names the weights of a ConvNeXt."""

    signature: tuple[str, ...]  # patterns that all have a key in its files, and not all in those of formats below
    names: Names
    value: Callable[[str, Tensor], Tensor] = _as_is  # what to do to a tensor, by our name of it


_BLOCK = r'stages\.\d\.\d+\.dwconv\.weight'
FORMATS: dict[str, Format] = {
    'EUPE': Format((_BLOCK, r'projectors\..+'), _DINOV3),
    'DINOv3': Format((_BLOCK, r'norms\.3\.weight'), _DINOV3),
    'official': Format((_BLOCK,), _OFFICIAL),
    'FCMAE': Format(
        (r'encoder\.stages\.\d\.\d+\.dwconv\.(?:weight|kernel)|stages\.\d\.\d+\.dwconv\.kernel',), _FCMAE, _dense
    ),
    'isotropic': Format((r'blocks\.\d+\.dwconv\.weight',), _ISOTROPIC),
    'roadmap': Format((r'stages\.\d\.\d+\.conv2\.weight',), _ROADMAP),
    'openmmlab': Format((r'stages\.\d\.\d+\.depthwise_conv\.weight',), _OPENMMLAB),
    'timm': Format((r'stages[._]\d\.blocks\.\d+\.conv_dw\.weight',), _TIMM),
    'torchvision': Format((r'features\.\d\.\d+\.block\.0\.weight', r'.*\.layer_scale'), _TORCHVISION),
    'Hugging Face': Format((_HF + r'encoder\.stages\.\d\.layers\.\d+\.dwconv\.weight',), _HUGGINGFACE),
    'Hugging Face DINOv3': Format(
        (r'(?:model\.)?stages\.\d\.layers\.\d+\.depthwise_conv\.weight',), _HUGGINGFACE_DINOV3
    ),
}

# What stands before every name in weights of a larger model; the rest of that model is dropped on purpose.
PREFIXES = (
    '',
    'backbone.',  # detectors and segmentors of mmdet, mmseg and Hugging Face
    'visual.trunk.',  # OpenCLIP
    'timm_model.',  # OpenMMLab's TIMMBackbone
    'backbone.timm_model.',
)


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor | None], str]:
    """Renames the weights of another project's ConvNeXt to ours.

    Weights of a whole detector, segmentor or CLIP model are accepted: the backbone's part is taken.

    Args:
        state_dict: names and tensors, as in the file.

    Returns:
        Our names with their tensors (``None`` under the original name where a tensor is dropped on purpose), and the
        name of the source.

    Raises:
        ValueError: if the naming is not known, or a key does not belong to it.
    """
    prefix, source = _source(state_dict)
    names, value = FORMATS[source].names, FORMATS[source].value
    converted: dict[str, Tensor | None] = {}
    unknown = []
    for key, tensor in state_dict.items():
        if not key.startswith(prefix):  # neck and heads
            converted[key] = None
            continue
        known, name = _rename(key.removeprefix(prefix), names)
        if not known:
            unknown.append(key)
        elif name is None:
            converted[key] = None
        elif converted.get(name) is not None:
            raise ValueError(f'two tensors of the weights are our {name}; the second is {key}')
        else:
            converted[name] = value(name, tensor)
    if unknown:
        raise ValueError(f'the weights look like {source} ConvNeXt, but have other keys as well: {some(unknown)}')
    return converted, source if prefix != 'visual.trunk.' else 'OpenCLIP'


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether shapes agree but for ones: a 1x1 convolution's and a Linear layer's, (1, 1, 1, C) and (C,)."""
    first, second = ([size for size in tensor.shape if size != 1] for tensor in (one, other))
    return first == second


def _source(state_dict: Mapping[str, Tensor]) -> tuple[str, str]:
    """The prefix and the source of names."""
    for prefix in PREFIXES:
        names = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
        for source, form in FORMATS.items():
            if all(any(re.fullmatch(pattern, name) for name in names) for pattern in form.signature):
                return prefix, source
    deeper = _deeper(state_dict)
    where = f' A ConvNeXt lies deeper in them: give prefix={deeper!r}.' if deeper else ''
    raise ValueError(
        f'these are not the weights of a ConvNeXt known here ({", ".join(FORMATS)} names). '
        f'The first keys are {some(state_dict)}.{where}'
    )


def _deeper(state_dict: Mapping[str, Tensor]) -> str | None:
    """The prefix under which a ConvNeXt's weights lie, if there is one."""
    for form in FORMATS.values():
        for key in state_dict:
            if match := re.fullmatch(rf'(.+?\.)(?:{form.signature[0]})', key):
                return match[1]
    return None


def _rename(key: str, names: Names) -> tuple[bool, str | None]:
    for pattern, name in names:
        match = re.fullmatch(pattern, key)
        if match:
            return True, None if name is None else match.expand(name)
    return False, None
