import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from torch import nn

import densekit.ops  # noqa: F401
from densekit.engine.config import load_config
from densekit.predictor import Predictor
from densekit.report import features
from densekit.report.feature_sheets import View
from densekit.report.features import NetworkInput
from densekit.report.pictures import read_image

pytestmark = pytest.mark.usefixtures('quick_mmengine')

SHEETS = ['cam.png', 'components.png', 'energy.png', 'receptive_field.png']


@pytest.fixture(scope='module')
def models(tiny, tmp_path_factory):
    """Config and checkpoint of a detector and a segmentor of random weights."""
    found = {}
    for name in ('det', 'seg'):
        torch.manual_seed(0)
        cfg = load_config(getattr(tiny, name))
        path = tmp_path_factory.mktemp(name) / 'random.pth'
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = MODELS.build(cfg.model)
            model.init_weights()
        torch.save({'state_dict': model.state_dict()}, path)
        found[name] = getattr(tiny, name), str(path)
    return found


@pytest.fixture
def picture(tmp_path):
    """Not square, and not as large as the model's input."""
    path = tmp_path / 'picture.png'
    small = np.random.default_rng(0).integers(0, 255, (10, 14, 3), dtype=np.uint8)
    Image.fromarray(small).resize((56, 40)).save(path)
    return path


def plain_input(height=33, width=45, padded=None):
    size = padded or (height, width)
    return NetworkInput(torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)), None, height, width)


class Convolutions(nn.Module):
    """A backbone of 3 x 3 convolutions, so that what its units see is known."""

    def __init__(self, strides, kernel=3):
        super().__init__()
        layers = [nn.Conv2d(3 if i == 0 else 4, 4, kernel, stride, kernel // 2) for i, stride in enumerate(strides)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return tuple(maps)


# ---------------------------------------------------------------------------------------------- the receptive field


def test_a_convolution_sees_its_kernel_and_a_second_one_more():
    torch.manual_seed(0)
    fields = features.receptive_fields(Convolutions([1, 1]), plain_input())
    for (field, centre), reach in zip(fields, (1, 2), strict=True):
        assert field.shape == (33, 45)
        assert centre == (22.5, 16.5)
        rows, columns = np.nonzero(field)
        assert (rows.min(), rows.max()) == (16 - reach, 16 + reach)
        assert (columns.min(), columns.max()) == (22 - reach, 22 + reach)


def test_the_centre_counts_strides_and_leaves_padding_out():
    torch.manual_seed(0)
    given = plain_input(32, 32, padded=(64, 96))
    fields = features.receptive_fields(Convolutions([2, 4]), given)
    for (field, centre), stride in zip(fields, (2, 8), strict=True):
        unit = 32 // stride // 2
        assert centre == ((unit + 0.5) * stride,) * 2
        assert field.shape == (32, 32)
        rows, columns = np.nonzero(field)
        assert abs(rows.mean() + 0.5 - centre[0]) <= stride
        assert abs(columns.mean() + 0.5 - centre[1]) <= stride


def test_behind_a_layer_norm_the_field_is_not_nothing():
    """The sum of the channels, of which the gradient is often taken, does not depend on the image there."""

    class Normed(Convolutions):
        def forward(self, x):
            mapped = self.layers[0](x).permute(0, 2, 3, 1)
            return (nn.functional.layer_norm(mapped, (4,)).permute(0, 3, 1, 2),)

    torch.manual_seed(0)
    given, backbone = plain_input(), Normed([1])
    ((field, _),) = features.receptive_fields(backbone, given)
    inputs = given.tensor.clone().requires_grad_()
    (plain,) = torch.autograd.grad(backbone(inputs)[0][0, :, 16, 22].sum(), inputs)
    assert plain.abs().max() < 1e-4 < 0.1 < field.max()


def test_the_field_is_the_norm_of_the_jacobian():
    """With as many random sums as it takes; against the derivatives of each channel by itself."""
    torch.manual_seed(0)
    backbone, given = Convolutions([1]), plain_input(9, 9)
    ((field, _),) = features.receptive_fields(backbone, given, projections=2000)
    jacobian = torch.autograd.functional.jacobian(lambda x: backbone(x)[0][0, :, 4, 4], given.tensor)
    expected = jacobian[:, 0].square().sum((0, 1)).sqrt().detach().numpy()
    assert np.allclose(field, expected, atol=0.03 * expected.max())


def test_reach_is_the_square_that_holds_a_share():
    field = np.zeros((21, 31))
    field[8:13, 13:18] = 1  # five pixels around (15.5, 10.5)
    assert features.reach(field, (15.5, 10.5), 0.95) == 5
    assert features.reach(field, (15.5, 10.5), 0.3) == 3
    assert features.reach(field, (15.5, 10.5), 0.04) == 1


def test_the_fields_of_a_convnext_are_centred_and_grow(models, picture):
    predictor = Predictor(*models['det'])
    given = features.network_input(predictor, read_image(picture))
    fields = features.receptive_fields(predictor.model.backbone, given)
    sides = []
    for field, (x, y) in fields:
        assert field.shape == (given.height, given.width)
        total = field.sum()
        rows, columns = np.indices(field.shape) + 0.5
        assert abs((field * columns).sum() / total - x) < 8
        assert abs((field * rows).sum() / total - y) < 8
        sides.append(features.reach(field, (x, y), 0.95))
    assert len(sides) == 4
    assert sides[0] < sides[1] < min(sides[2:])  # the last two see the whole picture


# -------------------------------------------------------------------------------------------- energy and components


def test_energy_and_contrast():
    maps = torch.zeros(1, 2, 3, 4)
    maps[0, :, 1, 2] = torch.tensor([3.0, 4.0])
    expected = np.zeros((3, 4))
    expected[1, 2] = np.sqrt(12.5)
    assert np.allclose(features.energy(maps), expected)
    assert np.allclose(features.energy(maps + 0), features.energy(-maps))
    # What is everywhere does not count as contrast.
    assert np.allclose(features.contrast(maps + 100), features.contrast(maps), atol=1e-5)
    assert features.contrast(torch.ones(1, 2, 3, 4)).max() == 0


def test_components_are_those_of_a_singular_value_decomposition():
    maps = torch.randn(1, 6, 5, 7, generator=torch.Generator().manual_seed(0))
    along, shares = features.principal_components(maps)
    rows = maps[0].reshape(6, -1).T.double().numpy()
    left, values, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    expected = left * values
    for i in range(3):
        assert np.allclose(np.abs(along[..., i].ravel()), np.abs(expected[:, i]))
    assert np.allclose(shares, values[:3] ** 2 / (values**2).sum())


def test_two_channels_have_two_components():
    along, shares = features.principal_components(torch.randn(1, 2, 5, 7))
    assert along.shape == (5, 7, 3) and (along[..., 2] == 0).all()
    assert np.isclose(shares.sum(), 1)


def test_a_backbone_without_maps_is_refused():
    with pytest.raises(ValueError, match='Flatten emits no feature maps'):
        features.feature_maps(nn.Flatten(), torch.rand(1, 3, 4, 4))


# ------------------------------------------------------------------------------------------------ activation maps


class Sample:
    """As much of a data sample as is looked at."""

    def __init__(self, height, width):
        self.ori_shape, self.metainfo = (height, width), {}

    def clone(self):
        return self


class Brightness(nn.Module):
    """A backbone that emits the image's red at half its size, and a second map that nothing uses."""

    def forward(self, x):
        red = nn.functional.avg_pool2d(x[:, :1], 2)
        return red, nn.functional.avg_pool2d(x[:, 1:2], 4) * 2


class RedSegmentor(nn.Module):
    """Class 1 where there is red within three pixels of the map, class 0 elsewhere."""

    def __init__(self):
        super().__init__()
        self.backbone = Brightness()

    def encode_decode(self, inputs, _metas):
        red, _ = self.backbone(inputs)
        near = nn.functional.avg_pool2d(red, 7, 1, 3) * 49
        logits = torch.cat([torch.full_like(near, 0.5), near], 1)
        return nn.functional.interpolate(logits, scale_factor=2)


class RedDetector(nn.Module):
    """Two detections, scored by the red in the left and the right half."""

    def __init__(self):
        super().__init__()
        self.backbone = Brightness()

    def forward(self, inputs, _samples, mode):
        assert mode == 'predict'
        red, _ = self.backbone(inputs)
        middle = red.shape[3] // 2
        scores = torch.stack([red[..., :middle].mean(), red[..., middle:].mean()])
        found = type('Found', (), {})()
        found.scores, found.labels = scores, torch.tensor([4, 7])
        found.bboxes = torch.tensor([[0.0, 0, 10, 20], [20, 0, 40, 20]])
        return [type('Result', (), {'pred_instances': found})()]


class Crafted:
    def __init__(self, model):
        self.model = model


@pytest.fixture
def red_spots():
    """Black, 32 high and 64 wide, with red at the left, (10, 10) to (14, 14), and more at the right, (50, 20)."""
    tensor = torch.zeros(1, 3, 32, 64)
    tensor[0, 0, 10:14, 10:14] = 1
    tensor[0, 0, 20:28, 50:58] = 1
    return NetworkInput(tensor, Sample(32, 64), 32, 64)


def test_the_map_of_a_pixel_is_high_at_what_makes_its_class(red_spots):
    maps = features.pixel_maps(Crafted(RedSegmentor()), red_spots, 12, 12)
    assert maps.label == 1
    local = maps.local[0]
    assert local.shape == (16, 32)
    expected = np.zeros((16, 32))
    expected[5:7, 5:7] = 1  # the object by it, in the map's pixels, and not the one at the right
    assert np.array_equal(local, expected)
    # Pooled, the gradient says red; so all of it shows.
    assert (maps.pooled[0] > 0).sum() == 4 + 16
    assert not maps.local[1].any() and not maps.pooled[1].any()
    assert features.pixel_maps(Crafted(RedSegmentor()), red_spots, 35, 5).label == 0


@pytest.mark.parametrize(('number', 'label', 'columns'), [(0, 7, (25, 28)), (1, 4, (5, 6))])
def test_the_map_of_a_detection_is_high_at_its_object(red_spots, number, label, columns):
    """The second detection has the larger score, so it is the first one told."""
    maps = features.detection_maps(Crafted(RedDetector()), red_spots, number)
    assert maps.label == label
    _, found = np.nonzero(maps.local[0])
    assert (found.min(), found.max()) == columns
    assert (maps.box[0] == 20) == (label == 7)


def test_what_cannot_be_explained_is_refused(red_spots):
    with pytest.raises(ValueError, match='there is no detection 2; the image has 2'):
        features.detection_maps(Crafted(RedDetector()), red_spots, 2)
    with pytest.raises(ValueError, match='pixel 64 3 is not in the image, which is 64 wide and 32 high'):
        features.pixel_maps(Crafted(RedSegmentor()), red_spots, 64, 3)
    detector = RedDetector()
    detector.forward = torch.no_grad()(detector.forward)
    with pytest.raises(ValueError, match='scores of RedDetector have no gradient'):
        features.detection_maps(Crafted(detector), red_spots, 0)


def test_a_detection_is_the_one_that_the_predictor_gives(models, picture):
    predictor = Predictor(*models['det'])
    image = read_image(picture)
    expected = predictor(image)
    given = features.network_input(predictor, image)
    for number in (0, len(expected.scores) - 1):
        maps = features.detection_maps(predictor, given, number)
        assert maps.label == expected.labels[number]
        assert np.isclose(maps.score, expected.scores[number], atol=1e-5)
        assert np.allclose(maps.box, expected.boxes[number], atol=1e-2)
        assert any(cam.any() for cam in maps.local)
    assert not predictor.model.backbone._forward_hooks


def test_a_pixels_class_is_the_one_that_the_predictor_gives(models, picture):
    predictor = Predictor(*models['seg'])
    image = read_image(picture)
    labels = predictor(image)
    given = features.network_input(predictor, image)
    found = [features.pixel_maps(predictor, given, x, y).label for x, y in ((0, 0), (28, 20), (55, 39))]
    assert found == [labels[0, 0], labels[20, 28], labels[39, 55]]


# ------------------------------------------------------------------------------------------------------- the sheets


def test_maps_lie_over_the_image_without_their_padding():
    given = NetworkInput(torch.zeros(1, 3, 64, 64), None, 32, 64)
    view = View(np.zeros((100, 200, 3), np.uint8), given)
    values = np.zeros((16, 16))
    values[7, 15] = 1  # the last place that is not padding
    values[8:] = 9
    fitted = view.fitted(values)
    assert fitted.shape == (240, 480)
    assert fitted.max() == 1
    rows, columns = np.nonzero(fitted)
    assert (rows.min(), columns.min()) == (210, 450)


@pytest.mark.parametrize(('name', 'target'), [('det', ['--detection', 1]), ('seg', ['--pixel', 3, 30]), ('seg', [])])
def test_sheets(tool, models, picture, tmp_path, capsys, name, target):
    assert tool('inspect_features', *models[name], picture, '--out', tmp_path / 'out', *target) == 0
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == SHEETS
    shown = capsys.readouterr().out
    assert all(str(tmp_path / 'out' / sheet) in shown for sheet in SHEETS)
    for sheet in SHEETS:
        pixels = np.array(Image.open(tmp_path / 'out' / sheet))
        assert pixels.shape[1] > 5 * 480  # the image and four maps
        assert len(np.unique(pixels[::7, ::7] @ np.array([65536, 256, 1]))) > 100


@pytest.mark.parametrize(
    ('name', 'target', 'message'),
    [
        ('det', ['--pixel', 3, 3], '--pixel X Y does not go with a detector; give --detection N'),
        ('seg', ['--detection', 0], '--detection N does not go with a segmentor; give --pixel X Y'),
        ('seg', ['--pixel', 99, 3], 'pixel 99 3 is not in the image'),
        ('det', ['--detection', 999], 'there is no detection 999'),
    ],
)
def test_wrong_targets_are_refused(tool, models, picture, tmp_path, capsys, name, target, message):
    assert tool('inspect_features', *models[name], picture, '--out', tmp_path / 'out', *target) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()
