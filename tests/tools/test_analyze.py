import json

import pytest

from backbones.roadmap import RUNGS
from densekit.report import roadmap_table


@pytest.fixture
def measured(monkeypatch):
    """Counts made up, so that nothing needs to be built; test_roadmap.py has the real ones."""
    counts = {'tiny': (4_100_000_000, 25_557_032), 'base': (14_800_000_000, 64_673_832)}
    monkeypatch.setattr(roadmap_table, 'measure', lambda arch, step: counts[arch])


@pytest.mark.usefixtures('measured')
def test_roadmap_as_a_table(tool, capsys):
    assert tool('analyze', '--roadmap') == 0
    table, remarks = capsys.readouterr().out.split('\n\n')
    header, rule, *rows = table.splitlines()
    assert [row.split()[0] for row in rows] == list(RUNGS)
    assert ' '.join(rows[0].split()) == 'resnet 4.10 4.09 +0.24 25.6 76.13 14.80 15.01 -1.40 64.7 78.20'
    assert [row.split()[:3] for row in rows if '*' in row] == [['layer_norm', '4.10', '4.46*']]
    columns = [i for i, character in enumerate(rule) if character == ' ']
    assert all(line[i] == ' ' for line in (header, *rows) for i in columns)
    assert {line.rindex('.') for line in rows} == {rows[0].rindex('.')}
    assert max(map(len, (*table.splitlines(), *remarks.splitlines()))) <= 120
    assert remarks.startswith('* Not explained')


@pytest.mark.usefixtures('measured')
def test_roadmap_as_json(tool, capsys):
    assert tool('analyze', '--roadmap', '--json') == 0
    ladder = json.loads(capsys.readouterr().out)
    assert [rung['step'] for rung in ladder] == list(RUNGS)
    assert [rung['change'] for rung in ladder] == [rung.change for rung in RUNGS.values()]
    assert ladder[0]['tiny'] == {
        'multiply_adds': 4_100_000_000,
        'paper_gflops': 4.09,
        'difference_percent': 0.24,
        'explained': True,
        'parameters': 25_557_032,
        'paper_top1': 76.13,
    }
    unexplained = {(arch, r['step']) for r in ladder for arch in ('tiny', 'base') if not r[arch]['explained']}
    assert unexplained == {('tiny', 'layer_norm')}


@pytest.mark.parametrize(('arch', 'step', 'parameters'), [('tiny', 'resnet', 25_557_032), ('base', None, 88_591_464)])
def test_parameters_are_those_of_the_classifiers(arch, step, parameters):
    assert roadmap_table.measure(arch, step or list(RUNGS)[-1])[1] == parameters  # torchvision's, and Table 1's


def test_without_roadmap_it_says_what_to_give(tool, capsys):
    with pytest.raises(SystemExit) as exit_:
        tool('analyze')
    assert exit_.value.code == 2
    assert '--roadmap' in capsys.readouterr().err


def test_help_imports_no_torch(command):
    shown = command('-X', 'importtime', __file__.replace('tests/tools/test_analyze.py', 'tools/analyze.py'), '--help')
    assert shown.returncode == 0
    assert '--roadmap' in shown.stdout
    assert ' torch' not in shown.stderr
