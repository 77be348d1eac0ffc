"""Parts of detectors that the stock stack computes too coarsely or too slowly; importing this registers them."""

from densekit.models.assigner import WholeMaxIoUAssigner as WholeMaxIoUAssigner
from densekit.models.box_heads import WholeConvFCBBoxHead as WholeConvFCBBoxHead
from densekit.models.box_heads import WholeShared2FCBBoxHead as WholeShared2FCBBoxHead
from densekit.models.boxes import DeviceBoxCoder as DeviceBoxCoder
from densekit.models.exact import ExactRoIExtractor as ExactRoIExtractor
from densekit.models.mask_head import RleMaskHead as RleMaskHead
from densekit.models.mask_head import RleMasksHook as RleMasksHook
from densekit.models.preprocessor import DeviceDetDataPreprocessor as DeviceDetDataPreprocessor
from densekit.models.roi_heads import WholeCascadeRoIHead as WholeCascadeRoIHead
from densekit.models.roi_heads import WholeRoIHead as WholeRoIHead
from densekit.models.rpn import ExactRPNHead as ExactRPNHead
from densekit.models.sampler import WholeRandomSampler as WholeRandomSampler
from densekit.models.tta import MaskTTAModel as MaskTTAModel
