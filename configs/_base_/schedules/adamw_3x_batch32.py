"""36 epochs of COCO (3x) in batches of 32, otherwise as 3x.

ConvNeXt V2 paper, arXiv 2301.00808, appendix A: learning rate 1e-4.
"""

_base_ = './adamw_3x.py'

auto_scale_lr = dict(base_batch_size=32)  # 8 GPUs x 4 images
