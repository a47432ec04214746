"""A simulated year of purchases, written directly into a journal, and its expected sums.

365 days: prices rise on 12 May, 14 to 16 July the server fails, and on 17 September twelve times
as much is bought as on other days. The expected sums are computed from the simulation's arrays and
never read from the journal: the tables are compared with them.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from krea_dagster.digests import hex_from_digests
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.manifest import MANIFEST_SCHEMA, write_manifest
from krea_dagster.prompts.identity import image_seeds, request_digests

DAYS: Final = 365
FIRST: Final = date(2026, 1, 1)
PRICE_CHANGE: Final = date(2026, 5, 12)
OUTAGE: Final = (date(2026, 7, 14), date(2026, 7, 16))
RUNAWAY: Final = date(2026, 9, 17)
RUNAWAY_TIMES: Final = 12

#: Units a call, by quality, before and after the change.
PRICES: Final = {"1K": (4_500, 4_800), "2K": (18_000, 19_200)}

CAMPAIGNS: Final = ("autumn", "spring", "winter", None)
SIZES: Final = ("1:1", "16:9", "2:1")
PARTITIONS: Final = 8

#: What becomes of a purchase; the last two only as long as nothing else is known.
DELIVERED, FAILED, REFUSED, LOST, UNKNOWN, REJECTED = range(6)
_CODES: Final = {
    FAILED: "generation_failed",
    REFUSED: "content_policy_violation",
    LOST: "task_not_found",
    UNKNOWN: "no_answer",
    REJECTED: "flat_image",
}
_STATES: Final = {
    DELIVERED: "stored",
    FAILED: "failed",
    REFUSED: "refused",
    LOST: "expired",
    UNKNOWN: "unknown",
    REJECTED: "completed",
}
_DAY_US: Final = 86_400_000_000
_EPOCH: Final = date(1970, 1, 1)

_Ints = npt.NDArray[np.int64]


@dataclass
class ExpectedSums:
    """The simulation's sums by UTC day, in units.

    ``asked`` counts purchases; of them ``delivered`` (``replaced`` among them), ``failed`` and so
    on. ``unknown_units`` is what is committed and not settled.
    """

    days: dict[date, dict[str, int]] = field(default_factory=dict)

    def total(self, name: str, start: date = date.min, end: date = date.max) -> int:
        """The sum of one figure over the days from start to end."""
        return sum(sums[name] for day, sums in self.days.items() if start <= day <= end)


class SimulatedYear:
    """A year of about ``purchases`` purchases. ``write`` puts days of it into the journal."""

    def __init__(
        self, folder: Path, purchases: int, *, seed: int = 1, attributed: bool = True
    ) -> None:
        self.folder = folder
        #: Whether purchases say which row they were made for; those of old versions do not.
        self.attributed = attributed
        self.storage = Storage(str(folder))
        self._chance = np.random.default_rng(seed)
        self.written_to: date | None = None
        self._make(purchases)

    @property
    def url(self) -> str:
        return f"sqlite:///{self.folder / 'journal.db'}"

    @property
    def purchases(self) -> int:
        return len(self._day)

    # -- the simulation ---------------------------------------------------------------------------

    def _make(self, purchases: int) -> None:
        chance = self._chance
        weights = np.ones(DAYS)
        weights[(RUNAWAY - FIRST).days] = RUNAWAY_TIMES
        count = max(1, round(purchases / 1.02))
        day = np.sort(chance.choice(DAYS, count, p=weights / weights.sum()))
        quality = (chance.random(count) < 0.1).astype(np.int64)
        size = chance.integers(0, len(SIZES), count)
        campaign = chance.integers(0, len(CAMPAIGNS), count)
        outage = (day >= (OUTAGE[0] - FIRST).days) & (day <= (OUTAGE[1] - FIRST).days)
        luck = chance.random(count)
        fate = np.full(count, DELIVERED)
        for bound, kind in ((0.03, FAILED), (0.008, REFUSED), (0.005, LOST), (0.002, REJECTED)):
            fate[luck < bound] = kind
        fate[outage & (luck > 0.5)] = FAILED
        fate[outage & (luck > 0.8)] = UNKNOWN
        drawn = chance.random(count) < 0.5
        # What failed is bought again a minute later; of some that are delivered another image
        # is bought up to forty days later.
        retried = np.flatnonzero((fate == FAILED) & (chance.random(count) < 0.5))
        again = np.flatnonzero((fate == DELIVERED) & (chance.random(count) < 0.005))
        again_day = np.minimum(day[again] + chance.integers(0, 40, len(again)), DAYS - 1)
        second = chance.integers(0, 80_000, count) * 1_000_000
        self._rows = count
        self._row = np.concatenate([np.arange(count), retried, again])
        self._number = np.concatenate(
            [np.ones(count), np.full(len(retried), 2), np.ones(len(again))]
        )
        self._attempt = np.concatenate([np.zeros(count + len(retried)), np.ones(len(again))])
        self._number, self._attempt = self._number.astype(np.int64), self._attempt.astype(np.int64)
        self._day = np.concatenate([day, day[retried], again_day])
        self._fate = np.concatenate(
            [fate, np.full(len(retried), DELIVERED), np.full(len(again), DELIVERED)]
        )
        self._sent = (
            (self._day + (FIRST - _EPOCH).days) * _DAY_US
            + np.concatenate([second, second[retried] + 60_000_000, second[again] + 120_000_000])
            + np.arange(len(self._day)) % 1_000_000
        )
        changed = self._day >= (PRICE_CHANGE - FIRST).days
        self._quality = quality[self._row]
        prices = np.array([PRICES["1K"], PRICES["2K"]])
        self._price = prices[self._quality, changed.astype(np.int64)]
        self._late = chance.random(len(self._day)) < 0.02
        self._latency = chance.integers(1_400_000, 2_600_000, len(self._day))
        last_retry = np.zeros(count, np.bool_)
        last_retry[retried] = True
        self._was_retried = np.concatenate(
            [last_retry, np.zeros(len(retried) + len(again), np.bool_)]
        )
        self._late &= ~self._was_retried  # the second purchase says that the first one ended
        self._again_on = np.full(count, DAYS + 1)
        self._again_on[again] = again_day
        self._size, self._campaign = size, campaign
        self._twin = ~drawn & (chance.random(count) < 0.03)
        self._identify(drawn)

    def _identify(self, drawn: npt.NDArray[np.bool_]) -> None:
        rows = self._rows
        self.prompt_ids = pa.array([f"row-{number:07d}" for number in range(rows)])
        self._prompts = pa.array([f"harbor dawn red kite {number}" for number in range(rows)])
        self._sizes = pa.array(np.array(SIZES, object)[self._size])
        self._qualities = pa.array(np.array(["1K", "2K"], object)[self._quality[:rows]])
        chosen = pa.array(self._chance.integers(1, 1_048_577, rows), pa.int32(), mask=drawn)
        checks, zeros = pa.repeat(pa.scalar(False), rows), pa.array(np.zeros(rows, np.int32))
        self._seeds: list[pa.Array] = []
        self._keys: list[pa.Array] = []
        for attempt in (0, 1):
            attempts = pa.array(np.full(rows, attempt, np.int32))
            columns = {
                "prompt_id": self.prompt_ids,
                "sample": zeros,
                "prompt": self._prompts,
                "size": self._sizes,
                "quality": self._qualities,
                "seed": chosen,
                "nsfw_check": checks,
                "attempt": attempts,
            }
            columns["seed"] = image_seeds(columns)
            self._seeds.append(columns["seed"])
            self._keys.append(hex_from_digests(request_digests(columns)))

    def partition(self, row: int) -> str:
        return f"bucket-{row % PARTITIONS:03d}"

    # -- the expected sums --------------------------------------------------------------------

    def expected(self) -> ExpectedSums:
        """Return the sums of the days that were written."""
        assert self.written_to is not None
        until = (self.written_to - FIRST).days
        there = self._day <= until
        pending = there & (self._day == until) & self._late
        fate = np.where(pending, -1, self._fate)
        replaced = (
            there
            & (fate == DELIVERED)
            & (self._attempt == 0)
            & self._delivered_again(until)[self._row]
        )
        free = np.isin(fate, [FAILED, REFUSED])
        charged = np.where(pending | (fate == UNKNOWN) | free, 0, self._price)
        reserved = np.where(np.isin(fate, [REFUSED, UNKNOWN]), 0, self._price)
        unknown = np.where(pending | (fate == UNKNOWN), self._price, 0)
        returned = np.where(fate == FAILED, self._price, 0)
        shared = self._twin[self._row] & (self._listed_attempt(until)[self._row] >= self._attempt)
        delivered = fate == DELIVERED
        figures = {
            "asked": np.ones(len(fate), np.int64),
            "delivered": delivered,
            "replaced": replaced,
            "failed": fate == FAILED,
            "refused": fate == REFUSED,
            "lost": fate == LOST,
            "rejected": fate == REJECTED,
            "unknown": fate == UNKNOWN,
            "pending": pending,
            "reused": shared & delivered,
            "charged_units": charged,
            "reserved_units": reserved,
            "returned_units": returned,
            "unknown_units": unknown,
            "saved_units": np.where(shared & delivered, charged, 0),
        }
        expected = ExpectedSums()
        for number in range(until + 1):
            mask = there & (self._day == number)
            if mask.any():
                expected.days[FIRST + timedelta(days=number)] = {
                    name: int(np.asarray(values)[mask].sum()) for name, values in figures.items()
                }
        return expected

    def _listed_attempt(self, until: int) -> _Ints:
        return (self._again_on <= until).astype(np.int64)

    def _delivered_again(self, until: int) -> npt.NDArray[np.bool_]:
        """Rows whose second attempt is delivered: it is not while it waits for its settlement."""
        found = np.zeros(self._rows, np.bool_)
        there = (self._attempt == 1) & (self._day <= until)
        there &= ~((self._day == until) & self._late)
        found[self._row[there]] = True
        return found

    # -- the journal --------------------------------------------------------------------------

    def write(self, until: date = date(2026, 12, 31)) -> None:
        """Put all days up to one into the journal, and write the manifests of that day.

        Of its last day some purchases are not settled yet; the next call settles them.
        """
        first = -1 if self.written_to is None else (self.written_to - FIRST).days
        last = (until - FIRST).days
        with closing(Journal(self.url)) as journal:
            journal.bind("an emulator")
        with closing(sqlite3.connect(self.folder / "journal.db")) as database:
            # The figures are of reading: how this journal came to be does not matter to them.
            database.executescript("pragma synchronous = off; pragma foreign_keys = off;")
            if first >= 0:
                settled = np.flatnonzero((self._day == first) & self._late)
                self._settle(database, settled)
            chosen = np.flatnonzero((self._day > first) & (self._day <= last))
            chosen = chosen[np.argsort(self._sent[chosen])]
            for start in range(0, len(chosen), 50_000):
                self._insert(database, chosen[start : start + 50_000], last)
            database.commit()
        self.written_to = until
        self._write_manifests(last)

    def _insert(self, database: sqlite3.Connection, chosen: _Ints, last: int) -> None:
        request_rows, submission_rows, event_rows = [], [], []
        replaced_requests = []
        for at in chosen.tolist():
            request, submission = self._pair(
                at, pending=bool(self._late[at]) and self._day[at] == last
            )
            submission_rows.append(submission)
            if self._number[at] > 1:
                replaced_requests.append(request)
                # The first purchase's failure is told by its event alone from now on.
                key = request["request_key"]
                said = json.dumps({"error_code": _CODES[FAILED]})
                event_rows.append(
                    {"request_key": key, "seq": 4, "at": submission["sent_at"] - 1, "run_id": "r"}
                    | {"from_state": "submitted", "event": "failed", "to_state": "failed"}
                    | {"idempotency_key": f"krea-{key}-1", "data": said}
                )
            else:
                request_rows.append(request)
        _fill(database, "requests", request_rows)
        _fill(database, "requests", replaced_requests, verb="insert or replace")
        _fill(database, "submissions", submission_rows)
        _fill(database, "events", event_rows)

    def _settle(self, database: sqlite3.Connection, chosen: _Ints) -> None:
        for at in chosen.tolist():
            request, submission = self._pair(at, pending=False)
            request["updated_at"] += _DAY_US
            if submission["settled_at"] is not None:
                submission["settled_at"] += _DAY_US
            _fill(database, "requests", [request], verb="insert or replace")
            _fill(database, "submissions", [submission], verb="insert or replace")

    def _pair(self, at: int, *, pending: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        row, attempt, fate = int(self._row[at]), int(self._attempt[at]), int(self._fate[at])
        key = self._keys[attempt][row].as_py()
        sent, price, number = int(self._sent[at]), int(self._price[at]), int(self._number[at])
        done = sent + 200_000 + int(self._latency[at])
        state = "submitted" if pending else _STATES[fate]
        stored = state == "stored"
        accepted = fate not in (REFUSED, UNKNOWN)
        settled = not pending and fate != UNKNOWN
        charged = (0 if fate in (FAILED, REFUSED) else price) if settled else None
        committed = price if charged is None else charged
        request = {
            "request_key": key,
            "model": "krea-2-turbo",
            "prompt": self._prompts[row].as_py(),
            "size": self._sizes[row].as_py(),
            "quality": self._qualities[row].as_py(),
            "seed": self._seeds[attempt][row].as_py(),
            "nsfw_check": 0,
            "attempt": attempt,
            "partition_key": self.partition(row),
            "state": state,
            "seq": 5,
            "idempotency_key": f"krea-{key}-{number}",
            "completed_at": done if state in ("stored", "completed", "expired") else None,
            "stored_at": done if stored else None,
            "image_path": f"images/{key[:2]}/{key}.png" if stored else None,
            "image_sha256": key if stored else None,
            "image_bytes": 10 if stored else None,
            "image_format": "PNG" if stored else None,
            "width": 1024 if stored else None,
            "height": 1024 if stored else None,
            "error_code": None if pending else _CODES.get(fate),
            "updated_at": done,
        }
        submission = {
            "idempotency_key": f"krea-{key}-{number}",
            "request_key": key,
            "number": number,
            "run_id": f"run-{int(self._day[at]):03d}",
            "partition_key": self.partition(row),
            "sent_at": sent,
            "posts": 1,
            "prompt_id": self.prompt_ids[row].as_py() if self.attributed else None,
            "sample": 0 if self.attributed else None,
            "task_id": f"task-{key[:24]}-{number}" if accepted else None,
            "submitted_at": sent + 200_000 if accepted else None,
            "expected_units": price,
            "committed_units": committed,
            "reserved_units": price if accepted else None,
            "charged_units": charged,
            "settled_at": done if settled else None,
            "billing_rule": "per_call" if accepted else None,
            "user_group": "default" if accepted else None,
        }
        return request, submission

    def _write_manifests(self, last: int) -> None:
        first_day = self._day[: self._rows]
        rows = np.flatnonzero(first_day <= last)
        attempt = self._listed_attempt(last)[rows]
        places = pa.array(rows)
        columns: dict[str, pa.Array] = {
            "prompt_id": self.prompt_ids.take(places),
            "sample": pa.array(np.zeros(len(rows), np.int32)),
            "prompt": self._prompts.take(places),
            "model": pa.repeat(pa.scalar("krea-2-turbo"), len(rows)),
            "size": self._sizes.take(places),
            "quality": self._qualities.take(places),
            "nsfw_check": pa.repeat(pa.scalar(False), len(rows)),
            "attempt": pa.array(attempt.astype(np.int32)),
        }
        mask = pa.array(attempt == 1)
        for name, both in (("seed", self._seeds), ("request_key", self._keys)):
            one, two = (values.take(places) for values in both)
            columns[name] = pa.compute.if_else(mask, two, one)
        for name in MANIFEST_SCHEMA.names:
            kind = MANIFEST_SCHEMA.field(name).type
            columns.setdefault(name, pa.nulls(len(rows), kind))
        campaigns = pa.array(np.array(CAMPAIGNS, object)[self._campaign[rows]], pa.string())
        table = pa.table({name: columns[name] for name in MANIFEST_SCHEMA.names})
        table = table.append_column("campaign", campaigns)
        for number in range(PARTITIONS):
            here = np.flatnonzero(rows % PARTITIONS == number)
            part = table.take(pa.array(here))
            twins = part.take(pa.array(np.flatnonzero(self._twin[rows[here]])))
            ids = pa.compute.binary_join_element_wise(twins["prompt_id"], "twin", "-")
            twins = twins.set_column(0, "prompt_id", ids)
            own = pa.repeat(pa.scalar(f"bucket-{number:03d}"), part.num_rows + len(twins))
            whole = pa.concat_tables([part, twins])
            place = whole.column_names.index("partition_key")
            write_manifest(
                self.storage, f"bucket-{number:03d}", whole.set_column(place, "partition_key", own)
            )


def _fill(
    database: sqlite3.Connection, table: str, rows: Sequence[dict[str, Any]], verb: str = "insert"
) -> None:
    if rows:
        names = list(rows[0])
        marks = ", ".join("?" for _ in names)
        database.executemany(
            f"{verb} into {table} ({', '.join(names)}) values ({marks})",
            (list(row.values()) for row in rows),
        )
