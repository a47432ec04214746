"""The measures of spend: each is defined here, once, in SQL over purchases.

A purchase is a row of the ledger. A refund or a correction of a charge is a row of the view
``charges`` without an outcome: it counts as no purchase. Terminal, JSON, CSV, SQL, report, assets
and checks read these definitions through the views of ``views.py``, the table ``spend_daily``, or
``query.sums``. Credits are decimals with four places, so that no sum is rounded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from krea_dagster.engine.journal.entry_log import CORRECTION, PROMOTION, REFUND, TOP_UP
from krea_dagster.engine.verdict import FLAG, REJECT

#: The type of a credit amount, of a sum of them, and of money in the ledger. Money has
#: places enough that the sum of many rounded rows is the rounded sum.
CREDITS: Final = pa.decimal128(18, 4)
SUM_OF_CREDITS: Final = pa.decimal128(38, 4)
MONEY: Final = pa.decimal128(38, 16)

_COUNT: Final = pa.int64()
_QUOTIENT: Final = pa.float64()


@dataclass(frozen=True)
class SpendMeasure:
    """An aggregate over purchases: its SQL, its type, and what it means."""

    name: str
    sql: str
    kind: pa.DataType
    text: str

    @property
    def typed_sql(self) -> str:
        """The SQL with the type of the result."""
        names = {_COUNT: "BIGINT", SUM_OF_CREDITS: "DECIMAL(38, 4)", _QUOTIENT: "DOUBLE"}
        return f"CAST({self.sql} AS {names[self.kind]})"


def _count(*outcomes: str) -> str:
    return f"count(*) FILTER (outcome IN ({', '.join(map(repr, outcomes))}))"


def _sum(credits: str, where: str = "true") -> str:
    return f"coalesce(sum({credits}) FILTER ({where}), 0)"


#: A purchase whose image counts as accepted. Without any verdict, that is all that was delivered
#: and not replaced.
_IS_ACCEPTED: Final = (
    f"outcome = 'delivered' AND coalesce(verdict, '') NOT IN ('{REJECT}', '{FLAG}')"
)
#: A purchase whose image several rows share.
_IS_SHARED: Final = "outcome IN ('delivered', 'replaced') AND rows > 1"

_DELIVERED: Final = _count("delivered", "replaced")
_ACCEPTED: Final = f"count(*) FILTER ({_IS_ACCEPTED})"
_CHARGED: Final = _sum("credits_charged")
_UNKNOWN: Final = _sum("credits_unknown")
_REFUNDED: Final = _sum("credits_refunded")

#: Every measure, by name: its SQL, its type, and what it means.
MEASURES: Final = {
    name: SpendMeasure(name, sql, kind, text)
    for name, (sql, kind, text) in {
        "purchases": ("count(outcome)", _COUNT, "Purchases that were sent"),
        "delivered": (_DELIVERED, _COUNT, "Those that bought an image, also one replaced since"),
        "replaced": (
            _count("replaced"),
            _COUNT,
            "Of the delivered, those with a later attempt that was delivered",
        ),
        "accepted": (
            _ACCEPTED,
            _COUNT,
            "Of the delivered, those neither replaced, rejected nor flagged",
        ),
        "failed": (_count("failed"), _COUNT, "Those whose task failed"),
        "refused": (_count("refused"), _COUNT, "Those that were certainly not created"),
        "lost": (_count("lost"), _COUNT, "Those that are paid, and the image is lost"),
        "rejected": (
            _count("rejected"),
            _COUNT,
            "Those that are paid, and a check rejected the file",
        ),
        "unknown": (_count("unknown"), _COUNT, "Those without a usable answer yet"),
        "pending": (
            _count("pending"),
            _COUNT,
            "Those that are at the server, or being fetched",
        ),
        "reused": (
            f"coalesce(sum(rows - 1) FILTER ({_IS_SHARED}), 0)",
            _COUNT,
            "Manifest rows that share a delivered image, beyond its first row",
        ),
        "credits_charged": (_CHARGED, SUM_OF_CREDITS, "Credits that were charged"),
        "credits_refunded": (
            _REFUNDED,
            SUM_OF_CREDITS,
            "Credits that refunds gave back, and corrections of charges",
        ),
        "credits_net": (
            f"{_CHARGED} - {_REFUNDED}",
            SUM_OF_CREDITS,
            "Credits that were charged, without those refunded",
        ),
        "credits_returned": (
            _sum("credits_returned"),
            SUM_OF_CREDITS,
            "Credits that were reserved and not charged",
        ),
        "credits_unknown": (
            _UNKNOWN,
            SUM_OF_CREDITS,
            "Credits that may be charged: committed and not settled",
        ),
        "credits_at_stake": (
            f"{_UNKNOWN} + {_sum('credits_charged', 'outcome = ' + repr('pending'))}",
            SUM_OF_CREDITS,
            "Credits that may be charged, or are paid for an image to come",
        ),
        "credits_committed": (
            f"{_CHARGED} + {_UNKNOWN}",
            SUM_OF_CREDITS,
            "Credits that were charged, or may be charged",
        ),
        "credits_saved_by_reuse": (
            _sum("(rows - 1) * credits_charged", _IS_SHARED),
            SUM_OF_CREDITS,
            "Credits that the reused rows would have cost",
        ),
        "credits_per_delivered": (
            f"{_CHARGED} / nullif({_DELIVERED}, 0)",
            _QUOTIENT,
            "Credits charged per delivered image",
        ),
        "credits_per_accepted": (
            f"{_CHARGED} / nullif({_ACCEPTED}, 0)",
            _QUOTIENT,
            "Credits charged per accepted image",
        ),
        "latency_p50_s": (
            "quantile_cont(latency_s, 0.5)",
            _QUOTIENT,
            "Median time from submission to completion, seconds",
        ),
        "latency_p95_s": (
            "quantile_cont(latency_s, 0.95)",
            _QUOTIENT,
            "95th percentile of that time, seconds",
        ),
    }.items()
}

#: The measures of purchases alone: of the ledger without refunds.
OF_PURCHASES: Final = tuple(
    name for name in MEASURES if name not in ("credits_refunded", "credits_net")
)

#: Whether an entry of the account gives a charge back, or takes more, as an expression.
CHANGES_CHARGE: Final = f"counts_as IN ('{REFUND}', '{CORRECTION}')"

#: The sums of the account's entries, over the view ``entries``.
ENTRY_SUMS: Final = {
    "credits_bought": _sum("credits", f"counts_as = '{TOP_UP}'"),
    "credits_given": _sum("credits", f"counts_as = '{PROMOTION}'"),
    "credits_refunded": _sum("credits", CHANGES_CHARGE),
    "credits_refunded_without_purchase": _sum(
        "credits", f"{CHANGES_CHARGE} AND idempotency_key IS NULL"
    ),
}

#: The purchases that brought nothing, or of which that is not known, by outcome.
WITHOUT_IMAGE: Final = ("failed", "refused", "lost", "rejected", "unknown")


def selected(names: Iterable[str] | None = None, **renamed: str) -> str:
    """Return measures (all by default) as a list for SELECT; ``renamed`` maps a name to another."""
    chosen = MEASURES if names is None else {name: MEASURES[name] for name in names}
    return ", ".join(
        f"{one.typed_sql} AS {renamed.get(name, name)}" for name, one in chosen.items()
    )
