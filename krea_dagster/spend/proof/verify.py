"""The proof: every charge has one task, one file and a manifest row, and the sums agree.

Held against each other: the journal's purchases, its events, its sums for the caps, the files
under the storage root, the manifests, and what the account said. Nothing is bought, sent or
changed, and no network is needed. The journal is read as it stands at one moment, in one pass
over its requests; what is kept meanwhile is a name for each request that a manifest lists.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from itertools import islice
from pathlib import PurePosixPath
from typing import Final

from krea_dagster.engine.budget import Commitment
from krea_dagster.engine.journal.journal import (
    Charge,
    Journal,
    RequestEvents,
    Snapshot,
    scopes_of_charge,
)
from krea_dagster.engine.record import Record, StoredImage
from krea_dagster.engine.states import Event, State
from krea_dagster.engine.states import replay as replayed
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import IllegalTransition
from krea_dagster.models import credits_text
from krea_dagster.spend.proof.account import AccountComparison, AccountProof
from krea_dagster.spend.proof.findings import FindingKind, Proof, ProofFigures, ProofFindings
from krea_dagster.spend.proof.manifest_rows import ListedRows, compare_rows
from krea_dagster.spend.proof.stored_files import FileChecker, FileState

#: Files that are looked up in the journal at once.
_CHUNK: Final = 500

#: States in which a charge has a meaning.
_MAY_BE_CHARGED: Final = frozenset({State.STORED, State.COMPLETED, State.EXPIRED})


def verify(
    journal: Journal,
    storage: Storage,
    *,
    hash_bytes: int | None = None,
    manifests_may_lag: bool = False,
    on_progress: Callable[[ProofFigures], None] = lambda _: None,
) -> Proof:
    """Hold journal, files, manifests and account against each other.

    ``hash_bytes`` bounds the bytes that are read again: all where it is None; of the other
    files only the size is compared. With ``manifests_may_lag`` a manifest that is behind the
    journal is a note: other runs may be about to write theirs. ``on_progress`` is called now
    and then with the figures so far. Raises JournalError where the journal cannot be read.
    """
    excused = {FindingKind.NOT_LISTED, FindingKind.ROW_BEHIND} if manifests_may_lag else set()
    findings = ProofFindings(frozenset(excused))
    listed = compare_rows(storage, journal, findings)
    _compare_files(storage, journal, findings)
    with journal.snapshot() as snapshot, FileChecker(storage, hash_bytes=hash_bytes) as reader:
        books = _JournalCheck(findings, listed, reader, snapshot, on_progress)
        books.read()
        books.compare_sums()
    account = _account(books.account, findings)
    return findings.proof(books.figures, account)


class _JournalCheck:
    """One pass over the journal: adds up, looks at files, and finds what does not agree."""

    def __init__(
        self,
        findings: ProofFindings,
        listed: ListedRows,
        reader: FileChecker,
        snapshot: Snapshot,
        on_progress: Callable[[ProofFigures], None],
    ) -> None:
        self._findings = findings
        self._listed = listed
        self._reader = reader
        self._snapshot = snapshot
        self._on_progress = on_progress
        self._committed: Counter[str] = Counter()
        self._spent: Counter[str] = Counter()
        self.account = AccountComparison(snapshot.account_readings())
        self._counts: Counter[str] = Counter(
            manifests=listed.files, rows=listed.rows, rows_agreeing=listed.agreeing
        )

    @property
    def figures(self) -> ProofFigures:
        """What was looked at so far."""
        return ProofFigures(**self._counts)

    def read(self) -> None:
        """Take every request with its purchases and its events, in the order of the keys."""
        charges = _ChargesByRequest(self._snapshot.charges())
        request_events = self._snapshot.request_events()
        for number, record in enumerate(self._snapshot.records()):
            history = next(request_events)
            self._replay(record, history)
            own = charges.of(record.request_key)
            for charge in own:
                self._add_up(charge)
            self._judge_charges(record, own, history)
            self._count(requests=1)
            if record.state is State.STORED and record.image is not None:
                for found in self._reader.look(record, record.image):
                    self._judge_file(*found)
            if number % 1000 == 0:
                self._on_progress(self.figures)
        for found in self._reader.rest():
            self._judge_file(*found)
        self._on_progress(self.figures)

    # -- one request --------------------------------------------------------------------------

    def _replay(self, record: Record, history: RequestEvents) -> None:
        self._count(events=len(history.events))
        trouble = _replay_trouble(history)
        if trouble:
            self._find(FindingKind.EVENTS_DIFFER, record, f"its events do not add up: {trouble}")

    def _add_up(self, charge: Charge) -> None:
        charged = charge.charged_units or 0
        self._count(submissions=1)
        if charged:
            self._count(charges=1, tasks=int(charge.task_id is not None), charged_units=charged)
        for scope in scopes_of_charge(charge):
            self._committed[scope] += charge.committed_units
            self._spent[scope] += charged
        self.account.add(charge)

    def _judge_charges(
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
            self._judge_charge(record, charge)
        if len(paid) == 1 and paid[0].state not in _MAY_BE_CHARGED:
            self._find(
                FindingKind.CHARGED_WITHOUT_IMAGE,
                record,
                f"{_credits(paid[0].charged_units or 0)} were charged, and it is "
                f"{record.state.value}",
                paid[0].charged_units or 0,
            )
        found = any(name == Event.FOUND.value for _, name in history.events)
        if record.state is State.STORED and not charges and found:
            self._find(
                FindingKind.PURCHASE_UNKNOWN,
                record,
                "its file was found in the storage root: another journal has bought it, and what "
                "it cost is not known here",
            )
        elif record.state is State.STORED and not charges:
            self._find(
                FindingKind.STORED_WITHOUT_CHARGE,
                record,
                "it is stored, and there is no purchase of it",
            )
        if record.state is State.STORED or paid:
            self._judge_listing(record, sum(charge.charged_units or 0 for charge in paid))

    def _judge_charge(self, record: Record, charge: Charge) -> None:
        at_most = max(charge.committed_units, charge.reserved_units or 0)
        said = charge.charged_units
        task = f"task {charge.task_id}" if charge.task_id else "no task id"
        since = f"{charge.sent_at:%Y-%m-%d %H:%M} UTC"
        if said and charge.task_id is None:
            self._find(
                FindingKind.CHARGED_WITHOUT_TASK,
                record,
                f"{_credits(said)} were charged, and no task is known",
                said,
            )
        match charge.state:
            case State.SUBMITTING | State.UNKNOWN:
                text = f"outcome unknown since {since}: at most {_credits(at_most)}"
                self._at_stake(FindingKind.OUTCOME_UNKNOWN, record, text, at_most)
            case State.SUBMITTED:
                text = f"{task} was not finished, sent {since}: {_credits(at_most)} reserved"
                self._at_stake(FindingKind.IN_FLIGHT, record, text, at_most)
            case State.COMPLETED:
                units = at_most if said is None else said
                why = f" ({record.error_code})" if record.error_code else ""
                text = f"{task} is paid, and its image is not stored{why}: {_credits(units)}"
                self._at_stake(FindingKind.PAID_NOT_STORED, record, text, units)
            case State.EXPIRED:
                units = at_most if said is None else said
                known = "" if said is not None else "at most "
                text = f"{task} is lost ({record.error_code}): {known}{_credits(units)}"
                self._count(lost=1, lost_units=units)
                self._find(FindingKind.LOST, record, text, units)
            case State.STORED if said is None:
                text = f"{task} never said what it cost: at most {_credits(at_most)}"
                self._find(FindingKind.PRICE_UNKNOWN, record, text, at_most)
            case None | State.FAILED if said is None and charge.committed_units:
                text = f"{task} ended without an image: at most {_credits(at_most)} charged"
                self._find(FindingKind.MAYBE_CHARGED, record, text, at_most)

    def _at_stake(self, kind: FindingKind, record: Record, text: str, units: int) -> None:
        self._count(at_stake=1, at_stake_units=units)
        self._find(kind, record, text, units)

    def _judge_listing(self, record: Record, units: int) -> None:
        if record.request_key in self._listed.rows_of:
            return
        if self._listed.newer_than(record):
            self._find(
                FindingKind.NOT_ASKED_ANY_MORE,
                record,
                f"{_credits(units)} paid, and the prompt table does not ask for it any more",
                units,
            )
            return
        self._find(
            FindingKind.NOT_LISTED,
            record,
            f"{_credits(units)} paid, and no manifest lists it; materialize the partition's "
            "manifest",
            units,
        )

    def _judge_file(self, record: Record, image: StoredImage, seen: FileState) -> None:
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

    # -- the sums -----------------------------------------------------------------------------

    def compare_sums(self) -> None:
        """Hold what each scope has committed against the sum of its purchases."""
        kept = self._snapshot.commitments()
        for scope in sorted({*kept, *self._committed}):
            said = kept.get(scope, Commitment())
            right = Commitment(self._committed[scope], self._spent[scope])
            if said == right:
                continue
            what, of = ("committed", "committed_units")
            if said.committed_units == right.committed_units:
                what, of = ("spent", "spent_units")
            self._findings.add(
                FindingKind.SUM_DIFFERS,
                f"{scope.replace(':', ' ', 1)}: the journal has "
                f"{_credits(getattr(said, of))} {what}, its purchases come to "
                f"{_credits(getattr(right, of))}",
                abs(getattr(said, of) - getattr(right, of)),
            )


class _ChargesByRequest:
    """Charges by request, where both come in the same order."""

    def __init__(self, charges: Iterator[Charge]) -> None:
        self._charges = charges
        self._next = next(charges, None)

    def of(self, request_key: str) -> list[Charge]:
        """The charges of a request; each request is asked for once, in order."""
        found = []
        while self._next is not None and self._next.request_key == request_key:
            found.append(self._next)
            self._next = next(self._charges, None)
        return found


def _replay_trouble(history: RequestEvents) -> str:
    """Why a request's events do not lead to its state; empty where they do."""
    numbers = [number for number, _ in history.events]
    if numbers != list(range(history.seq + 1)):
        return f"their numbers are not 0 to {history.seq}"
    try:
        state = replayed(Event(name) for _, name in history.events)
    except (ValueError, IllegalTransition) as error:
        return str(error)
    if state is None or state.value != history.state:
        return f"they lead to {state and state.value}, and it is {history.state}"
    return ""


def _compare_files(storage: Storage, journal: Journal, findings: ProofFindings) -> None:
    """Find files under ``images`` that no request has. The journal is read after the names."""
    names = (name for name in storage.names("images") if not name.startswith("images/rejected/"))
    for chunk in _chunks(names):
        by_key = {name: PurePosixPath(name).stem for name in chunk}
        records = journal.records(set(by_key.values()))
        for name, key in by_key.items():
            record = records.get(key)
            if record is None or (record.image is not None and record.image.path != name):
                findings.add(FindingKind.FILE_UNKNOWN, f"the file {name} belongs to no request")
            elif record.image is None:
                findings.add(
                    FindingKind.FILE_NOT_ENTERED,
                    f"the file {name} is that of a request which is {record.state.value}: a run "
                    "ended before it was entered, and the next one fetches it anew",
                    request_key=key,
                    task_id=record.task_id,
                )


def _account(comparison: AccountComparison, findings: ProofFindings) -> AccountProof | None:
    proof = comparison.proof()
    if proof is None:
        findings.add(
            FindingKind.ACCOUNT_NOT_COMPARED,
            "the account was not read twice, so that its use cannot be held against the journal",
        )
        return None
    for before, after in zip(proof.stretches, proof.stretches[1:], strict=False):
        findings.add(
            FindingKind.ACCOUNT_NOT_COMPARED,
            f"the account's use fell from {_credits(before.after.used_units)} to "
            f"{_credits(after.before.used_units)} at {_when(after.before.at)}, as it does "
            "with another key; what comes before and after was compared apart",
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
            f"{_range(stretch.low_units, stretch.high_units)}: {_credits(abs(units))} "
            f"{unexplained}" + _where(proof),
            abs(units),
        )
    return proof


def _where(proof: AccountProof) -> str:
    """Between which readings the account used what is not explained."""
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
    return f"{_credits(low)} to {_credits(high)}, by what was in flight"


def _when(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S}"


def _chunks(names: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(names)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk


def _credits(units: int) -> str:
    return f"{credits_text(units)} credits"
