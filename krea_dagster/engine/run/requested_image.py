"""What a run is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from krea_dagster.models import ImageRequest


@dataclass(frozen=True)
class BoughtFor:
    """The row that an image is bought for, and the number of what that row says of it.

    ``attribution_id`` is the number of its attributes in the journal, None for none.
    """

    prompt_id: str
    sample: int
    attribution_id: int | None = None

    def packed(self) -> str:
        """Return it as a short text: a run keeps one for each image that it is to buy."""
        return f"{self.sample}/{self.attribution_id or ''}/{self.prompt_id}"

    @classmethod
    def unpacked(cls, text: str) -> BoughtFor:
        """Return what ``packed`` has packed."""
        sample, number, prompt_id = text.split("/", 2)
        return cls(prompt_id, int(sample), int(number) if number else None)


@dataclass(frozen=True)
class RequestedImage:
    """A request with the number of rows that share it.

    ``scopes`` are the budget scopes of its first row (``budget.column_scope``), in addition to
    those of its run, day, month and partition. ``callback_url`` is the row's own callback address.
    ``row`` is its first row, which its purchase is attributed to, with its ``attributes`` as the
    journal keeps them.
    """

    request: ImageRequest
    partition_key: str
    rows: int = 1
    scopes: tuple[str, ...] = ()
    callback_url: str | None = None
    row: BoughtFor | None = None
    attributes: str | None = None
