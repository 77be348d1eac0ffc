"""Files are written whole or not at all."""

import pytest

from densekit.files import draft_of, whole_file, write_whole


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / 'made/a.json'
    write_whole(path, 'old')
    with whole_file(path) as draft:
        draft.write_text('new')
        assert path.read_text() == 'old'
        assert draft.parent == path.parent and draft.suffix == '.json' and draft.name.startswith('.')
    assert path.read_text() == 'new'
    assert list(path.parent.iterdir()) == [path]
    assert draft_of(path) != draft_of(path)


@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
def test_nothing_is_left_of_what_fails(tmp_path, error):
    path = tmp_path / 'a.json'
    path.write_text('old')
    with pytest.raises(error), whole_file(path) as draft:
        draft.write_text('ne')
        raise error
    assert path.read_text() == 'old'
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_refused_first(tmp_path):
    with pytest.raises(IsADirectoryError, match='is a folder; give the name of a file'):
        write_whole(tmp_path, 'text')
    assert list(tmp_path.iterdir()) == []
