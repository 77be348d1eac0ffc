"""The metafiles: an entry for every recipe, its figures recounted, and README's table made from them."""

import ast
import functools
import re
from pathlib import Path

import mmdet
import mmseg
import pytest
import yaml
from recipes import CONFIGS, RECIPES, config_of

from densekit.report import recipes_table
from densekit.report.analysis import analyze
from densekit.report.metafile import METAFILE, find_recipe, read_metafile

ROOT = CONFIGS.parent
METAFILES = sorted(CONFIGS.glob(f'*/{METAFILE}'))

# Millions of parameters and GFLOPs as tables 3 and 4 of arXiv 2201.03545 print them.
V1 = {
    'detection/mask_rcnn_convnext_t_coco': (48, 262),
    'detection/cascade_convnext_t_coco': (86, 741),
    'detection/cascade_convnext_s_coco': (108, 827),
    'detection/cascade_convnext_b_coco': (146, 964),
    'detection/cascade_convnext_b_in22k_coco': (146, 964),
    'detection/cascade_convnext_l_in22k_coco': (255, 1354),
    'detection/cascade_convnext_xl_in22k_coco': (407, 1898),
    'segmentation/upernet_convnext_t_ade20k': (60, 939),
    'segmentation/upernet_convnext_s_ade20k': (82, 1027),
    'segmentation/upernet_convnext_b_ade20k': (122, 1170),
    'segmentation/upernet_convnext_b_in22k_640_ade20k': (122, 1828),
    'segmentation/upernet_convnext_l_in22k_640_ade20k': (235, 2458),
    'segmentation/upernet_convnext_xl_in22k_640_ade20k': (391, 3335),
}
# Other papers' figures hold the norms and activations as well, of which ResNets and Swin have more: up to 0.3 %.
OTHERS_HOLD = 0.003
# How a docstring puts what to expect.
EXPECTED = {
    'box AP': r'box AP (\d+\.\d)',
    'mask AP': r'mask AP (\d+\.\d)',
    'PQ': r'PQ (\d+\.\d)',
    'mIoU': r'mIoU (\d+\.\d++)(?!, probably)',
    'multi-scale mIoU': r'(\d+\.\d+) multi-scale',
    'mIoU at one scale or several': r'mIoU (\d+\.\d+), probably',
}
DATASETS = {'coco': 'COCO', 'ade20k': 'ADE20K', 'shapes': 'generated shapes'}


def stem(path):
    return path.relative_to(CONFIGS).with_suffix('').as_posix()


every_recipe = pytest.mark.parametrize('path', RECIPES, ids=stem)


@functools.cache
def counted(path):
    (analysis,) = analyze([str(path)])
    return analysis


def docstring(path):
    """In one line, and what of it is expected."""
    text = ' '.join(ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))).split())
    return text, text[text.index('Expected') :].partition('torchrun')[0]


def in_docstring(pattern, path):
    found = re.search(pattern, docstring(path)[1])
    return float(found[1]) if found else None


def assert_gflops(path, printed):
    difference = abs(counted(path)['multiply_adds'] / 1e9 - printed)
    assert difference <= (1 if 'convnext' in path.stem else OTHERS_HOLD * printed)


def test_every_recipe_has_an_entry_and_every_entry_a_recipe():
    entries = [file.parent / recipe.config for file in METAFILES for recipe in read_metafile(file)]
    assert sorted(entries) == RECIPES
    assert len(V1) == 13 and {stem(path) for path in entries} >= set(V1)


@pytest.mark.parametrize('name', V1)
def test_v1_counts_as_printed(name):
    path = CONFIGS / f'{name}.py'
    parameters, gflops = V1[name]
    paper = find_recipe(path).paper
    assert (paper.parameters, paper.gflops) == (parameters, gflops)
    assert round(counted(path)['parameters'] / 1e6) == parameters
    assert abs(counted(path)['multiply_adds'] / 1e9 - gflops) <= 1
    assert counted(path)['multiply_adds_of_attention'] == 0
    assert counted(path)['paper']['gflops'] == gflops


@every_recipe
def test_every_recipe_is_counted_wholly(path):
    analysis = counted(path)
    assert analysis['multiply_adds'] > 0 and analysis['not_counted'] is None
    has_auxiliary_head = 'auxiliary_head' in config_of(path).model
    assert (analysis['parameters'] > analysis['parameters_without_auxiliary_head']) == has_auxiliary_head


@every_recipe
def test_counts_are_those_of_paper_and_docstring(path):
    paper = find_recipe(path).paper
    parameters, gflops = in_docstring(r'(\d+) M parameters', path), in_docstring(r'(\d+) GFLOPs', path)
    if paper is not None:
        assert (paper.parameters, paper.gflops) == (parameters, gflops)
    if parameters is not None:
        assert round(counted(path)['parameters'] / 1e6) == parameters
    if gflops is not None:
        assert_gflops(path, gflops)


@every_recipe
def test_metrics_and_table_are_those_of_the_docstring(path):
    recipe, (text, expected) = find_recipe(path), docstring(path)
    values = {name: in_docstring(pattern, path) for name, pattern in EXPECTED.items()}
    known = recipe.paper or recipe.ours or ('published' in expected and recipe.zoo)
    assert {name: value for name, value in values.items() if value is not None} == (known.metrics if known else {})
    assert ('Not from a paper' in text) == (recipe.paper is None)
    assert ('not run' in expected) == (recipe.ours is None)
    if recipe.paper is not None:
        arxiv, table = recipe.paper.table.split(', ')
        assert f'{table} of {arxiv}' in text
    if recipe.ours is not None:
        assert recipe.ours.source in expected and (ROOT / recipe.ours.source).is_file()


@every_recipe
def test_weights_data_and_schedule_are_those_of_the_config(path):
    recipe, cfg = find_recipe(path), config_of(path)
    init_cfg = cfg.model.backbone.get('init_cfg') or {}
    assert recipe.weights == (init_cfg['checkpoint'] if init_cfg.get('type') == 'Pretrained' else None)
    assert recipe.dataset.startswith(DATASETS[path.stem.rsplit('_', 1)[1]])
    number, unit = re.fullmatch(r'(\d+)(x|k| epochs| iterations)', recipe.schedule).groups()
    trained = int(number) * {'x': 12, 'k': 1000}.get(unit, 1)
    if unit == ' epochs' and 'max_epochs' not in cfg.train_cfg:  # by iterations, in batches of COCO's 118,000
        trained = round(trained * 118_000 / cfg.auto_scale_lr.base_batch_size)
    assert trained == cfg.train_cfg.get('max_epochs', cfg.train_cfg.get('max_iters'))


@functools.cache
def zoo_index(file):
    return yaml.safe_load(file.read_text(encoding='utf-8'))


def zoo_metrics(package, model):
    """Of the package's own model index."""
    metrics = {}
    for file in (Path(package.__file__).parent / '.mim/configs').glob('*/metafile.y*ml'):
        if f'Name: {model}\n' not in file.read_text(encoding='utf-8'):
            continue
        document = zoo_index(file)
        for entry in document['Models'] if isinstance(document, dict) else document:
            if entry['Name'] == model:
                results = entry['Results'] if isinstance(entry['Results'], list) else [entry['Results']]
                metrics.update({name: value for result in results for name, value in result['Metrics'].items()})
    return {{'mIoU(ms+flip)': 'multi-scale mIoU'}.get(name, name): value for name, value in metrics.items()}


def test_figures_of_the_zoos_are_those_of_their_model_index():
    zoos = [recipe.zoo for file in METAFILES for recipe in read_metafile(file) if recipe.zoo]
    indexed = [zoo for zoo in zoos if not zoo.model.startswith('projects/')]  # those are in no index
    assert len(indexed) >= 9
    for zoo in indexed:
        assert zoo.metrics == zoo_metrics({'mmdet': mmdet, 'mmseg': mmseg}[zoo.package], zoo.model)


def test_readme_has_the_table_of_the_metafiles():
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    table = recipes_table.recipes_table(ROOT)
    assert readme == recipes_table.with_table(readme, table), 'run python -m densekit.report.recipes_table'
    assert len(table.splitlines()) == 2 + len(RECIPES)
    assert (
        '| `configs/detection/cascade_convnext_t_coco.py` | COCO, 3x | 86 | 741 | box AP 50.4, mask AP 43.7 |' in table
    )


def test_command_writes_the_table_and_nothing_else(tmp_path, monkeypatch, capsys):
    (tmp_path / 'configs/detection').mkdir(parents=True)
    (tmp_path / 'configs/detection' / METAFILE).write_text('recipes: []\n')
    readme = tmp_path / 'README.md'
    readme.write_text(f'before\n{recipes_table.BEGIN}\nold\n{recipes_table.END}\nafter\n')
    monkeypatch.setattr(recipes_table, 'ROOT', tmp_path)
    assert recipes_table.main() == 0
    begin, header, _, end = readme.read_text().splitlines()[1:-1]
    assert (begin, end) == (recipes_table.BEGIN, recipes_table.END) and header.startswith('| recipe |')
    assert readme.read_text().startswith('before\n') and readme.read_text().endswith('\nafter\n')
    readme.write_text(f'before\n{recipes_table.END}\n')
    assert recipes_table.main() == 2
    assert 'two lines' in capsys.readouterr().err
    assert readme.read_text() == f'before\n{recipes_table.END}\n'


ENTRY = {
    'config': 'x.py',
    'task': 'instance segmentation',
    'dataset': 'COCO',
    'schedule': '3x',
    'weights': None,
    'paper': {'table': 'arXiv 1, Table 1', 'parameters': 1, 'gflops': None, 'metrics': {'box AP': 50.0}},
    'zoo': {'package': 'mmdet', 'model': 'x', 'metrics': {'box AP': 50.0}},
    'ours': {'source': 'benchmarks/x.md', 'metrics': {'box AP': 50.0}},
}
PLACES = [(), ('paper',), ('zoo',), ('ours',)]
FIELDS = [(*place, field) for place in PLACES for field in functools.reduce(dict.__getitem__, place, ENTRY)]


def read(tmp_path, *entries):
    path = tmp_path / METAFILE
    path.write_text(yaml.safe_dump({'recipes': list(entries)}))
    return read_metafile(path)


def changed(place, change):
    entry = yaml.safe_load(yaml.safe_dump(ENTRY))
    change(functools.reduce(dict.__getitem__, place, entry))
    return entry


def test_a_whole_entry_is_read(tmp_path):
    (recipe,) = read(tmp_path, ENTRY)
    assert recipe.paper.metrics == {'box AP': 50.0} and recipe.ours.source == 'benchmarks/x.md'
    (recipe,) = read(tmp_path, {**ENTRY, 'paper': None, 'zoo': None, 'ours': 'not run'})
    assert (recipe.paper, recipe.zoo, recipe.ours) == (None, None, None)


@pytest.mark.parametrize('field', FIELDS, ids='.'.join)
def test_a_missing_field_is_refused(field, tmp_path):
    *place, name = field
    with pytest.raises(ValueError, match=f'lacks {name}'):
        read(tmp_path, changed(place, lambda node: node.pop(name)))


@pytest.mark.parametrize('place', PLACES)
def test_an_unknown_field_is_refused(place, tmp_path):
    with pytest.raises(ValueError, match='unknown papre'):
        read(tmp_path, changed(place, lambda node: node.update(papre=1)))


@pytest.mark.parametrize(
    ('entries', 'message'),
    [
        ([{**ENTRY, 'ours': None}], 'ours is None'),
        ([{**ENTRY, 'ours': 'not runn'}], 'not runn'),
        ([changed(('zoo',), lambda zoo: zoo.update(metrics={}))], 'metrics is {}'),
        ([changed(('zoo', 'metrics'), lambda metrics: metrics.update({'boxAP': 50.0}))], 'boxAP'),
        ([changed(('zoo', 'metrics'), lambda metrics: metrics.update({'box AP': '50.0'}))], 'no metric'),
        ([ENTRY, ENTRY], r'more than one entry for x\.py'),
    ],
)
def test_a_wrong_entry_is_refused(entries, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, *entries)
