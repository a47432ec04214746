"""The emulator's state: accounts, tasks, credits and faults, kept on disk, without HTTP.

A task's status is never written: it follows from the clock and from two times that are fixed
when the task is created. Credits are reserved at creation and settled after the task's end.
Settling is done at the next look at the account, with the same result as if done on time.

Everything is in one SQLite file in the state folder, committed before a response leaves. So an
emulator that is killed and started on the same folder still has its tasks, keys, counts and
scripted faults. Rates of faults and all settings are given with each start.

Times are unix seconds of the given clock. Money is in units of 1/10,000 credit.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from krea_dagster.emulator import contract, faults
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
from krea_dagster.emulator.model import TASK_COLUMNS, Account, CreateResult, EmulatedTask
from krea_dagster.emulator.state_file import StateFile

LINK_LIFETIME_S: Final = 24 * 3600.0

#: The kinds of fault that can be bound to a prompt.
_WITH_PROMPT: Final = ("create", "task", "read", "file", "callback")

_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz0123456789"

_SELECT_TASK: Final = f"SELECT {TASK_COLUMNS} FROM tasks"  # noqa: S608


class LinkExpiredError(Exception):
    """The link has worked once."""


class World:
    """The state and the rules of the emulator. Thread-safe; one process per state folder.

    A call that the API would refuse raises ``contract.ErrorResponse``.

    Args:
        state: the folder of the state file.
        clock: unix seconds.
        seed: of all random draws.
        latency_s: seconds that a task takes, varied uniformly by ± the share ``latency_jitter``.
        latency_jitter: from 0 to 1.
        max_concurrent: most unfinished tasks, None for no limit; beyond it the response is 429.
            A task that never ends does not count, so that it does not block the others.
        rate: create calls a second, None for no limit; beyond it the response is 429.
        idempotency: whether the Idempotency-Key is honoured.
        task_lifetime_s: how long after its creation a task can be read, None for no limit.
        link_lifetime_s: how long after the read that returned it a link works.
        denies_foreign_tasks: whether a read of another account's task gets 403, or else 404.
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
        self._callbacks = CallbackQueue(self._state)
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
        """Commit everything inside together, at the end of the outermost block."""
        return self._state.transaction()

    # -- accounts -----------------------------------------------------------------------------

    def add_account(self, api_key: str, granted_units: int) -> None:
        """Create an account with this key. An account that exists keeps its balance."""
        with self.transaction():
            self._db.execute(
                "INSERT OR IGNORE INTO accounts (key_hash, granted) VALUES (?, ?)",
                (_hash(api_key), granted_units),
            )

    def account(self, api_key: str) -> Account | None:
        """Return the account of a key with its balance, None if there is none."""
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

        Scripted and rated task and callback faults are chosen here, so that they strike only
        tasks that are created; they come after ``task_faults``. For ``undecided_s`` seconds a
        repeat is told that the first call is undecided. Raises ErrorResponse.
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
            row = self._new_task(order, task_faults, now)
            price = _price_of(row, price)
            row.update(account=account.id, idempotency_key=idempotency_key, reserved=price)
            task = self._insert(row)
            if order.callback_url is not None and task.ready_at is not None:
                self._callbacks.plan(
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
        """Mark a key as used for another body, unless it has created a task."""
        with self.transaction():
            known = self._db.execute(
                "SELECT 1 FROM idempotency WHERE account = ? AND key = ?", (account.id, key)
            ).fetchone()
            if known is None:
                self._db.execute(
                    "INSERT OR IGNORE INTO taken_keys VALUES (?, ?)", (account.id, key)
                )

    def task(self, task_id: str, account: Account) -> EmulatedTask:
        """Return a task of this account. Raises ErrorResponse 404 or 403."""
        task = self._find(task_id)
        if task is None or self._is_over(task) or task.fault("vanished"):
            raise contract.task_not_found()
        if task.account != account.id:
            if self.denies_foreign_tasks:
                raise contract.access_denied("read")
            raise contract.task_not_found()
        return task

    def first_task_id(self, account: Account) -> str:
        """Return the id of an account's first task."""
        found = self._db.execute(
            "SELECT task_id FROM tasks WHERE account = ? ORDER BY n LIMIT 1", (account.id,)
        )
        return str(found.fetchone()[0])

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
                f"{_SELECT_TASK} WHERE {where} ORDER BY n DESC LIMIT ? OFFSET ?",
                [*values, page_size, (page - 1) * page_size],
            ).fetchall()
        return [EmulatedTask.from_row(row) for row in rows], count

    # -- links and files ----------------------------------------------------------------------

    def link_path(self, task: EmulatedTask) -> str:
        """Return a new link to a task's image, as a path."""
        expires_ms = int((self.now() + self.link_lifetime_s) * 1000)
        name = f"{task.task_id}-{expires_ms}"
        return f"/files/{name}-{self._sign(name)}.png"

    def file(self, name: str) -> EmulatedTask:
        """Return the task whose image a link names, and count the fetch.

        ``name`` is the last part of the path. The task holds how often it was fetched before.
        Raises ErrorResponse 404 for a link that was never returned, LinkExpiredError.
        """
        stem, _, signature = name.removesuffix(".png").rpartition("-")
        if not hmac.compare_digest(self._sign(stem).encode(), signature.encode()):
            raise contract.task_not_found()
        task_id, _, expires_ms = stem.rpartition("-")
        task = self._find(task_id)
        if task is None or self._is_over(task):
            raise contract.task_not_found()
        if self.now() * 1000 >= int(expires_ms):
            raise LinkExpiredError
        with self.transaction():
            self._db.execute("UPDATE tasks SET fetched = fetched + 1 WHERE n = ?", (task.n,))
        return task

    def rendered(self, task: EmulatedTask, sha256: str) -> None:
        """Record the hash of a task's undamaged image."""
        if task.file_sha256 is None:
            with self.transaction():
                self._db.execute("UPDATE tasks SET file_sha256 = ? WHERE n = ?", (sha256, task.n))

    # -- callbacks ----------------------------------------------------------------------------

    def due_callbacks(self, most: int, *, without: Collection[int] = ()) -> list[QueuedCallback]:
        """Return the next callbacks, the earliest first, due or not, except ``without``."""
        return self._callbacks.due(most, without=without)

    def callback_answered(self, call: QueuedCallback, status: int) -> None:
        """Record a callback's response, 0 for none; plan its repeat, or give it up."""
        self._callbacks.answered(call, status, self.now())

    def task_of_callback(self, call: QueuedCallback) -> EmulatedTask:
        """Return the task of a callback."""
        return self._task_number(call.n)

    def unused_task_id(self) -> str:
        """Return a task id that is not in use."""
        with self._lock:
            return self._new_task_id(self.now())

    # -- faults -------------------------------------------------------------------------------

    def script(
        self, name: str, n: int = 1, *, match: str | None = None, arg: str | float | None = None
    ) -> None:
        """Make a fault strike the next ``n`` requests of its kind.

        With ``match``, only those for a prompt that contains this text. Scripted faults strike in
        the order in which they were scripted, and before those at a rate. Raises
        UnknownFaultError.
        """
        chosen = faults.parse_fault(name, arg)
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
        """Make a fault strike this share (0 to 1) of the requests of its kind; 0 ends it.

        Raises UnknownFaultError.
        """
        chosen = faults.parse_fault(name, arg)
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
        """Refuse with 402 what would raise charged plus reserved credits above a limit."""
        self.quota = None if most_credits is None else round(most_credits * UNITS_PER_CREDIT)

    def apply(self, option: faults.FaultOption) -> None:
        """Apply an option of the command line. Raises UnknownFaultError."""
        if option.name == faults.QUOTA:
            self.set_quota(float(option.arg or 0))
        elif option.rate is not None:
            self.set_rate(option.name, option.rate, arg=option.arg)
        else:
            self.script(option.name, option.n, arg=option.arg)

    def choose_fault(self, kind: RequestKind, prompt: str = "") -> ChosenFault | None:
        """Return the fault that strikes a request of this kind now, and use up its script."""
        with self.transaction():
            row = self._db.execute(
                "SELECT id, name, arg FROM scripts WHERE kind = ? AND still > 0 "
                "AND (match IS NULL OR instr(?, match) > 0) ORDER BY id LIMIT 1",
                (kind, prompt),
            ).fetchone()
            if row is not None:
                self._db.execute("UPDATE scripts SET still = still - 1 WHERE id = ?", row[:1])
                return faults.parse_fault(row[1], row[2])
            for rate, chosen in self._rates.values():
                if chosen.fault.kind == kind and self._random.random() < rate:
                    return chosen
            return None

    def bytes(self, count: int) -> bytes:
        """Return random bytes of the seeded source."""
        with self._lock:
            return self._random.randbytes(count)

    # -- statistics ---------------------------------------------------------------------------

    def count(self, kind: str, what: str) -> None:
        """Count one more request of a kind. ``what`` is its status, or another word."""
        self._state.count(kind, what)

    def stats(self, *, tasks: bool = True) -> dict[str, Any]:
        """Return counts of requests, tasks and callbacks and sums of credits, as JSON values.

        The fields are described in the package's ``openapi.yaml``, under ``Stats``.
        """
        with self.transaction():
            now = self._settle()
            found = {**read_totals(self._db), "unconsumed_faults": self.unconsumed()}
            if tasks:
                found["tasks"] = [task_record(*row, now) for row in self._tasks_as_sent()]
            return found

    def _tasks_as_sent(self) -> Iterator[tuple[EmulatedTask, dict[str, Any]]]:
        extra = ("idempotency_key", "seed", "account", "callback_url")
        rows = self._db.execute(
            f"SELECT {TASK_COLUMNS}, {', '.join(extra)} FROM tasks ORDER BY n"  # noqa: S608
        )
        for row in rows:
            sent = dict(zip(extra, row[-len(extra) :], strict=True))
            yield EmulatedTask.from_row(row[: -len(extra)]), sent

    # -- inside -------------------------------------------------------------------------------

    def _sign(self, text: str) -> str:
        return hmac.new(self._secret, text.encode(), "sha256").hexdigest()[:16]

    def _is_over(self, task: EmulatedTask) -> bool:
        lifetime = self.task_lifetime_s
        return lifetime is not None and self.now() >= task.created_at + lifetime

    def _find(self, task_id: str) -> EmulatedTask | None:
        with self._lock:
            row = self._db.execute(f"{_SELECT_TASK} WHERE task_id = ?", (task_id,)).fetchone()
        return None if row is None else EmulatedTask.from_row(row)

    def _task_number(self, n: int | None) -> EmulatedTask:
        with self._lock:
            row = self._db.execute(f"{_SELECT_TASK} WHERE n = ?", (n,)).fetchone()
        return EmulatedTask.from_row(row)

    def _settle(self) -> float:
        """Settle the credits of tasks that have ended; return the time at which."""
        now = self.now()  # once: the tasks that are added up and marked must be the same
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
            wait_s = (1 - self._tokens) / self.rate
            raise contract.rate_limited("create", str(max(1, math.ceil(wait_s))))
        self._tokens -= 1

    def _check_room(self) -> None:
        if self.max_concurrent is None:
            return
        row = self._db.execute(
            "SELECT count(*) FROM tasks WHERE settled = 0 AND ready_at > ?", (self.now(),)
        ).fetchone()
        if row[0] >= self.max_concurrent:
            raise contract.rate_limited("create")

    def _check_credits(self, account: Account, price: int) -> None:
        spent = account.charged + account.held + price
        if account.remaining < price or (self.quota is not None and spent > self.quota):
            raise contract.out_of_credits("create")

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
                raise contract.idempotency_conflict()
            return None
        body_hash, undecided_until, n = row
        if body_hash != order.body_hash:
            raise contract.idempotency_conflict()
        if self.now() < undecided_until:
            raise contract.paid_outcome_unknown()
        return self._task_number(n)

    def _new_task(
        self, order: Order, requested: Sequence[ChosenFault], now: float
    ) -> dict[str, Any]:
        """Decide a new task's id, seed, faults and end; return them as columns."""
        chosen = [one for one in requested if not (one.once and self._known(order))]
        struck = self.choose_fault("task", order.prompt)
        if struck is not None:
            chosen.append(struck)
        spread = 1 + self.latency_jitter * self._random.uniform(-1, 1)
        duration_s = max(0.0, self.latency_s * spread)
        ready_at, ends_as, error_code = _end(chosen, now, duration_s)
        if order.callback_url is not None and ready_at is not None:
            callback_fault = self.choose_fault("callback", order.prompt)
            chosen += [] if callback_fault is None else [callback_fault]
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

    def _insert(self, row: dict[str, Any]) -> EmulatedTask:
        # The names are those of _new_task and create, never a caller's; the values are bound.
        names = ", ".join(row)
        marks = ", ".join("?" * len(row))
        cursor = self._db.execute(
            f"INSERT INTO tasks ({names}) VALUES ({marks})",  # noqa: S608
            tuple(row.values()),
        )
        return self._task_number(cursor.lastrowid)

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


def _hash(api_key: str) -> str:
    return hashlib.sha256(api_key.encode("utf-8", "surrogateescape")).hexdigest()


def _price_of(row: Mapping[str, Any], units: int) -> int:
    """Return a task's price in units: the published one, or that of a fault."""
    for name, arg in json.loads(row["faults"]):
        if name == "price":
            return round(float(arg) * UNITS_PER_CREDIT)
    return units
