"""Quotes what a run would buy, from the table, the journal and the files; without network."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from operator import ne
from typing import Final

import numpy as np
import pyarrow as pa

from krea_dagster.application.batch import Batch, Standing
from krea_dagster.digests import Mask, first_of_each
from krea_dagster.engine.budget import CREDITS_PER_USD, Caps, Commitment
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.record import Record
from krea_dagster.engine.storage.images import ImageStore
from krea_dagster.errors import ConfigError
from krea_dagster.plugin.partitions import has_come
from krea_dagster.plugin.resource import KreaResource
from krea_dagster.prompts import PLAN_SCHEMA, PromptTable
from krea_dagster.spend.quote import ImageGroup, Quote, quote

_QUALITY: Final = PLAN_SCHEMA.get_field_index("quality")
_KEY: Final = PLAN_SCHEMA.get_field_index("request_key")


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
    now = datetime.now(timezone.utc)
    known = {key for key in in_table if has_come(table, key, now)}
    if unknown := [key for key in partitions if key not in known]:
        shown = ", ".join(sorted(known)[:10]) + (", …" if len(known) > 10 else "")
        raise ConfigError(f"there is no partition {unknown[0]!r}; there are {shown or 'none'}")
    chosen = [key for key in in_table if key in (partitions or known)]
    with Batch.read(table, chosen, krea, look=True) as batch:
        quoted = quote_images(krea, batch.standing(krea), credits_per_usd=credits_per_usd)
    return Quoted(quoted, chosen, [key for key in in_table if key not in known])


def quote_images(
    krea: KreaResource,
    standing: Standing,
    *,
    ask_again: Iterable[str] = (),
    credits_per_usd: float = CREDITS_PER_USD,
) -> Quote:
    """Quote these images. Makes no journal where there is none. Raises as ``quote_partitions``."""
    now = datetime.now(timezone.utc)
    prices: dict[str, int] = {}
    with ExitStack() as stack:
        journal = None
        if krea.has_journal():
            journal = stack.enter_context(krea.open_journal())
            prices = journal.prices.highest()
        caps = krea.caps()
        return quote(
            _asked(standing, journal, in_order=caps != Caps()),
            prices=prices,
            now=now,
            policy=krea.policy(ask_again),
            holds=ImageStore(krea.open_storage()).holds,
            caps=caps,
            committed=(lambda _: Commitment()) if journal is None else journal.commitment,
            credits_per_usd=credits_per_usd,
            table_id=standing.table_id,
        )


def _asked(standing: Standing, journal: Journal | None, *, in_order: bool) -> Iterator[ImageGroup]:
    """Yield the images by how they stand, thousands at once; ``in_order`` where caps bind."""
    plan = standing.plan
    whole = standing.by_partition(standing.done)
    seen = standing.by_partition(standing.seen)
    first = standing.by_partition(first_of_each(standing.digests)[0])
    for key in plan.keys:
        start = 0
        for batch in plan.batches(key):
            here = slice(start, start + batch.num_rows)
            start += batch.num_rows
            yield from _of_batch(
                key,
                batch,
                whole=whole[key][here],
                seen=seen[key][here],
                first=first[key][here],
                journal=journal,
                in_order=in_order,
                scopes=standing.scopes_of(batch),
            )


def _of_batch(
    key: str,
    batch: pa.RecordBatch,
    *,
    whole: Mask,
    seen: Mask,
    first: Mask,
    journal: Journal | None,
    in_order: bool,
    scopes: Sequence[tuple[str, ...]],
) -> Iterator[ImageGroup]:
    qualities = batch.column(_QUALITY).dictionary_encode()
    names = qualities.dictionary.to_pylist()
    numbers = np.asarray(qualities.indices.to_numpy(), np.int64)
    # Those that the journal knows, and that are not done, are looked at one by one.
    alone = seen & ~whole
    records: Mapping[str, Record] = {}
    keys = batch.column(_KEY)
    if journal is not None and alone.any():
        records = journal.records(keys.filter(pa.array(alone)).unique().to_pylist())
    kinds = numbers * 3 + np.where(whole, 0, np.where(alone, 1, 2))
    order = np.arange(len(kinds)) if in_order else np.argsort(kinds, kind="stable")
    kinds = kinds[order]
    changes = (kinds[1:] != kinds[:-1]) | (kinds[1:] % 3 == 1)
    if scopes:  # then caps bind, and the images are in their order
        changes |= np.fromiter(map(ne, scopes[1:], scopes), np.bool_, len(changes))
    breaks = np.flatnonzero(changes) + 1
    for places in np.split(order, breaks) if len(order) else ():
        at = int(places[0])
        yield ImageGroup(
            key,
            names[numbers[at]],
            rows=len(places),
            requests=int(first[places].sum()),
            record=records.get(keys[at].as_py()) if alone[at] else None,
            intact=bool(whole[at]),
            scopes=scopes[at] if scopes else (),
        )
