"""Files that are written whole or not at all."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def draft_of(path: str | os.PathLike) -> Path:
    """A name of its own for what is to become a file: in the same folder, hidden, with the same suffix."""
    return Path(path).with_name(f'.{uuid.uuid4().hex}-{Path(path).name}')


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A draft to write to, which takes the place of a file if no error comes; else nothing is left of it.

    Whoever reads the file meanwhile sees the old one or the new one, never a part. Its folder is made if missing.

    Args:
        path: of the file.

    Raises:
        IsADirectoryError: if it is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f'{path} is a folder; give the name of a file')
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = draft_of(path)
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Writes a text file, in UTF-8, as :func:`whole_file` does."""
    with whole_file(path) as draft:
        draft.write_text(text, encoding='utf-8')
