"""Writes a gallery: one HTML file with embedded thumbnails, to send to a colleague.

The page loads and runs nothing, which its Content-Security-Policy enforces. An image is shown only
where its file still has the manifest's hash; otherwise the page says what is wrong in its place.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any, BinaryIO, Final

import jinja2
from markupsafe import Markup, escape
from PIL import Image

from krea_dagster.curation.gallery.filter import GalleryRows
from krea_dagster.curation.measures.builtin import to_grey_or_rgb
from krea_dagster.curation.thumbnails import (
    LEAST_SIDE,
    SIDE,
    NoThumbnail,
    Thumbnails,
    decoded,
)
from krea_dagster.engine.record import PRUNED
from krea_dagster.engine.states import State
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.engine.verdict import NONE, Verdict
from krea_dagster.errors import ConfigError

#: The default for the longest side of a thumbnail, pixels, and for the size of a page.
THUMBNAIL: Final = 320
MOST_BYTES: Final = 25_000_000

_QUALITY: Final = 78
#: Thumbnails per batch of threads, and thumbnails from which the page's size is estimated.
_AT_ONCE: Final = 32
_SAMPLE: Final = 16
#: Bytes of text and markup per row.
_MARKUP_BYTES: Final = 1_200
#: Characters shown of a prompt that is not expanded, and of a text in place of an image.
_SHOWN: Final = 200
#: Characters of the prompt in an image's alternative text.
_ALT: Final = 150
#: The heading of the images of rows that were changed or removed.
_EARLIER: Final = "Earlier images"


@dataclass(frozen=True)
class Thumbnail:
    """A thumbnail as WebP and its size in pixels, or the problem why there is none."""

    data: bytes = b""
    width: int = 0
    height: int = 0
    problem: str = ""


@dataclass(frozen=True)
class GallerySummary:
    """Counts of rows of a gallery, and the bytes of the page.

    ``shown`` have an image, ``missing`` have none although it was stored, and ``left_out`` match
    the filter but did not fit on the page.
    """

    shown: int
    missing: int
    left_out: int
    size_bytes: int


@dataclass(frozen=True)
class Estimate:
    """The estimated bytes of a page, and the thumbnails that were made for it, by SHA-256."""

    size_bytes: int
    made: Mapping[str, Thumbnail]


def estimate(storage: Storage, rows: Sequence[dict[str, Any]], side: int = THUMBNAIL) -> Estimate:
    """Estimate the bytes of a page of these rows from a sample of their thumbnails."""
    stored = [row for row in rows if row["status"] == State.STORED.value]
    step = max(1, len(stored) // _SAMPLE)
    sample = [*_thumbnails(storage, stored[::step][:_SAMPLE], side, {})]
    mean = sum(len(one.data) for _, one in sample) / max(1, len(sample))
    size_bytes = round(len(stored) * mean * 4 / 3) + len(rows) * _MARKUP_BYTES
    return Estimate(size_bytes, {row["image_sha256"]: one for row, one in sample if one.data})


def write_gallery(
    storage: Storage,
    chosen: GalleryRows,
    target: BinaryIO,
    *,
    title: str = "Gallery",
    filter_text: str = "",
    side: int = THUMBNAIL,
    most_bytes: int = MOST_BYTES,
    now: datetime | None = None,
    made: Mapping[str, Thumbnail] = MappingProxyType({}),
    on_progress: Callable[[int], None] = lambda _: None,
) -> GallerySummary:
    """Write the page of these rows into an open file.

    Rows are added while the page stays below ``most_bytes``. ``filter_text`` describes the filter;
    ``made`` are those thumbnails of an ``Estimate``; ``on_progress`` gets the number of finished
    rows. Raises ConfigError where not even one row fits.
    """
    if not 32 <= side <= 1024:
        raise ConfigError(f"thumbnails must have 32 to 1024 pixels, not {side}")
    cards: list[dict[str, Any]] = []
    room = most_bytes - len(_style()) - 4 * _MARKUP_BYTES
    for row, thumbnail in _thumbnails(storage, chosen.rows, side, made):
        card = _card(row, thumbnail)
        room -= card.pop("bytes")
        if room < 0:
            break
        cards.append(card)
        on_progress(len(cards))
    if chosen.rows and not cards:
        raise ConfigError(f"a page of {most_bytes:,} bytes is too small for one image")
    shown = sum(1 for card in cards if card["image"])
    missing = sum(1 for card in cards if card["missing"])
    # A purchase that several rows share was paid once.
    paid = {card["request_key"]: card["credits"] or 0.0 for card in cards}
    at = (now or datetime.now(timezone.utc)).astimezone(timezone.utc)
    page = (
        _environment()
        .get_template("gallery.html.j2")
        .render(
            title=_readable(title),
            filter_text=_readable(filter_text),
            sections=_sections(cards),
            count=len(cards),
            shown=shown,
            missing=missing,
            left_out=chosen.matched - len(cards),
            credits=sum(paid.values()),
            written=f"{at.day} {at:%b %Y} at {at:%H:%M} UTC",
            style=Markup(_style()),  # noqa: S704 - the package's own file
            style_hash=base64.b64encode(hashlib.sha256(_style().encode()).digest()).decode(),
        )
        .encode()
    )
    target.write(page)
    return GallerySummary(shown, missing, chosen.matched - len(cards), len(page))


def _thumbnails(
    storage: Storage, rows: Sequence[dict[str, Any]], side: int, made: Mapping[str, Thumbnail]
) -> Iterator[tuple[dict[str, Any], Thumbnail]]:
    """Yield rows with their thumbnails, which are made in threads, in the order of the rows."""
    kept = Thumbnails(storage)

    def thumbnail(row: dict[str, Any]) -> Thumbnail:
        return made.get(row["image_sha256"]) or _thumbnail(storage, kept, row, side)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for first in range(0, len(rows), _AT_ONCE):
            part = rows[first : first + _AT_ONCE]
            yield from zip(part, pool.map(thumbnail, part), strict=True)


def _thumbnail(storage: Storage, kept: Thumbnails, row: dict[str, Any], side: int) -> Thumbnail:
    if row["status"] != State.STORED.value:
        state = [row["status"], row["error_code"], row["error_message"]]
        return Thumbnail(problem=_short(": ".join(_readable(text) for text in state if text)))
    if row["error_code"] == PRUNED:
        return Thumbnail(problem="The file was pruned.")
    if not row["image_path"]:
        return Thumbnail(problem="The manifest has no file name.")
    try:
        with storage.open(storage.name_of(row["image_path"])) as file:
            data = file.read()
    except FileNotFoundError:
        return Thumbnail(problem="The file is missing.")
    except OSError as error:
        return Thumbnail(problem=f"The file cannot be read: {type(error).__name__}.")
    if hashlib.sha256(data).hexdigest() != row["image_sha256"]:
        return Thumbnail(problem="The file is not the one that was verified.")
    try:
        return _thumbnail_of(_small(kept, row["image_sha256"], data, side), side)
    except NoThumbnail:
        return Thumbnail(problem="The file cannot be decoded.")


def _small(kept: Thumbnails, sha256: str, data: bytes, side: int) -> Image.Image:
    """Return the kept thumbnail where it is large enough, otherwise the image itself."""
    if (found := kept.find(sha256)) is not None:
        with suppress(NoThumbnail):  # it is damaged
            small = decoded(found, side)
            large_enough = side <= LEAST_SIDE or max(small.size) >= side
            return small if large_enough else decoded(data, side)
    image = decoded(data, max(side, SIDE))
    kept.add(sha256, image)
    return image


def _thumbnail_of(image: Image.Image, side: int) -> Thumbnail:
    small = to_grey_or_rgb(image)
    # Halved first, which is fast, and then filtered to the final size.
    small.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=1.5)
    buffer = io.BytesIO()
    small.convert("RGB").save(buffer, "WEBP", quality=_QUALITY, method=2)
    return Thumbnail(buffer.getvalue(), *small.size)


def _card(row: dict[str, Any], thumbnail: Thumbnail) -> dict[str, Any]:
    """Return the values of one row for the template; ``bytes`` is its estimated size."""
    prompt = _readable(row["prompt"] or "")
    start = prompt if len(prompt) <= _SHOWN else f"{prompt[:_SHOWN].rstrip()}…"
    section = "" if row["section"] is None else str(row["section"])
    alt = f"Image for the prompt: {prompt[:_ALT]}{'…' if len(prompt) > _ALT else ''}"
    image = base64.b64encode(thumbnail.data).decode()
    stored = row["status"] == State.STORED.value
    return {
        "image": image,
        "width": thumbnail.width,
        "height": thumbnail.height,
        "problem": thumbnail.problem,
        "missing": stored and not image and row["error_code"] != PRUNED,
        "alt": alt,
        "prompt": prompt,
        "start": start,
        "prompt_id": _readable(row["prompt_id"] or ""),
        "sample": row["sample"],
        "attempt": row["attempt"],
        "section": _EARLIER if row["earlier"] else _readable(section),
        "seed": row["seed"],
        "size": " ".join(one for one in (row["size"], row["quality"]) if one),
        "pixels": f"{row['width']} × {row['height']}" if row["width"] and row["height"] else "",
        "credits": row["credits_charged"],
        "request_key": row["request_key"] or "",
        "sha256": row["image_sha256"] or "",
        **_said(row["said"]),
        "bytes": len(image) + 3 * len(str(escape(prompt)).encode()) + _MARKUP_BYTES,
    }


def _said(one: Verdict | None) -> dict[str, Any]:
    """Return what a reviewer said of an image."""
    if one is None:
        return {"verdict": "", "reason": "", "tags": "", "note": ""}
    return {
        "verdict": "" if one.verdict == NONE else one.verdict,
        "reason": _readable(one.reason or ""),
        "tags": ", ".join(one.tags or ()),
        "note": _readable(one.note or ""),
    }


def _sections(cards: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the cards by section, in the order of each section's first; earlier images last."""
    found: dict[str, list[dict[str, Any]]] = {}
    for card in cards:
        found.setdefault(card["section"], []).append(card)
    return sorted(found.items(), key=lambda one: one[0] == _EARLIER)


def _readable(text: str) -> str:
    """Replace characters that HTML does not allow or that are invisible, such as NUL."""
    return "".join(
        one if one in "\n\t" or unicodedata.category(one) not in {"Cc", "Cs"} else "\ufffd"
        for one in text
    )


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _number(value: float) -> str:
    """Return a number with at most four decimals and without trailing zeros."""
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
