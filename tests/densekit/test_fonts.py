"""Names of classes in scripts that Pillow's own typeface does not have."""

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import ImageFont

from densekit.report import fonts
from densekit.report.fonts import font, readable
from densekit.report.pictures import draw_instances, draw_label_map

CLASSES = ('cat', '猫', 'Straße')
UNKNOWN = '\U000fffff'  # of no script


@pytest.fixture(autouse=True)
def said(monkeypatch):
    """What is said; nothing is remembered from another test."""
    cached = (fonts.font, fonts.readable, fonts._file, fonts._files, fonts._characters)
    messages = []
    monkeypatch.setattr('mmengine.logging.print_log', lambda text, **_: messages.append(text))
    for function in cached:
        function.cache_clear()
    yield messages
    monkeypatch.undo()
    for function in cached:
        function.cache_clear()


def fonts_of_the_machine(monkeypatch, *paths):
    monkeypatch.setattr('matplotlib.font_manager.findSystemFonts', lambda: list(map(str, paths)))


def pixels(typeface, text):
    mask = typeface.getmask(text)
    return np.array(mask).reshape(mask.size[::-1])


def font_file(path, characters):
    """A font whose characters are all a triangle."""
    pen = TTGlyphPen(None)
    for place, move in zip([(0, 0), (800, 0), (400, 800)], [pen.moveTo, pen.lineTo, pen.lineTo], strict=True):
        move(place)
    pen.closePath()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder(['.notdef', 'triangle'])
    builder.setupCharacterMap({ord(character): 'triangle' for character in characters})
    builder.setupGlyf({'.notdef': TTGlyphPen(None).glyph(), 'triangle': pen.glyph()})
    builder.setupHorizontalMetrics({'.notdef': (800, 0), 'triangle': (800, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({'familyName': path.stem, 'styleName': 'Regular'})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


@pytest.mark.parametrize('text', ['Straße', 'Ω', 'Müll', 'Ж', 'é'])
def test_letters_beyond_ascii_are_drawn(monkeypatch, text):
    fonts_of_the_machine(monkeypatch)  # with what is installed beside Python alone
    for character in text:
        for typeface, there in ((font(20, text), True), (ImageFont.load_default(20), character.isascii())):
            same = np.array_equal(pixels(typeface, character), pixels(typeface, UNKNOWN))
            assert same is not there
    assert readable((text,)) == (text,)


def test_ascii_keeps_pillows_typeface(monkeypatch):
    monkeypatch.setattr(fonts, '_files', None)  # nothing is searched
    np.testing.assert_array_equal(pixels(font(20, 'cat 0.9'), 'cat 0.9'), pixels(ImageFont.load_default(20), 'cat 0.9'))
    assert readable(('cat', 'a b')) == ('cat', 'a b')


def test_a_font_of_the_machine_is_found(monkeypatch, tmp_path, said):
    other = font_file(tmp_path / 'Other-Regular.ttf', '犬 0.')
    broken = tmp_path / 'Broken-Regular.ttf'
    broken.write_bytes(b'no font')
    right = font_file(tmp_path / 'Right.ttf', '猫犬 0.')
    fonts_of_the_machine(monkeypatch, right, broken, other)
    assert readable(CLASSES) == CLASSES and not said
    assert font(20, '猫 0').path == str(right)
    assert font(20, '犬 0').path == str(other)  # one of regular weight comes first
    assert (pixels(font(20, '猫'), '猫') > 0).sum() > 40


def picture(names):
    image = np.full((200, 300, 3), 90, np.uint8)
    box = np.array([[100, 60, 250, 150]])
    return draw_instances(image, boxes=box, labels=np.array([1]), classes=names, palette=[(200, 80, 40)] * 3)


def test_numbers_take_the_place_of_names_without_a_font(monkeypatch, said):
    fonts_of_the_machine(monkeypatch)
    assert readable(CLASSES) == ('cat', 'class 1', 'Straße')
    np.testing.assert_array_equal(picture(list(CLASSES)), picture(['', 'class 1', '']))
    labels = np.ones((200, 300), np.uint8)
    style = {'palette': [(200, 80, 40)] * 3}
    image = np.zeros((200, 300, 3), np.uint8)
    mapped = draw_label_map(image, labels, classes=list(CLASSES), **style)
    np.testing.assert_array_equal(mapped, draw_label_map(image, labels, classes=['', 'class 1', ''], **style))
    (message,) = said  # once, for three pictures
    assert message.startswith('No font of this machine has the characters of 猫: pictures show numbers')
    assert 'fonts-noto-cjk' in message
