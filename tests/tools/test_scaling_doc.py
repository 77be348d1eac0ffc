"""The commands of docs/scaling.md are ones that the tools, torchrun and sbatch's script take."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from densekit.cli import Interrupted, RunStopped
from densekit.engine import contract
from densekit.engine.config import load_config
from densekit.report import scaling_tables

ROOT = Path(__file__).parents[2]
DOC = (ROOT / 'docs/scaling.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'```bash\n(.*?)```', DOC, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace('\\\n', ' ').splitlines()]
COMMANDS += [code for code in re.findall(r'^\| [^|]+ \| `([^`]+)` \|', DOC, re.MULTILINE) if 'tools/' in code]


def parse_tool(name, argv):
    spec = importlib.util.spec_from_file_location(f'doc_{name}', ROOT / f'tools/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.parse_args(argv)


def parsed(command):
    """The arguments of the tool that a command runs, and of torchrun where that starts it."""
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if re.fullmatch(r'tools/\w+\.(py|sh)', word))
    launcher, tool, argv = words[:at], words[at], words[at + 1 :]
    torchrun = get_args_parser().parse_args([*launcher[1:], tool]) if launcher[0] == 'torchrun' else None
    assert torchrun or launcher == ['python'] or (launcher[0] == 'sbatch' and tool == 'tools/slurm_train.sh')
    return parse_tool('train' if tool.endswith('.sh') else Path(tool).stem, argv), torchrun


def check_config(args):
    path = getattr(args, 'config', None)
    if path not in (None, 'CONFIG'):
        load_config(str(ROOT / path), args.cfg_options)  # misspelt keys are errors


def test_there_are_commands():
    assert len(COMMANDS) >= 15
    text = '\n'.join(COMMANDS)
    assert all(part in text for part in ('--nnodes 1:4 --max-restarts', '--rdzv-endpoint', 'sbatch', '--shard'))


@pytest.mark.parametrize('command', [command for command in COMMANDS if 'densekit.report' not in command])
def test_a_command_is_taken(command):
    args, torchrun = parsed(command)
    check_config(args)
    if torchrun is not None and torchrun.max_restarts:
        assert args.resume == 'auto'  # or the second attempt starts afresh
        assert set(args.allow_changed) == {'world_size', 'global_batch'}


def test_the_calculation_is_called_as_it_can_be():
    (command,) = (command for command in COMMANDS if 'densekit.report' in command)
    words = shlex.split(command)
    assert words[:3] == ['python', '-m', 'densekit.report.scaling_tables']
    args = scaling_tables._parse_args(words[3:])
    assert all((ROOT / config).is_file() for config in args.configs)


@pytest.mark.parametrize(
    'command',
    [
        'python tools/train.py CONFIG --no-such-option',
        'torchrun --no-such-option tools/train.py CONFIG',
        'python tools/train.py configs/detection/cascade_convnext_xl_in22k_coco.py --cfg-options shardin.param_dtype=a',
        'python tools/train.py configs/detection/no_such.py',
        'sh tools/train.py CONFIG',
    ],
)
def test_a_wrong_one_would_be_found(command):
    with pytest.raises((SystemExit, AssertionError, ValueError, OSError)):
        check_config(parsed(command)[0])


def test_the_sharding_of_the_example_is_known():
    text = next(block for block in re.findall(r'```python\n(.*?)```', DOC, re.DOTALL) if 'sharding' in block)
    options = set(re.findall(r'^    (\w+)=', text, re.MULTILINE))
    known = {'param_dtype', 'activation_checkpointing', 'sharded_checkpoints'}
    assert options == known
    values = [f'sharding.{name}=True' for name in sorted(options)]
    load_config(str(ROOT / scaling_tables.CONFIGS[0]), values)
    with pytest.raises(ValueError, match='no_such'):
        load_config(str(ROOT / scaling_tables.CONFIGS[0]), ['sharding.no_such=True'])


def test_statuses_and_parts_of_the_contract_are_those_of_the_code():
    statuses = re.findall(r'^\| (\d+) \|', DOC, re.MULTILINE)
    assert statuses == ['0', '1', '2', str(RunStopped.status), str(Interrupted.status)]
    section = DOC.partition('**Resuming.**')[2].partition('```')[0]
    assert all(f'`{part}`' in section for part in contract.PARTS)


def test_links_and_files_exist():
    linked = [target for target in re.findall(r'\]\(([^)#]+)\)', DOC) if '://' not in target]
    assert linked and all((ROOT / 'docs' / target).exists() for target in linked)
    named = set(re.findall(r'(?:configs|tools)/[\w/]+\.(?:py|sh)', DOC))
    assert len(named) > 4 and all((ROOT / name).is_file() for name in named)


@pytest.mark.parametrize('what', ['NCCL', 'SyncBN', 'FSDP2 on CUDA', 'several nodes', 'SLURM'])
def test_what_was_not_run_says_so(what):
    rows = DOC.partition('## What was run')[2].splitlines()
    assert any(what in row and 'not run' in row for row in rows)
