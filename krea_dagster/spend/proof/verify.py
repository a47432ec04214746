"""The proof: every charge has one task, one file and a manifest row, and the sums agree.

Compared are the journal's purchases, its events, its sums for the caps, the files under the storage
root, the manifests, and the account's readings. Nothing is bought, sent or changed, and no network
is needed. The journal is read from one snapshot, in one pass over its requests; in memory is a name
for each request that a manifest lists.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime
from itertools import groupby, islice
from pathlib import PurePosixPath
from typing import Final

from krea_dagster.engine.budget import Commitment
from krea_dagster.engine.journal.bulk_reads import request_count
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.rows import Charge, scopes_of_charge
from krea_dagster.engine.journal.snapshot import RequestEvents, Snapshot
from krea_dagster.engine.record import Record, StoredImage
from krea_dagster.engine.states import Event, State
from krea_dagster.engine.states import replay as replayed
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import IllegalTransition
from krea_dagster.models import credits_text
from krea_dagster.spend.proof.account import AccountComparison, AccountProof
from krea_dagster.spend.proof.findings import FindingKind, Proof, ProofFigures, ProofFindings
from krea_dagster.spend.proof.manifest_rows import ListedRows, compare_rows
from krea_dagster.spend.proof.statements import changed_statements
from krea_dagster.spend.proof.stored_files import FileChecker, FileState

#: Files that are looked up in the journal at once.
_CHUNK: Final = 500

#: States in which a request may have been charged.
_MAY_BE_CHARGED: Final = frozenset({State.STORED, State.COMPLETED, State.EXPIRED})


def verify(
    journal: Journal,
    storage: Storage,
    *,
    hash_bytes: int | None = None,
    manifests_may_lag: bool = False,
    on_progress: Callable[[ProofFigures], None] = lambda _: None,
) -> Proof:
    """Compare journal, files, manifests and account.

    ``hash_bytes`` limits the bytes that are read again (None: all); of the other files only the
    size is compared. With ``manifests_may_lag`` a manifest that is behind the journal is a note:
    other runs may be about to write theirs. ``on_progress`` is called every thousand requests.
    Raises JournalError where the journal cannot be read.
    """
    excused = {FindingKind.NOT_LISTED, FindingKind.ROW_BEHIND} if manifests_may_lag else set()
    findings = ProofFindings(frozenset(excused))
    pruned = frozenset(journal.pruned.keys().to_pylist())
    listed = compare_rows(storage, journal, findings, pruned)
    _compare_files(storage, journal, findings, pruned)
    for text in changed_statements(storage, journal.closed_months.all()):
        findings.add(FindingKind.STATEMENT_CHANGED, text)
    with journal.snapshot() as snapshot, ExitStack() as stack:
        stored = request_count(snapshot.connection)
        checker = FileChecker(storage, hash_bytes=hash_bytes, stored=stored)
        stack.enter_context(checker)
        check = _JournalCheck(
            findings,
            listed,
            checker,
            snapshot,
            on_progress,
            generated=journal.tables.generated(),
            pruned=pruned,
        )
        check.check_requests()
        check.check_sums()
    account = _account(check.account, findings)
    return findings.proof(check.figures, account)


def account_proof(journal: Journal) -> AccountProof | None:
    """Compare the account's readings with the journal's charges; None for fewer than two.

    Reads every charge: microseconds each. Raises JournalError.
    """
    with journal.snapshot() as snapshot:
        readings = snapshot.account_readings()
        if len(readings) < 2:
            return None
        comparison = AccountComparison(readings, snapshot.entries())
        for charge in snapshot.charges():
            comparison.add(charge)
    return comparison.proof()


class _JournalCheck:
    """One pass over the journal: adds up its charges, and checks them and the stored files."""

    def __init__(
        self,
        findings: ProofFindings,
        listed: ListedRows,
        checker: FileChecker,
        snapshot: Snapshot,
        on_progress: Callable[[ProofFigures], None],
        *,
        generated: frozenset[str],
        pruned: frozenset[str],
    ) -> None:
        self._findings = findings
        self._pruned = pruned
        self._generated = generated
        self._listed = listed
        self._checker = checker
        self._snapshot = snapshot
        self._on_progress = on_progress
        self._committed: Counter[str] = Counter()
        self._spent: Counter[str] = Counter()
        self.account = AccountComparison(snapshot.account_readings(), snapshot.entries())
        self._counts: Counter[str] = Counter(
            manifests=listed.files, rows=listed.rows, rows_agreeing=listed.agreeing
        )

    @property
    def figures(self) -> ProofFigures:
        """The figures so far."""
        return ProofFigures(**self._counts)

    def check_requests(self) -> None:
        """Check every request with its purchases and its events, in the order of the keys."""
        groups = groupby(self._snapshot.charges(), lambda charge: charge.request_key)
        key, group = next(groups, ("", iter(())))
        request_events = self._snapshot.request_events()
        for number, record in enumerate(self._snapshot.records()):
            charges: list[Charge] = []
            if key == record.request_key:
                charges = list(group)
                key, group = next(groups, ("", iter(())))
            self._check_request(record, charges, next(request_events))
            if number % 1000 == 0:
                self._on_progress(self.figures)
        for found in self._checker.rest():
            self._check_file(*found)
        self._on_progress(self.figures)

    def _check_request(
        self, record: Record, charges: Sequence[Charge], history: RequestEvents
    ) -> None:
        self._count(requests=1, events=len(history.events))
        if trouble := _replay_trouble(history):
            self._find(FindingKind.EVENTS_DIFFER, record, f"its events do not add up: {trouble}")
        for charge in charges:
            self._add_up(charge)
        self._check_charges(record, charges, history)
        if record.request_key in self._pruned:
            self._count(pruned=1)
        elif record.state is State.STORED and record.image is not None:
            for found in self._checker.check(record, record.image):
                self._check_file(*found)

    def _add_up(self, charge: Charge) -> None:
        charged = charge.charged_units or 0
        self._count(submissions=1)
        if charged:
            self._count(charges=1, tasks=int(charge.task_id is not None), charged_units=charged)
        for scope in scopes_of_charge(charge):
            self._committed[scope] += charge.committed_units
            self._spent[scope] += charged
        self.account.add(charge)

    def _check_charges(
        self, record: Record, charges: Sequence[Charge], history: RequestEvents
    ) -> None:
        paid = [charge for charge in charges if charge.charged_units]
        if len(paid) > 1:
            tasks = ", ".join(str(charge.task_id) for charge in paid)
            beyond = sum(charge.charged_units or 0 for charge in paid[1:])
            self._find(
                FindingKind.BOUGHT_TWICE,
                record,
                f"bought {len(paid)} times, by the tasks {tasks}: {_credits(beyond)} too many",
                beyond,
            )
        for charge in charges:
            self._check_charge(record, charge)
        if len(paid) == 1 and paid[0].state not in _MAY_BE_CHARGED:
            self._find(
                FindingKind.CHARGED_WITHOUT_IMAGE,
                record,
                f"{_credits(paid[0].charged_units or 0)} were charged, and it is "
                f"{record.state.value}",
                paid[0].charged_units or 0,
            )
        found = any(name == Event.FOUND.value for _, name, _ in history.events)
        if record.state is State.STORED and not charges and found:
            self._find(
                FindingKind.PURCHASE_UNKNOWN,
                record,
                "its file was found in the storage root: it was bought under another journal, and "
                "its cost is not known here",
            )
        elif record.state is State.STORED and not charges:
            self._find(
                FindingKind.STORED_WITHOUT_CHARGE,
                record,
                "it is stored, and the journal has no purchase of it",
            )
        if record.state is State.STORED or paid:
            self._check_listing(record, sum(charge.charged_units or 0 for charge in paid))

    def _check_charge(self, record: Record, charge: Charge) -> None:
        at_most = max(charge.committed_units, charge.reserved_units or 0)
        charged = charge.charged_units
        task = f"task {charge.task_id}" if charge.task_id else "no task id"
        since = f"{charge.sent_at:%Y-%m-%d %H:%M} UTC"
        if charged and charge.task_id is None:
            self._find(
                FindingKind.CHARGED_WITHOUT_TASK,
                record,
                f"{_credits(charged)} were charged, and no task is known",
                charged,
            )
        match charge.state:
            case State.SUBMITTING | State.UNKNOWN:
                text = f"outcome unknown since {since}: at most {_credits(at_most)}"
                self._at_stake(FindingKind.OUTCOME_UNKNOWN, record, text, at_most)
            case State.SUBMITTED:
                text = f"{task} was not finished, sent {since}: {_credits(at_most)} reserved"
                self._at_stake(FindingKind.IN_FLIGHT, record, text, at_most)
            case State.COMPLETED:
                units = at_most if charged is None else charged
                why = f" ({record.error_code})" if record.error_code else ""
                text = f"{task} is paid, and its image is not stored{why}: {_credits(units)}"
                self._at_stake(FindingKind.PAID_NOT_STORED, record, text, units)
            case State.EXPIRED:
                units = at_most if charged is None else charged
                known = "" if charged is not None else "at most "
                text = f"{task} is lost ({record.error_code}): {known}{_credits(units)}"
                self._count(lost=1, lost_units=units)
                self._find(FindingKind.LOST, record, text, units)
            case State.STORED if charged is None:
                text = f"{task} never charged what it cost: at most {_credits(at_most)}"
                self._find(FindingKind.PRICE_UNKNOWN, record, text, at_most)
            case None | State.FAILED if charged is None and charge.committed_units:
                text = f"{task} ended without an image: at most {_credits(at_most)} charged"
                self._find(FindingKind.MAYBE_CHARGED, record, text, at_most)

    def _at_stake(self, kind: FindingKind, record: Record, text: str, units: int) -> None:
        self._count(at_stake=1, at_stake_units=units)
        self._find(kind, record, text, units)

    def _check_listing(self, record: Record, units: int) -> None:
        # A generate call returns its manifest to the caller, and writes none.
        if record.request_key in self._listed.rows_of or record.table_id in self._generated:
            return
        if self._listed.has_left(record):
            has_row = self._listed.earlier.get(record.request_key) in self._listed.names
            why = "its row requests another one now" if has_row else "no row requests it any more"
            text = f"{_credits(units)} paid, and {why}"
            self._find(FindingKind.NOT_ASKED_ANY_MORE, record, text, units)
            return
        self._find(
            FindingKind.NOT_LISTED,
            record,
            f"{_credits(units)} paid, and no manifest lists it; materialize the partition's "
            "manifest",
            units,
        )

    def _check_file(self, record: Record, image: StoredImage, seen: FileState) -> None:
        paid = record.charged_units or 0
        if seen.trouble is not None or seen.size_bytes is None:
            why = "is not there" if seen.trouble is None else f"cannot be read: {seen.trouble}"
            self._find(
                FindingKind.FILE_MISSING,
                record,
                f"the file {image.path} {why} ({_credits(paid)} paid); a run fetches a "
                "missing one again for nothing, as long as the server has it",
                paid,
            )
            return
        self._count(files=1)
        if seen.size_bytes != image.bytes:
            how = f"{seen.size_bytes} bytes instead of {image.bytes}"
        elif seen.sha256 not in (None, image.sha256):
            how = f"the sha256 {str(seen.sha256)[:12]}… instead of {image.sha256[:12]}…"
        else:
            hashed = seen.sha256 is not None
            self._count(files_hashed=int(hashed), bytes_hashed=image.bytes if hashed else 0)
            return
        self._find(
            FindingKind.FILE_CHANGED,
            record,
            f"the file {image.path} has {how} ({_credits(paid)} paid); remove it, and a run "
            "fetches it again for nothing, as long as the server has it",
            paid,
        )

    def _find(self, kind: FindingKind, record: Record, text: str, units: int = 0) -> None:
        self._findings.add(
            kind,
            f"{self._listed.name(record)}: {text}",
            units,
            request_key=record.request_key,
            task_id=record.task_id,
        )

    def _count(self, **more: int) -> None:
        self._counts.update(more)

    def check_sums(self) -> None:
        """Compare the sums that the journal keeps for the caps with those of its purchases."""
        kept = self._snapshot.commitments()
        for scope in sorted({*kept, *self._committed}):
            recorded = kept.get(scope, Commitment())
            added_up = Commitment(self._committed[scope], self._spent[scope])
            if recorded == added_up:
                continue
            what, of = ("committed", "committed_units")
            if recorded.committed_units == added_up.committed_units:
                what, of = ("spent", "spent_units")
            self._findings.add(
                FindingKind.SUM_DIFFERS,
                f"{scope.replace(':', ' ', 1)}: the journal has "
                f"{_credits(getattr(recorded, of))} {what}, its purchases come to "
                f"{_credits(getattr(added_up, of))}",
                abs(getattr(recorded, of) - getattr(added_up, of)),
            )


def _replay_trouble(history: RequestEvents) -> str:
    """Return why a request's events do not lead to its state; empty where they do."""
    kept = [event for event in history.events if event[0] >= history.kept_from_seq]
    if [number for number, _, _ in kept] != list(range(history.kept_from_seq, history.seq + 1)):
        return f"their numbers are not {history.kept_from_seq} to {history.seq}"
    try:
        before = State(kept[0][2]) if history.kept_from_seq else None
        state = replayed((Event(name) for _, name, _ in kept), before)
    except (ValueError, IllegalTransition) as error:
        return str(error)
    if state is None or state.value != history.state:
        return f"they lead to {state and state.value}, and it is {history.state}"
    return ""


def _compare_files(
    storage: Storage, journal: Journal, findings: ProofFindings, pruned: frozenset[str]
) -> None:
    """Find files under ``images`` that belong to no request. The names are read first."""
    names = (name for name in storage.names("images") if not name.startswith("images/rejected/"))
    for chunk in _chunks(names):
        by_key = {name: PurePosixPath(name).stem for name in chunk}
        records = journal.records(set(by_key.values()))
        for name, key in by_key.items():
            record = records.get(key)
            if record is None or (record.image is not None and record.image.path != name):
                findings.add(FindingKind.FILE_UNKNOWN, f"the file {name} belongs to no request")
            elif key in pruned:
                findings.add(
                    FindingKind.FILE_PRUNED,
                    f"the file {name} was pruned, and is there: `krea-dagster prune` removes it, "
                    "`krea-dagster accept root` takes it back",
                    request_key=key,
                )
            elif record.image is None:
                findings.add(
                    FindingKind.FILE_NOT_ENTERED,
                    f"the file {name} belongs to a request that is {record.state.value}: a run "
                    "ended before it recorded the file, and the next run fetches it again",
                    request_key=key,
                    task_id=record.task_id,
                )


def _account(comparison: AccountComparison, findings: ProofFindings) -> AccountProof | None:
    proof = comparison.proof()
    if proof is None:
        findings.add(
            FindingKind.ACCOUNT_NOT_COMPARED,
            "the account was not read twice, so its use cannot be compared with the journal",
        )
        return None
    for before, after in zip(proof.stretches, proof.stretches[1:], strict=False):
        findings.add(
            FindingKind.ACCOUNT_NOT_COMPARED,
            f"the account's use fell from {_credits(before.after.used_units)} to "
            f"{_credits(after.before.used_units)} at {_when(after.before.at)}, as it does "
            "with another key, or by a refund; the times before and after were compared separately",
        )
    for stretch in proof.stretches:
        units = stretch.unexplained_units
        if not units:
            continue
        unexplained = "used beyond that" if units > 0 else "charged there are missing"
        findings.add(
            FindingKind.ACCOUNT_DIFFERS,
            f"the account used {_credits(stretch.used_units)} from "
            f"{_when(stretch.before.at)} to {_when(stretch.after.at)}, the journal explains "
            f"{_range(stretch.low_units, stretch.high_units)}"
            + (
                f", or up to {_credits(stretch.refunded_units)} less by refunds"
                if stretch.refunded_units
                else ""
            )
            + f": {_credits(abs(units))} "
            f"{unexplained}" + _where(proof),
            abs(units),
        )
    return proof


def _where(proof: AccountProof) -> str:
    """Return the readings between which the account used unexplained credits, as text."""
    shown = [
        f"{_credits(gap.unexplained_units)} between {_when(gap.before.at)} (run "
        f"{gap.before.run_id[:8]}) and {_when(gap.after.at)} (run {gap.after.run_id[:8]})"
        for gap in proof.gaps[:3]
    ]
    more = ", …" if len(proof.gaps) > len(shown) else ""
    return f"; {', '.join(shown)}{more}" if shown else ""


def _range(low: int, high: int) -> str:
    if low == high:
        return _credits(low)
    return f"{_credits(low)} to {_credits(high)}, depending on what was in flight"


def _when(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S}"


def _chunks(names: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(names)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk


def _credits(units: int) -> str:
    return f"{credits_text(units)} credits"
