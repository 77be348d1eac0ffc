import json

import pytest

ATTO = ('--backbone', 'atto', '--images', '1x32x32', '--peers', 'densekit', 'timm', '--rounds', '1', '--device', 'cpu')


def results(folder):
    return json.loads(next(folder.glob('*.json')).read_text())


def test_a_backbone(tool, tmp_path, capsys):
    assert tool('benchmark', *ATTO, '--out', tmp_path, '--phase', 'infer') == 0
    assert 'times as fast as timm' in capsys.readouterr().out
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == ['.json', '.md', '.png']
    before = results(tmp_path)
    assert tool('benchmark', *ATTO, '--out', tmp_path, '--phase', 'infer') == 0
    assert '0 of 1 cases to measure' in capsys.readouterr().out
    assert results(tmp_path) == before
    assert tool('benchmark', *ATTO, '--out', tmp_path, '--budget', '0') == 0
    assert '1 cases are left' in capsys.readouterr().out


def test_a_tier(tool, tmp_path, capsys, monkeypatch):
    from densekit.benchmark import plan

    monkeypatch.setattr(plan, '_theirs', lambda device: ['timm'])
    measured = []
    monkeypatch.setattr(plan.BackboneCase, 'measure', lambda case, settings: measured.append(case) or RECORD)
    argv = ('--tier', '1', '3', '--images', '1x32x32', '--out', tmp_path, '--device', 'cpu')
    assert tool('benchmark', *argv) == 0
    assert [(case.arch, case.dtype, case.training) for case in measured] == [
        ('tiny', dtype, training) for dtype in ('fp32', 'bf16') for training in (True, False)
    ]
    assert {case['tier'] for case in results(tmp_path)['cases'].values()} == {1, 3}


RECORD = {'kind': 'backbone', 'title': 'made up', 'images': 1, 'rows': [], 'left_out': {}}


def test_a_step(tool, tiny, quick_mmengine, tmp_path, capsys):
    argv = ('--step', tiny.seg, '--images', '2x64x64', '--phase', 'infer', '--rounds', '1', '--device', 'cpu')
    assert tool('benchmark', *argv, '--out', tmp_path) == 0
    assert 'times as fast as stock' in capsys.readouterr().out


def test_data(tool, tiny, quick_mmengine, capsys):
    assert tool('benchmark', '--data', tiny.det, '--gpu-rate', '7') == 0
    out = capsys.readouterr().out
    assert 'PackDetInputs' in out and out.splitlines()[-1].split()[0] == '7'


def test_fit(tool, tiny, quick_mmengine, capsys, monkeypatch):
    from densekit.benchmark import fit

    monkeypatch.setattr(fit, '_SIDES', (64, 96))
    monkeypatch.setattr(fit, '_STAGES', (False, (0, 1)))
    assert tool('benchmark', '--fit', '1GiB', tiny.det, '--images', '1x100x96', '--device', 'cpu') == 0
    out = capsys.readouterr().out
    assert 'images of 128 x 96' in out  # padded as the model pads
    assert out.count('python tools/train.py') == 4
    assert all(out.count(f'"model.backbone.with_cp={stages}"') == 2 for stages in ('False', '[0,1]'))


@pytest.mark.parametrize(
    ('argv', 'said'),
    [
        (('--backbone', 'tinny', '--images', '1x32x32'), 'choose one of atto'),
        (('--backbone', 'tiny'), '--images is missing'),
        (('--backbone', 'tiny', '--images', '512'), 'give number, height and width'),
        (('--backbone', 'tiny', '--images', '1x32x32', '--peers', 'official'), 'facebookresearch'),
        (('--backbone', 'tiny', '--images', '1x32x32', '--peers', 'densekit folded'), 'for inference only'),
        (('--backbone', 'tiny', '--images', '1x32x32', '--device', 'tpu'), '--device tpu'),
        (('--backbone', 'tiny', '--images', '1x32x32', '--out', '/proc/none'), '--out FOLDER'),
        (('--step', 'no_such.py', '--images', '1x32x32'), 'config no_such.py does not exist'),
        (('--data', 'no_such.py'), 'config no_such.py does not exist'),
        (('--fit', 'much', 'no_such.py'), '--fit much'),
        (('--fit', '1GiB', 'no_such.py', '--images', '1x32x32', '1x64x64'), '--fit plans for one size; give one'),
        (('--waits', 'no_such.py', '--images', '1x32x32', '1x64x64'), '--waits counts for one size; give one'),
    ],
)
def test_mistakes(tool, capsys, argv, said):
    assert tool('benchmark', *argv) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    'argv', [('--step', '--data', 'a.py'), ('--step',), ('a.py',), ('--tier', '8'), ('--rounds', '0')]
)
def test_arguments_that_do_not_go_together(tool, capsys, argv):
    with pytest.raises(SystemExit) as stop:
        tool('benchmark', *argv)
    assert stop.value.code == 2
    assert 'error: ' in capsys.readouterr().err


def test_verifying_needs_a_gpu(tool, tiny, quick_mmengine, capsys):
    argv = ('--fit', '1GiB', tiny.det, '--images', '1x96x96', '--verify', '--device', 'cpu')
    assert tool('benchmark', *argv) == 2
    assert 'CUDA GPU' in capsys.readouterr().err


def test_help_answers_without_torch(command):
    found = command('-X', 'importtime', 'tools/benchmark.py', '--help')
    assert 'torch' not in found.stderr
