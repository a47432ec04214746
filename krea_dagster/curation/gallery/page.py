"""Writes a gallery: one HTML file with small pictures in it, to send to a colleague.

The page loads nothing and runs nothing, and says so to the browser by its Content-Security-Policy.
A picture is shown only where its file is still what was verified: the file's hash is that of the
manifest. What is missing or was changed is said in its place.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from importlib.resources import files
from itertools import groupby
from typing import Any, BinaryIO, Final

import jinja2
from markupsafe import Markup, escape
from PIL import Image

from krea_dagster.curation.gallery.filter import GalleryRows
from krea_dagster.curation.measures.builtin import to_grey_or_rgb
from krea_dagster.engine.states import State
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.engine.storage.verify import DAMAGED, FORMATS
from krea_dagster.errors import ConfigError

#: The longest side of a small picture, pixels, and the most bytes of a page.
THUMBNAIL: Final = 320
MOST_BYTES: Final = 25_000_000

_QUALITY: Final = 78
#: Pictures that are made at once, and those that the size of all is judged by.
_AT_ONCE: Final = 32
_SAMPLE: Final = 16
#: Bytes of a page beside its pictures, for each of them: text and markup.
_BESIDE: Final = 1_200
#: Characters of a prompt that are always shown, and of a text in place of a picture.
_SHOWN: Final = 200
#: Characters of a text for those who do not see the picture.
_ALT: Final = 150


@dataclass(frozen=True)
class Thumbnail:
    """A small picture: its bytes (WebP), and its size in pixels; or why there is none."""

    data: bytes = b""
    width: int = 0
    height: int = 0
    trouble: str = ""


@dataclass(frozen=True)
class GallerySummary:
    """What became of a gallery: counts of rows, and the bytes of the page.

    ``shown`` have their picture, ``missing`` have none though it was stored, and ``left_out``
    met the filtered and are not on the page for want of room.
    """

    shown: int
    missing: int
    left_out: int
    size_bytes: int


def estimate_bytes(storage: Storage, rows: Sequence[dict[str, Any]], side: int = THUMBNAIL) -> int:
    """About the bytes of a page of these rows, by a few of their pictures."""
    stored = [row for row in rows if row["status"] == State.STORED.value]
    step = max(1, len(stored) // _SAMPLE)
    some = [made.data for _, made in _made(storage, stored[::step][:_SAMPLE], side)]
    mean = sum(map(len, some)) / max(1, len(some))
    return round(len(stored) * mean * 4 / 3) + len(rows) * _BESIDE


def write_gallery(
    storage: Storage,
    chosen: GalleryRows,
    target: BinaryIO,
    *,
    title: str = "Gallery",
    filtered: str = "",
    side: int = THUMBNAIL,
    most_bytes: int = MOST_BYTES,
    now: datetime | None = None,
    on_made: Callable[[int], None] = lambda _: None,
) -> GallerySummary:
    """Write the page of these rows into an open file.

    Rows are taken while the page stays below ``most_bytes``. ``filtered`` says in words by what
    they were chosen, and ``on_made`` is told of every row that is done. Raises ConfigError where
    not even one picture fits.
    """
    if not 32 <= side <= 1024:
        raise ConfigError(f"the small pictures have 32 to 1024 pixels, not {side}")
    cards: list[dict[str, Any]] = []
    room = most_bytes - len(_style()) - 4 * _BESIDE
    for row, made in _made(storage, chosen.rows, side):
        card = _card(row, made)
        room -= card.pop("bytes")
        if room < 0:
            break
        cards.append(card)
        on_made(len(cards))
    if chosen.rows and not cards:
        raise ConfigError(f"a page of {most_bytes:,} bytes has no room for one picture")
    shown = sum(1 for card in cards if card["picture"])
    missing = sum(1 for card in cards if card["missing"])
    # Rows that share a purchase were paid for once.
    paid = {card["request_key"]: card["credits"] or 0.0 for card in cards}
    at = (now or datetime.now(timezone.utc)).astimezone(timezone.utc)
    page = (
        _environment()
        .get_template("gallery.html.j2")
        .render(
            title=_readable(title),
            filtered=_readable(filtered),
            groups=[
                (key, list(group)) for key, group in groupby(cards, lambda card: card["partition"])
            ],
            count=len(cards),
            shown=shown,
            missing=missing,
            left_out=chosen.matched - len(cards),
            credits=sum(paid.values()),
            written=f"{at.day} {at:%b %Y} at {at:%H:%M} UTC",
            style=Markup(_style()),  # noqa: S704 - a file of our own
            style_hash=base64.b64encode(hashlib.sha256(_style().encode()).digest()).decode(),
        )
        .encode()
    )
    target.write(page)
    return GallerySummary(shown, missing, chosen.matched - len(cards), len(page))


def _made(
    storage: Storage, rows: Sequence[dict[str, Any]], side: int
) -> Iterator[tuple[dict[str, Any], Thumbnail]]:
    """Make the small pictures, some at once, and yield them in the order of the rows."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for first in range(0, len(rows), _AT_ONCE):
            part = rows[first : first + _AT_ONCE]
            yield from zip(
                part, pool.map(lambda row: _thumbnail(storage, row, side), part), strict=True
            )


def _thumbnail(storage: Storage, row: dict[str, Any], side: int) -> Thumbnail:
    if row["status"] != State.STORED.value:
        said = [row["status"], row["error_code"], row["error_message"]]
        return Thumbnail(trouble=_short(": ".join(_readable(text) for text in said if text)))
    if not row["image_path"]:
        return Thumbnail(trouble="The manifest names no file.")
    try:
        with storage.open(storage.name_of(row["image_path"])) as file:
            data = file.read()
    except FileNotFoundError:
        return Thumbnail(trouble="The file is missing.")
    except OSError as error:
        return Thumbnail(trouble=f"The file cannot be read: {type(error).__name__}.")
    if hashlib.sha256(data).hexdigest() != row["image_sha256"]:
        return Thumbnail(trouble="The file is not the one that was verified.")
    try:
        return _small(data, side)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, *DAMAGED):
        return Thumbnail(trouble="The file cannot be decoded.")


def _small(data: bytes, side: int) -> Thumbnail:
    with Image.open(io.BytesIO(data), formats=tuple(FORMATS)) as image:
        image.draft("RGB", (side, side))  # a JPEG is decoded at a fraction of its size
        image.load()
        small = to_grey_or_rgb(image)
        # By halves first, which is quick, and what is left by a filter.
        small.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=1.5)
    buffer = io.BytesIO()
    small.convert("RGB").save(buffer, "WEBP", quality=_QUALITY, method=2)
    return Thumbnail(buffer.getvalue(), *small.size)


def _card(row: dict[str, Any], made: Thumbnail) -> dict[str, Any]:
    """What one row shows; ``bytes`` are about what it takes on the page."""
    prompt = _readable(row["prompt"] or "")
    start = prompt if len(prompt) <= _SHOWN else f"{prompt[:_SHOWN].rstrip()}…"
    alt = f"Image for the prompt: {prompt[:_ALT]}{'…' if len(prompt) > _ALT else ''}"
    picture = base64.b64encode(made.data).decode()
    stored = row["status"] == State.STORED.value
    return {
        "picture": picture,
        "width": made.width,
        "height": made.height,
        "trouble": made.trouble,
        "missing": stored and not picture,
        "alt": alt,
        "prompt": prompt,
        "start": start,
        "prompt_id": _readable(row["prompt_id"] or ""),
        "sample": row["sample"],
        "attempt": row["attempt"],
        "partition": _readable(row["partition_key"] or ""),
        "seed": row["seed"],
        "size": " ".join(one for one in (row["size"], row["quality"]) if one),
        "pixels": f"{row['width']} × {row['height']}" if row["width"] and row["height"] else "",
        "credits": row["credits_charged"],
        "request_key": row["request_key"] or "",
        "sha256": row["image_sha256"] or "",
        "verdict": row.get("verdict"),
        "bytes": len(picture) + 3 * len(str(escape(prompt)).encode()) + _BESIDE,
    }


def _readable(text: str) -> str:
    """A text without characters that HTML cannot hold or that nobody sees, such as NUL."""
    return "".join(
        one if one in "\n\t" or unicodedata.category(one) not in {"Cc", "Cs"} else "\ufffd"
        for one in text
    )


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _number(value: float) -> str:
    """A figure without zeros at its end, and with no more than four decimals."""
    return f"{value:,.4f}".rstrip("0").rstrip(".")


@cache
def _style() -> str:
    return _text("gallery.css")


def _text(name: str) -> str:
    return (files("krea_dagster.curation.gallery") / name).read_text("utf-8")


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_text),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    return environment
