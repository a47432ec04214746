"""The emulator's state: accounts, tasks and books, kept on disk, without any HTTP.

A task's status is never written: it follows from the clock and from two times that were fixed
when the task was created. Credits are reserved at creation and settled when the task's end has
passed. Settling is done on the next look at the account, and reads as if done on time.

Everything is in one SQLite file in the state folder, committed before an answer leaves, so that
a killed emulator has forgotten nothing when it is started on the same folder again: tasks, keys,
books, scripted faults. Rates of faults and all settings come anew with each start.

Times are unix seconds of the given clock. Money is in units of 1/10,000 credit.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from krea_dagster.emulator import faults
from krea_dagster.emulator.accounting import read_totals, task_record
from krea_dagster.emulator.callback_queue import CallbackQueue, QueuedCallback
from krea_dagster.emulator.contract import (
    MAX_SEED,
    PRICE_UNITS,
    TASK_ID_PREFIX,
    UNITS_PER_CREDIT,
    Order,
)
from krea_dagster.emulator.faults import ChosenFault, RequestKind
from krea_dagster.emulator.state_file import StateFile

LINK_LIFETIME_S: Final = 24 * 3600.0

#: The kinds of fault that can be bound to a prompt.
_WITH_PROMPT: Final = ("create", "task", "read", "file", "callback")

_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz0123456789"


class OutOfCreditsError(Exception):
    """The account has not enough credits left, or the quota is reached."""


class TooBusyError(Exception):
    """More submissions than allowed. ``retry_after_s`` is None where no advice is given."""

    def __init__(self, retry_after_s: float | None) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s


class KeyConflictError(Exception):
    """The Idempotency-Key was used for another body."""


class UndecidedError(Exception):
    """The first submission with this Idempotency-Key is not decided yet."""


class UnknownTaskError(Exception):
    """The task is not known, or not any more."""


class ForeignTaskError(Exception):
    """The task belongs to another account."""


class LinkExpiredError(Exception):
    """The link was good once."""


@dataclass(frozen=True)
class Account:
    """An account as it stands now. All amounts in units."""

    id: int
    granted: int
    reserved: int
    charged: int
    returned: int

    @property
    def held(self) -> int:
        """Reserved for tasks that have not ended."""
        return self.reserved - self.charged - self.returned

    @property
    def remaining(self) -> int:
        """What can still be spent: the balance falls when credits are reserved."""
        return self.granted - self.charged - self.held


@dataclass(frozen=True)
class EmulatedTask:
    """One task. ``ready_at`` is None where it never ends."""

    n: int
    task_id: str
    account: int
    prompt: str
    size: str
    quality: str
    used_seed: int
    reserved: int
    created_at: float
    started_at: float
    ready_at: float | None
    ends_as: str
    error_code: str | None
    faults: tuple[ChosenFault, ...]
    reads_at_end: int
    fetched: int
    file_sha256: str | None

    def status(self, now: float) -> str:
        """Return pending, processing, completed, failed or cancelled."""
        if self.ready_at is not None and now >= self.ready_at:
            return self.ends_as
        return "pending" if now < self.started_at else "processing"

    def progress(self, now: float) -> int:
        """Return 0 to 100; 100 only when completed, and 0 when it failed, as documented."""
        status = self.status(now)
        if status == "completed":
            return 100
        if status != "processing":
            return 0
        end = self.started_at + 60 if self.ready_at is None else self.ready_at
        share = (now - self.created_at) / max(end - self.created_at, 1e-9)
        return max(1, min(99, int(100 * share)))

    def fault(self, effect: str) -> ChosenFault | None:
        """Return the task fault with this effect, if the task has it."""
        return next((one for one in self.faults if one.fault.effect == effect), None)


_TASK_COLUMNS: Final = (
    "n, task_id, account, prompt, size, quality, used_seed, reserved, created_at, started_at, "
    "ready_at, ends_as, error_code, faults, reads_at_end, fetched, file_sha256"
)


@dataclass(frozen=True)
class CreateResult:
    """The outcome of a create call that was taken."""

    task: EmulatedTask
    replayed: bool


class World:
    """All that the emulator knows. Thread-safe; one process at a time per state folder.

    ``latency_s`` is how long a task takes, varied uniformly by ± the share ``latency_jitter``.
    ``max_concurrent`` is how many tasks may be unfinished, ``rate`` how many create calls a
    second are taken; beyond either the caller is told to come back. A task that never ends
    does not count as unfinished, so that it does not block the others.
    ``task_lifetime_s`` is how long after its creation a task can be read, None for ever;
    ``link_lifetime_s`` how long after the read that handed it out a link works.
    ``denies_foreign_tasks``: a read of another account's task is told that it is not one's own;
    else, that there is none.
    """

    def __init__(
        self,
        state: Path,
        *,
        clock: Callable[[], float],
        seed: int = 0,
        latency_s: float = 1.0,
        latency_jitter: float = 0.3,
        max_concurrent: int | None = None,
        rate: float | None = None,
        idempotency: bool = True,
        task_lifetime_s: float | None = None,
        link_lifetime_s: float = LINK_LIFETIME_S,
        denies_foreign_tasks: bool = True,
    ) -> None:
        self._clock = clock
        self.latency_s = latency_s
        self.latency_jitter = latency_jitter
        self.max_concurrent = max_concurrent
        self.rate = rate
        self.idempotency = idempotency
        self.task_lifetime_s = task_lifetime_s
        self.link_lifetime_s = link_lifetime_s
        self.denies_foreign_tasks = denies_foreign_tasks
        self.quota: int | None = None
        self._rates: dict[str, tuple[float, ChosenFault]] = {}
        self._tokens = float("inf") if rate is None else max(1.0, rate)
        self._tokens_at = clock()
        self._state = StateFile(state)
        self._db = self._state.db
        self._lock = self._state.lock
        self._outbox = CallbackQueue(self._state)
        start = int(self._state.meta("starts", "0")) + 1
        self._db.execute("UPDATE meta SET value = ? WHERE name = 'starts'", (str(start),))
        self._random = random.Random(f"{seed}:{start}")  # noqa: S311 - nothing secret
        secret = f"{self._random.getrandbits(128):032x}"
        self._secret = bytes.fromhex(self._state.meta("secret", secret))

    def close(self) -> None:
        """Close the state file. The world cannot be used afterwards."""
        self._state.close()

    def now(self) -> float:
        """Return the time of the world's clock."""
        return self._clock()

    def transaction(self) -> contextlib.AbstractContextManager[None]:
        """Make all that happens inside durable at once, when the outermost block is left."""
        return self._state.transaction()

    # -- accounts -----------------------------------------------------------------------------

    def add_account(self, api_key: str, granted_units: int) -> None:
        """Make an account with this key, unless there is one: then it keeps what it has."""
        with self.transaction():
            self._db.execute(
                "INSERT OR IGNORE INTO accounts (key_hash, granted) VALUES (?, ?)",
                (_hash(api_key), granted_units),
            )

    def account(self, api_key: str) -> Account | None:
        """Return the account of a key as it stands now, None where there is none."""
        with self.transaction():
            self._settle()
            row = self._db.execute(
                "SELECT id, granted, reserved, charged, returned FROM accounts WHERE key_hash = ?",
                (_hash(api_key),),
            ).fetchone()
        return None if row is None else Account(*row)

    # -- tasks --------------------------------------------------------------------------------

    def create(
        self,
        account: Account,
        order: Order,
        *,
        idempotency_key: str | None = None,
        task_faults: Sequence[ChosenFault] = (),
        ignore_key: bool = False,
        undecided_s: float = 0.0,
    ) -> CreateResult:
        """Create a task and reserve its credits, or return the one that the key created.

        Scripted and rated task and callback faults are chosen here, for tasks that really come to
        exist, after ``task_faults``. While ``undecided_s`` lasts, a repeat raises UndecidedError.
        Raises TooBusyError, KeyConflictError, UndecidedError, OutOfCreditsError.
        """
        with self.transaction():
            self._take_token()
            honoured = self.idempotency and not ignore_key
            if honoured and idempotency_key is not None:
                known = self._replay(account, order, idempotency_key)
                if known is not None:
                    return CreateResult(known, replayed=True)
            self._check_room()
            price = PRICE_UNITS[order.quality]
            self._check_credits(account, price)
            now = self.now()
            row = self._planned(order, task_faults, now)
            price = _told_price(row, price)
            row.update(account=account.id, idempotency_key=idempotency_key, reserved=price)
            task = self._insert(row)
            if order.callback_url is not None and task.ready_at is not None:
                self._outbox.plan(
                    task.n, task.faults, created_at=task.created_at, ready_at=task.ready_at
                )
            self._db.execute(
                "UPDATE accounts SET reserved = reserved + ? WHERE id = ?", (price, account.id)
            )
            if idempotency_key is not None:
                self._db.execute(
                    "INSERT OR IGNORE INTO idempotency VALUES (?, ?, ?, ?, ?)",
                    (account.id, idempotency_key, order.body_hash, task.n, now + undecided_s),
                )
            return CreateResult(task, replayed=False)

    def take_key(self, account: Account, key: str) -> None:
        """Have a key count as used for another body, unless it has created a task."""
        with self.transaction():
            known = self._db.execute(
                "SELECT 1 FROM idempotency WHERE account = ? AND key = ?", (account.id, key)
            ).fetchone()
            if known is None:
                self._db.execute(
                    "INSERT OR IGNORE INTO taken_keys VALUES (?, ?)", (account.id, key)
                )

    def task(self, task_id: str, account: Account) -> EmulatedTask:
        """Return a task of this account. Raises UnknownTaskError or ForeignTaskError."""
        task = self._find(task_id)
        if task is None or self._is_over(task) or task.fault("vanished"):
            raise UnknownTaskError
        if task.account != account.id:
            raise ForeignTaskError if self.denies_foreign_tasks else UnknownTaskError
        return task

    def count_read_at_end(self, task: EmulatedTask) -> int:
        """Count one more read of an ended task; return how many there were before."""
        with self.transaction():
            self._db.execute(
                "UPDATE tasks SET reads_at_end = reads_at_end + 1 WHERE n = ?", (task.n,)
            )
        return task.reads_at_end

    def tasks(
        self, account: Account, *, status: str | None, page: int, page_size: int
    ) -> tuple[list[EmulatedTask], int]:
        """Return one page of an account's tasks, newest first, and how many there are in all.

        ``status`` is pending, processing (which includes pending), completed, failed or
        cancelled.
        """
        with self.transaction():
            now = self._settle()
            where = "account = ?"
            values: list[Any] = [account.id]
            if status == "pending":
                where += " AND settled = 0 AND started_at > ?"
                values.append(now)
            elif status == "processing":
                where += " AND settled = 0"
            elif status is not None:
                where += " AND settled = 1 AND ends_as = ?"
                values.append(status)
            if self.task_lifetime_s is not None:
                where += " AND created_at > ?"
                values.append(now - self.task_lifetime_s)
            # Only fixed text is put together here; every value is bound.
            total = self._db.execute(f"SELECT count(*) FROM tasks WHERE {where}", values)  # noqa: S608
            count = int(total.fetchone()[0])
            rows = self._db.execute(
                f"SELECT {_TASK_COLUMNS} FROM tasks WHERE {where} "  # noqa: S608
                "ORDER BY n DESC LIMIT ? OFFSET ?",
                [*values, page_size, (page - 1) * page_size],
            ).fetchall()
        return [_task(row) for row in rows], count

    # -- links and files ----------------------------------------------------------------------

    def link_path(self, task: EmulatedTask) -> str:
        """Return a fresh link to a task's picture, as a path: it ends a day after now."""
        expires_ms = int((self.now() + self.link_lifetime_s) * 1000)
        name = f"{task.task_id}-{expires_ms}"
        return f"/files/{name}-{self._sign(name)}.png"

    def file(self, name: str) -> EmulatedTask:
        """Return the task whose picture a link names, and count the fetch.

        ``name`` is the last part of the path. The task says how often it was fetched before.
        Raises UnknownTaskError for a link that was never handed out, LinkExpiredError.
        """
        stem, _, signature = name.removesuffix(".png").rpartition("-")
        if not hmac.compare_digest(self._sign(stem).encode(), signature.encode()):
            raise UnknownTaskError
        task_id, _, expires_ms = stem.rpartition("-")
        task = self._find(task_id)
        if task is None or self._is_over(task):
            raise UnknownTaskError
        if self.now() * 1000 >= int(expires_ms):
            raise LinkExpiredError
        with self.transaction():
            self._db.execute("UPDATE tasks SET fetched = fetched + 1 WHERE n = ?", (task.n,))
        return task

    def rendered(self, task: EmulatedTask, sha256: str) -> None:
        """Note the hash of a task's undamaged picture."""
        if task.file_sha256 is None:
            with self.transaction():
                self._db.execute("UPDATE tasks SET file_sha256 = ? WHERE n = ?", (sha256, task.n))

    # -- callbacks ----------------------------------------------------------------------------

    def due_calls(self, most: int, *, without: Collection[int] = ()) -> list[QueuedCallback]:
        """Return the next calls to make, the earliest first, whether due or not yet.

        ``without`` are those that are under way.
        """
        return self._outbox.due(most, without=without)

    def called(self, call: QueuedCallback, status: int) -> None:
        """Note what a call was answered with, 0 for nothing; plan its repeat, or give it up."""
        self._outbox.answered(call, status, self.now())

    def task_called_about(self, call: QueuedCallback) -> EmulatedTask:
        """Return the task that a call is about."""
        with self._lock:
            found = self._db.execute(
                f"SELECT {_TASK_COLUMNS} FROM tasks WHERE n = ?",  # noqa: S608
                (call.n,),
            )
            return _task(found.fetchone())

    def unused_task_id(self) -> str:
        """Return an id as a task could have, and none has."""
        with self._lock:
            return self._new_task_id(self.now())

    # -- faults -------------------------------------------------------------------------------

    def script(
        self, name: str, n: int = 1, *, match: str | None = None, arg: str | float | None = None
    ) -> None:
        """Have a fault strike the next ``n`` requests of its kind.

        With ``match``, only those for a prompt that holds this text. Scripted faults strike in
        the order in which they were scripted, and before those at a rate. Raises
        UnknownFaultError.
        """
        chosen = faults.choose(name, arg)
        if match is not None and chosen.fault.kind not in _WITH_PROMPT:
            raise faults.UnknownFaultError(f"the fault {name!r} has no prompt to match")
        if n < 1:
            raise faults.UnknownFaultError(f"{name}: a count is at least 1")
        with self.transaction():
            self._db.execute(
                "INSERT INTO scripts (name, kind, arg, match, still) VALUES (?, ?, ?, ?, ?)",
                (name, chosen.fault.kind, chosen.arg or None, match, n),
            )

    def unconsumed(self) -> list[dict[str, Any]]:
        """Return the scripted faults that have not struck yet: name, n left, match, arg."""
        with self._lock:
            rows = self._db.execute(
                "SELECT name, still, match, arg FROM scripts WHERE still > 0 ORDER BY id"
            ).fetchall()
        return [dict(zip(("name", "n", "match", "arg"), row, strict=True)) for row in rows]

    def forget_scripts(self) -> None:
        """Drop the scripted faults that have not struck yet."""
        with self.transaction():
            self._db.execute("DELETE FROM scripts")

    def set_rate(self, name: str, rate: float, *, arg: str | float | None = None) -> None:
        """Have a fault strike this share of the requests of its kind; 0 ends it.

        Raises UnknownFaultError.
        """
        chosen = faults.choose(name, arg)
        if not 0 <= rate <= 1:
            raise faults.UnknownFaultError(f"{name}: a rate is from 0.0 to 1.0, not {rate}")
        with self._lock:
            self._rates.pop(name, None)
            if rate > 0:
                self._rates[name] = (rate, chosen)

    def rates(self) -> dict[str, float]:
        """Return the faults that strike at a rate."""
        with self._lock:
            return {name: rate for name, (rate, _) in self._rates.items()}

    def set_quota(self, most_credits: float | None) -> None:
        """Refuse with 402 all that would bring charged and reserved above so many credits."""
        self.quota = None if most_credits is None else round(most_credits * UNITS_PER_CREDIT)

    def apply(self, wish: faults.FaultOption) -> None:
        """Do what a command line asked for. Raises UnknownFaultError."""
        if wish.name == faults.QUOTA:
            self.set_quota(float(wish.arg or 0))
        elif wish.rate is not None:
            self.set_rate(wish.name, wish.rate, arg=wish.arg)
        else:
            self.script(wish.name, wish.n, arg=wish.arg)

    def choose(self, kind: RequestKind, prompt: str = "") -> ChosenFault | None:
        """Return the fault that strikes a request of this kind now, and use up its script."""
        with self.transaction():
            row = self._db.execute(
                "SELECT id, name, arg FROM scripts WHERE kind = ? AND still > 0 "
                "AND (match IS NULL OR instr(?, match) > 0) ORDER BY id LIMIT 1",
                (kind, prompt),
            ).fetchone()
            if row is not None:
                self._db.execute("UPDATE scripts SET still = still - 1 WHERE id = ?", row[:1])
                return faults.choose(row[1], row[2])
            for rate, chosen in self._rates.values():
                if chosen.fault.kind == kind and self._random.random() < rate:
                    return chosen
            return None

    def bytes(self, count: int) -> bytes:
        """Return random bytes from the seeded source."""
        with self._lock:
            return self._random.randbytes(count)

    # -- the books ----------------------------------------------------------------------------

    def count(self, kind: str, what: str) -> None:
        """Count one more request of a kind: ``what`` is its status, or another word."""
        with self.transaction():
            self._db.execute(
                "INSERT INTO counts VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET n = n + 1",
                (kind, what),
            )

    def stats(self, *, tasks: bool = True) -> dict[str, Any]:
        """Return what was asked, created, charged and fetched, as plain JSON values.

        The fields are described in the package's ``openapi.yaml``, under ``Books``.
        """
        with self.transaction():
            now = self._settle()
            return {
                **read_totals(self._db),
                "unconsumed_faults": self.unconsumed(),
                **({"tasks": [task_record(*row, now) for row in self._booked()]} if tasks else {}),
            }

    def _booked(self) -> Iterator[tuple[EmulatedTask, dict[str, Any]]]:
        extra = ("idempotency_key", "seed", "account", "callback_url")
        rows = self._db.execute(
            f"SELECT {_TASK_COLUMNS}, {', '.join(extra)} FROM tasks ORDER BY n"  # noqa: S608
        )
        for row in rows:
            yield _task(row[: -len(extra)]), dict(zip(extra, row[-len(extra) :], strict=True))

    # -- inside -------------------------------------------------------------------------------

    def _sign(self, text: str) -> str:
        return hmac.new(self._secret, text.encode(), "sha256").hexdigest()[:16]

    def _is_over(self, task: EmulatedTask) -> bool:
        lifetime = self.task_lifetime_s
        return lifetime is not None and self.now() >= task.created_at + lifetime

    def _find(self, task_id: str) -> EmulatedTask | None:
        with self._lock:
            row = self._db.execute(
                f"SELECT {_TASK_COLUMNS} FROM tasks WHERE task_id = ?",  # noqa: S608
                (task_id,),
            ).fetchone()
        return None if row is None else _task(row)

    def _settle(self) -> float:
        """Move the credits of tasks whose end has passed; return the time that was looked at."""
        now = self.now()  # once: what is added up and what is marked must be the same tasks
        ended = self._db.execute(
            "SELECT account, ends_as = 'completed', sum(reserved) FROM tasks "
            "WHERE settled = 0 AND ready_at <= ? GROUP BY 1, 2",
            (now,),
        ).fetchall()
        if not ended:
            return now
        self._db.execute("UPDATE tasks SET settled = 1 WHERE settled = 0 AND ready_at <= ?", (now,))
        for account, completed, units in ended:
            column = "charged" if completed else "returned"
            self._db.execute(
                f"UPDATE accounts SET {column} = {column} + ? WHERE id = ?",  # noqa: S608
                (units, account),
            )
        return now

    def _take_token(self) -> None:
        if self.rate is None:
            return
        now = self.now()
        full = max(1.0, self.rate)
        self._tokens = min(full, self._tokens + (now - self._tokens_at) * self.rate)
        self._tokens_at = now
        if self._tokens < 1:
            raise TooBusyError((1 - self._tokens) / self.rate)
        self._tokens -= 1

    def _check_room(self) -> None:
        if self.max_concurrent is None:
            return
        row = self._db.execute(
            "SELECT count(*) FROM tasks WHERE settled = 0 AND ready_at > ?", (self.now(),)
        ).fetchone()
        if row[0] >= self.max_concurrent:
            raise TooBusyError(None)

    def _check_credits(self, account: Account, price: int) -> None:
        if account.remaining < price:
            raise OutOfCreditsError
        if self.quota is not None and account.charged + account.held + price > self.quota:
            raise OutOfCreditsError

    def _replay(self, account: Account, order: Order, key: str) -> EmulatedTask | None:
        row = self._db.execute(
            "SELECT body_hash, undecided_until, n FROM idempotency WHERE account = ? AND key = ?",
            (account.id, key),
        ).fetchone()
        if row is None:
            taken = self._db.execute(
                "SELECT 1 FROM taken_keys WHERE account = ? AND key = ?", (account.id, key)
            ).fetchone()
            if taken is not None:
                raise KeyConflictError
            return None
        body_hash, undecided_until, n = row
        if body_hash != order.body_hash:
            raise KeyConflictError
        if self.now() < undecided_until:
            raise UndecidedError
        found = self._db.execute(f"SELECT {_TASK_COLUMNS} FROM tasks WHERE n = ?", (n,))  # noqa: S608
        return _task(found.fetchone())

    def _planned(self, order: Order, asked: Sequence[ChosenFault], now: float) -> dict[str, Any]:
        """Decide a new task's id, seed, faults and end; return them as columns."""
        chosen = [one for one in asked if not (one.once and self._known(order))]
        struck = self.choose("task", order.prompt)
        if struck is not None:
            chosen.append(struck)
        spread = 1 + self.latency_jitter * self._random.uniform(-1, 1)
        duration_s = max(0.0, self.latency_s * spread)
        ready_at, ends_as, error_code = _end(chosen, now, duration_s)
        if order.callback_url is not None and ready_at is not None:
            lied_about = self.choose("callback", order.prompt)
            chosen += [] if lied_about is None else [lied_about]
        return {
            "task_id": self._new_task_id(now),
            "fingerprint": order.fingerprint,
            "prompt": order.prompt,
            "size": order.size,
            "quality": order.quality,
            "seed": order.seed,
            "nsfw_check": order.nsfw_check,
            "callback_url": order.callback_url,
            "used_seed": order.seed or self._random.randint(1, MAX_SEED),
            "created_at": now,
            "started_at": now + duration_s * 0.2,
            "ready_at": ready_at,
            "ends_as": ends_as,
            "error_code": error_code,
            "faults": json.dumps([[one.fault.name, one.arg] for one in chosen]),
        }

    def first_task_id(self, account: Account) -> str:
        """Return the id of an account's first task."""
        found = self._db.execute(
            "SELECT task_id FROM tasks WHERE account = ? ORDER BY n LIMIT 1", (account.id,)
        )
        return str(found.fetchone()[0])

    def _insert(self, row: dict[str, Any]) -> EmulatedTask:
        # The names are those of _planned and create, never a caller's; the values are bound.
        names = ", ".join(row)
        marks = ", ".join("?" * len(row))
        cursor = self._db.execute(
            f"INSERT INTO tasks ({names}) VALUES ({marks})",  # noqa: S608
            tuple(row.values()),
        )
        found = self._db.execute(
            f"SELECT {_TASK_COLUMNS} FROM tasks WHERE n = ?",  # noqa: S608
            (cursor.lastrowid,),
        )
        return _task(found.fetchone())

    def _known(self, order: Order) -> bool:
        row = self._db.execute(
            "SELECT 1 FROM tasks WHERE fingerprint = ? LIMIT 1", (order.fingerprint,)
        ).fetchone()
        return row is not None

    def _new_task_id(self, now: float) -> str:
        while True:
            tail = "".join(self._random.choices(_ALPHABET, k=8))
            task_id = f"{TASK_ID_PREFIX}{int(now):010d}-{tail}"
            if self._find(task_id) is None:
                return task_id


def _end(
    chosen: Sequence[ChosenFault], now: float, duration_s: float
) -> tuple[float | None, str, str | None]:
    """Decide when a task ends (None: never), as what, and with which error code."""
    effects = {one.fault.effect: one for one in chosen}
    if "slow" in effects:
        duration_s += effects["slow"].seconds
    never = "stuck" in effects or "final_status" in effects
    ready_at = None if never else now + duration_s
    if "fail" in effects:
        return ready_at, "failed", effects["fail"].arg
    return ready_at, "cancelled" if "cancel" in effects else "completed", None


def _task(row: Sequence[Any]) -> EmulatedTask:
    values = list(row)
    at = len(values) - 4  # the place of the faults in _TASK_COLUMNS
    raw = values[at]
    values[at] = (
        ()
        if raw == "[]"
        else tuple(faults.choose(name, arg or None) for name, arg in json.loads(raw))
    )
    return EmulatedTask(*values)


def _hash(api_key: str) -> str:
    return hashlib.sha256(api_key.encode("utf-8", "surrogateescape")).hexdigest()


def _told_price(row: Mapping[str, Any], units: int) -> int:
    """Return what a task costs, in units: the published price, or what a fault says."""
    for name, arg in json.loads(row["faults"]):
        if name == "price":
            return round(float(arg) * UNITS_PER_CREDIT)
    return units
