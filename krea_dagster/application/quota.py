"""Exactly N accepted images per group: regenerates what was rejected, holds back the rest.

Before a run plans its purchases, ``apply_quota`` raises the attempts of rejected candidates while
their groups lack images and have budget left. The run then buys as usual, within the same caps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.application.backend import Backend
from krea_dagster.application.batch import Batch, has_begun
from krea_dagster.application.buy_options import BuyOptions
from krea_dagster.curation.accepted.accepted_table import AcceptedTableBuilder
from krea_dagster.curation.accepted.candidates import read_slots
from krea_dagster.curation.accepted.quota import (
    IS_FIXED,
    GroupResult,
    QuotaDecision,
    WantedImages,
    decide,
    quota_totals,
    slot_states,
)
from krea_dagster.curation.accepted.rules import Rules, judge
from krea_dagster.digests import Digests, DigestSet, Mask, digests_from_hex
from krea_dagster.engine.journal.attempt_log import AttemptLog
from krea_dagster.errors import ConfigError
from krea_dagster.prompts import Plan

#: How often a table that changes meanwhile is read again.
_MOST_READINGS: Final = 5

#: A candidate's prompt_id and sample.
_Slot = tuple[str, int]


@dataclass(frozen=True)
class QuotaState:
    """What a run requests for the quota, and the outcome of each group.

    ``again`` counts the regenerated candidates by partition, ``held`` those not bought now.
    ``homes`` maps a prompt to its partition; it is empty if the groups are values of a column,
    which may be in several partitions.
    """

    outcomes: Sequence[GroupResult] = ()
    again: Mapping[str, int] = field(default_factory=dict)
    held: Mapping[str, int] = field(default_factory=dict)
    homes: Mapping[str, str] = field(default_factory=dict)

    def line(self) -> str:
        """Return a summary in one line."""
        totals = quota_totals(self.outcomes)
        return (
            f"{totals['accepted']} of {totals['wanted']} wanted images are accepted, "
            f"{totals['undecided']} are undecided; {totals['asked']} more are requested, "
            f"{sum(self.again.values())} of them to replace rejected ones; "
            f"{totals['groups_short']} of {totals['groups']} groups stay short."
        )


def apply_quota(
    batch: Batch,
    options: BuyOptions,
    backend: Backend,
    wanted: WantedImages | None,
    rules: Rules | None,
    *,
    folders: Sequence[str] = (),
    raised_by: str,
) -> tuple[Batch, QuotaState]:
    """Regenerate what a quota lacks, hold back the rest, and return the batch to continue with.

    Without a quota (``wanted`` is None) that is the same batch. ``folders`` are those of the
    manifests, next to which measures and near-duplicates are stored. Two runs that decide at the
    same time never raise the same candidate twice: it is raised only if its attempt still is the
    one that was rejected. A group in several partitions is decided over the whole table and in one
    order, so that runs over some of them agree. Raises ConfigError, PromptTableError or
    JournalError.
    """
    if wanted is None:
        return batch, QuotaState()
    again: Counter[str] = Counter()
    for _ in range(_MOST_READINGS):
        decided = _decided(
            batch, options, backend, wanted, rules or Rules(), folders=folders, raised_by=raised_by
        )
        again.update(decided.raised.values())
        if decided.plan is not batch.plan:
            batch.close()
            batch = replace(batch, plan=decided.plan)
        held = decided.held()
        if held is not None:
            break
        batch.close()
        batch = replace(batch, plan=backend.plan(batch.table, batch.keys))
    else:
        batch.close()
        raise ConfigError(
            f"the prompt table {batch.table.shown} changed each time it was "
            "read. Nothing was bought. Run again when it is complete."
        )
    homes = {} if wanted.column else dict(_pairs(decided.slots, "prompt_id", "partition_key"))
    counts = {key: int(held[batch.plan.place(key)].sum()) for key in batch.plan.keys}
    return replace(batch, held=held), QuotaState(decided.decision.outcomes, again, counts, homes)


@dataclass(frozen=True)
class _Decided:
    """The decision about all candidates, and the plan after their attempts were ``raised``.

    ``raised`` maps each raised candidate to its partition.
    """

    slots: pa.Table
    decision: QuotaDecision
    plan: Plan
    raised: Mapping[_Slot, str]

    def held(self) -> Mask | None:
        """Return a mask of the images that are not bought now; None if the decision is outdated.

        A request that any group needs is bought. The decision is outdated if the plan has images
        that it does not cover: the table or an attempt has changed since the candidates were read.
        """
        images = self.plan.all_digests
        asked = DigestSet(self._digests(self.decision.ask)).contains(images)
        known = DigestSet(self._digests(np.ones(self.slots.num_rows, np.bool_))).contains(images)
        if not known.all():
            raised = [
                bytes.fromhex(image.request.request_key)
                for image in self.plan.named({prompt_id for prompt_id, _ in self.raised})
                if (image.prompt_id, image.sample) in self.raised
            ]
            known |= DigestSet(_as_digests(raised)).contains(images)
            if not known.all():
                return None
        held = DigestSet(self._digests(self.decision.held & ~self.decision.ask)).contains(images)
        return np.asarray(held & ~asked)

    def _digests(self, mask: Mask) -> Digests:
        return digests_from_hex(self.slots["request_key"].filter(pa.array(mask)).combine_chunks())


def _decided(
    batch: Batch,
    options: BuyOptions,
    backend: Backend,
    wanted: WantedImages,
    rules: Rules,
    *,
    folders: Sequence[str],
    raised_by: str,
) -> _Decided:
    """Decide about the table as it is now, and raise the attempts that are regenerated."""
    with ExitStack() as stack:
        journal = stack.enter_context(backend.open_journal())
        accepting = AcceptedTableBuilder.read(
            backend.open_storage(), journal, rules, wanted, folders
        )
        view = batch.plan
        if wanted.column and batch.keys is not None:
            now = datetime.now(timezone.utc)
            every = [
                key for key in batch.table.partition_keys() if has_begun(batch.table, key, now)
            ]
            view = stack.enter_context(backend.plan(batch.table, every))
        slots = read_slots(
            _batches(view), journal, column=wanted.column, prices=journal.prices.highest()
        )
        reasons = judge(slots, accepting.rules, accepting.evidence())
        standing = slot_states(slots, reasons, retry_errors=options.retry_errors)
        log = journal.attempts(backend.table_id(journal, batch.table, enter=True))
        return _raised(batch, log, wanted, slots, standing, raised_by=raised_by)


def _raised(
    batch: Batch,
    log: AttemptLog,
    wanted: WantedImages,
    slots: pa.Table,
    standing: npt.NDArray[np.int8],
    *,
    raised_by: str,
) -> _Decided:
    """Decide, raise the attempts of this batch's candidates, and plan again."""
    mine = np.asarray(pc.is_in(slots["partition_key"], value_set=pa.array(batch.plan.keys)))
    if batch.trial is not None:  # the others are decided about when they are bought
        in_trial = pa.array(sorted(batch.trial_ids()), pa.string())
        mine &= np.asarray(pc.is_in(slots["prompt_id"], value_set=in_trial))
    known, drawn = log.current(), log.drawn()
    while True:
        decision = decide(wanted, slots, standing)
        (places,) = np.nonzero(decision.again & mine)
        if not len(places):
            return _Decided(slots, decision, batch.plan, {})
        chosen = slots.take(pa.array(places))
        names = list(_pairs(chosen, "prompt_id", "sample"))
        attempts = dict(zip(names, chosen["attempt"].to_pylist(), strict=True))
        later = {**known, **{name: attempt + 1 for name, attempt in attempts.items()}}
        trial = batch.table.plan(batch.keys, later, drawn=drawn)
        # A seed that the table fixes may, once in a million, equal the drawn one. A candidate that
        # would give the same image again is never raised.
        same = _unchanged(trial, dict(zip(names, chosen["seed"].to_pylist(), strict=True)))
        if not same:
            break
        trial.close()
        standing = standing.copy()
        standing[[place for place, name in zip(places, names, strict=True) if name in same]] = (
            IS_FIXED
        )
    raised = log.replace(
        [(*name, attempt) for name, attempt in attempts.items()],
        raised_by=raised_by,
        at=datetime.now(timezone.utc),
    )
    now = log.current()
    if now != later:
        trial.close()  # another run has raised some of them meanwhile
        trial = batch.table.plan(batch.keys, now, drawn=log.drawn())
    homes = dict(zip(names, chosen["partition_key"].to_pylist(), strict=True))
    return _Decided(slots, decision, trial, {name: homes[name] for name in raised})


def _unchanged(plan: Plan, seeds: Mapping[_Slot, int]) -> set[_Slot]:
    """Return the candidates whose seed in a plan is the one that they had."""
    found = set()
    for image in plan.named({prompt_id for prompt_id, _ in seeds}):
        name = (image.prompt_id, image.sample)
        if seeds.get(name) == image.request.seed:
            found.add(name)
    return found


def _as_digests(found: Sequence[bytes]) -> Digests:
    return np.frombuffer(b"".join(found), np.uint8).reshape(-1, 32)


def _batches(plan: Plan) -> Iterator[pa.RecordBatch]:
    for key in plan.keys:
        yield from plan.batches(key)


def _pairs(slots: pa.Table, one: str, other: str) -> Iterator[tuple[Any, Any]]:
    return zip(slots[one].to_pylist(), slots[other].to_pylist(), strict=True)
