"""What docs/scaling.md says is what the code does; its commands and links: tests/test_docs.py."""

import re
import shlex
from pathlib import Path

import pytest

from densekit.cli import Interrupted, RunStopped
from densekit.engine import contract
from densekit.engine.config import load_config
from densekit.report import scaling_tables

ROOT = Path(__file__).parents[2]
DOC = (ROOT / 'docs/scaling.md').read_text(encoding='utf-8')


def test_the_calculation_is_called_as_it_can_be():
    (command,) = re.findall(r'^python -m densekit\.report.*$', DOC.replace('\\\n', ' '), re.MULTILINE)
    words = shlex.split(command)
    assert words[:3] == ['python', '-m', 'densekit.report.scaling_tables']
    args = scaling_tables._parse_args(words[3:])
    assert all((ROOT / config).is_file() for config in args.configs)


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


@pytest.mark.parametrize('what', ['NCCL', 'SyncBN', 'FSDP2 on CUDA', 'several nodes', 'SLURM'])
def test_what_was_not_run_says_so(what):
    rows = DOC.partition('## What was run')[2].splitlines()
    assert any(what in row and 'not run' in row for row in rows)
