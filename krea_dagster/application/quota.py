"""Exactly N accepted, in a run of ``images``: asks again for what is missing, holds the rest back.

Before a run plans its purchases, ``ask_for_wanted`` raises the attempts of the slots whose picture
was refused, as far as their groups lack images and their budgets last. The run then buys as
always, through the same caps and budgets.
"""

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

from krea_dagster import redact
from krea_dagster.application.batch import Batch
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
from krea_dagster.models import credits_from_units
from krea_dagster.plugin.config import KreaImagesConfig
from krea_dagster.plugin.metadata import Metadata, small_table
from krea_dagster.plugin.partitions import has_come
from krea_dagster.plugin.resource import KreaResource
from krea_dagster.prompts import Plan

#: Groups that a table in the UI names.
_MOST_SHORT: Final = 50

#: Readings of a table that changes while it is decided about.
_MOST_READINGS: Final = 5

#: A slot's prompt_id and sample.
_Slot = tuple[str, int]


@dataclass(frozen=True)
class Asked:
    """What a run asks for, and how each group then stands.

    ``again`` counts by partition the slots of which another picture is asked for; ``held`` the
    slots that are not bought now. ``homes`` says of which partition a prompt is; it is empty where
    values of a column are counted, which may lie in several.
    """

    outcomes: Sequence[GroupResult] = ()
    again: Mapping[str, int] = field(default_factory=dict)
    held: Mapping[str, int] = field(default_factory=dict)
    homes: Mapping[str, str] = field(default_factory=dict)

    def metadata(self, partition_key: str) -> Metadata:
        """What a partition's materialization shows; of a column, all groups of the table."""
        if not self.outcomes:
            return {}
        outcomes = [
            one
            for one in self.outcomes
            if not self.homes or self.homes.get(one.name) == partition_key
        ]
        return {
            **wanted_metadata(outcomes),
            "slots_asked_again": self.again.get(partition_key, 0),
            "slots_held_back": self.held.get(partition_key, 0),
        }

    def line(self) -> str:
        """One line on what is asked for."""
        totals = quota_totals(self.outcomes)
        return (
            f"{totals['accepted']} of {totals['wanted']} wanted images are accepted, "
            f"{totals['undecided']} are undecided; {totals['asked']} more are asked for, of them "
            f"{sum(self.again.values())} in place of refused ones; {totals['groups_short']} of "
            f"{totals['groups']} stay short."
        )


def wanted_metadata(outcomes: Sequence[GroupResult]) -> Metadata:
    """Counts over groups, and a table of those that stay short and why."""
    values = {f"wanted_{name}": value for name, value in quota_totals(outcomes).items()}
    values["wanted_images"] = values.pop("wanted_wanted")
    if any(one.short for one in outcomes):
        values["stay_short"] = short_table(outcomes)
    return values


def short_table(outcomes: Sequence[GroupResult]) -> Any:
    """The groups that stay short, as a table for the UI; the first 50."""
    short = [one for one in outcomes if one.short]
    return small_table(
        [
            {
                "of": one.name,
                "wanted": one.wanted,
                "accepted": one.accepted,
                "undecided": one.undecided,
                "candidates": one.images,
                "credits": credits_from_units(one.units),
                "why": one.why,
            }
            for one in short[:_MOST_SHORT]
        ]
    )


def ask_for_wanted(
    batch: Batch,
    config: KreaImagesConfig,
    krea: KreaResource,
    wanted: WantedImages | None,
    rules: Rules | None,
    *,
    folders: Sequence[str] = (),
    raised_by: str,
) -> tuple[Batch, Asked]:
    """Ask again for what is missing, and hold back what is not; returns the batch to go on with.

    That is the same one where nothing is ``wanted``. ``folders`` are those of the manifests,
    beside which measures and likeness lie. Two runs that decide at once never raise the same slot
    twice: it is raised only where its attempt still is the one whose picture was refused. What a
    group that lies in several partitions lacks is decided over the whole table and in one order,
    so that runs over some of them agree. Raises ConfigError, PromptTableError or JournalError.
    """
    if wanted is None:
        return batch, Asked()
    again: Counter[str] = Counter()
    for _ in range(_MOST_READINGS):
        decided = _decided(
            batch, config, krea, wanted, rules or Rules(), folders=folders, raised_by=raised_by
        )
        again.update(decided.raised.values())
        if decided.plan is not batch.plan:
            batch.close()
            batch = replace(batch, plan=decided.plan)
        held = decided.held()
        if held is not None:
            break
        batch.close()
        batch = replace(batch, plan=krea.plan(batch.table, batch.keys))
    else:
        batch.close()
        raise ConfigError(
            f"the prompt table {redact.location(batch.table.source)} was changed each time "
            "that it was read. Nothing was bought. Run again when it is complete."
        )
    homes = {} if wanted.column else dict(_pairs(decided.slots, "prompt_id", "partition_key"))
    counts = {key: int(held[batch.plan.place(key)].sum()) for key in batch.plan.keys}
    return replace(batch, held=held), Asked(decided.decision.outcomes, again, counts, homes)


@dataclass(frozen=True)
class _Decided:
    """What was decided about slots, and the plan with the attempts that were ``raised`` for it.

    ``raised`` has the partition of each slot.
    """

    slots: pa.Table
    decision: QuotaDecision
    plan: Plan
    raised: Mapping[_Slot, str]

    def held(self) -> Mask | None:
        """Which images of the plan are not bought now; a request that any group asks for is.

        None where the plan has images that nothing was decided about: the table, or an attempt,
        has changed since the slots were read.
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
    config: KreaImagesConfig,
    krea: KreaResource,
    wanted: WantedImages,
    rules: Rules,
    *,
    folders: Sequence[str],
    raised_by: str,
) -> _Decided:
    """Decide about the table as it is now, and raise the attempts that are asked for again."""
    with ExitStack() as stack:
        journal = stack.enter_context(krea.open_journal())
        accepting = AcceptedTableBuilder.read(krea.open_storage(), journal, rules, wanted, folders)
        view = batch.plan
        if wanted.column and batch.keys is not None:
            now = datetime.now(timezone.utc)
            every = [key for key in batch.table.partition_keys() if has_come(batch.table, key, now)]
            view = stack.enter_context(krea.plan(batch.table, every))
        slots = read_slots(
            _batches(view), journal, column=wanted.column, prices=journal.prices.highest()
        )
        reasons = judge(slots, accepting.rules, accepting.evidence())
        standing = slot_states(slots, reasons, retry_errors=config.retry_errors)
        log = journal.attempts(krea.table_id(journal, batch.table, enter=True))
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
    """Decide, raise the attempts of this batch's slots that are asked for again, and plan anew."""
    mine = np.asarray(pc.is_in(slots["partition_key"], value_set=pa.array(batch.plan.keys)))
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
        # A seed that the table fixes may be, once in a million, the one that would be drawn: what
        # would give the same picture again is never raised.
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
        trial.close()  # another run was quicker with some of them
        trial = batch.table.plan(batch.keys, now, drawn=log.drawn())
    homes = dict(zip(names, chosen["partition_key"].to_pylist(), strict=True))
    return _Decided(slots, decision, trial, {name: homes[name] for name in raised})


def _unchanged(plan: Plan, seeds: Mapping[_Slot, int]) -> set[_Slot]:
    """The slots whose seed in a plan is the one that they had."""
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
