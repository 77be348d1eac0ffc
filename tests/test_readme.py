"""What the README says holds: its files exist, its config builds, its Python runs."""

import re
from pathlib import Path

import densekit.ops  # noqa: F401  before mmdet

# isort: split
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')
PYTHON = re.findall(r'```python\n(.*?)```', README, re.DOTALL)


def test_named_files_exist():
    linked = {target for target in re.findall(r'\]\(([^)#]+)\)', README) if '://' not in target}
    in_text = set(re.findall(r'(?:configs|tools|benchmarks|docs)/[\w/.]+\.(?:py|md|jpg)', README))
    assert len(linked) > 3 and len(in_text) > 5
    assert [name for name in sorted(linked | in_text) if not (ROOT / name).is_file()] == []


def test_every_recipe_is_listed():
    recipes = {
        str(path.relative_to(ROOT))
        for folder in ('detection', 'segmentation')
        for path in (ROOT / 'configs' / folder).glob('*.py')
    }
    assert recipes and all(f'`{recipe}`' in README for recipe in recipes)


def test_make_targets_exist():
    makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
    targets = set(re.findall(r'^make (\w[\w-]*)', README, re.MULTILINE))
    assert {'demo', 'test'} <= targets
    assert all(f'\n{target}:' in makefile for target in targets)


def test_options_exist():
    sources = [*(ROOT / 'tools').glob('*.py'), ROOT / 'densekit' / 'cli.py']
    known = ''.join(path.read_text(encoding='utf-8') for path in sources)
    commands = re.findall(r'tools/\w+\.py[^`\n]*', README)
    options = {option for command in commands for option in re.findall(r'(--[a-z][a-z-]+)', command)}
    options |= set(re.findall(r'`(--[a-z][a-z-]+)', README)) - {'--no-build-isolation'}
    assert {'--resume', '--amp', '--tta', '--out'} <= options
    assert [option for option in sorted(options) if f"'{option}'" not in known] == []


def test_plug_in_config_builds(tmp_path):
    text = next(block for block in PYTHON if '_base_' in block)
    path = tmp_path / 'mine.py'
    path.write_text(text, encoding='utf-8')
    cfg = Config.fromfile(path)
    init_default_scope('mmdet')
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert type(model.backbone).__module__ == 'backbones.convnext'
    assert list(model.backbone.channels) == cfg.model.neck.in_channels


def test_python_example_runs():
    text = next(block for block in PYTHON if 'load_pretrained' in block)
    before_loading = text.partition('report =')[0]
    with torch.device('meta'):
        namespace: dict = {}
        exec(before_loading, namespace)
    backbone = namespace['backbone']
    assert str((backbone.channels, backbone.strides))[1:-1] in text
    with pytest.raises(FileNotFoundError, match=r'convnext_tiny_1k_224\.pth'):
        namespace['load_pretrained'](backbone, 'convnext_tiny_1k_224.pth')
