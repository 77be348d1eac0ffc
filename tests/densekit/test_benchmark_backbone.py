import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from backbones import ARCHS, ConvNeXt
from backbones.folding import FoldedBlock
from densekit.benchmark import chart, machine, multiscale, peers, run
from densekit.benchmark.backbone import BackboneCase, best_forms, step
from densekit.benchmark.case import Candidate, Settings, measure_rows, parse_images, written
from densekit.benchmark.depthwise import DIRECTIONS, DepthwiseCase, Operation
from densekit.benchmark.launches import count, covered
from densekit.benchmark.memory import peak_bytes
from densekit.benchmark.multiscale import MultiScaleCase, sizes
from densekit.benchmark.peaks import Peaks, measure
from densekit.benchmark.plan import cases_of
from densekit.benchmark.roofline import FORMS, Rates, depthwise_floor, floor
from densekit.benchmark.steps import StepCase
from densekit.benchmark.table import TIERS, against_best, render, round_by_round
from densekit.benchmark.timing import Budget, interleaved
from densekit.files import write_whole
from densekit.report.complexity import count_multiply_adds

CPU = torch.device('cpu')
PEAKS = Peaks(copy=1e10, fp32=1e11, bf16=2e11)
H200 = Rates(copy=4.3e12, matrix=790e12, vector=67e12)
MIB = 2**20

# Milliseconds per image, worked out by hand from bytes and FLOP of each operation: compiled, fused, best.
TABLE = [
    ('tiny', 512, 512, True, (0.466, 0.317, 0.275)),
    ('tiny', 800, 1280, True, (1.82, 1.24, 1.08)),
    ('base', 512, 512, True, (1.17, 0.82, 0.80)),
    ('base', 800, 1280, True, (4.56, 3.22, 3.11)),
    ('xlarge', 640, 640, True, (5.39, 4.29, 4.29)),
    ('tiny', 800, 1280, False, (0.59, 0.38, 0.31)),
    ('base', 512, 512, False, (0.38, 0.26, 0.24)),
]


@pytest.mark.parametrize(('arch', 'height', 'width', 'training', 'expected'), TABLE)
def test_floors(arch, height, width, training, expected):
    found = [1e3 * floor(arch, (1, height, width), H200, training=training, form=form) for form in FORMS]
    assert found == pytest.approx(expected, rel=0.02)


def test_floors_are_of_what_limits():
    images = (1, 512, 512)
    known = floor('tiny', images, H200, training=True)
    endless = 1e30
    of_memory = floor('tiny', images, Rates(4.3e12, endless, endless), training=True)
    of_both = floor('tiny', images, Rates(4.3e12, 790e12, endless), training=True)
    assert of_memory < of_both < known
    assert floor('tiny', (4, 512, 512), H200, training=True) == pytest.approx(4 * known)
    assert floor('tiny', images, H200, training=True, value_bytes=4) > known


def test_arithmetic_is_that_of_the_model():
    with torch.device('meta'):
        model, image = ConvNeXt('tiny'), torch.empty(1, 3, 512, 512)
    depthwise = sum(49 * d * c * (128 // 2**i) ** 2 for i, (d, c) in enumerate(zip(*ARCHS['tiny'], strict=True)))
    endless, rate = 1e30, 1e12
    of_products = floor('tiny', (1, 512, 512), Rates(endless, rate, endless), training=False, form='fused')
    of_depthwise = floor('tiny', (1, 512, 512), Rates(endless, endless, rate), training=False)
    assert of_depthwise * rate == pytest.approx(2 * depthwise)
    assert of_products * rate == pytest.approx(2 * (count_multiply_adds(model, image) - depthwise))


def test_floor_of_the_depthwise_convolution():
    assert 1e12 * depthwise_floor(1, H200) == pytest.approx(1.46, abs=0.01)  # multiply-adds
    assert 1e12 * depthwise_floor(1, Rates(4.3e12, 1, 1e30)) == pytest.approx(0.93, abs=0.01)  # memory


def test_turns_are_interleaved_and_rotated():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in 'abc'}
    times, failures = interleaved(calls, CPU, rounds=3, clock=lambda call, device, repeats: call() or 2.0)
    assert failures == {}
    assert ''.join(order[9:]) == 'abc' + 'bca' + 'cab'
    assert times['a'].rounds == (2.0, 2.0, 2.0) and times['a'].median == 2.0


@pytest.mark.parametrize('fails_at', [1, 5])
def test_one_that_fails_does_not_stop_the_others(fails_at):
    calls = []

    def bad():
        calls.append(1)
        if len(calls) == fails_at:
            raise RuntimeError('no such kernel\nmore')

    clock = lambda call, device, repeats: call() or 1.0  # noqa: E731
    times, failures = interleaved({'bad': bad, 'good': lambda: None}, CPU, rounds=4, clock=clock)
    assert failures == {'bad': 'RuntimeError: no such kernel'}
    assert list(times) == ['good'] and len(times['good'].rounds) == 4
    assert len(calls) == fails_at


def test_budget():
    assert Budget(None).left() > 1e9 and 0 < Budget(1000).left() <= 1000 and Budget(0).left() <= 0


def test_union_of_intervals():
    assert covered([(5, 9), (0, 2), (1, 3), (6, 7), (9, 10)]) == 3 + 5
    assert covered([]) == 0


def test_peak_memory():
    def together():
        first = torch.ones(MIB)  # 4 MiB
        second = torch.ones(2 * MIB)
        return len(first) + len(second)

    def one_after_the_other():
        first = torch.ones(MIB)
        del first
        return torch.ones(2 * MIB)

    assert peak_bytes(together, CPU) == pytest.approx(12 * MIB, rel=0.001)
    assert peak_bytes(one_after_the_other, CPU) == pytest.approx(8 * MIB, rel=0.001)


def test_peaks():
    found = measure(CPU, side=64, size=2**16)
    assert min(found.as_dict().values()) > 0
    assert PEAKS.rates('bf16') == Rates(1e10, 2e11, 1e11) and PEAKS.rates('fp32') == Rates(1e10, 1e11, 1e11)


def test_peaks_are_of_random_numbers(monkeypatch):
    operands = {}
    product = torch.mm
    monkeypatch.setattr(torch, 'mm', lambda a, b, out: operands.update({a.dtype: (a, b)}) or product(a, b, out=out))
    measure(CPU, side=64, size=2**16)
    assert set(operands) == {torch.float32, torch.bfloat16}
    assert all(0.9 < one.float().std() < 1.1 for pair in operands.values() for one in pair)


def same_weights(model, shift=0):
    """Weights by size and the order in which layers run; norms and scales stay 1."""
    seen = {}

    def fill(layer, args):
        with torch.no_grad():
            for parameter in layer.parameters():
                size = parameter.numel()
                seen[size] = seen.get(size, 0) + 1
                generator = torch.Generator().manual_seed(1000 * size + seen[size] + shift)
                values = torch.randn(size, generator=generator) / (size / layer.bias.numel()) ** 0.5
                parameter.copy_(values.reshape(parameter.shape))

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_pre_hook(fill) for layer in layers]
    model(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return model


BUILDERS = peers.builders(CPU)[0]


@pytest.fixture(scope='module')
def expected():
    return features('densekit')


def features(name, shift=0):
    model = BUILDERS[name]('atto', 0.1)
    model.eval()  # mmpretrain's returns None
    with torch.no_grad():
        return same_weights(model, shift)(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))


def error(found, expected):
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize('name', [name for name in BUILDERS if name != 'densekit triton'])
def test_all_compute_the_same(name, expected):
    assert error(features(name), expected) < 1e-4
    assert error(features(name, shift=1), expected) > 0.1


def test_who_is_compared():
    found, left_out = peers.builders(CPU)
    assert next(iter(found)) == peers.OURS
    assert {'timm', 'timm conv_mlp', 'torchvision', 'transformers'} <= set(found)
    assert 'facebookresearch' in left_out['official']
    assert ('mmpretrain' in found) != ('mmpretrain' in left_out)


def test_folded_is_for_inference():
    assert peers.FOLDED not in BUILDERS and 'inference' in peers.builders(CPU)[1][peers.FOLDED]
    found, left_out = peers.builders(CPU, training=False)
    assert peers.FOLDED in found and peers.FOLDED not in left_out
    model = found[peers.FOLDED]('atto', 0.1)
    assert sum(isinstance(module, FoldedBlock) for module in model.modules()) == 12
    case = BackboneCase('atto', (1, 32, 32), 'fp32', False, layouts=('nhwc',), peers=(peers.FOLDED, 'densekit'))
    rows = case.measure(Settings(CPU, PEAKS, rounds=1, at_least=0.0))['rows']
    assert [(row['who'], row.get('error')) for row in rows] == [('densekit', None), ('densekit folded', None)]


def test_one_that_does_not_import_is_named(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'transformers', None)
    found, left_out = peers.builders(CPU)
    assert 'transformers' not in found and 'transformers' in left_out['transformers']


@pytest.mark.parametrize('dtype', ['fp32', 'bf16'])
def test_training_steps_drop_their_gradients_but_make_them(dtype):
    case = BackboneCase('atto', (1, 32, 32), dtype, True)
    made = []

    def build(arch, drop_path):
        model = BUILDERS['timm'](arch, drop_path)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: made.append(p))
        made.append(model)
        return model

    run_step = step(case, build, 'nhwc', 'eager', CPU)
    run_step()
    model, *with_gradients = made
    assert len(with_gradients) == len(list(model.parameters()))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


def test_rows_of_a_backbone():
    case = BackboneCase('atto', (1, 32, 32), 'fp32', False, peers=('densekit', 'timm'))
    record = case.measure(Settings(CPU, PEAKS, rounds=2, at_least=0.0))
    assert [(row['who'], row['layout']) for row in record['rows']] == [
        (who, layout) for who in ('densekit', 'timm') for layout in ('nchw', 'nhwc')
    ]
    assert all(len(row['rounds']) == 2 and row['peak_bytes'] > 0 for row in record['rows'])
    assert record['floors']['best'] <= record['floors']['fused'] < record['floors']['compiled']
    assert set(best_forms(record['rows'])) == {'densekit', 'timm'}


def test_a_candidate_that_cannot_be_made_has_its_reason():
    def broken():
        raise RuntimeError('needs another GPU')

    rows = measure_rows({Candidate('a'): broken, Candidate('b'): lambda: int}, Settings(CPU, PEAKS, 1, 0.0))
    assert rows[0]['error'] == 'RuntimeError: needs another GPU'
    assert 'error' not in rows[1]


@pytest.mark.parametrize('direction', DIRECTIONS)
def test_depthwise_directions(direction):
    shapes = []

    def convolution(x, weight, bias):
        y = nn.functional.conv2d(x, weight, bias, padding=3, groups=x.shape[1])
        for tensor in (x, weight):
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: shapes.append(tuple(gradient.shape)))
        return y

    operation = Operation(DepthwiseCase(2, 'fp32'), (4, 6, 5), direction, convolution, 'nhwc', CPU)
    operation()
    of_input, of_weight = (2, 4, 6, 5), (4, 1, 7, 7)
    wanted = {'forward': set(), 'input gradient': {of_input}, 'weight gradient': {of_weight}}
    assert set(shapes) == wanted.get(direction, {of_input, of_weight})


def test_sizes_of_a_multi_scale_pass():
    assert sizes(2, (480, 800)) == [(2, 480, 800), (2, 800, 1344)]


@pytest.mark.parametrize('before', [None, '/a/warm/cache'])
def test_a_cold_pass_finds_nothing_compiled(monkeypatch, before):
    names = ('TRITON_CACHE_DIR', 'TORCHINDUCTOR_CACHE_DIR')
    for name in names:
        monkeypatch.setenv(name, before) if before else monkeypatch.delenv(name, raising=False)
    found = []

    class Pool(ThreadPoolExecutor):  # a process takes over the environment that is there when it starts
        def __init__(self, *args, **kwargs):
            super().__init__()

        def submit(self, *args):
            found.append([Path(os.environ[name]) for name in names])
            assert not any(path.exists() and list(path.iterdir()) for path in found[-1])
            return super().submit(found[-1][0].mkdir)  # is filled

    monkeypatch.setattr(multiscale, 'ProcessPoolExecutor', Pool)
    for _ in range(2):
        multiscale._cold(MultiScaleCase('atto', 1), Candidate('densekit'), CPU)
        assert [os.environ.get(name) for name in names] == [before] * 2
    paths = [path for pair in found for path in pair]
    assert len(set(paths)) == 4 and not any(path.exists() for path in paths)


def test_images():
    assert parse_images('2x800X1333') == (2, 800, 1333) and written((2, 800, 1333)) == '2x800x1333'
    for text in ('800x1333', '0x2x2', '2x3x', 'ax2x2'):
        with pytest.raises(ValueError, match='--images'):
            parse_images(text)


def test_nothing_is_launched_on_a_cpu():
    assert count(lambda: None, CPU) is None


@pytest.mark.parametrize('device', [CPU, torch.device('cuda', 0)])
def test_the_plan_has_no_case_twice(device):
    keys = [case.key for tier in TIERS for case in cases_of(tier, device)]
    assert len(keys) == len(set(keys)) and len(keys) > 10
    if device.type == 'cuda':
        assert len([key for key in keys if '8x800x1344' in key]) >= 5


def test_compiled_peers_run_beside_our_kernels_on_cuda():
    cases = [case for case in cases_of(4, torch.device('cuda', 0)) if 'compiled' in case.modes]
    assert {case.peers[:-1] for case in cases} == {('densekit', 'densekit triton')}
    assert {case.peers[-1] for case in cases} == {name for name in BUILDERS if 'densekit' not in name}
    assert {(case.arch, case.images, case.training) for case in cases} == {
        (arch, images, training)
        for arch in ('tiny', 'base')
        for images in ((16, 512, 512), (8, 800, 1344))
        for training in (True, False)
    }
    assert set(cases[0].peers) <= set(peers.builders(torch.device('cuda', 0))[0])
    assert {case.peers for case in cases_of(4, CPU)} == {('densekit', 'timm')}  # which has no such kernels


def test_steps_on_cuda_run_with_our_kernels_too():
    cases = cases_of(6, torch.device('cuda', 0))
    half = len(cases) // 2
    assert not any(case.options for case in cases[:half])
    assert [replace(case, options=()) for case in cases[half:]] == cases[:half]
    default, kernels = cases[0].ours(), cases[half].ours()
    assert default.model.backbone.get('kernels', 'auto') == 'auto' and kernels.model.backbone.kernels == 'triton'
    assert not any(case.options for case in cases_of(6, CPU))


def test_the_plan_takes_other_sizes():
    keys = [case.key for case in cases_of(1, CPU, [(2, 64, 96)])]
    assert keys and all('2x64x96' in key for key in keys)


class Made:
    """A case of known figures."""

    def __init__(self, key, ours=1.0, other=2.0, stop=None):
        self.key, self.times, self.stop, self.count = key, {'densekit': ours, 'timm': other}, stop, 0

    def measure(self, settings):
        self.count += 1
        if self.stop:
            raise self.stop
        rows = [
            {'who': who, 'layout': 'nhwc', 'mode': 'eager', 'first': 9.0, 'rounds': [t, t, 3 * t], 'peak_bytes': MIB}
            for who, t in self.times.items()
        ]
        rows.append({'who': 'other', 'layout': 'nchw', 'mode': 'eager', 'error': 'out of memory'})
        floors = dict.fromkeys(FORMS, 0.25)
        return {'kind': 'backbone', 'title': f'case {self.key}', 'images': 4, 'rows': rows, 'floors': floors}


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Runs cases into a folder; returns what is left and what was said."""
    monkeypatch.setattr(run.peaks, 'measure', lambda device: PEAKS)

    def start(*cases, **kwargs):
        said = []
        left = run.run_cases([(1, case) for case in cases], device=CPU, out=tmp_path, say=said.append, **kwargs)
        return left, said

    start.folder = tmp_path
    start.content = lambda: json.loads(next(tmp_path.glob('*.json')).read_text())
    return start


def test_an_interrupted_run_goes_on_where_it_stopped(go):
    first, second = Made('a'), Made('b', stop=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        go(first, second)
    assert list(go.content()['cases']) == ['a']
    assert {path.suffix for path in go.folder.iterdir()} == {'.json', '.md', '.png'}  # and no draft
    second.stop = None
    left, said = go(first, second)
    assert left == []
    assert said[1:] == ['measuring b', '  densekit (nhwc, eager) is 2.00 times as fast as timm (nhwc, eager); 0 s']
    assert (first.count, second.count) == (1, 2)
    go(first, second, again=True)
    assert (first.count, second.count) == (2, 3)


def test_the_budget_ends_a_run_between_cases(go):
    case = Made('a')
    assert go(case, budget=0)[0] == ['a'] and case.count == 0
    assert go(case, budget=100)[0] == [] and case.count == 1


def test_no_case_begins_that_would_not_end_in_time(go, monkeypatch):
    clock = SimpleNamespace(time=0.0)
    monkeypatch.setattr(run.time, 'monotonic', lambda: clock.time)
    cases = [Made(key) for key in 'abc']
    for case in cases:
        measure = case.measure
        case.measure = lambda settings, measure=measure: setattr(clock, 'time', clock.time + 40) or measure(settings)
    assert go(*cases, budget=100)[0] == ['c']  # 20 seconds are left, and the others took 40


def test_results_of_another_torch_are_not_mixed(go, monkeypatch):
    go(Made('a'))
    path = next(go.folder.glob('*.json'))
    content = json.loads(path.read_text())
    content['versions']['torch'] = '1.0'
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r'torch 1\.0.*--out FOLDER'):
        go(Made('b'))
    path.write_text('{"cases": ')
    with pytest.raises(ValueError, match='no results file'):
        go(Made('b'))


def test_writing_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / 'a.json'
    write_whole(path, 'old')
    monkeypatch.setattr(Path, 'replace', lambda *args: (_ for _ in ()).throw(OSError('disk')))
    with pytest.raises(OSError, match='disk'):
        write_whole(path, 'new')
    assert path.read_text() == 'old'


def test_the_page(go):
    go(Made('a', ours=0.5, other=0.4))
    page = next(go.folder.glob('*.md')).read_text()
    assert '| case a | densekit (nhwc, eager) | 500 | timm (nhwc, eager) | 400 | 0.80x | 0.80x | 0.50 |' in page
    assert '| densekit | nhwc | eager | 500 | 500 to 1500 | 8 | 0.50 | 9000 | 1.0 |' in page
    assert 'Failed: other (nchw, eager): out of memory.' in page
    assert torch.__version__.partition('+')[0] in page and '## Backbone' in page


def test_our_choices_count_as_ours():
    rows = [{'who': who, 'rounds': [t]} for who, t in [('densekit', 3.0), ('densekit triton', 1.0), ('timm', 2.0)]]
    ours, other, ratio = against_best({'kind': 'backbone', 'rows': rows})
    assert (ours['who'], other['who'], ratio) == ('densekit triton', 'timm', 2.0)
    assert against_best({'kind': 'depthwise', 'rows': rows}) is None
    assert against_best({'kind': 'backbone', 'rows': rows[:2]}) is None


def test_ratios_round_by_round():
    """A neighbour takes turns with one of the two; the medians alone would say that ours is as slow."""
    ours, other = {'rounds': [1.0, 4.0, 4.0, 1.0, 4.0]}, {'rounds': [2.0, 4.0, 8.0, 2.0, 8.0]}
    assert round_by_round(ours, other) == 2.0
    assert round_by_round(other, ours) == 0.5
    with pytest.raises(ValueError, match='zip'):
        round_by_round(ours, {'rounds': [1.0]})


@pytest.mark.parametrize(('device', 'kept'), [(CPU, True), (torch.device('cuda', 0), False)])
def test_whole_steps_on_a_cpu_keep_freed_memory(device, kept, tmp_path, monkeypatch):
    """As a run does; whatever else is measured does not."""
    order, here = [], machine.describe(CPU)
    monkeypatch.setattr(run, 'keep_freed_memory', lambda: order.append('kept'))
    monkeypatch.setattr(run.machine, 'slug', lambda device: 'made')
    monkeypatch.setattr(run.machine, 'name', lambda device: 'made')
    monkeypatch.setattr(run.machine, 'describe', lambda device: here)
    monkeypatch.setattr(run.peaks, 'measure', lambda device: PEAKS)
    record = Made('a').measure(None)
    monkeypatch.setattr(StepCase, 'measure', lambda case, settings: order.append('step') or record)
    cases = [(1, Made('a')), (6, StepCase('a.py', (1, 32, 32)))]
    run.run_cases(cases[:1], device=device, out=tmp_path, say=lambda line: None)
    assert order == []
    run.run_cases(cases, device=device, out=tmp_path, say=lambda line: None)
    assert order == ['kept'] * kept + ['step']


def test_a_page_of_nothing(tmp_path):
    content = {**machine.describe(CPU), 'peaks': None, 'cases': {}}
    assert 'Nothing is measured yet' in render(content)
    assert not chart.draw(content, tmp_path / 'a.png') and not list(tmp_path.iterdir())


def test_the_revision_says_whether_files_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, '__file__', str(tmp_path / 'densekit/benchmark/machine.py'))
    for name in ('GIT_DIR', 'GIT_WORK_TREE', 'GIT_INDEX_FILE'):
        monkeypatch.delenv(name, raising=False)

    def git(*argv):
        subprocess.run(['git', '-c', 'user.name=a', '-c', 'user.email=a@b', *argv], cwd=tmp_path, check=True)

    git('init', '-q')
    (tmp_path / 'a.py').write_text('1')
    git('add', '.')
    git('commit', '-q', '-m', 'a')
    commit = machine.revision()
    assert commit and not commit.endswith('+')
    (tmp_path / 'benchmarks/results').mkdir(parents=True)
    (tmp_path / 'benchmarks/results/a.json').write_text('{}')
    assert machine.revision() == commit
    (tmp_path / 'new.py').write_text('1')
    assert machine.revision() == commit + '+'
    (tmp_path / 'new.py').unlink()
    (tmp_path / 'a.py').write_text('2')
    assert machine.revision() == commit + '+'


def test_devices():
    assert machine.choose('cpu') == CPU
    for name in ('gpu', 'cuda:99', 'meta'):
        with pytest.raises(ValueError, match=f'--device {name}'):
            machine.choose(name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_on_a_gpu():
    device = torch.device('cuda', 0)
    peaks = measure(device, side=1024, size=2**26)
    modes = ('eager', 'graphed')
    for training in (True, False):
        case = BackboneCase('atto', (2, 64, 64), 'bf16', training, modes, peers=('densekit', 'timm', 'transformers'))
        record = case.measure(Settings(device, peaks, rounds=2, at_least=0.01))
        assert [row.get('error') for row in record['rows']] == [None] * len(record['rows'])
        eager = [row for row in record['rows'] if row['mode'] == 'eager']
        assert all(row['kernels'] > 50 and row['busy'] > 0 and row['peak_bytes'] > 0 for row in eager)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_depthwise_on_a_gpu():
    device = torch.device('cuda', 0)
    case = DepthwiseCase(2, 'bf16', ((96, 32, 32),))
    record = case.measure(Settings(device, measure(device, side=1024, size=2**26), rounds=2, at_least=0.001))
    assert [row.get('error') for row in record['rows']] == [None] * len(record['rows'])
    assert all(0 < min(row['rounds']) < 0.01 for row in record['rows'])  # seconds that the GPU worked: no host time
