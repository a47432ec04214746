"""The images that one run works on: those that its partitions request, and their state."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property, partial
from typing import Final
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa

from krea_dagster.application.backend import Backend
from krea_dagster.application.buy_options import BuyOptions, RowSelection, Sample
from krea_dagster.application.callback_column import check_own_urls
from krea_dagster.application.look import Look
from krea_dagster.application.manifest_summary import ManifestSummary, watched
from krea_dagster.application.plan_notes import plan_notes
from krea_dagster.application.plan_state import PlanState
from krea_dagster.application.present_partitions import origin_of
from krea_dagster.digests import Mask
from krea_dagster.engine.journal.bulk_reads import (
    NO_KNOWN_REQUESTS,
    KnownRequests,
    all_known_requests,
    known_requests,
)
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.policy import REJECTED
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import State
from krea_dagster.errors import ConfigError
from krea_dagster.manifest import Manifests, manifest_parts, manifest_schema
from krea_dagster.prompts import PLAN_SCHEMA, HashPartitions, Plan, PromptTable
from krea_dagster.prompts.partitioning import MultiPartitions, TimePartitions
from krea_dagster.prompts.requests import PlannedImage, drawn_seed
from krea_dagster.prompts.trial import Trial, TrialRows

#: States in which a request has ended, so that another image may be requested.
_ENDED: Final = frozenset({State.STORED, State.FAILED, State.REFUSED, State.EXPIRED})

#: The batch that the runs of this process may use again.
_handed_over: Final[ContextVar[Batch | None]] = ContextVar("krea_batch", default=None)


@dataclass(frozen=True)
class MadeManifests:
    """The manifests of a plan, to be stored or closed, and the summary of each."""

    plan: Plan
    manifests: Manifests
    summaries: dict[str, ManifestSummary]


@dataclass(frozen=True)
class Batch:
    """The images that some partitions request, at their attempts. Must be closed.

    ``held`` masks those that are not to be bought now, in the order of the plan; None for none.
    With a ``trial`` only its rows are bought; the plan and the manifest have all.
    """

    table: PromptTable
    keys: Sequence[str] | None
    plan: Plan
    held: Mask | None = None
    trial: Trial | None = None
    #: Columns that the settings want written with each purchase.
    spend_by: Sequence[str] = ()
    _look: Look | None = field(default=None, repr=False)
    _mark: Sequence[str] = ()
    #: The state of the whole that was handed over, until a run has used it.
    _states: list[PlanState] = field(default_factory=list, repr=False)
    #: The manifests that a run made in its step of images, by run; None where no step takes them.
    _made: dict[str, MadeManifests] | None = field(default=None, repr=False)

    @classmethod
    def read(
        cls,
        table: PromptTable,
        keys: Sequence[str] | None,
        backend: Backend,
        *,
        to_buy: bool = False,
        look: bool = False,
        trial: Trial | None = None,
    ) -> Batch:
        """Read the partitions, or all, and if they are ``to_buy``, check that this is possible.

        In that order: a bad table creates nothing, not even a journal. ``look`` if the state will
        be needed. A batch that is ``handed_over`` is used again if it has these partitions and
        nothing has changed. Raises PromptTableError, ConfigError or JournalError.
        """
        _return_memory()
        has_journal = backend.has_journal()
        backend.check_root()
        # Before the table is read: what changes meanwhile has another mark.
        table = table.pinned()
        mark = [table.mark(), backend.mark_of_attempts(table)]
        earlier = _handed_over.get()
        if earlier is not None and earlier.serves(table, keys, [*mark, backend.journal_id()]):
            batch = earlier.part(keys)
        else:
            # A large table is compared with all that is stored. Listing that is work for the
            # system, planning for the processor, so they run at the same time.
            ahead = Look(partial(_look, table, keys, backend)) if has_journal and look else None
            try:
                batch = cls(table, keys, backend.plan(table, keys), _look=ahead)
            except BaseException:
                if ahead is not None:
                    ahead.close()
                raise
        try:
            if to_buy:
                backend.check()
            by, mark = tuple(backend.settings.spend_by), [*mark, backend.journal_id()]
            return replace(batch, trial=trial, spend_by=by, _mark=mark)
        except BaseException:
            batch.close()
            raise

    @contextmanager
    def handed_over(self, state: PlanState) -> Iterator[None]:
        """Let the runs in this block, in this process, use this batch instead of reading again.

        The first run also uses its ``state``; a later one looks at what that has stored. A run's
        manifests are made once too, in its first step that needs their figures.
        """
        made: dict[str, MadeManifests] = {}
        token = _handed_over.set(replace(self, _made=made, _states=[state]))
        try:
            yield
        finally:
            _handed_over.reset(token)
            for one in made.values():
                one.manifests.close()

    def serves(self, table: PromptTable, keys: Sequence[str] | None, mark: Sequence[str]) -> bool:
        """Return whether this batch is what reading these partitions now would give."""
        here = replace(self.table, source=table.source)  # the path may be relative or absolute
        has_keys = self.keys is None if keys is None else set(keys) <= set(self.plan.keys)
        return bool(mark[0]) and self._mark == mark and here == table and has_keys

    def part(self, keys: Sequence[str] | None) -> Batch:
        """Return the batch of some of its partitions, or all, for another user."""
        plan = self.plan.part(self.plan.keys if keys is None else keys)
        return replace(self, keys=keys, plan=plan)

    def close(self) -> None:
        """Release memory and disk."""
        if self._look is not None:
            self._look.close()
        self.plan.close()

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def regenerate(self, options: BuyOptions, backend: Backend, raised_by: str) -> Batch:
        """Raise the attempts of the rows that ``options.regenerate`` selects.

        ``raised_by`` is the root run of the run and its re-executions, none of which raises them
        again. A row whose last raise has not ended is continued instead. Raises ConfigError for
        a row whose seed the table fixes, unless ``options.new_seed``.
        """
        samples = self.selected(options, backend)
        if not samples:
            return self
        with backend.open_journal() as journal:
            ended = self._ended(journal, set(samples))
            journal.attempts(backend.table_id(journal, self.table, enter=True)).raise_attempts(
                samples,
                raised_by=raised_by,
                at=datetime.now(timezone.utc),
                settled=lambda sample, attempt: ended.get((*sample, attempt), False),
                draw=options.new_seed,
            )
        self.close()
        self._states.clear()
        return replace(self, plan=backend.plan(self.table, self.keys))

    def selected(
        self, options: BuyOptions, backend: Backend, *, all_rows: bool = False
    ) -> list[Sample]:
        """Return the (prompt_id, sample) that ``options.regenerate`` selects.

        Raises ConfigError for a row whose seed the table fixes, and for one that does not exist:
        in this batch if it has ``all_rows``, else in the whole table.
        """
        if not options.regenerate:
            return []
        rows = RowSelection.parse(options.regenerate)
        missing = rows.without_row(self.plan)
        if missing and not all_rows and self.keys is not None:
            with backend.plan(self.table) as whole:
                missing = rows.without_row(whole)
        if missing:
            raise ConfigError(f"no row has the prompt_id {missing[0]!r}; nothing was bought")
        if backend.has_journal():
            with backend.open_journal() as journal:
                samples = rows.samples(self.plan, journal)
        else:
            samples = rows.samples(self.plan, None)
        if not options.new_seed:
            self._refuse_fixed(samples, _gone_for_good(backend))
        return samples

    def images_of(self, samples: Collection[Sample]) -> Iterator[PlannedImage]:
        """Yield the images of this batch that are these (prompt_id, sample)."""
        wanted = set(samples)
        for image in self.plan.named({prompt_id for prompt_id, _ in wanted}):
            if (image.prompt_id, image.sample) in wanted:
                yield image

    def _refuse_fixed(self, samples: Sequence[Sample], gone: Collection[str]) -> None:
        """Refuse to buy the same image again, unless it is ``gone``: the table fixes its seed."""
        for image in self.images_of(samples):
            request = image.request
            drawn = drawn_seed(image.prompt_id, image.sample, request.attempt)
            if request.seed != drawn and request.request_key not in gone:
                raise ConfigError(
                    f"the prompt table fixes the seed of row {image.prompt_id!r}: another image of "
                    "it would be the same image, paid for twice. Nothing was bought. Use "
                    "--new-seed (new_seed in the run config) to draw a seed, or change the table."
                )

    def end_regenerations(self, backend: Backend) -> None:
        """Record which raised attempts of this batch have ended."""
        with backend.open_journal() as journal:
            log = journal.attempts(backend.table_id(journal, self.table))
            ended = self._ended(journal, log.open_slots())
            if done := [sample for sample, has_ended in ended.items() if has_ended]:
                log.close_slots(done, at=datetime.now(timezone.utc))

    def _ended(
        self, journal: Journal, samples: Collection[Sample]
    ) -> dict[tuple[str, int, int], bool]:
        """Return whether each of these samples, at its attempt in this batch, has ended."""
        keys = {
            (image.prompt_id, image.sample, image.request.attempt): image.request.request_key
            for image in self.images_of(samples)
        }
        records = journal.records(keys.values())
        return {name: key in records and _has_ended(records[key]) for name, key in keys.items()}

    @property
    def held_count(self) -> int:
        """Number of images that are not to be bought now, of the trial if there is one."""
        if self.held is None:
            return 0
        return int((self.held if self.outside is None else self.held & ~self.outside).sum())

    @cached_property
    def trial_rows(self) -> TrialRows | None:
        """The rows of the trial; None without one."""
        return None if self.trial is None else self.trial.of(self.plan)

    @property
    def outside(self) -> Mask | None:
        """A mask of the images that the trial leaves out, in the order of the plan."""
        return None if self.trial_rows is None else ~self.trial_rows.inside

    def inside(self, key: str) -> Mask:
        """Return a mask of a partition's images that are in the trial; all without one."""
        place = self.plan.place(key)
        if self.trial_rows is None:
            return np.ones(len(self.plan.all_digests[place]), np.bool_)
        return self.trial_rows.inside[place]

    def trial_ids(self) -> set[str]:
        """Return the prompt_ids of the rows in the trial."""
        found: set[str] = set()
        for key in self.plan.keys:
            inside, start = self.inside(key), 0
            for batch in self.plan.batches(key) if inside.any() else ():
                chosen = batch.filter(pa.array(inside[start : start + batch.num_rows]))
                found.update(chosen.column(0).to_pylist())
                start += batch.num_rows
        return found

    @property
    def notes(self) -> list[str]:
        """What is not a problem of the table, and perhaps not expected."""
        digests = self.plan.all_digests
        wanted = digests if self.outside is None else digests[~self.outside]
        return [*plan_notes(self.plan, wanted), *self.unknown_columns(self.spend_by)]

    def unknown_columns(self, spend_by: Sequence[str]) -> list[str]:
        """Return a note on the columns that are to be written with each purchase, and missing."""
        return [
            f"spend_by (KREA_SPEND_BY) names {name!r}, which the prompt table does not have, so "
            f"that purchases are written without it; its columns are {', '.join(self._columns)}"
            for name in spend_by
            if name not in self._columns and self.plan.all_digests.size
        ]

    def versions(self) -> Mapping[str, str]:
        """Return the data version of ``prompts``, by partition."""
        return self.plan.versions()

    def state(self, backend: Backend, spend_by: Sequence[str] = ()) -> PlanState:
        """Return the state of the images in journal and storage. Raises JournalError.

        ``spend_by`` are columns whose values are written with each purchase, in addition to those
        of the settings and of the budgets; those that the table does not have are left out.
        """
        columns = backend.budget_columns()
        named = dict.fromkeys([*columns, *backend.settings.spend_by, *spend_by])
        attributes = [name for name in named if name in self._columns]
        if missing := [name for name in columns if name not in self._columns]:
            raise ConfigError(
                f"a budget names the column {missing[0]!r}, which the prompt table does not have; "
                f"its columns are {', '.join(self._columns)}. Nothing was bought."
            )
        check_own_urls(self.plan, self.table.shown, private_allowed=backend.settings.synthetic)
        if self._states:
            state = self._states.pop().part(self.plan)
            return replace(state, held=self.held, outside=self.outside)
        if not backend.has_journal():
            nothing = NO_KNOWN_REQUESTS.of(self.plan.all_digests)
            return PlanState(self.plan, *nothing, columns, attributes, self.held, self.outside)
        found = None if self._look is None else self._look.take()
        with backend.open_journal() as journal:
            if found is None:
                found = known_requests(journal, backend.open_storage(), self.plan.all_digests)
            table_id = backend.table_id(journal, self.table)
        known = found.of(self.plan.all_digests)
        return PlanState(self.plan, *known, columns, attributes, self.held, self.outside, table_id)

    def manifest_parts(
        self, key: str, backend: Backend, journal: Journal, run_id: str
    ) -> Iterator[pa.Table]:
        """Yield the manifest of a partition as the journal has it now, part by part."""
        locate = backend.open_storage().locate
        return manifest_parts(self.plan, key, journal, locate=locate, run_id=run_id)

    def summaries(self, backend: Backend, run_id: str) -> Mapping[str, ManifestSummary]:
        """Return the summary of each partition's manifest, as the journal has it now."""
        if self._made is not None:
            self._made[run_id] = made = self._make_manifests(backend, run_id)
            return made.summaries
        found: dict[str, ManifestSummary] = {}
        for key, summary, parts in self.summarized_parts(backend, run_id):
            for _ in parts:  # reading them fills the summary
                pass
            found[key] = summary
        return found

    def manifests(self, backend: Backend, run_id: str) -> MadeManifests:
        """Make the manifest of each partition; or return those that this run made a moment ago."""
        made = self._made.pop(run_id, None) if self._made is not None else None
        if made is not None:
            if made.plan.same_images(self.plan):
                return made
            made.manifests.close()
        return self._make_manifests(backend, run_id)

    def _make_manifests(self, backend: Backend, run_id: str) -> MadeManifests:
        made = MadeManifests(self.plan, Manifests(), {})
        schema = origin_of(backend, self.table).noted_in(self.manifest_schema)
        for key, summary, parts in self.summarized_parts(backend, run_id):
            made.manifests.add(key, schema, parts)
            made.summaries[key] = summary
        return made

    def summarized_parts(
        self, backend: Backend, run_id: str
    ) -> Iterator[tuple[str, ManifestSummary, Iterator[pa.Table]]]:
        """Yield each partition's key, its manifest's parts, and the summary that they fill."""
        with backend.open_journal() as journal:
            for key in self.plan.keys:
                summary = ManifestSummary()
                parts = self.manifest_parts(key, backend, journal, run_id)
                outside = None if self.trial is None else ~self.inside(key)
                yield key, summary, watched(parts, self.plan.digests(key), summary, outside)

    @property
    def _columns(self) -> list[str]:
        return [*PLAN_SCHEMA.names, *self.plan.passthrough.names]

    @property
    def manifest_schema(self) -> pa.Schema:
        """The schema of the manifest."""
        return manifest_schema(self.plan)


def _gone_for_good(backend: Backend) -> frozenset[str]:
    """Return the requests whose file was pruned, and not because it was rejected."""
    if not backend.has_journal():
        return frozenset()
    with backend.open_journal() as journal:
        return frozenset(journal.pruned.keys(without="rejected").to_pylist())


def has_begun(table: PromptTable, key: str, now: datetime) -> bool:
    """Return whether a partition has begun; those that are not by time always have."""
    by = table.partition_by
    if isinstance(by, MultiPartitions):
        parts = MultiPartitions.split(key)
        by, key = by.time, "" if parts is None else parts[1]
    if not isinstance(by, TimePartitions):
        return True
    return key <= by.key_of(now.astimezone(ZoneInfo(by.zone)).date())


def _has_ended(record: Record) -> bool:
    rejected = record.state is State.COMPLETED and record.error_code in REJECTED
    return record.state in _ENDED or rejected


def _return_memory() -> None:
    """Make Arrow return memory to the system, unless the environment chooses an allocator.

    Its own allocator keeps most of what a table took, for each thread: planning 50,000 rows then
    takes 100 MB more than with the system's, in the same time.
    """
    if "ARROW_DEFAULT_MEMORY_POOL" not in os.environ:
        pa.set_memory_pool(pa.system_memory_pool())


def _look(table: PromptTable, keys: Sequence[str] | None, backend: Backend) -> KnownRequests | None:
    """Read the state of all that is stored, if the table seems to request much of it."""
    expected = table.row_count()
    if keys is not None and isinstance(table.partition_by, HashPartitions):
        expected = expected * len(keys) // table.partition_by.count
    with backend.open_journal() as journal:
        return all_known_requests(journal, backend.open_storage(), expected)
