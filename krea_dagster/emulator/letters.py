"""Letters of every script that prompts use, drawn from two fonts of the package.

``letters.ttf`` has outlines of Latin, Greek, Cyrillic, Hebrew and Arabic, ``letters.xz`` bitmaps of
16 rows of the others and of emoji; ``letters.txt`` has their origins and licences. A text that
Pillow's own font covers is drawn in that. A letter in none of them is written as its code point.
"""

from __future__ import annotations

import functools
import io
import lzma
import struct
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Final, Protocol

from PIL import Image, ImageDraw, ImageFont

from krea_dagster.emulator.scripts import joined, visual

_ROWS: Final = 16
#: Rows of a bitmap above the baseline, and how high it is drawn, in sizes of the font.
_ABOVE: Final = 14
_HEIGHT: Final = 1.15
#: Bitmaps are enlarged by this, rounded off, and then brought to their size.
_ROUNDED: Final = 8

_Colour = tuple[int, int, int]


class Pen(Protocol):
    """Measures and draws text of one size."""

    def length(self, text: str) -> float:
        """Return the width of a text."""

    def draw(
        self, draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, fill: _Colour
    ) -> None:
        """Draw a line of text, whose upper left corner is at a place."""


def prepared(text: str) -> str:
    """Return a text as pens draw it: with composed and joined letters, in logical order."""
    if _is_plain(text):
        return text
    known = (
        letter if _is_drawn(letter) else f"U+{ord(letter):X}"
        for letter in joined(unicodedata.normalize("NFC", text))
    )
    return "".join(known)


def pen_for(text: str, size: int) -> Pen:
    """Return the pen for a prepared text."""
    return PlainPen(default_font(size)) if _is_plain(text) else ScriptPen(size)


@functools.lru_cache(maxsize=32)
def default_font(size: int) -> ImageFont.FreeTypeFont:
    """Return Pillow's own font."""
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType")  # noqa: TRY004 - not an argument
    # The basic layout needs no further library, and is the same on every machine.
    return font.font_variant(layout_engine=ImageFont.Layout.BASIC)


@dataclass(frozen=True)
class PlainPen:
    """Draws with one font."""

    font: ImageFont.FreeTypeFont

    def length(self, text: str) -> float:
        """Return the width of a text."""
        return self.font.getlength(text)

    def draw(
        self, draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, fill: _Colour
    ) -> None:
        """Draw a line of text."""
        draw.text(place, text, font=self.font, fill=fill)


@dataclass(frozen=True)
class ScriptPen:
    """Draws outlines where there are some, else bitmaps, from left to right."""

    size: int

    def length(self, text: str) -> float:
        """Return the width of a text."""
        return sum(self._advance(cluster) for cluster in visual(text))

    def draw(
        self, draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, fill: _Colour
    ) -> None:
        """Draw a line of text."""
        x, y = place
        font = _outlines(self.size)
        top = y + font.getmetrics()[0] - self._height * _ABOVE / _ROWS
        for cluster in visual(text):
            end = x + self._advance(cluster)
            if _is_outline(cluster[0]):
                draw.text((x, y), cluster, font=font, fill=fill)
            else:
                for mask in self._masks(cluster):
                    # A mark has the width of the letter that it is drawn over, or half of it.
                    draw.bitmap((round(end - mask.width), round(top)), mask, fill=fill)
            x = end

    @property
    def _height(self) -> int:
        return round(self.size * _HEIGHT)

    def _advance(self, cluster: str) -> float:
        if _is_outline(cluster[0]):
            return _outlines(self.size).getlength(cluster[0])
        return _mask(cluster[0], self._height).width

    def _masks(self, cluster: str) -> Iterator[Image.Image]:
        for letter in cluster:
            if letter in _bitmaps():
                yield _mask(letter, self._height)


@functools.cache
def _is_drawn(letter: str) -> bool:
    return letter == " " or _is_outline(letter) or letter in _bitmaps()


def _is_plain(text: str) -> bool:
    return text.isascii() or all(map(_in_default_font, text))


@functools.lru_cache(maxsize=4096)
def _in_default_font(letter: str) -> bool:
    return letter == " " or not _is_box(default_font(_ROWS), letter)


@functools.lru_cache(maxsize=4096)
def _is_outline(letter: str) -> bool:
    return letter == " " or not _is_box(_outlines(_ROWS), letter)


def _is_box(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    """Return whether a font has no such letter, and draws a box."""
    found, box = font.getmask(letter), font.getmask("\uffff")
    return found.size == box.size and bytes(found) == bytes(box)


@functools.lru_cache(maxsize=32)
def _outlines(size: int) -> ImageFont.FreeTypeFont:
    data = io.BytesIO(files(__package__).joinpath("letters.ttf").read_bytes())
    return ImageFont.truetype(data, size, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def _bitmaps() -> dict[str, bytes]:
    """Return the rows of each letter: 16 of one or two bytes.

    The file has the number of letters, their code points, their numbers of bytes, and the bytes.
    """
    data = lzma.decompress(files(__package__).joinpath("letters.xz").read_bytes())
    (count,) = struct.unpack_from("<I", data)
    codes = struct.unpack_from(f"<{count}I", data, 4)
    at = 4 + 5 * count
    found: dict[str, bytes] = {}
    for code, size in zip(codes, data[4 + 4 * count : at], strict=True):
        found[chr(code)] = data[at : at + size]
        at += size
    return found


@functools.lru_cache(maxsize=2048)
def _mask(letter: str, height: int) -> Image.Image:
    """Return the bitmap of a letter, rounded off, as an image of this height."""
    rows = _bitmaps()[letter]
    width = 8 * len(rows) // _ROWS
    small = Image.frombytes("1", (width, _ROWS), rows).convert("L")
    large = small.resize((width * _ROUNDED, _ROWS * _ROUNDED), Image.Resampling.BICUBIC)
    large = large.point([0] * 112 + [255] * 144)
    return large.resize((round(height * width / _ROWS), height), Image.Resampling.BOX)
