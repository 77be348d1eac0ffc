"""RoIAlign's gradient by matrix products is torchvision's."""

import pytest
import torch

import densekit.ops  # noqa: F401

# isort: split
from mmcv.ops import roi_align

from densekit.models import roi_pooling
from densekit.models.roi_pooling import RoIAlignByProducts, roi_align_gradient

pytestmark = pytest.mark.usefixtures('one_thread')

SHAPE = 2, 3, 20, 24
SCALE = 0.25  # a map for a picture of 80 x 96 pixels


def boxes(count, dtype=torch.float64):
    """From a pixel to larger than the picture, and partly outside of it."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=generator, dtype=dtype) * 100 - 20
    size = 120 ** torch.rand(count, 2, generator=generator, dtype=dtype)
    image = torch.randint(0, 2, (count, 1), generator=generator).to(dtype)
    return torch.cat([image, corner, corner + size], dim=1)


def ours_and_torchvisions(rois, *, size=(7, 5), ratio=0, dtype=torch.float64, scale=SCALE):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(SHAPE, generator=generator, dtype=dtype)
    weights = torch.randn(len(rois), SHAPE[1], *size, generator=generator, dtype=dtype)
    results = []
    for pool in (
        lambda x: RoIAlignByProducts.apply(x, rois, *size, scale, ratio),
        lambda x: roi_align(x, rois, size, scale, ratio, 'avg', True),
    ):
        x = features.clone().requires_grad_()
        pooled = pool(x)
        (pooled * weights).sum().backward()
        results.append((pooled.detach(), x.grad))
    return results


@pytest.fixture(params=['products', 'samples'])
def way(request, monkeypatch):
    """Forces one of the two ways of the gradient."""
    monkeypatch.setattr(roi_pooling, 'PRODUCTS_PER_SAMPLE', {'products': 1e12, 'samples': 0}[request.param])


@pytest.mark.parametrize('ratio', [0, 1, 2])
@pytest.mark.parametrize('count', [0, 1, 40])
def test_output_and_gradient_are_torchvisions(way, count, ratio):
    (pooled, grad), (reference, reference_grad) = ours_and_torchvisions(boxes(count), ratio=ratio)
    assert torch.equal(pooled, reference)
    assert bool(grad.any()) == (count > 0)
    torch.testing.assert_close(grad, reference_grad, rtol=1e-10, atol=1e-10)


def test_in_float32_they_differ_by_rounding(way):
    (_, grad), (_, reference) = ours_and_torchvisions(boxes(40, torch.float32), dtype=torch.float32)
    torch.testing.assert_close(grad, reference, rtol=1e-5, atol=1e-5)


def test_boxes_in_several_parts_give_the_same(monkeypatch):
    monkeypatch.setattr(roi_pooling, 'PRODUCTS_PER_SAMPLE', 1e12)
    monkeypatch.setattr(roi_pooling, 'NUMBERS_AT_ONCE', 7 * 24 * 3 * 4)
    (_, grad), (_, reference) = ours_and_torchvisions(boxes(40))
    torch.testing.assert_close(grad, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    'box',
    [
        (0.0, 8.0, 8.0, 8.0, 40.0),  # no width: no samples
        (0.0, -400.0, -400.0, -300.0, -300.0),
        (1.0, 90.0, 70.0, 140.0, 130.0),  # beyond the last cell
        (1.0, -30.0, -30.0, 130.0, 110.0),
    ],
)
def test_boxes_at_and_beyond_the_border(way, box):
    (_, grad), (_, reference) = ours_and_torchvisions(torch.tensor([box], dtype=torch.float64))
    torch.testing.assert_close(grad, reference, rtol=1e-10, atol=1e-10)


def test_a_box_without_width_among_others(way):
    rois = torch.cat([boxes(5), torch.tensor([[0.0, 96.0, 8.0, 96.0, 40.0]], dtype=torch.float64)])
    (_, grad), (_, reference) = ours_and_torchvisions(rois)
    torch.testing.assert_close(grad, reference, rtol=1e-10, atol=1e-10)


def test_autocast_does_not_reach_the_gradient(way):
    rois = boxes(40, torch.float32)
    (_, reference), _ = ours_and_torchvisions(rois, dtype=torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        (_, grad), _ = ours_and_torchvisions(rois, dtype=torch.float32)
    assert torch.equal(grad, reference)


def test_another_box_has_another_gradient(way):
    """The comparisons above can fail."""
    rois = boxes(40)
    (_, grad), _ = ours_and_torchvisions(rois)
    _, (_, reference) = ours_and_torchvisions(rois + torch.tensor([0, 2.0, 0, 2.0, 0], dtype=rois.dtype))
    assert (grad - reference).abs().max() > 0.01


def test_the_way_with_less_work_is_taken(monkeypatch):
    taken = []
    monkeypatch.setattr(roi_pooling, '_products', lambda *args, of=roi_pooling._products: taken.append(1) or of(*args))
    grad, rois = torch.randn(4, 3, 7, 7), torch.tensor([[0.0, 10.0, 10.0, 60.0, 60.0]]).repeat(4, 1)
    roi_align_gradient(grad, rois, (1, 3, 24, 24), SCALE, 0)
    assert taken
    taken.clear()
    roi_align_gradient(grad, rois, (1, 3, 400, 400), SCALE, 0)
    assert not taken
