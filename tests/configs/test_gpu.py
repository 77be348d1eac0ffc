"""One training and one test step of every recipe on CUDA."""

import math

import pytest
import torch
from recipes import CONFIGS, RECIPES, build_model, build_wrapper, losses_of, make_batch, recipe, shrink

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device'),
]


def train_and_test(path, amp, device):
    """Losses of a training step, and the prediction for one image in the same precision."""
    cfg = shrink(recipe(path))
    torch.manual_seed(0)
    model = build_model(cfg, device)
    wrapper = build_wrapper(cfg, model, amp)
    losses = losses_of(model, wrapper, make_batch(cfg))
    wrapper.step()
    wrapper.zero_grad()
    model.eval()
    one_image = {key: values[:1] for key, values in make_batch(cfg).items()}
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=amp == 'bf16'):
        (prediction,) = model.test_step(one_image)
    return losses, prediction


def check(losses, prediction, device):
    assert all(math.isfinite(value) for value in losses.values()), losses
    shape = prediction.ori_shape
    if 'pred_instances' in prediction:
        found = prediction.pred_instances
        assert len(found) and found.bboxes.device.type == device
        assert found.bboxes.isfinite().all() and found.scores.isfinite().all()
        if 'masks' in found:  # not of DINO and RTMDet
            assert found.masks.shape == (len(found), *shape)
    else:
        assert prediction.pred_sem_seg.data.shape == (1, *shape)
        assert prediction.pred_sem_seg.data.device.type == device
        assert prediction.seg_logits.data.isfinite().all()


@pytest.mark.parametrize('amp', ['off', 'bf16'])
@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.relative_to(CONFIGS).with_suffix('').as_posix())
def test_training_and_test_step(path, amp):
    check(*train_and_test(path, amp, 'cuda'), 'cuda')
