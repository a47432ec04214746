"""Serves the review page of a project."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

from krea_dagster import redact
from krea_dagster.application.backend import Backend
from krea_dagster.curation.review.app import REASONS, Review, ReviewSettings
from krea_dagster.curation.review.server import serve
from krea_dagster.errors import ConfigError
from krea_dagster.uvicorn_server import listen


def review(
    backend: Backend,
    *,
    reviewer: str,
    port: int,
    token: str,
    reasons: Sequence[str],
    on_ready: Callable[[str, int], object],
) -> None:
    """Serve the page until it is interrupted; see ``Krea.review``."""
    if not backend.has_journal():
        raise ConfigError(
            "there is no journal, so there is nothing to review. Check that KREA_STORAGE and "
            "KREA_JOURNAL_URL are those of the runs, or run `krea-dagster materialize` first"
        )
    storage = backend.open_storage()
    try:
        listener = listen("127.0.0.1", port)
    except OSError as error:
        raise ConfigError(f"cannot listen on 127.0.0.1:{port}: {error}") from error
    with listener, backend.open_journal() as journal:
        settings = ReviewSettings(
            storage=storage,
            journal=journal,
            reviewer=reviewer,
            title=redact.location(storage.locate("")).rstrip("/"),
            reasons=reasons or REASONS,
        )
        page = Review(settings)
        serve(
            page,
            listener,
            token or secrets.token_urlsafe(24),
            on_ready=lambda address: on_ready(address, len(page)),
        )
