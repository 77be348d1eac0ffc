"""ConvNeXt for OpenMMLab. Importing this package registers everything in mmengine's root registry.

Both mmdet and mmseg find names of the root registry, so one ``custom_imports = dict(imports=['backbones'])`` serves
either; under mmcv-lite, put ``'densekit.ops'`` before it.
"""

try:
    import mmengine as _mmengine  # noqa: F401
    import timm as _timm  # noqa: F401
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        f'backbones needs torch, timm and mmengine, and this environment fails with: {error}. From the densekit '
        "checkout, `pip install -e '.[lite]'` installs all of them; `python -m densekit.doctor` shows what is missing."
    ) from error

from backbones.checkpoint import LoadReport as LoadReport
from backbones.checkpoint import PretrainedBackbone as PretrainedBackbone
from backbones.checkpoint import load_pretrained as load_pretrained
from backbones.convnext import ARCHS as ARCHS
from backbones.convnext import ConvNeXt as ConvNeXt
from backbones.files import read_checkpoint as read_checkpoint
from backbones.formats import convert_state_dict as convert_state_dict
from backbones.isotropic import ISOTROPIC_ARCHS as ISOTROPIC_ARCHS
from backbones.isotropic import ConvNeXtIsotropic as ConvNeXtIsotropic
from backbones.layer_decay import LayerDecayOptimWrapperConstructor as LayerDecayOptimWrapperConstructor
from backbones.layers import GRN as GRN
from backbones.layers import LayerNorm2d as LayerNorm2d
from backbones.roadmap import RUNGS as RUNGS
from backbones.roadmap import ConvNeXtRoadmap as ConvNeXtRoadmap
from backbones.zoo import ZOO as ZOO
