import os

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')  # before torch is first imported; see densekit/cli.py

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton interprets its kernels; before it is first imported, as it is by what follows.
os.environ.setdefault('TRITON_INTERPRET', '0' if torch.cuda.is_available() else '1')

ROOT = Path(__file__).parents[1]
# pytest puts this folder on the path, where tests/backbones would be taken for the package from any other folder.
sys.path.insert(0, str(ROOT))

import densekit.ops  # noqa: E402, F401  (before a test imports what needs mmcv.ops)

TINY = """
_base_ = '{base}'
data_root = '{data}/'
shapes = dict(num_train=8, num_val=3, size=64)
dataset = dict(data_root=data_root, shapes=shapes)
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dataset)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dataset)
test_dataloader = val_dataloader
model = dict(backbone=dict(arch=dict(depths=(1, 1, 1, 1))))
train_cfg = dict(max_iters=4, val_interval=4)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
"""
TINY_DET = """
val_evaluator = dict(ann_file=data_root + 'coco/annotations/instances_val.json')
test_evaluator = val_evaluator
"""


@dataclass(frozen=True)
class Tiny:
    """The demo's configs on eight pictures: a run takes a second.

    Attributes:
        det: path of the detector's config; four iterations, checkpoints after two and four, then validation.
        seg: path of the segmentor's.
        data: folder of the pictures, in COCO's and ADE20K's formats.
    """

    det: str
    seg: str
    data: Path


@pytest.fixture(scope='session')
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    from densekit.data.shapes import generate_shapes

    folder = tmp_path_factory.mktemp('tiny')
    generate_shapes(folder / 'shapes', num_train=8, num_val=3, size=64)
    det = TINY.format(base=ROOT / 'configs/detection/mask_rcnn_convnext_mini_shapes.py', data=folder / 'shapes')
    seg = TINY.format(base=ROOT / 'configs/segmentation/upernet_convnext_mini_shapes.py', data=folder / 'shapes')
    (folder / 'tiny_det.py').write_text(det + TINY_DET)
    (folder / 'tiny_seg.py').write_text(seg)
    return Tiny(str(folder / 'tiny_det.py'), str(folder / 'tiny_seg.py'), folder / 'shapes')


@pytest.fixture
def quick_mmengine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For runs in this process: one thread, no formatting of configs (half the time of a run), nothing shared.

    Loggers and message hubs go by the name of the config and the second, and runs here take less than one.
    """
    import torch
    from mmengine.config import config
    from mmengine.logging import MessageHub, MMLogger

    monkeypatch.setattr(config, 'FormatCode', lambda text, **_: (text, True))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    MMLogger._instance_dict.clear()
    MessageHub._instance_dict.clear()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch computes on one thread: sums are in one order, however many cores there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def photos(tiny: Tiny, tmp_path: Path) -> Path:
    """A folder of images, with their COCO file beside it."""
    shutil.copytree(tiny.data / 'coco/train', tmp_path / 'photos')
    shutil.copy(tiny.data / 'coco/annotations/instances_train.json', tmp_path / 'photos.json')
    return tmp_path / 'photos'


@pytest.fixture
def tool() -> Callable[..., int]:
    """Runs a tool in this process: ``tool('train', 'CONFIG', '--amp', 'off')`` returns its exit status."""

    def run(name: str, *argv: object) -> int:
        spec = importlib.util.spec_from_file_location(f'tools_{name}', ROOT / 'tools' / f'{name}.py')
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.main([str(arg) for arg in argv])

    return run


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``python ...`` in an empty folder, as a user would from a terminal."""

    def run(*argv: object, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, argv)],
            cwd=tmp_path,
            env={**os.environ, 'OMP_NUM_THREADS': '1', **env},
            capture_output=True,
            text=True,
        )

    return run
