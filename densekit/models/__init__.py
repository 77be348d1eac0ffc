"""Parts of detectors that the stock stack computes too coarsely or too slowly; importing this registers them."""

from densekit.models.assigner import WholeMaxIoUAssigner as WholeMaxIoUAssigner
from densekit.models.exact import ExactRoIExtractor as ExactRoIExtractor
from densekit.models.exact import ExactRPNHead as ExactRPNHead
from densekit.models.mask_head import RleMaskHead as RleMaskHead
from densekit.models.mask_head import RleMasksHook as RleMasksHook
from densekit.models.tta import MaskTTAModel as MaskTTAModel
