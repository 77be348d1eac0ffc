"""Package metadata. The settings of the tools (ruff, mypy, pytest) live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# mmcv-lite holds all of mmcv's Python; densekit.ops supplies what its missing compiled module would.
# Those who have a compiled mmcv, or the maintained forks of the same import names, install without this extra.
LITE = [
    'mmengine>=0.10.7,<0.12',
    'mmcv-lite>=2.0,<2.2',
    'mmdet>=3.3,<4',
    'mmsegmentation>=1.2.2,<2',
    'setuptools<82',  # mmengine needs pkg_resources, gone from setuptools 82 on
    'ftfy',  # imported by mmseg, missing from its own requirements
    'regex',  # likewise
]

# COCO scores in hundredths of the time; equal to pycocotools' to the last digit.
FAST = ['hotcoco']

# What the tests compare with.
TEST = [
    *FAST,
    'onnx',
    'onnxruntime',
    'onnxscript',
    'transformers',
]

DEV = [
    *TEST,
    'build',
    'mypy',
    'pytest',
    'pytest-timeout',
    'pytest-xdist',
    'ruff',
    'wheel',
]

setup(
    name='densekit',
    version='0.1.0',
    description='ConvNeXt for detection and segmentation on OpenMMLab: backbones, recipes, and runs that do not fail',
    long_description=(HERE / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10,<3.14',  # mmengine 0.10 calls pkgutil.find_loader, gone from 3.14
    packages=find_packages(include=['backbones', 'backbones.*', 'densekit', 'densekit.*']),
    install_requires=[
        'torch>=2.6',
        'torchvision>=0.21',
        'timm>=1.0.15',
        'numpy',
        'safetensors',
        'filelock',
        'pillow>=10.1',  # a scalable default font for the pictures
        'pycocotools>=2.0.8',
    ],
    extras_require={'lite': LITE, 'fast': FAST, 'test': TEST, 'dev': DEV},
)
