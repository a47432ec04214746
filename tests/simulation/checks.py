"""What must be true after every scenario."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from krea_dagster.engine.journal import schema
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.rows import scopes_of_charge
from krea_dagster.engine.policy import Policy
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import Event, State, replay
from krea_dagster.errors import IllegalTransition, JournalError, KreaError, StorageError
from tests.simulation.scenario import HOUR_S, ForgedCallback, Outage, Scenario, Stop
from tests.simulation.world import SimulatedWorld, open_journal

if TYPE_CHECKING:
    from tests.simulation.play import ScenarioResult
    from tests.simulation.process import Process

#: Faults after which a paid image cannot be fetched.
_NEVER_HAD = frozenset({"stuck", "unknown_final_status", "vanished", "private_link", "file_link"})
#: States whose task has to be read at the server.
_AT_SERVER = frozenset({State.SUBMITTED, State.COMPLETED, State.EXPIRED})
#: Task states at the server that ended without an image and without a charge.
_NOT_ALIVE = ("failed", "cancelled")


def wrong_end(process: Process, scenario: Scenario) -> str | None:
    """Return why a run may not end as this one did, None if it may."""
    error = process.error
    if error is None:
        return None
    for one in _leaves(error):
        if isinstance(one, IllegalTransition) or not isinstance(one, KreaError):
            return f"{process.name} broke: {one!r}"
        part = "journal" if isinstance(one, JournalError) else "store"
        if not isinstance(one, JournalError | StorageError):
            return f"{process.name} broke: {one!r}"
        if not _may_end_for(part, process, scenario):
            return f"{process.name} ended by {type(one).__name__}, without need: {one}"
    return None


def _may_end_for(part: str, process: Process, scenario: Scenario) -> bool:
    """Whether a run may end because a part is away: a short outage has to be waited for."""
    away = [one for one in scenario.events if isinstance(one, Outage) and one.what == part]
    if not process.carries or not hasattr(Policy, "outage_patience_s"):
        return bool(away)  # not within the engine
    if scenario.has(Stop, run=process.run.number):
        return bool(away)  # a run that is told to stop waits for nothing
    for_good = any(one.how == "is full" for one in away)
    return for_good or sum(one.for_s for one in away) > Policy.outage_patience_s


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if hasattr(error, "exceptions"):
        for one in error.exceptions:
            yield from _leaves(one)
    else:
        yield error


def not_waited_for(scenario: Scenario, records: Iterable[Record]) -> Iterator[str]:
    """Yield requests that runs have not finished although they only met short outages."""
    runs = scenario.runs
    away = [one for one in scenario.events if isinstance(one, Outage)]
    plain = len(runs) + len(away) == len(scenario.events) and not any(
        run.cap_images is not None or not run.wait or run.patience_s < 600 or run.kind != "run"
        for run in runs
    )
    passes = sum(one.for_s for one in away) < 200 and not any(
        one.how in ("is full", "loses its answers") for one in away
    )
    if not plain or not passes or scenario.server.link_lifetime_s < HOUR_S:
        return
    wanted = {scenario.rows[number].prompt for run in runs for number in run.rows}
    for record in records:
        if record.request.prompt in wanted and record.state is not State.STORED:
            yield (
                f"{record.request_key[:8]} is {record.state.value} ({record.error_message}) after "
                "outages that passed"
            )


def check_all(
    world: SimulatedWorld, scenario: Scenario, processes: Sequence[Process], result: ScenarioResult
) -> None:
    """Compare the journal with the server's records and with the disk."""
    journal = open_journal(world)
    try:
        _Checks(world, scenario, processes, result, journal).all()
    finally:
        journal.close()


class _Checks:
    def __init__(
        self,
        world: SimulatedWorld,
        scenario: Scenario,
        processes: Sequence[Process],
        result: ScenarioResult,
        journal: Journal,
    ) -> None:
        self.world, self.scenario, self.processes = world, scenario, processes
        self.told, self.journal = result, journal
        self.stats = world.emulated.stats()
        self.tasks: list[dict[str, Any]] = self.stats["tasks"]
        self.records = {record.request_key: record for record in journal.all_records()}
        self.charges = {charge.idempotency_key: charge for charge in journal.charges()}
        self.honoured = scenario.server.honours_keys and not scenario.has_fault(
            "ignore_idempotency"
        )

    def fail(self, said: str) -> None:
        """Note a failure."""
        self.told.failures.append(said)

    def all(self) -> None:
        """Run every check."""
        self.events()
        self.claims()
        self.every_task_is_in_the_journal()
        self.nothing_bought_twice()
        self.nothing_lost()
        self.charges_agree()
        self.sums()
        self.caps()
        self.wishes()
        if self.stats["key_leaks"]:
            self.fail("the API key was sent to the file host")
        for record in self.records.values():
            self.told.counts[f"ended {record.state.value}"] += 1
        self.told.counts["images"] += len(self.records)
        self.told.counts["tasks at the server"] += len(self.tasks)
        self.told.counts["posts"] += self.stats["submit_posts"]

    def events(self) -> None:
        """The events of each request lead to its state, without a gap."""
        with self.journal.database.read() as connection:
            rows = connection.execute(
                select(schema.events).order_by(schema.events.c.request_key, schema.events.c.seq)
            ).all()
            columns = schema.requests.c.request_key, schema.requests.c.state
            states = {row.request_key: row.state for row in connection.execute(select(*columns))}
        by_key: dict[str, list[Any]] = defaultdict(list)
        for row in rows:
            by_key[row.request_key].append(row)
            self.told.counts[f"event {row.event}"] += 1
        for key, state in states.items():
            events = by_key[key]
            if [row.seq for row in events] != list(range(len(events))):
                self.fail(f"the events of {key[:8]} have a gap: {[row.seq for row in events]}")
            try:
                result = replay(Event(row.event) for row in events)
            except IllegalTransition as error:
                self.fail(f"the events of {key[:8]} lead nowhere: {error}")
                continue
            if result is None or result.value != state:
                self.fail(f"the events of {key[:8]} lead to {result}, and it is {state}")

    def claims(self) -> None:
        """A run that ended holds no claim; a killed one may, and counts as dead."""
        killed = {process.name for process in self.processes if process.ended != "done"}
        with self.journal.database.read() as connection:
            owners = connection.execute(select(schema.owners)).all()
            held = connection.execute(
                select(schema.requests.c.request_key, schema.requests.c.claimed_by).where(
                    schema.requests.c.claimed_by.is_not(None)
                )
            ).all()
        runs = {row.owner: row.run_id for row in owners}
        for row in owners:
            if row.run_id not in killed:
                self.fail(f"{row.run_id} has ended and is still entered as at work")
        for row in held:
            if runs.get(row.claimed_by) not in killed:
                self.fail(f"{row.request_key[:8]} is still claimed by {runs.get(row.claimed_by)}")

    def every_task_is_in_the_journal(self) -> None:
        """No purchase without a line in the journal."""
        for task in self.tasks:
            if task["idempotency_key"] not in self.charges:
                self.fail(f"task {task['task_id']} was bought without a line in the journal")

    def nothing_bought_twice(self) -> None:
        """One valid task for each body, and repeats only of unknown outcomes."""
        alive: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for task in self.tasks:
            if task["status"] not in _NOT_ALIVE:
                key = task["idempotency_key"] or ""
                request = key.rsplit("-", 1)[0]
                alive[request].append(task)
        for request, tasks in alive.items():
            keys = {task["idempotency_key"] for task in tasks}
            if len(keys) > 1:
                self.fail(f"{request[:13]} was bought twice, under {sorted(keys)}: {_ids(tasks)}")
            elif len(tasks) > 1 and self.honoured:
                self.fail(f"{request[:13]} was bought twice under one key: {_ids(tasks)}")
            elif len(tasks) > 1 and self._holds():
                self.fail(
                    f"{request[:13]} was repeated, and outcomes were to be held: {_ids(tasks)}"
                )
            elif len(tasks) > 1:
                charge = self.charges[tasks[0]["idempotency_key"]]
                self.told.counts["bought twice by a server that ignores keys"] += 1
                if charge.posts < len(tasks):
                    self.fail(
                        f"{request[:13]} was bought {len(tasks)} times by {charge.posts} posts"
                    )

    def _holds(self) -> bool:
        return all(run.on_unknown == "hold" for run in self.scenario.runs) and not any(
            task_replayed for task_replayed in self._replayed_in_calm()
        )

    def _replayed_in_calm(self) -> Iterator[bool]:
        with self.journal.database.read() as connection:
            rows = connection.execute(
                select(schema.events.c.run_id).where(schema.events.c.event == "replaying")
            )
            yield from (row.run_id.startswith("run-10") for row in rows)

    def nothing_lost(self) -> None:
        """Every image is stored after the calm runs, or the server gives a reason."""
        by_key: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for task in self.tasks:
            by_key[task["idempotency_key"]].append(task)
        digests = {task["file_sha256"] for task in self.tasks}
        for key, record in self.records.items():
            tasks = by_key.get(record.idempotency_key or "", [])
            if record.state is State.STORED:
                self._file(record, digests)
            elif not self._excused(record, tasks):
                self.fail(
                    f"{key[:8]} ({record.request.prompt}) is {record.state.value} after the calm: "
                    f"{record.error_code}: {record.error_message}; task {record.task_id}; at the "
                    f"server {[(t['task_id'], t['status'], t['faults']) for t in tasks]}"
                )
            alive = [task for task in tasks if task["status"] not in _NOT_ALIVE]
            if (
                alive
                and not self._misnamed
                and record.task_id not in {task["task_id"] for task in alive}
            ):
                self.fail(
                    f"{key[:8]}: the journal has task {record.task_id}, and the server made "
                    f"{_ids(alive)}"
                )

    @property
    def _misnamed(self) -> bool:
        """Whether a task was named as that of another purchase.

        Then the images of two rows cannot be told apart: a task's answer names no prompt.
        """
        return self.scenario.has_fault("repeated_id") or self.scenario.has(ForgedCallback)

    def _excused(self, record: Record, tasks: Sequence[dict[str, Any]]) -> bool:
        faults = {fault for task in tasks for fault in task["faults"]}
        if faults & _NEVER_HAD or self._misnamed:
            return True
        if self.scenario.server.task_lifetime_s is not None and record.state in _AT_SERVER:
            return True  # forgotten by the server before it was fetched
        if record.error_code == "request_cancelled":
            return True  # whether it was charged is not known, so it is not bought again
        wanted = {
            image.request.request_key
            for process in self.processes[-1:]
            for image in process.planned(self.journal)
        }
        # No row wants an image any more that a later request has replaced.
        return record.request_key not in wanted

    def _file(self, record: Record, digests: set[str]) -> None:
        image = record.image
        assert image is not None
        path = self.world.folder / "root" / image.path
        if not path.is_file() or path.stat().st_size != image.bytes:
            self.fail(f"{record.request_key[:8]} is stored, and its file is not there")
        elif image.sha256 not in digests and not self.scenario.has_fault(
            "jpeg_as_png", "same_file", "octet_stream"
        ):
            self.fail(f"{record.request_key[:8]} is stored, and no task made its file")

    def charges_agree(self) -> None:
        """The charges of the journal are those of the server."""
        if not self.honoured or self.scenario.has_fault("price"):
            return
        by_id = {task["task_id"]: task for task in self.tasks}
        for charge in self.charges.values():
            task = by_id.get(charge.task_id or "")
            if task is None or charge.charged_units is None or charge.state is not State.STORED:
                continue
            if charge.charged_units != task["charged_units"]:
                self.fail(
                    f"{charge.idempotency_key[:13]}: the journal has {charge.charged_units} units "
                    f"charged, the server {task['charged_units']}"
                )

    def sums(self) -> None:
        """The sums for the caps are those of the purchases."""
        committed: dict[str, int] = defaultdict(int)
        spent: dict[str, int] = defaultdict(int)
        for charge in self.charges.values():
            for scope in scopes_of_charge(charge):
                committed[scope] += charge.committed_units
                spent[scope] += charge.charged_units or 0
        with self.journal.database.read() as connection:
            rows = connection.execute(select(schema.commitments)).all()
        found = {row.scope: (row.committed_units, row.spent_units) for row in rows}
        for scope in {*committed, *found}:
            wanted = (committed[scope], spent[scope])
            if found.get(scope, (0, 0)) != wanted:
                self.fail(f"{scope} has {found.get(scope)} units, its purchases add up to {wanted}")

    def caps(self) -> None:
        """No run commits more than its cap."""
        if self.scenario.has_fault("price"):
            return
        for process in self.processes:
            cap = process.run.cap_images
            if cap is None:
                continue
            mine = [c for c in self.charges.values() if c.run_id == process.name]
            total = sum(charge.committed_units for charge in mine)
            if total > cap * 4500:
                self.fail(f"{process.name} committed {total} units, and its cap is {cap * 4500}")

    def wishes(self) -> None:
        """One regeneration requests one image, also if its run is killed and started again."""
        wished: dict[tuple[str, int], int] = defaultdict(int)
        open_: set[tuple[str, int]] = set()
        for said, slot in self.world.wishes:
            if said == "ended":
                open_.discard(slot)
            elif slot not in open_:
                wished[slot] += 1
                open_.add(slot)
        for slot, attempt in self.journal.attempts("0" * 32).current().items():
            if attempt > wished[slot]:
                self.fail(f"{slot[0]} was asked for {attempt} more times by {wished[slot]} wishes")


def _ids(tasks: Sequence[dict[str, Any]]) -> list[str]:
    return [f"{task['task_id']} ({task['status']})" for task in tasks]
