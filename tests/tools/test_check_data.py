"""tools/check_data.py: what it prints, its exit status, its progress."""

import io
import json
from pathlib import Path

import pytest

from densekit.report.progress import ProgressBar

pytestmark = pytest.mark.usefixtures('quick_mmengine')


def spoiled(tiny, tmp_path, change) -> Path:
    """A config like the tiny detector's whose training annotations are changed."""
    content = json.loads((tiny.data / 'coco/annotations/instances_train.json').read_text())
    change(content)
    (tmp_path / 'train.json').write_text(json.dumps(content))
    dataset = f"dict(_delete_=True, type='CocoDataset', metainfo=dict(classes={tuple(_names(content))}), "
    dataset += f"ann_file='{tmp_path}/train.json', data_prefix=dict(img='{tiny.data}/coco/train/'), "
    dataset += "filter_cfg=dict(filter_empty_gt=True), pipeline=[dict(type='LoadImageFromFile')])"
    config = tmp_path / 'config.py'
    config.write_text(f"_base_ = '{tiny.det}'\ntrain_dataloader = dict(dataset={dataset})\n")
    return config


def _names(content: dict) -> list[str]:
    return [category['name'] for category in content['categories']]


@pytest.mark.parametrize('options', [[], ['--headers'], ['--decode']])
def test_clean_data(tool, capsys, tiny, options):
    for config in (tiny.det, tiny.seg):
        assert tool('check_data', config, *options) == 0
        shown = capsys.readouterr()
        assert 'No faults.' in shown.out
        assert 'train_dataloader: ' in shown.out and 'images 8' in shown.out
        assert shown.err.startswith(('reading ', 'train_dataloader: label maps: 8'))
        assert '\r' not in shown.err


def test_faults(tool, capsys, tiny, tmp_path):
    def change(content):
        images = [annotation['image_id'] for annotation in content['annotations']]
        for annotation in content['annotations'][:5]:
            annotation['category_id'] = 99
        flat = next(a for a in content['annotations'][5:] if images.count(a['image_id']) > 2)
        flat['bbox'][2] = 0

    config = spoiled(tiny, tmp_path, change)
    assert tool('check_data', config, '--json', tmp_path / 'out/faults.json') == 1
    shown = capsys.readouterr().out
    assert 'error, 5 x annotation-category-unknown' in shown
    assert f'{tmp_path}/train.json: annotation 1 of image 1: there is no category 99 in the file' in shown
    assert 'and 2 more' in shown
    table = shown[shown.index('severity') :].splitlines()
    assert table[2].split()[:3] == ['error', 'annotation-category-unknown', '5']
    assert table[3].split()[:3] == ['warning', 'box-no-area', '1']
    assert 'All 6 faults are in' in shown
    written = json.loads((tmp_path / 'out/faults.json').read_text())
    assert [fault['id'] for fault in written if fault['severity'] == 'error'] == [1, 2, 3, 4, 5]
    assert set(written[0]) == {'kind', 'file', 'id', 'text', 'severity'}


def test_options_change_the_config(tool, capsys, tiny):
    classes = 'train_dataloader.dataset.metainfo.classes=[circle,square,triangel,star,cross]'
    assert tool('check_data', tiny.det, '--cfg-options', classes) == 1
    assert "class 'triangel' of train_dataloader is no category; the nearest is 'triangle'" in capsys.readouterr().out


def test_wrong_usage(tool, capsys, tiny, tmp_path, command):
    assert tool('check_data', 'nothing.py') == 2
    assert 'config nothing.py does not exist' in capsys.readouterr().err
    assert tool('check_data', tiny.det, '--json', tmp_path) == 2
    assert f'--json {tmp_path} is a folder' in capsys.readouterr().err
    missing = f'train_dataloader.dataset.ann_file={tmp_path}/none.json'
    coco = spoiled(tiny, tmp_path, lambda content: None)
    assert tool('check_data', coco, '--cfg-options', missing) == 2
    assert f'{tmp_path}/none.json: no such file' in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        tool('check_data')
    assert ended.value.code == 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_on_a_terminal():
    stream = Terminal()
    bar = ProgressBar(stream)
    bar('reading a file', 0, 0)
    for done in (256, 512, 1024):
        bar('train: images', done, 1024)
    bar.clear()
    lines = stream.getvalue().split('\r')
    assert lines[1] == 'reading a file'
    assert [line[:46] for line in lines if 'images' in line] == [
        'train: images [#######.......................]',
        'train: images [###############...............]',
        'train: images [##############################]',
    ]
    assert '1,024 of 1,024, 0 s left' in stream.getvalue()
    assert stream.getvalue().endswith(' \r')
    assert '\n' not in stream.getvalue()


def test_lines_elsewhere():
    stream = io.StringIO()
    bar = ProgressBar(stream)
    bar('reading a file', 0, 0)
    for done in (256, 512, 1024):
        bar('train: images', done, 1024)
    bar.clear()
    assert stream.getvalue() == 'reading a file\ntrain: images: 1,024\n'
