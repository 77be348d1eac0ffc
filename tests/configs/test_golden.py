"""Resolved configs and layer-decay groups are those on file; `python tests/configs/golden.py` writes them anew."""

import difflib

import pytest
from golden import LAYER_DECAY, RESOLVED, entries, layer_decay_text, resolved_texts

HINT = 'if that was meant: python tests/configs/golden.py'


def difference(old: str, new: str) -> str:
    return '\n'.join(difflib.unified_diff(old.splitlines(), new.splitlines(), 'on file', 'now', n=0, lineterm=''))


@pytest.fixture(scope='module')
def texts():
    return resolved_texts()


def test_every_family_is_on_file(texts):
    assert set(texts) == {path.stem for path in RESOLVED.glob('*.txt')}, HINT


@pytest.mark.parametrize('path', sorted(RESOLVED.glob('*.txt')), ids=lambda path: path.stem)
def test_resolved_configs_are_those_on_file(path, texts):
    now = texts[path.stem]
    assert now == path.read_text(), f'{difference(path.read_text(), now)}\n{HINT}'


def test_layer_decay_groups_are_those_on_file():
    on_file, now = LAYER_DECAY.read_text(), layer_decay_text()
    assert now == on_file, f'{difference(on_file, now)}\n{HINT}'


def test_entries_tell_values_apart():
    assert entries({'a': {'b': [1, 2], 'c': ()}, 'd': [{'e': 'f'}]}) == {'a.b': '[1, 2]', 'a.c': '()', 'd.0.e': "'f'"}
    assert entries({'a': [(1, 2)]}) == {'a': '[(1, 2)]'}
    assert entries({'a': 1}) != entries({'a': '1'})
