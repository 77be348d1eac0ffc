"""Typefaces for the names in pictures, in whatever script they are."""

import logging
from functools import cache, lru_cache
from pathlib import Path

from PIL import ImageFont


@lru_cache(maxsize=256)
def font(size: int, text: str = '') -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A typeface, ``size`` pixels high, that has the characters of a text.

    Pillow's own has those of ASCII alone. Others come from DejaVu, which matplotlib brings, or else from a font of this
    machine; where none has them all, the text gets DejaVu's sign for an unknown character.
    """
    if text.isascii():
        return ImageFont.load_default(size)
    return ImageFont.truetype(_file(frozenset(text)) or _dejavu(), size)


@lru_cache(maxsize=16)
def readable(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of classes as pictures can show them: as they are, or ``class 3`` where no font has the characters.

    Says once which those are.
    """
    lost = [name for name in names if not name.isascii() and _file(frozenset(name)) is None]
    if lost:
        from mmengine.logging import print_log  # late: pictures are to be had without it

        shown = ', '.join(lost[:5]) + (', ...' if len(lost) > 5 else '')
        print_log(
            f'No font of this machine has the characters of {shown}: pictures show numbers of classes instead of such '
            'names. Install a font that has them; on Debian, fonts-noto-cjk for Chinese, Japanese and Korean, '
            'fonts-noto-core for others',
            logger='current',
            level=logging.WARNING,
        )
    return tuple(f'class {label}' if name in lost else name for label, name in enumerate(names))


@lru_cache(maxsize=4096)
def _file(characters: frozenset[str]) -> str | None:
    """A font file that has all of some characters."""
    wanted = {ord(character) for character in characters if not character.isspace()}
    return next((path for path in _files() if wanted <= _characters(path)), None)


def _dejavu() -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path(), 'fonts/ttf/DejaVuSans.ttf'))


@lru_cache(maxsize=1)
def _files() -> tuple[str, ...]:
    """DejaVu, then the fonts of this machine: upright ones of regular weight first, without serifs."""
    from matplotlib.font_manager import findSystemFonts

    def rank(path: str) -> tuple[bool, bool, str]:
        name = Path(path).stem.lower()
        return 'regular' not in name, 'serif' in name or 'mono' in name, path

    return (_dejavu(), *sorted(findSystemFonts(), key=rank))


@cache
def _characters(path: str) -> frozenset[int]:
    """The characters that a font file has; none if it is of pictures in one size, or cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        face = FT2Font(path)
        return frozenset(face.get_charmap()) if face.scalable else frozenset()
    except (OSError, RuntimeError):
        return frozenset()
