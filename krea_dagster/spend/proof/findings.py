"""What a proof finds, and what it proves: values, and the collector that bounds their number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from krea_dagster.spend.proof.account import AccountProof

#: ProofFindings of one kind that are kept with their sentences; all are counted.
KEPT: Final = 100


class Severity(str, Enum):
    """Whether the books are wrong, or only not closed yet."""

    #: It does not add up.
    ERROR = "error"
    #: Open, at stake, or explained.
    NOTE = "note"


class FindingKind(str, Enum):
    """What can be found. The text is what ``--json`` and the check's metadata show."""

    #: One request was charged more than once.
    BOUGHT_TWICE = "bought_twice"
    #: Charged, and no task is known.
    CHARGED_WITHOUT_TASK = "charged_without_task"
    #: Charged, in a state that costs nothing and has no image.
    CHARGED_WITHOUT_IMAGE = "charged_without_image"
    #: Stored, and the journal knows of no purchase.
    STORED_WITHOUT_CHARGE = "stored_without_charge"
    #: Stored, and the file is not there or cannot be read.
    FILE_MISSING = "file_missing"
    #: Stored, and the file has other bytes.
    FILE_CHANGED = "file_changed"
    #: A file that no request in the journal has.
    FILE_UNKNOWN = "file_unknown"
    #: Paid, and no manifest row shows it.
    NOT_LISTED = "not_listed"
    #: A manifest row says something else than the journal.
    ROW_DIFFERS = "row_differs"
    #: A manifest row says what the journal said earlier.
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
    #: Stored, and the server never said what it cost.
    PRICE_UNKNOWN = "price_unknown"
    #: Stored, because its file was found in the storage root; who bought it is not known here.
    PURCHASE_UNKNOWN = "purchase_unknown"
    #: Paid and stored, and the prompt table does not ask for it any more.
    NOT_ASKED_ANY_MORE = "not_asked_any_more"
    #: The file of a request that is not stored yet.
    FILE_NOT_ENTERED = "file_not_entered"
    #: The account could not be compared.
    ACCOUNT_NOT_COMPARED = "account_not_compared"


#: Kinds that are errors, whatever else is true.
_ERRORS: Final = frozenset(
    {
        FindingKind.BOUGHT_TWICE,
        FindingKind.CHARGED_WITHOUT_TASK,
        FindingKind.CHARGED_WITHOUT_IMAGE,
        FindingKind.STORED_WITHOUT_CHARGE,
        FindingKind.FILE_MISSING,
        FindingKind.FILE_CHANGED,
        FindingKind.FILE_UNKNOWN,
        FindingKind.NOT_LISTED,
        FindingKind.ROW_DIFFERS,
        FindingKind.ROW_BEHIND,
        FindingKind.ROW_UNKNOWN,
        FindingKind.MANIFEST_UNREADABLE,
        FindingKind.EVENTS_DIFFER,
        FindingKind.SUM_DIFFERS,
        FindingKind.ACCOUNT_DIFFERS,
    }
)


@dataclass(frozen=True)
class Finding:
    """One sentence, and what it is about. ``units`` is the money in question, at most."""

    kind: FindingKind
    severity: Severity
    text: str
    units: int = 0
    request_key: str | None = None
    task_id: str | None = None


@dataclass(frozen=True)
class ProofFigures:
    """What was looked at. Money in units.

    ``charges`` are submissions that cost something, ``tasks`` their distinct tasks. ``files``
    were found with their size, ``files_hashed`` of them with their hash. ``rows`` are manifest
    rows, ``rows_agreeing`` those that say what the journal says. ``at_stake_units`` is paid, or
    may be, without an image at hand yet; ``lost_units`` is paid without one for good.
    """

    requests: int = 0
    events: int = 0
    submissions: int = 0
    charges: int = 0
    tasks: int = 0
    files: int = 0
    files_hashed: int = 0
    bytes_hashed: int = 0
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
    """What was proved, and what was found.

    ``findings`` are the first hundred of each kind, errors before notes; ``counts`` and
    ``units`` are of all of them, by kind. ``account`` is None where it was not read twice.
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
        """Whether nothing was found that is wrong."""
        return self.errors == 0


@dataclass
class ProofFindings:
    """Takes findings. Errors that ``excused`` names are kept as notes."""

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
        """Count a finding, and keep it where there are not too many of its kind."""
        self.counts[kind] += 1
        self.units[kind] += units
        kept = self.kept.setdefault(kind, [])
        if len(kept) < KEPT:
            severity = self.severity(kind)
            kept.append(Finding(kind, severity, text, units, request_key, task_id))

    def severity(self, kind: FindingKind) -> Severity:
        """How bad findings of a kind are here."""
        wrong = kind in _ERRORS and kind not in self.excused
        return Severity.ERROR if wrong else Severity.NOTE

    def proof(self, figures: ProofFigures, account: AccountProof | None) -> Proof:
        """All of it."""
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
