"""Quotes what a run would buy, from the table, the journal and the files; without network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from operator import ne
from typing import Final

import numpy as np
import pyarrow as pa

from krea_dagster.application.backend import Backend
from krea_dagster.application.batch import Batch, has_begun
from krea_dagster.application.plan_state import PlanState
from krea_dagster.application.pruning import pruned_note, pruned_rows
from krea_dagster.digests import Mask, first_of_each
from krea_dagster.engine.budget import Caps, Commitment
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.record import Record
from krea_dagster.errors import ConfigError
from krea_dagster.prompts import PLAN_SCHEMA, PromptTable
from krea_dagster.prompts.trial import Trial, TrialRows
from krea_dagster.spend.quote import ImageGroup, Quote, QuoteLine, quote

_QUALITY: Final = PLAN_SCHEMA.get_field_index("quality")
_KEY: Final = PLAN_SCHEMA.get_field_index("request_key")


@dataclass(frozen=True)
class Quoted:
    """A quote of partitions. ``waiting`` are those that have not begun and are left out.

    ``trial`` are the rows that it is of, if it is not of all; ``notes`` say what is not a problem
    of the table and perhaps not expected. ``pruned`` rows have an image whose
    file was pruned, and is not bought again.
    """

    quote: Quote
    partitions: Sequence[str]
    waiting: Sequence[str]
    trial: TrialRows | None = None
    notes: Sequence[str] = ()
    pruned: int = 0

    @property
    def total(self) -> QuoteLine:
        """The sum over all partitions and qualities."""
        return self.quote.total


def quote_partitions(
    backend: Backend,
    table: PromptTable,
    partitions: Sequence[str] = (),
    *,
    trial: Trial | None = None,
) -> Quoted:
    """Quote these partitions of the table, or all that a run would take; or a trial of them.

    Creates no journal. Raises ConfigError, also if the journal has images of another origin,
    PromptTableError or JournalError.
    """
    backend.check_origin()
    table = table.pinned()
    in_table = table.partition_keys()
    now = datetime.now(timezone.utc)
    known = {key for key in in_table if has_begun(table, key, now)}
    if unknown := [key for key in partitions if key not in known]:
        shown = ", ".join(sorted(known)[:10]) + (", …" if len(known) > 10 else "")
        raise ConfigError(f"unknown partition {unknown[0]!r}; the partitions are {shown or 'none'}")
    chosen = [key for key in in_table if key in (partitions or known)]
    with Batch.read(table, chosen, backend, look=True, trial=trial) as batch:
        quoted = quote_images(backend, batch.state(backend))
        waiting = [key for key in in_table if key not in known]
        pruned = pruned_rows(backend, batch.plan.all_digests)
        notes = [*batch.notes, *([pruned_note(pruned)] if pruned else [])]
        return Quoted(quoted, chosen, waiting, batch.trial_rows, notes, pruned)


def quote_images(
    backend: Backend,
    state: PlanState,
    *,
    retry_errors: Iterable[str] = (),
) -> Quote:
    """Quote these images. Creates no journal. Raises as ``quote_partitions``."""
    now = datetime.now(timezone.utc)
    prices: dict[str, int] = {}
    with ExitStack() as stack:
        journal = None
        if backend.has_journal():
            journal = stack.enter_context(backend.open_journal())
            prices = journal.prices.highest()
        caps = backend.caps()
        return quote(
            _asked(state, journal, in_order=caps != Caps()),
            prices=prices,
            now=now,
            policy=backend.policy(retry_errors),
            holds=backend.open_storage().holds,
            caps=caps,
            committed=(lambda _: Commitment()) if journal is None else journal.commitment,
            credit_price=backend.credit_prices().on(now.date()),
            table_id=state.table_id,
        )


def _asked(state: PlanState, journal: Journal | None, *, in_order: bool) -> Iterator[ImageGroup]:
    """Yield the images grouped by state; ``in_order`` if there are caps."""
    plan = state.plan
    is_first = np.zeros_like(state.inside)
    is_first[state.inside] = first_of_each(state.digests[state.inside])[0]
    settled, seen, first, inside = map(
        state.by_partition, (state.settled, state.seen, is_first, state.inside)
    )
    for key in plan.keys:
        start = 0
        for batch in plan.batches(key) if inside[key].any() else ():
            here = start + np.flatnonzero(inside[key][start : start + batch.num_rows])
            asked = batch if len(here) == batch.num_rows else batch.take(pa.array(here - start))
            start += batch.num_rows
            yield from _of_batch(
                key,
                asked,
                settled=settled[key][here],
                seen=seen[key][here],
                first=first[key][here],
                journal=journal,
                in_order=in_order,
                scopes=state.scopes_of(asked),
            )


def _of_batch(
    key: str,
    batch: pa.RecordBatch,
    *,
    settled: Mask,
    seen: Mask,
    first: Mask,
    journal: Journal | None,
    in_order: bool,
    scopes: Sequence[tuple[str, ...]],
) -> Iterator[ImageGroup]:
    qualities = batch.column(_QUALITY).dictionary_encode()
    names = qualities.dictionary.to_pylist()
    numbers = np.asarray(qualities.indices.to_numpy(), np.int64)
    # Images that the journal knows and that are not settled are quoted one by one.
    alone = seen & ~settled
    records: Mapping[str, Record] = {}
    keys = batch.column(_KEY)
    if journal is not None and alone.any():
        records = journal.records(keys.filter(pa.array(alone)).unique().to_pylist())
    kinds = numbers * 3 + np.where(settled, 0, np.where(alone, 1, 2))
    order = np.arange(len(kinds)) if in_order else np.argsort(kinds, kind="stable")
    kinds = kinds[order]
    changes = (kinds[1:] != kinds[:-1]) | (kinds[1:] % 3 == 1)
    if scopes:  # then there are caps, and the images are in order
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
            intact=bool(settled[at]),
            scopes=scopes[at] if scopes else (),
        )
