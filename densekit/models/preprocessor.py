"""Takes images and truth to the device while the host goes on."""

from typing import Any

import densekit.ops  # noqa: F401  importing mmdet needs mmcv's ops

# isort: split
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmengine.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class DeviceDetDataPreprocessor(DetDataPreprocessor):
    """mmdet's DetDataPreprocessor, to the bit, without the host waiting for the device.

    mmdet's (3.3.0) waits for the copy of each image and each field of its truth, and for that of the numbers by which
    it swaps the channels.

    Args:
        *args: of mmdet's class.
        non_blocking: the host goes on while data are copied.
        **kwargs: of mmdet's class.
    """

    def __init__(self, *args: Any, non_blocking: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, non_blocking=non_blocking, **kwargs)

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """A batch on the device: normalized, padded and joined.

        Args:
            data: ``inputs``, a list of ``(3, H, W)`` or a tensor ``(N, 3, H, W)``, and ``data_samples``.
                Images of another number of channels are left to mmdet.
            training: masks are padded too.
        """
        swap: bool = self._channel_conversion  # type: ignore[has-type]
        if not swap or any(len(image) != 3 for image in data['inputs']):
            return super().forward(data, training)
        data = self.cast_data(data)
        inputs = data['inputs']
        data['inputs'] = inputs.flip(1) if isinstance(inputs, Tensor) else [image.flip(0) for image in inputs]
        self._channel_conversion = False  # done
        try:
            return super().forward(data, training)
        finally:
            self._channel_conversion = swap
