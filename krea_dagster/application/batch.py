"""What one run works on: the images that its partitions ask for, and which of them are done."""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from itertools import repeat
from typing import Final, TypeAlias

import numpy as np
import pyarrow as pa

from krea_dagster import redact
from krea_dagster.application import regenerate
from krea_dagster.application.callback_column import COLUMN, check_own_urls, own_urls
from krea_dagster.application.manifest_summary import Figures, watched
from krea_dagster.digests import Digests, Mask, first_of_each
from krea_dagster.engine.budget import column_scope
from krea_dagster.engine.journal.bulk_reads import (
    NO_KNOWN_REQUESTS,
    KnownRequests,
    all_known_requests,
    known_requests,
)
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.policy import REJECTED
from krea_dagster.engine.record import Record
from krea_dagster.engine.run.worklist import RequestedImage
from krea_dagster.engine.states import State
from krea_dagster.errors import ConfigError
from krea_dagster.manifest import manifest_parts, manifest_schema
from krea_dagster.plugin.config import KreaImagesConfig
from krea_dagster.plugin.resource import KreaResource
from krea_dagster.prompts import PLAN_SCHEMA, HashPartitions, Plan, PromptTable
from krea_dagster.prompts.requests import drawn_seed

#: States in which a request has come to its end: another image may be asked for.
_SETTLED: Final = frozenset({State.STORED, State.FAILED, State.REFUSED, State.EXPIRED})

#: The scopes of an image, and where its row wants its end told.
_Carried: TypeAlias = tuple[tuple[str, ...], str | None]


@dataclass(frozen=True)
class Batch:
    """The images that some partitions ask for, at their attempts. Must be closed.

    ``held`` are those that are not to be bought now, in the order of the plan; None for none.
    """

    table: PromptTable
    keys: Sequence[str] | None
    plan: Plan
    _ahead: "Future[KnownRequests | None] | None" = None
    held: Mask | None = None

    @classmethod
    def read(
        cls,
        table: PromptTable,
        keys: Sequence[str] | None,
        krea: KreaResource,
        *,
        to_buy: bool = False,
        keep: bool = True,
        look: bool = False,
    ) -> "Batch":
        """Read the partitions, or all, and where they are ``to_buy``, check that one can.

        In that order: a bad table makes nothing, not even a journal. ``keep`` as for
        ``PromptTable.plan``; ``look`` where the standing will be asked for. Raises
        PromptTableError, ConfigError or JournalError.
        """
        _return_memory()
        has_journal = krea.has_journal()
        krea.check_root()
        # A large table is compared with all that is stored, which is listed meanwhile: the one
        # is work for the processor, the other for the system.
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(_look_ahead, table, keys, krea) if has_journal and look else None
            plan = krea.plan(table, keys, keep=keep)
        try:
            if to_buy:
                krea.check()
        except BaseException:
            plan.close()
            raise
        return cls(table, keys, plan, ahead)

    def close(self) -> None:
        """Give back memory and disk."""
        self.plan.close()

    def __enter__(self) -> "Batch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask_again(self, config: KreaImagesConfig, krea: KreaResource, raised_by: str) -> "Batch":
        """Raise the attempts of the rows that a person wants another image of.

        ``raised_by`` is the root of the run and its re-executions, none of which asks again. A row
        whose last wish has not ended is continued, and not asked for once more. Raises
        ConfigError for a row whose seed the table fixes, unless ``config.new_seed``.
        """
        slots = self.wished(config, krea)
        if not slots:
            return self
        with krea.open_journal() as journal:
            ended = self._ended(journal, set(slots))
            journal.attempts(krea.table_id(journal, self.table, enter=True)).raise_attempts(
                slots,
                raised_by=raised_by,
                at=datetime.now(timezone.utc),
                settled=lambda slot, attempt: ended.get((*slot, attempt), False),
                draw=config.new_seed,
            )
        self.close()
        return replace(self, plan=krea.plan(self.table, self.keys))

    def wished(
        self, config: KreaImagesConfig, krea: KreaResource, *, all_rows: bool = False
    ) -> list[tuple[str, int]]:
        """Return the (prompt_id, sample) that a person wants another image of.

        Raises ConfigError for a row whose seed the table fixes, and for one that is not there:
        in this batch where it has ``all_rows`` that are meant, or else in the whole table.
        """
        if not config.again:
            return []
        wishes = regenerate.read(config.again)
        missing = wishes.without_row(self.plan)
        if missing and not all_rows and self.keys is not None:
            with krea.plan(self.table) as whole:
                missing = wishes.without_row(whole)
        if missing:
            raise ConfigError(f"no row has the prompt_id {missing[0]!r}; nothing was bought")
        if krea.has_journal():
            with krea.open_journal() as journal:
                slots = wishes.slots(self.plan, journal)
        else:
            slots = wishes.slots(self.plan, None)
        if not config.new_seed:
            self._refuse_fixed(slots)
        return slots

    def _refuse_fixed(self, slots: Sequence[tuple[str, int]]) -> None:
        """Refuse to buy the same image again: its seed is the table's."""
        names = {prompt_id for prompt_id, _ in slots}
        for image in self.plan.named(names):
            request = image.request
            slot = (image.prompt_id, image.sample)
            drawn = drawn_seed(image.prompt_id, image.sample, request.attempt)
            if slot in slots and request.seed != drawn:
                raise ConfigError(
                    f"row {image.prompt_id!r} has its seed in the prompt table, so that another "
                    "image of it would be the same one, paid for twice. Nothing was bought. Give "
                    "--new-seed (new_seed in the run config) to have a seed drawn, or change the "
                    "table."
                )

    def end_wishes(self, krea: KreaResource) -> None:
        """Note the wishes for images of this batch that a run has come to its end with."""
        with krea.open_journal() as journal:
            log = journal.attempts(krea.table_id(journal, self.table))
            ended = self._ended(journal, log.open_slots())
            if any(ended.values()):
                done = [slot for slot, has_ended in ended.items() if has_ended]
                log.close_slots(done, at=datetime.now(timezone.utc))

    def _ended(
        self, journal: Journal, slots: Collection[tuple[str, int]]
    ) -> dict[tuple[str, int, int], bool]:
        """Return of these slots, with the attempts that this batch has, whether they have ended."""
        keys = {
            (image.prompt_id, image.sample, image.request.attempt): image.request.request_key
            for image in self.plan.named({prompt_id for prompt_id, _ in slots})
            if (image.prompt_id, image.sample) in slots
        }
        known = journal.records(keys.values())
        return {slot: key in known and _has_ended(known[key]) for slot, key in keys.items()}

    @property
    def held_count(self) -> int:
        """How many images are not to be bought now."""
        return 0 if self.held is None else int(self.held.sum())

    def versions(self) -> Mapping[str, str]:
        """The data version of ``prompts``, by partition."""
        return self.plan.versions()

    def standing(self, krea: KreaResource) -> "Standing":
        """How the images stand in the journal and in the storage. Raises JournalError."""
        digests = self.plan.all_digests
        columns = krea.budget_columns()
        if missing := [name for name in columns if name not in self._columns]:
            raise ConfigError(
                f"a budget names the column {missing[0]!r}, and the prompt table has none of that "
                f"name; it has {', '.join(self._columns)}. Nothing was bought."
            )
        source = redact.location(self.table.source)
        check_own_urls(self.plan, source, private_allowed=krea.synthetic)
        if not krea.has_journal():
            return Standing(self.plan, NO_KNOWN_REQUESTS, columns, self.held)
        found = None if self._ahead is None else self._ahead.result()
        with krea.open_journal() as journal:
            if found is None:
                found = known_requests(journal, krea.open_storage(), digests)
            table_id = krea.table_id(journal, self.table)
        return Standing(self.plan, found, columns, self.held, table_id)

    def manifest_parts(
        self, key: str, krea: KreaResource, journal: Journal, run_id: str
    ) -> Iterator[pa.Table]:
        """The manifest of a partition as the journal has it now, part by part."""
        locate = krea.open_storage().locate
        return manifest_parts(self.plan, key, journal, locate=locate, run_id=run_id)

    def figures(self, krea: KreaResource, run_id: str) -> Iterator[tuple[str, Figures]]:
        """What the manifest of each partition adds up to, by key. Raises JournalError."""
        with krea.open_journal() as journal:
            for key in self.plan.keys:
                figures = Figures()
                parts = self.manifest_parts(key, krea, journal, run_id)
                for _ in watched(parts, self.plan.digests(key), figures):
                    pass
                yield key, figures

    @property
    def _columns(self) -> list[str]:
        """The columns of the plan, and the table's further ones."""
        return [*PLAN_SCHEMA.names, *self.plan.passthrough.names]

    @property
    def manifest_schema(self) -> pa.Schema:
        """The schema of the parts."""
        return manifest_schema(self.plan)


def _has_ended(record: Record) -> bool:
    """Whether a request has come to its end, so that another image may be asked for."""
    rejected = record.state is State.COMPLETED and record.error_code in REJECTED
    return record.state in _SETTLED or rejected


def _return_memory() -> None:
    """Have Arrow give its memory back to the system, unless somebody has chosen otherwise.

    Its own allocator keeps most of what a table took, for each thread: planning 50,000 rows then
    takes 100 MB more than it does with the system's, and no less time.
    """
    if "ARROW_DEFAULT_MEMORY_POOL" not in os.environ:
        pa.set_memory_pool(pa.system_memory_pool())


def _look_ahead(
    table: PromptTable, keys: Sequence[str] | None, krea: KreaResource
) -> KnownRequests | None:
    """Look at all that is stored, where the table seems to ask for much of it."""
    expected = table.row_count()
    if keys is not None and isinstance(table.partition_by, HashPartitions):
        expected = expected * len(keys) // table.partition_by.count
    with krea.open_journal() as journal:
        return all_known_requests(journal, krea.open_storage(), expected)


@dataclass(frozen=True)
class Standing:
    """How the images of a plan stand: which are stored and whole, and which are known at all.

    ``budget_columns`` are those whose values have a budget; ``held`` as in ``Batch``; ``table_id``
    is the prompt table's in the journal.
    """

    plan: Plan
    known: KnownRequests
    budget_columns: Sequence[str] = ()
    held: Mask | None = None
    table_id: str = ""

    @property
    def whole(self) -> Mask:
        """Which images are stored and whole: nothing is left to do for them."""
        return self._seen_and_whole[1]

    @property
    def done(self) -> Mask:
        """Which images a run has nothing to do for: those that are whole, and those held back."""
        return self.whole if self.held is None else self.whole | self.held

    @property
    def seen(self) -> Mask:
        """Which images ask for a request that the journal knows."""
        return self._seen_and_whole[0]

    @cached_property
    def _seen_and_whole(self) -> tuple[Mask, Mask]:
        return self.known.of(self.digests)

    def wanted(self) -> Iterator[RequestedImage]:
        """Yield each request that is not done once, in the order of the plan.

        What is in the journal, and not plainly done, is left to the runner to decide about.
        """
        open_ = np.flatnonzero(~self.done)
        first, counts = first_of_each(self.digests[open_])
        chosen = np.zeros(len(self.digests), np.bool_)
        chosen[open_[first]] = True
        masks = self.by_partition(chosen)
        requests = self.plan.requests(masks)
        carried: Iterable[_Carried] = repeat(((), None), len(counts[first]))
        if self.budget_columns or COLUMN in self.plan.passthrough.names:
            carried = self._carried(masks)
        for (request, partition_key), rows, (scopes, url) in zip(
            requests, counts[first], carried, strict=True
        ):
            yield RequestedImage(request, partition_key, int(rows), scopes, url)

    def _carried(self, masks: Mapping[str, Mask]) -> Iterator[_Carried]:
        """Yield what the table's further columns say of each masked image, in the plan's order."""
        calls = COLUMN in self.plan.passthrough.names
        for key in self.plan.keys:
            mask, start = masks[key], 0
            for batch in self.plan.batches(key) if mask.any() else ():
                chosen = batch.filter(pa.array(mask[start : start + batch.num_rows]))
                start += batch.num_rows
                nothing = repeat((), chosen.num_rows)
                scopes = self.scopes_of(chosen) if self.budget_columns else nothing
                urls = own_urls(chosen) if calls else repeat(None, chosen.num_rows)
                yield from zip(scopes, urls, strict=True)

    def scopes_of(self, images: pa.RecordBatch) -> Sequence[tuple[str, ...]]:
        """Return what each of these images counts for; nothing where no column has a budget."""
        names = images.schema.names
        columns = []
        for name in self.budget_columns:
            # The table's own columns come first, and may have a further one's name.
            texts = images.column(names.index(name)).cast(pa.string())
            values = texts.dictionary_encode()
            scopes = [column_scope(name, value) for value in values.dictionary.to_pylist()]
            places = values.indices.to_pylist()
            empty = column_scope(name, None)
            columns.append([empty if place is None else scopes[place] for place in places])
        return list(zip(*columns, strict=True))

    def by_partition(self, mask: Mask) -> dict[str, Mask]:
        """Cut a mask over all images by partition."""
        return {key: mask[self.plan.place(key)] for key in self.plan.keys}

    @property
    def digests(self) -> Digests:
        """The request keys of all images as bytes, in the order of the plan."""
        return self.plan.all_digests
