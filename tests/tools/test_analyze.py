import json
from pathlib import Path

import pytest

from backbones.roadmap import RUNGS
from densekit.report import roadmap_table

CONFIGS = Path(__file__).parents[2] / 'configs'
MINI = str(CONFIGS / 'detection/mask_rcnn_convnext_mini_shapes.py')
CASCADE_T = str(CONFIGS / 'detection/cascade_convnext_t_coco.py')
UPERNET_T = str(CONFIGS / 'segmentation/upernet_convnext_t_ade20k.py')
# A 3 x 3 convolution of 384 channels to 256 with BatchNorm, and one to 150 classes with biases.
AUXILIARY_HEAD = 384 * 256 * 9 + 2 * 256 + 256 * 150 + 150


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


@pytest.mark.parametrize('argv', [(), ('--json',), ('--roadmap', 'x.py')])
def test_neither_or_both_is_refused(argv, tool, capsys):
    with pytest.raises(SystemExit) as exit_:
        tool('analyze', *argv)
    assert exit_.value.code == 2
    assert 'give config files or --roadmap' in capsys.readouterr().err


def test_recipes_as_a_table(tool, capsys):
    assert tool('analyze', MINI, CASCADE_T) == 0
    out, err = capsys.readouterr()
    table, remarks = out.split('\n\n')
    mini, cascade = table.splitlines()[2:]
    assert mini.split()[:5] == ['mask_rcnn_convnext_mini_shapes', '96x96', '2.3', '-', '-']
    assert cascade.split() == ['cascade_convnext_t_coco', '1280x800', '85.9', '-', '86', '740.2', '741', '-0.8', '0.0']
    assert 'attention:' in remarks
    assert err == ''


def test_recipes_as_json(tool, capsys):
    assert tool('analyze', UPERNET_T, '--json') == 0
    (analysis,) = json.loads(capsys.readouterr().out)
    assert (analysis['config'], analysis['height'], analysis['width']) == (UPERNET_T, 512, 2048)
    assert analysis['parameters'] - analysis['parameters_without_auxiliary_head'] == AUXILIARY_HEAD
    assert round(analysis['multiply_adds'] / 1e9, 1) == 938.5
    assert analysis['multiply_adds_of_attention'] == 0 and analysis['not_counted'] is None
    assert analysis['paper']['gflops'] == 939


def test_a_config_that_is_not_there(tool, capsys):
    assert tool('analyze', MINI, MINI.replace('mini', 'minni')) == 2
    out, err = capsys.readouterr()
    assert out == ''
    assert err.startswith('error: config ') and 'Did you mean' in err


def test_help_imports_no_torch(command):
    shown = command('-X', 'importtime', __file__.replace('tests/tools/test_analyze.py', 'tools/analyze.py'), '--help')
    assert shown.returncode == 0
    assert '--roadmap' in shown.stdout
    assert ' torch' not in shown.stderr
