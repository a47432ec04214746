"""Quotes what a run would buy, from the table, the journal and the files; without network."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from krea_dagster.engine.budget import CREDITS_PER_USD, Commitment
from krea_dagster.engine.images import ImageStore
from krea_dagster.engine.record import Record
from krea_dagster.errors import ConfigError
from krea_dagster.plugin.partitions import partitions_for
from krea_dagster.plugin.resource import KreaResource
from krea_dagster.prompts import DayPartitions, PlannedImage, PromptTable, plan_images
from krea_dagster.spend.quote import Quote, quote


@dataclass(frozen=True)
class Quoted:
    """A quote of whole partitions. ``waiting`` are those of days to come, which are left out."""

    quote: Quote
    partitions: Sequence[str]
    waiting: Sequence[str]


def quote_partitions(
    krea: KreaResource,
    table: PromptTable,
    partitions: Sequence[str] = (),
    *,
    credits_per_usd: float = CREDITS_PER_USD,
) -> Quoted:
    """Quote these partitions of the table, or all that a run would take.

    Makes no journal where there is none. Raises ConfigError, PromptTableError or JournalError.
    """
    in_table = table.partition_keys()
    known = set(in_table)
    if isinstance(table.partition_by, DayPartitions):
        known &= set(partitions_for(table, name="krea").get_partition_keys())
    if unknown := [key for key in partitions if key not in known]:
        shown = ", ".join(sorted(known)[:10]) + (", …" if len(known) > 10 else "")
        raise ConfigError(f"there is no partition {unknown[0]!r}; there are {shown or 'none'}")
    chosen = [key for key in in_table if key in (partitions or known)]
    rows = table.read(chosen).rows
    attempts = krea.attempts() if krea.has_journal() else {}
    quoted = quote_images(krea, tuple(plan_images(rows, attempts)), credits_per_usd=credits_per_usd)
    return Quoted(quoted, chosen, [key for key in in_table if key not in known])


def quote_images(
    krea: KreaResource,
    images: Sequence[PlannedImage],
    *,
    ask_again: Iterable[str] = (),
    credits_per_usd: float = CREDITS_PER_USD,
) -> Quote:
    """Quote these images. Makes no journal where there is none. Raises as ``quote_partitions``."""
    now = datetime.now(timezone.utc)
    records: dict[str, Record] = {}
    prices: dict[str, int] = {}
    day = Commitment()
    if krea.has_journal():
        with krea.open_journal() as journal:
            records = journal.records({image.request.request_key for image in images})
            prices = journal.highest_prices()
            day = journal.commitment(f"day:{now:%Y-%m-%d}")
    return quote(
        images,
        records,
        prices=prices,
        now=now,
        policy=krea.policy(ask_again),
        holds=ImageStore(krea.open_storage()).holds,
        caps=krea.caps(),
        day=day,
        credits_per_usd=credits_per_usd,
    )
