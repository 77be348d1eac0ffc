"""tools/report.py: what was asked for by name and cannot be done is an error, before the page is written."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from report_reader import Page

from densekit.models.mask_head import RleMaskHead
from densekit.predictor import run_lengths
from densekit.report.page import predictions
from densekit.report.page.charts import Line, line_chart
from densekit.report.page.run_folder import names_of
from densekit.report.page.scores import _health

pytestmark = pytest.mark.usefixtures('quick_mmengine')


@pytest.fixture
def run(tiny, tmp_path):
    """Makes a work folder with the config of a task and random weights, as far as they are wanted."""

    def make(task='det', weights=False, name='run', validated=()):
        folder = tmp_path / name
        (folder / '1/vis_data').mkdir(parents=True)
        cfg = Config.fromfile(getattr(tiny, task))
        (folder / '1/vis_data/config.py').write_text(cfg.pretty_text)
        logged = [{'iter': i, 'step': i, 'loss': 1 / i, 'lr': 0.1, 'time': 0.1} for i in (1, 2)]
        lines = [json.dumps(record) for record in [*logged, *validated]]
        (folder / '1/vis_data/scalars.json').write_text('\n'.join(lines) + '\n')
        if weights:
            torch.manual_seed(0)
            with DefaultScope.overwrite_default_scope(cfg.default_scope):
                model = MODELS.build(cfg.model)
                model.init_weights()
            torch.save({'state_dict': model.state_dict()}, folder / 'iter_2.pth')
        return folder

    return make


@pytest.fixture
def refused(tool, capsys):
    """Runs the tool, which has to leave an old page as it is."""

    def check(folder, *argv):
        page = Path(folder, 'report.html')
        page.write_text('old')
        assert tool('report', folder, *argv) == 2
        assert page.read_text() == 'old'
        said = capsys.readouterr().err
        assert 'Traceback' not in said
        return said

    return check


def test_what_is_asked_for_by_name_and_is_of_something_else(run, refused, tmp_path):
    det, seg = run(), run('seg', weights=True, name='other')
    assert 'No page is written, because this was asked for' in refused(det, '--checkpoint', seg / 'iter_2.pth')
    for content, said in (
        ('{"a": 1}', "is not COCO's file of results"),
        ('[{"image_id": 1}]', "is not COCO's file of results"),
        ('[[1]]', "is not COCO's file of results"),
        ('[{"ima', 'is no JSON'),
    ):
        (tmp_path / 'found.json').write_text(content)
        assert f'{tmp_path}/found.json {said}' in refused(det, '--results', tmp_path / 'found.json')
    assert "give COCO's file of results" in refused(det, '--results', tmp_path)
    assert 'give a folder of label maps' in refused(seg, '--results', tmp_path / 'found.json')
    assert 'device gpu cannot be used' in refused(det, '--device', 'gpu')


def test_a_file_is_no_work_folder(tool, capsys, tmp_path):
    (tmp_path / 'mine.py').touch()
    assert tool('report', tmp_path / 'mine.py') == 2
    assert 'mine.py is a file; give the --work-dir' in capsys.readouterr().err


def test_a_page_without_an_evaluation_where_none_was_asked_for_by_name(tool, run):
    folder = run()
    assert tool('report', folder) == 0
    assert 'there is no checkpoint that could be evaluated' in (folder / 'report.html').read_text()


def test_torn_facts_are_evaluated_again(tool, run):
    folder = run(weights=True)
    assert tool('report', folder) == 0
    facts = folder / 'report/predictions.json'
    whole = facts.read_text()
    facts.write_text(whole[: len(whole) // 2])
    assert tool('report', folder) == 0
    assert facts.read_text() == whole
    assert 'It cannot be evaluated' not in (folder / 'report.html').read_text()


def test_masks_are_not_drawn_to_be_scored(tool, run, monkeypatch):
    """And the detections are to the byte those of drawn masks."""
    folder = run(weights=True)
    drawn = []
    stock = RleMaskHead._predict_by_feat_single

    def counted(self, *args, **kwargs):
        drawn.append(not self.run_lengths)
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(RleMaskHead, '_predict_by_feat_single', counted)
    found = []
    for switch in (run_lengths, lambda model: torch.no_grad()):
        monkeypatch.setattr(predictions, 'run_lengths', switch)
        assert tool('report', folder) == 0
        found.append((folder / 'report/detections.json').read_bytes())
        (folder / 'report/predictions.json').unlink()
    assert drawn == [False] * 3 + [True] * 3
    assert found[0] == found[1]
    assert any('segmentation' in row for row in json.loads(found[0]))


def test_validations_are_charted_in_percent_and_no_run_without_a_line_is_named(tool, run, tmp_path):
    validated = [{'coco/bbox_mAP': 0.25, 'step': 1}, {'coco/bbox_mAP': 0.5, 'step': 2}]
    folders = run(validated=validated), run(name='other')
    assert tool('report', *folders, '--images', 0, '--out', tmp_path / 'page.html') == 0
    made = Page((tmp_path / 'page.html').read_text())
    ys = np.array(made.charts['box AP (%)'].values('A'))[:, 1]
    np.testing.assert_allclose(ys, [25, 50], atol=0.5)
    assert made.tables['A: as logged'].column('coco/bbox_mAP') == {'1': 0.25, '2': 0.5}
    assert 'B: No validation was logged.' in made.sections['validation']
    chart = line_chart('t', [Line('one', [1, 2], [1, 2], 1), Line('two', [], [], 2)], 'x', 'y')
    legend = chart[chart.index('</svg>') :]
    assert 'one' in legend and 'two' not in legend


def test_names_of_folders(tmp_path):
    paths = [tmp_path / name for name in ('a/run', 'b/run', 'c')]
    assert names_of(paths[:1]) == ['run']
    assert names_of(paths[:2]) == ['a/run', 'b/run']
    assert names_of([paths[0], paths[2]]) == ['run', 'c']
    assert names_of([paths[0], paths[0]]) == ['run (1)', 'run (2)']


@pytest.mark.parametrize(('problems', 'said'), [(['a'], '1 remark of'), (['a', 'b'], '2 remarks of')])
def test_remarks_are_counted_in_good_english(problems, said):
    names = ('num_images', 'num_annotations', 'num_categories', 'images_without_annotations')
    health = {'summary': dict.fromkeys(names, 1), 'errors': problems, 'warnings': []}
    assert said in _health('run', SimpleNamespace(health=health))
