"""Which of the boxes a head learns from, drawn for all images with one question to the device."""

from collections.abc import Sequence
from typing import Any

import torch

import densekit.ops  # noqa: F401  importing mmdet needs mmcv's ops

# isort: split
from mmdet.models.task_modules.assigners import AssignResult
from mmdet.models.task_modules.samplers import RandomSampler, SamplingResult
from mmengine.registry import TASK_UTILS
from torch import Tensor

from densekit.models.boxes import positions
from densekit.models.overrides import unchanged


@TASK_UTILS.register_module()
class WholeRandomSampler(RandomSampler):
    """mmdet's RandomSampler, to the bit and with the same random numbers, for all images at once.

    mmdet's (3.3.0) waits for the device six times for each image. This one asks once how many boxes of all images have
    an object and how many have none; the rest follows from it. The arguments are those of mmdet's class.

    Its results have one attribute more, ``truths``: how many of the first positive boxes are true ones that were added.
    """

    @property
    def whole(self) -> bool:
        """Whether no subclass draws otherwise, image by image, so that :meth:`sample_all` can be asked instead."""
        methods = '_sample_pos', '_sample_neg', 'random_choice'
        return unchanged(self, WholeRandomSampler, 'sample') and unchanged(self, RandomSampler, *methods)

    def sample(self, assign_result: AssignResult, pred_instances: Any, gt_instances: Any, **kwargs: Any) -> Any:
        """Draws from the boxes of one image; see :meth:`sample_all`. If not :attr:`whole`, in mmdet's way."""
        if not self.whole:
            return super().sample(assign_result, pred_instances, gt_instances, **kwargs)
        return self.sample_all([assign_result], [pred_instances.priors], [gt_instances])[0]

    def sample_all(
        self, assigned: Sequence[AssignResult], priors: Sequence[Tensor], truths: Sequence[Any]
    ) -> list[SamplingResult]:
        """Draws from the boxes of several images. Only if :attr:`whole`.

        Args:
            assigned: of each image; true boxes are added to it if the sampler does so.
            priors: of each image ``(n, 4)``.
            truths: of each image, with ``bboxes`` ``(objects, 4)`` and ``labels``.

        Returns:
            Of each image the boxes drawn, those with an object and those without.
        """
        assert self.whole, 'a subclass draws in its own way'
        if self.add_gt_as_proposals:
            priors = [torch.cat([truth.bboxes, boxes]) for truth, boxes in zip(truths, priors, strict=True)]
            for result, truth in zip(assigned, truths, strict=True):
                result.add_gt_(truth.labels)
        masks = [mask for result in assigned for mask in (result.gt_inds > 0, result.gt_inds == 0)]
        counts = torch.stack([mask.sum() for mask in masks]).tolist()
        drawn = [draw for pair in zip(counts[::2], counts[1::2], strict=True) for draw in self._draw(*pair)]
        on_device = _to_device(drawn, masks[0].device)
        chosen = [
            places if draw is None else places[draw].sort().values
            for places, draw in zip(map(positions, masks, counts), on_device, strict=True)
        ]
        results = []
        for image, (result, boxes, truth) in enumerate(zip(assigned, priors, truths, strict=True)):
            added = len(truth.bboxes) if self.add_gt_as_proposals else 0
            flags = torch.cat(
                [boxes.new_ones(added, dtype=torch.uint8), boxes.new_zeros(len(boxes) - added, dtype=torch.uint8)]
            )
            sample = SamplingResult(*chosen[2 * image : 2 * image + 2], boxes, truth.bboxes, result, flags)
            draw = drawn[2 * image]
            # Added boxes come first and all have an object, so that what was drawn says how many of them there are.
            sample.truths = added if draw is None else int((draw < added).sum())
            results.append(sample)
        return results

    def _draw(self, positive: int, negative: int) -> tuple[Tensor | None, Tensor | None]:
        """Which of so many boxes with an object and without; None for all of them."""
        wanted = int(self.num * self.pos_fraction)
        found = min(positive, wanted)
        wanted_negative = self.num - found
        if self.neg_pos_ub >= 0:
            wanted_negative = min(wanted_negative, int(self.neg_pos_ub * max(1, found)))
        return _permuted(positive, wanted), _permuted(negative, wanted_negative)


def _permuted(count: int, wanted: int) -> Tensor | None:
    return torch.randperm(count)[:wanted] if count > wanted else None


def _to_device(drawn: Sequence[Tensor | None], device: torch.device) -> list[Tensor | None]:
    """Copies what there is, in one piece, while the host goes on."""
    parts = [draw for draw in drawn if draw is not None]
    if not parts or device.type == 'cpu':
        return list(drawn)
    joined = torch.cat(parts)
    if device.type == 'cuda':
        joined = joined.pin_memory()  # from pageable memory the host would wait
    copied = iter(joined.to(device, non_blocking=True).split([len(part) for part in parts]))
    return [None if draw is None else next(copied) for draw in drawn]
