"""What a run is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from krea_dagster.models import ImageRequest


@dataclass(frozen=True)
class RequestedImage:
    """A request with the number of rows that share it.

    ``scopes`` are the budget scopes of its first row (``budget.column_scope``), in addition to
    those of its run, day, month and partition. ``callback_url`` is the row's own callback address.
    """

    request: ImageRequest
    partition_key: str
    rows: int = 1
    scopes: tuple[str, ...] = ()
    callback_url: str | None = None
