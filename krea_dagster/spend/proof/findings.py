"""The findings and figures of a proof."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from krea_dagster.spend.proof.account import AccountProof

#: Findings of one kind that are kept; all are counted.
KEPT: Final = 100


class Severity(str, Enum):
    """An error: something disagrees. A note: money is open, at stake or explained."""

    ERROR = "error"
    NOTE = "note"


class FindingKind(str, Enum):
    """The kinds of findings. The text is shown by ``--json`` and the check's metadata."""

    #: One request was charged more than once.
    BOUGHT_TWICE = "bought_twice"
    #: Charged, and no task is known.
    CHARGED_WITHOUT_TASK = "charged_without_task"
    #: Charged, in a state that costs nothing and has no image.
    CHARGED_WITHOUT_IMAGE = "charged_without_image"
    #: Stored, and the journal has no purchase of it.
    STORED_WITHOUT_CHARGE = "stored_without_charge"
    #: Stored, and the file is not there or cannot be read.
    FILE_MISSING = "file_missing"
    #: Stored, and the file has other bytes.
    FILE_CHANGED = "file_changed"
    #: A file that belongs to no request in the journal.
    FILE_UNKNOWN = "file_unknown"
    #: Paid, and no manifest row shows it.
    NOT_LISTED = "not_listed"
    #: A manifest row differs from the journal.
    ROW_DIFFERS = "row_differs"
    #: A manifest row shows an earlier state of the journal.
    ROW_BEHIND = "row_behind"
    #: A manifest row of a request that the journal does not know.
    ROW_UNKNOWN = "row_unknown"
    #: A manifest file that cannot be read.
    MANIFEST_UNREADABLE = "manifest_unreadable"
    #: The events do not lead to the present state.
    EVENTS_DIFFER = "events_differ"
    #: What a run or a day has committed is not the sum of its purchases.
    SUM_DIFFERS = "sum_differs"
    #: The account used more or less than the journal can explain.
    ACCOUNT_DIFFERS = "account_differs"
    #: The file of a closed month's statement is missing or was changed.
    STATEMENT_CHANGED = "statement_changed"

    #: Paid, and the image is not here yet.
    PAID_NOT_STORED = "paid_not_stored"
    #: At the server, and not finished when last seen.
    IN_FLIGHT = "in_flight"
    #: The purchase may have happened or not.
    OUTCOME_UNKNOWN = "outcome_unknown"
    #: A task that ended without an image and may have been charged.
    MAYBE_CHARGED = "maybe_charged"
    #: Paid, and lost.
    LOST = "lost"
    #: Stored, and the server did not report its cost.
    PRICE_UNKNOWN = "price_unknown"
    #: Stored, because its file was found in the storage root; it was bought under another journal.
    PURCHASE_UNKNOWN = "purchase_unknown"
    #: Paid and stored, and its row requests another image now, or no row requests it any more.
    NOT_ASKED_ANY_MORE = "not_asked_any_more"
    #: The file of a request that is not stored yet.
    FILE_NOT_ENTERED = "file_not_entered"
    #: The file of an image that was pruned is there.
    FILE_PRUNED = "file_pruned"
    #: The account could not be compared.
    ACCOUNT_NOT_COMPARED = "account_not_compared"


_NOTES: Final = frozenset(
    {
        FindingKind.PAID_NOT_STORED,
        FindingKind.IN_FLIGHT,
        FindingKind.OUTCOME_UNKNOWN,
        FindingKind.MAYBE_CHARGED,
        FindingKind.LOST,
        FindingKind.PRICE_UNKNOWN,
        FindingKind.PURCHASE_UNKNOWN,
        FindingKind.NOT_ASKED_ANY_MORE,
        FindingKind.FILE_NOT_ENTERED,
        FindingKind.FILE_PRUNED,
        FindingKind.ACCOUNT_NOT_COMPARED,
    }
)


@dataclass(frozen=True)
class Finding:
    """One sentence and its subject. ``units`` is the most money that it is about."""

    kind: FindingKind
    severity: Severity
    text: str
    units: int = 0
    request_key: str | None = None
    task_id: str | None = None


@dataclass(frozen=True)
class ProofFigures:
    """Counts of what was checked, and money in units.

    ``charges`` are submissions that cost something, ``tasks`` their distinct tasks. ``files``
    have the right size, ``files_hashed`` of them also the right hash; ``pruned`` ones were removed
    by a person. ``rows`` are manifest rows, ``rows_agreeing`` those that agree with the journal.
    ``at_stake_units`` is paid, or may be, and the image is not stored yet; ``lost_units`` is paid,
    and the image is lost.
    """

    requests: int = 0
    events: int = 0
    submissions: int = 0
    charges: int = 0
    tasks: int = 0
    files: int = 0
    files_hashed: int = 0
    bytes_hashed: int = 0
    pruned: int = 0
    manifests: int = 0
    rows: int = 0
    rows_agreeing: int = 0
    charged_units: int = 0
    at_stake: int = 0
    at_stake_units: int = 0
    lost: int = 0
    lost_units: int = 0


@dataclass(frozen=True)
class Proof:
    """The result of a proof.

    ``findings`` are the first hundred of each kind, errors before notes; ``counts`` and ``units``
    are of all, by kind. ``account`` is None where the account was not read twice.
    """

    figures: ProofFigures
    account: AccountProof | None
    findings: Sequence[Finding]
    counts: Mapping[FindingKind, int]
    units: Mapping[FindingKind, int]
    errors: int
    notes: int

    @property
    def adds_up(self) -> bool:
        """Whether no finding is an error."""
        return self.errors == 0


@dataclass
class ProofFindings:
    """Collects findings. Errors of the kinds ``excused`` become notes."""

    excused: frozenset[FindingKind] = frozenset()
    kept: dict[FindingKind, list[Finding]] = field(default_factory=dict)
    counts: Counter[FindingKind] = field(default_factory=Counter)
    units: Counter[FindingKind] = field(default_factory=Counter)

    def add(
        self,
        kind: FindingKind,
        text: str,
        units: int = 0,
        *,
        request_key: str | None = None,
        task_id: str | None = None,
    ) -> None:
        """Count a finding, and keep it unless there are too many of its kind."""
        self.counts[kind] += 1
        self.units[kind] += units
        kept = self.kept.setdefault(kind, [])
        if len(kept) < KEPT:
            severity = self.severity(kind)
            kept.append(Finding(kind, severity, text, units, request_key, task_id))

    def severity(self, kind: FindingKind) -> Severity:
        """Return how bad findings of a kind are in this proof."""
        return Severity.NOTE if kind in _NOTES | self.excused else Severity.ERROR

    def proof(self, figures: ProofFigures, account: AccountProof | None) -> Proof:
        """Return the proof with all findings."""
        in_order = [kind for kind in FindingKind if kind in self.kept]
        in_order.sort(key=lambda kind: self.severity(kind) is Severity.NOTE)
        errors = sum(
            count for kind, count in self.counts.items() if self.severity(kind) is Severity.ERROR
        )
        return Proof(
            figures=figures,
            account=account,
            findings=[finding for kind in in_order for finding in self.kept[kind]],
            counts={kind: self.counts[kind] for kind in in_order},
            units={kind: self.units[kind] for kind in in_order},
            errors=errors,
            notes=self.counts.total() - errors,
        )
