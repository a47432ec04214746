"""Draw an image from a prompt and a seed: always the same one, of exactly the given size. Pure.

The image is an abstract landscape whose colours and shapes come from a hash of prompt and seed,
with the prompt written on it, so that a person sees which row a file belongs to.
"""

from __future__ import annotations

import colorsys
import hashlib
import io
import math
import random
import struct
import unicodedata
import zlib
from typing import Final

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from krea_dagster.emulator.letters import Pen, default_font, pen_for, prepared

_MAX_TEXT: Final = 600
#: Between letters of some scripts, and in emoji: nothing is drawn of them.
_JOINERS: Final = "\u200c\u200d\ufe0e\ufe0f"
_SMALL: Final = 4  # shapes are drawn at a quarter of the size and enlarged, which softens them


def render_png(prompt: str, seed: int, width: int, height: int) -> bytes:
    """Return the image as PNG bytes: the same ones for the same arguments."""
    return encode(render(prompt, seed, width, height), "PNG")


def encode(image: Image.Image, image_format: str) -> bytes:
    """Return an RGB image as PNG or JPEG bytes."""
    if image_format == "PNG":
        return _png(image)
    buffer = io.BytesIO()
    image.save(buffer, image_format, quality=88)
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """Return one chunk of a PNG file, with its length and checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(image: Image.Image) -> bytes:
    # Every row is stored as its difference from the row above. Pillow's writer tries each of
    # the five filters on each row, which takes twice as long and gains nothing here.
    above = ImageChops.offset(image, 0, 1)
    above.paste((0, 0, 0), (0, 0, image.width, 1))
    rows = ImageChops.subtract_modulo(image, above).tobytes()
    stride = image.width * 3
    filtered = b"".join(b"\x02" + rows[at : at + stride] for at in range(0, len(rows), stride))
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(filtered, 1))
        + png_chunk(b"IEND", b"")
    )


def render(prompt: str, seed: int, width: int, height: int) -> Image.Image:
    """Return the image of a prompt, RGB, ``width`` × ``height`` pixels."""
    key = f"{seed}\n{prompt}".encode("utf-8", "surrogatepass")
    source = random.Random(hashlib.sha256(key).digest())  # noqa: S311 - nothing secret
    image = _landscape(source, width, height)
    draw = ImageDraw.Draw(image)
    _write_prompt(draw, readable(prompt), width, height)
    _write_corner(draw, f"synthetic · seed {seed} · {width} x {height}", width, height)
    return image


def readable(prompt: str) -> str:
    """Return a prompt as one line that can be drawn: without control characters, shortened."""
    kept = []
    for character in prompt[: _MAX_TEXT * 4]:
        if character not in _JOINERS:
            category = unicodedata.category(character)
            kept.append(" " if category[0] in "CZ" else character)
    text = " ".join("".join(kept).split())
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"


# -- the landscape ----------------------------------------------------------------------------


def _colour(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _landscape(source: random.Random, width: int, height: int) -> Image.Image:
    w, h = math.ceil(width / _SMALL), math.ceil(height / _SMALL)
    hue = source.random()
    far = hue + source.uniform(0.08, 0.2) * source.choice((-1, 1))
    image = _sky(_colour(hue, 0.55, 0.62), _colour(far, 0.4, 0.98), w, h)
    draw = ImageDraw.Draw(image)

    radius = min(w, h) * source.uniform(0.09, 0.16)
    x, y = w * source.uniform(0.15, 0.85), h * source.uniform(0.14, 0.34)
    light = _colour(far + 0.05, 0.18, 1.0)
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=light)

    for _ in range(source.randint(2, 4)):
        cx, cy = w * source.random(), h * source.uniform(0.05, 0.45)
        cw, ch = w * source.uniform(0.15, 0.4), h * source.uniform(0.012, 0.03)
        draw.ellipse((cx - cw, cy - ch, cx + cw, cy + ch), fill=_colour(far, 0.22, 0.99))
    image = image.filter(ImageFilter.GaussianBlur(max(1.0, w / 160)))
    draw = ImageDraw.Draw(image)

    layers = source.randint(4, 6)
    for layer in range(layers):
        depth = layer / (layers - 1)
        colour = _colour(
            far + (hue - far) * depth + 0.05 * depth, 0.38 + 0.4 * depth, 0.86 - 0.62 * depth
        )
        draw.polygon(_hill(source, h * (0.42 + 0.42 * depth), w, h), fill=colour)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _sky(top: tuple[int, int, int], bottom: tuple[int, int, int], w: int, h: int) -> Image.Image:
    ramp = Image.linear_gradient("L").resize((w, h))
    return Image.composite(Image.new("RGB", (w, h), bottom), Image.new("RGB", (w, h), top), ramp)


def _hill(source: random.Random, base: float, w: int, h: int) -> list[tuple[float, float]]:
    """Return the outline of a hill whose crest is about ``base`` below the upper edge."""
    waves = [
        (h * source.uniform(0.02, 0.07) / n, n * source.uniform(0.6, 1.5), source.uniform(0, 7))
        for n in (1, 2, 4)
    ]
    points: list[tuple[float, float]] = [(0, h)]
    for x in range(0, w + 4, 4):
        turn = 2 * math.pi * x / w
        points.append((x, base + sum(a * math.sin(f * turn + p) for a, f, p in waves)))
    points.append((w + 4, h))
    return points


# -- the text ---------------------------------------------------------------------------------


def _write_prompt(draw: ImageDraw.ImageDraw, text: str, width: int, height: int) -> None:
    if not text:
        return
    text = prepared(text)
    room_w, room_h = width * 0.88, height * 0.5
    short = min(width, height)
    for share in (0.11, 0.09, 0.07, 0.055, 0.043, 0.034):
        size = round(short * share)
        pen = pen_for(text, size)
        lines = _wrap(text, pen, room_w)
        step = size * 1.25
        if len(lines) * step <= room_h:
            break
    else:
        lines = lines[: max(1, int(room_h / step))]
        lines[-1] = lines[-1][:-1] + "…"
    y = height * 0.9 - len(lines) * step
    offset = max(1, size // 24)
    for line in lines:
        pen.draw(draw, (width * 0.06 + offset, y + offset), line, (0, 0, 0))
        pen.draw(draw, (width * 0.06, y), line, (255, 255, 255))
        y += step


def _wrap(text: str, pen: Pen, room: float) -> list[str]:
    lines: list[str] = []
    line, used = "", 0.0
    space = pen.length(" ")
    for word in text.split(" "):
        for number, part in enumerate(_pieces(word, pen, room)):
            length = pen.length(part)
            between, gap = ("", 0.0) if number else (" ", space)
            if line and used + gap + length > room:
                lines.append(line)
                line, used = part, length
            elif line:
                line, used = f"{line}{between}{part}", used + gap + length
            else:
                line, used = part, length
    return [*lines, line]


def _pieces(word: str, pen: Pen, room: float) -> list[str]:
    length = pen.length(word)
    if length <= room:
        return [word]
    each = max(1, int(len(word) * room / length) - 1)
    return [word[start : start + each] for start in range(0, len(word), each)]


def _write_corner(draw: ImageDraw.ImageDraw, text: str, width: int, height: int) -> None:
    font = default_font(max(12, round(min(width, height) * 0.024)))
    place = (width * 0.94, height * 0.965)
    draw.text(place, text, font=font, fill=(235, 235, 235), anchor="rs")
