"""What docs/ says holds: commands are taken, marked ones run, Python runs or builds, links and tables are right.

A block after ``<!-- run -->`` is executed, in a folder with tools/, configs/, eight generated photos with COCO file and
label maps, and mine.py, a recipe on them.
"""

import importlib.util
import re
import shlex
import shutil
from functools import cache
from pathlib import Path

import densekit.ops  # noqa: F401  before mmdet

# isort: split
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from torch.distributed.run import get_args_parser

from backbones.roadmap import RUNGS
from densekit.cli import INTERRUPTED_STATUS, USER_ERROR_STATUS, Interrupted, RunStopped
from densekit.data import own_recipe
from densekit.data.faults import KINDS
from densekit.data.image_files import SAMPLE
from densekit.data.loader import TIMEOUT
from densekit.doctor import OLDEST_DRIVER
from densekit.engine import contract, guards
from densekit.engine.config import load_config
from densekit.report.roadmap_table import PUBLISHED

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text(encoding='utf-8') for path in sorted((ROOT / 'docs').glob('*.md'))}
OWN = ('CONFIG', 'mine.py', 'cats.py')  # stand for a reader's config
OF_OTHERS = {'--no-build-isolation', '--shm-size', '--max-restarts'}  # pip's, a container's, torchrun's

RUN = re.compile(r'<!-- run -->\n```bash\n(.*?)```', re.DOTALL)
RUN_PYTHON = re.compile(r'<!-- run -->\n```python\n(.*?)```', re.DOTALL)  # after the commands of its page
MINE = """
_base_ = {base!r}
data_root = 'data/'
shapes = dict(num_train=8, num_val=3, size=64)
dataset = dict(data_root=data_root, shapes=shapes)
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dataset)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dataset)
test_dataloader = val_dataloader
model = dict(backbone=dict(arch=dict(depths=(1, 1, 1, 1))))
param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=4)]
train_cfg = dict(max_iters=4, val_interval=4)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
val_evaluator = dict(ann_file=data_root + 'coco/annotations/instances_val.json')
test_evaluator = val_evaluator
"""


def blocks(text, language):
    return re.findall(rf'```{language}\n(.*?)```', text, re.DOTALL)


def lines_of(block):
    return [line for line in block.replace('\\\n', ' ').splitlines() if line.strip()]


def commands_of(text):
    """Those of blocks, and those in a line of text or a table that name what they are for."""
    found = [line for block in blocks(text, 'bash') for line in lines_of(block)]
    prose = re.sub(r'```.*?```', '', text, flags=re.DOTALL)
    found += [code for code in re.findall(r'`([^`\n]+)`', prose) if re.search(r' (CONFIG|WORK_DIR|NAME)\b', code)]
    return [command for command in found if re.search(r'\btools/\w+\.(py|sh) ', command)]


COMMANDS = [(page, command) for page, text in PAGES.items() for command in commands_of(text)]


@cache
def tool_module(name):
    spec = importlib.util.spec_from_file_location(f'doc_{name}', ROOT / f'tools/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsed(command):
    """The arguments of the tool that a command runs, and of torchrun where that starts it."""
    words = shlex.split(command, comments=True)
    at = next(i for i, word in enumerate(words) if re.fullmatch(r'tools/\w+\.(py|sh)', word))
    launcher, tool, argv = words[:at], words[at], words[at + 1 :]
    torchrun = get_args_parser().parse_args([*launcher[1:], tool]) if launcher[:1] == ['torchrun'] else None
    slurm = launcher[:1] == ['sbatch'] and tool == 'tools/slurm_train.sh'
    assert torchrun or slurm or launcher in ([], ['python'], ['srun', 'python'])
    assert (ROOT / tool).is_file()
    return tool_module('train' if tool.endswith('.sh') else Path(tool).stem).parse_args(argv), torchrun


def check_configs(args):
    for path in [getattr(args, 'config', None), *getattr(args, 'configs', [])]:
        if path is not None and path not in OWN:
            load_config(str(ROOT / path), getattr(args, 'cfg_options', ()))  # misspelt keys are errors


def test_there_are_commands():
    text = '\n'.join(command for _, command in COMMANDS)
    parts = ['--nnodes 1:4 --max-restarts', '--rdzv-endpoint', 'sbatch', '--shard', '--resume=auto', '--load-from']
    assert [part for part in parts if part not in text] == []
    assert {page for page, _ in COMMANDS} == set(PAGES) - {'install.md'}


@pytest.mark.parametrize(('page', 'command'), COMMANDS)
def test_a_command_is_taken(page, command):
    args, torchrun = parsed(command)
    check_configs(args)
    if torchrun is not None and torchrun.max_restarts:
        assert args.resume == 'auto'  # or the second attempt starts afresh
        assert set(args.allow_changed) == {'world_size', 'global_batch'}


@pytest.mark.parametrize(
    'command',
    [
        'python tools/train.py CONFIG --no-such-option',
        'torchrun --no-such-option tools/train.py CONFIG',
        'python tools/train.py configs/detection/cascade_convnext_xl_in22k_coco.py --cfg-options shardin.param_dtype=a',
        'python tools/train.py configs/detection/no_such.py',
        'python tools/analyze.py configs/detection/no_such.py',
        'python tools/no_such.py CONFIG',
        'sh tools/train.py CONFIG',
    ],
)
def test_a_wrong_one_would_be_found(command):
    with pytest.raises((SystemExit, AssertionError, ValueError, OSError)):
        check_configs(parsed(command)[0])


def test_options_exist():
    known = ''.join(path.read_text(encoding='utf-8') for path in (ROOT / 'tools').glob('*.py'))
    known += ''.join((ROOT / 'densekit' / name).read_text(encoding='utf-8') for name in ('cli.py', 'doctor.py'))
    named = {option for text in PAGES.values() for option in re.findall(r'`(--[a-z][a-z-]+)', text)} - OF_OTHERS
    assert {'--resume', '--ignore-zero', '--headers'} <= named
    assert [option for option in sorted(named) if f"'{option}'" not in known] == []


@pytest.fixture
def workplace(tiny, tmp_path, monkeypatch):
    for name in ('tools', 'configs'):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(tiny.data, tmp_path / 'data')
    shutil.copytree(tiny.data / 'coco/train', tmp_path / 'photos')
    shutil.copy(tiny.data / 'coco/annotations/instances_train.json', tmp_path / 'photos/instances.json')
    (tmp_path / 'labels').mkdir()
    for number, photo in enumerate(sorted((tmp_path / 'photos').glob('*.jpg'))):
        labels = np.full((64, 64), number % 3, np.uint8)
        labels[16:48] = (number + 1) % 3
        Image.fromarray(labels).save(tmp_path / f'labels/{photo.stem}.png')
    base = str(ROOT / 'configs/detection/mask_rcnn_convnext_mini_shapes.py')
    (tmp_path / 'mine.py').write_text(MINE.format(base=base), encoding='utf-8')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize('page', [page for page, text in PAGES.items() if RUN.search(text)])
def test_marked_blocks_run(page, workplace, tool, quick_mmengine, capsys):
    for command in (line for block in RUN.findall(PAGES[page]) for line in lines_of(block)):
        python, script, *argv = shlex.split(command, comments=True)
        assert python == 'python' and script.startswith('tools/')
        status = tool(Path(script).stem, *argv)
        assert status == 0, f'{command}\n{"".join(capsys.readouterr())}'
        for kind in (MMLogger, MessageHub):  # of two runs in one second
            kind._instance_dict.clear()
    for text in RUN_PYTHON.findall(PAGES[page]):
        exec(compile(text, page, 'exec'), {})


def test_the_marked_blocks_are_many():
    assert sum(len(lines_of(block)) for text in PAGES.values() for block in RUN.findall(text)) >= 10
    assert [page for page, text in PAGES.items() if RUN_PYTHON.search(text)] == ['predict.md']


@pytest.mark.parametrize(
    ('page', 'text'),
    [
        (page, text)
        for page, body in PAGES.items()
        for text in blocks(body, 'python')
        if text not in RUN_PYTHON.findall(body)
    ],
)
def test_python_runs_or_builds(page, text, tmp_path):
    if 'import torch' in text:
        exec(compile(text, page, 'exec'), {})
        return
    path = tmp_path / 'mine.py'
    path.write_text(text, encoding='utf-8')
    cfg = Config.fromfile(path)
    if 'model' not in cfg:  # a part of a config
        assert len(cfg) > 0
        return
    init_default_scope(re.search(r"_base_ = '(\w+)::", text)[1])
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert type(model.backbone).__module__ == 'backbones.convnext'
    inputs = model.neck.in_channels if model.with_neck else model.decode_head.in_channels
    assert list(model.backbone.channels) == list(inputs)
    if cfg.optim_wrapper.constructor == 'LayerDecayOptimWrapperConstructor':
        rates = {group['lr_scale'] for group in build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups}
        assert 1.0 in rates and len(rates) > 4


def anchors(text):
    """As GitHub makes them of headings."""
    headings = re.findall(r'^#+ (.+)$', re.sub(r'```.*?```', '', text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def test_anchors():
    assert anchors('# A\n\n## Sharding: `--shard`\n\n```\n# none\n```\n### NaN, and more\n') == {
        *('a', 'sharding---shard', 'nan-and-more')
    }


@pytest.mark.parametrize('page', PAGES)
def test_links_and_files_exist(page):
    text = PAGES[page]
    for target in re.findall(r'\]\(([^)]+)\)', text):
        if '://' in target:
            continue
        path, _, anchor = target.partition('#')
        linked = (ROOT / 'docs' / (path or page)).resolve()
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text(encoding='utf-8')), target
    named = set(re.findall(r'(?:configs|tools|benchmarks|densekit|examples)/[\w/]+\.(?:py|sh|md)', text))
    recipes = set(re.findall(r'`(\w+(?:_coco|_ade20k|_shapes)\.py)`', text))
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
    assert [name for name in sorted(recipes) if not list((ROOT / 'configs').glob(f'*/{name}'))] == []


def rows(page, header):
    """The cells of the table that begins with a header."""
    table = PAGES[page].partition(f'| {header} |')[2].partition('\n\n')[0].splitlines()[2:]
    assert table, header
    return [[cell.strip().strip('`') for cell in line.strip('|').split('|')] for line in table]


def test_versions_are_those_of_the_package():
    setup = (ROOT / 'setup.py').read_text(encoding='utf-8')
    pins = (ROOT / 'constraints.txt').read_text(encoding='utf-8')
    for name, needed, tested in rows('install.md', 'package'):
        if name == 'Python':
            assert "python_requires='>=3.10,<3.14'" in setup and needed == '3.10 to 3.13'
            continue
        name = name.partition(',')[0]
        assert f"'{name}{needed if needed != 'any' else ''}'" in setup
        assert f'\n{name}=={tested}\n' in pins
    assert rows('install.md', 'CUDA of torch') == [
        [str(cuda), str(driver)] for cuda, driver in sorted(OLDEST_DRIVER.items(), reverse=True)
    ]


def test_the_road_is_the_published_one():
    table = {row[0]: row[2:] for row in rows('roadmap.md', '`step`')}
    assert list(table) == list(RUNGS) == list(PUBLISHED)
    for step, published in PUBLISHED.items():
        figures = [figure for arch in ('tiny', 'base') for figure in published[arch]]
        assert [float(cell) for cell in table[step]] == figures


def test_faults_are_known():
    named = {kind for row in rows('own_data.md', 'often') for kind in re.findall(r'[a-z]+(?:-[a-z]+)+', row[1])}
    assert len(named) > 6 and named <= set(KINDS)


def test_what_is_decided_is_what_the_code_decides():
    plan = own_recipe.plan
    assert [plan('detection', n, 4).frozen for n in (999, 1000, 3999, 4000)] == [2, 1, 1, 0]
    seen = {n: plan('detection', n, 4).iterations * 4 / n for n in (50, 500, 4000, 10**5)}
    assert [round(value) for value in seen.values()] == [80, 40, 20, 12]
    assert [round(plan('segmentation', n, 4).iterations * 4 / n) for n in (50, 500)] == [160, 80]
    assert plan('detection', 500, 16).rate == 1e-4 and plan('detection', 500, 4).rate == 5e-5
    v2 = {name for name, size in own_recipe.SIZES.items() if 'nc' in size.license}
    assert v2 == set('afpnh')


def test_the_recipes_have_the_augmentation_that_is_promised():
    assert all('Cascade Mask R-CNN' in ' '.join(PAGES[page].split()) for page in ('faq.md', 'train.md'))
    for recipe in ('mask_rcnn_convnext_t_coco', 'cascade_convnext_t_coco'):
        assert load_config(str(ROOT / f'configs/detection/{recipe}.py')).tta_model.type == 'MaskTTAModel'
    for recipe in ('dino_convnext_t_12e_coco', 'mask2former_convnext_t_coco', 'rtmdet_l_convnext_b_coco'):
        assert 'tta_model' not in load_config(str(ROOT / f'configs/detection/{recipe}.py'))


def test_runs_are_as_the_code_has_them():
    text = ' '.join(PAGES['runs.md'].split())
    statuses = [row[0] for row in rows('runs.md', 'status')]
    assert sorted(set(statuses), key=int) == [
        *('0', '1', str(USER_ERROR_STATUS), str(RunStopped.status), str(Interrupted.status), str(INTERRUPTED_STATUS))
    ]
    assert all(f'`{part}`' in text for part in contract.PARTS)
    assert f'more than {guards.SAME_SIGNAL:g} seconds' in text
    assert f'after {guards.MOST_SKIPPED} in a row' in text
    assert f'hangs for {TIMEOUT} s' in text
    assert f'{SAMPLE} images and label maps' in text


@pytest.mark.parametrize('page', PAGES)
def test_nothing_but_users_words(page):
    assert not re.search(r'/work\b|\.\./shared|\bR\d+\b|\bissue \d', PAGES[page])
