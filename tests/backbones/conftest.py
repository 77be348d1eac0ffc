from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import densekit.ops  # noqa: F401  (before a test imports what needs mmcv.ops)
from backbones import ConvNeXt
from backbones.kernels import choice

MINI = dict(depths=(1, 2, 3, 1), channels=(8, 16, 24, 32))


def _randomize(model: nn.Module, seed: int = 0) -> None:
    """Gives every parameter a value that matters: fan-in weights, scales around 1, shifts around 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if name.endswith(('bias', 'beta')):
                parameter.copy_(0.1 * noise)
            elif parameter.squeeze().ndim <= 1:  # norms, layer scale, GRN
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These tensors are too small to be shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def randomize() -> Callable[..., None]:
    return _randomize


@pytest.fixture
def mini() -> Callable[..., ConvNeXt]:
    """Builds a small ConvNeXt with random weights, the same ones each time."""

    def build(**kwargs: Any) -> ConvNeXt:
        model = ConvNeXt(**{'arch': MINI, 'layer_scale_init_value': 1.0, **kwargs})
        _randomize(model)
        return model

    return build


@pytest.fixture
def source(mini: Callable[..., ConvNeXt]) -> ConvNeXt:
    """Whose weights are loaded."""
    return mini()


@pytest.fixture
def target() -> ConvNeXt:
    """Into which weights are loaded."""
    torch.manual_seed(0)
    return ConvNeXt(MINI)


@pytest.fixture(
    params=[
        pytest.param('cpu', marks=pytest.mark.skipif(torch.cuda.is_available(), reason='the kernels run on the GPU')),
        pytest.param(
            'cuda',
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device'),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the kernels run: on the GPU, or without one in Triton's interpreter.

    There float32 means float32 in what they are compared with too.
    """
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    return request.param


@pytest.fixture(autouse=True)
def _undecided() -> Iterator[None]:
    """Each test chooses its kernels anew, and has the lines of the log that come once."""
    yield
    choice._decide.cache_clear()
    choice._say.cache_clear()
