"""Writes a gallery: one HTML file with thumbnails of selected images."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from krea_dagster.application.backend import Backend
from krea_dagster.application.curation import open_verdicts
from krea_dagster.application.earlier import earlier_images_of
from krea_dagster.curation.gallery.filter import GalleryFilter, select_rows
from krea_dagster.curation.gallery.page import GallerySummary, estimate, write_gallery
from krea_dagster.engine.storage.page import write_page
from krea_dagster.errors import ConfigError


def write(
    backend: Backend,
    output: Path,
    filters: GalleryFilter | None,
    *,
    title: str,
    side: int,
    most_bytes: int,
    on_selected: Callable[[int, int, int], None],
    on_progress: Callable[[int], None],
) -> GallerySummary:
    """Write the page; see ``Krea.gallery``."""
    filters, storage = filters or GalleryFilter(), backend.open_storage()
    with open_verdicts(backend) as log:
        verdicts = {} if log is None else log.annotated()
    if log is None and filters.verdicts:
        raise ConfigError(
            "there is no journal to read verdicts from; set KREA_JOURNAL_URL, or omit --verdict"
        )
    earlier = earlier_images_of(backend) if filters.earlier else None
    chosen = select_rows(storage, filters, verdicts, earlier=earlier)
    if not chosen.matched:
        raise ConfigError(
            "no row matches the filter. Remove a --where, --verdict or --partition, or use "
            "--status any"
        )
    expected = estimate(storage, chosen.rows, side)
    on_selected(len(chosen.rows), chosen.matched, min(expected.size_bytes, most_bytes))
    with tempfile.TemporaryFile() as page:
        written = write_gallery(
            storage,
            chosen,
            page,
            title=title,
            filter_text=filters.words(),
            side=side,
            most_bytes=most_bytes,
            made=expected.made,
            on_progress=on_progress,
        )
        page.seek(0)
        write_page(output, page.read(), "the gallery")
    return written
