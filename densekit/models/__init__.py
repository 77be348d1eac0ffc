"""Parts of detectors that the stock stack computes too coarsely; importing this registers them."""

from densekit.models.exact import ExactRoIExtractor as ExactRoIExtractor
from densekit.models.exact import ExactRPNHead as ExactRPNHead
