"""The rules of acceptance: which images are accepted, and why a row is not. Pure.

A row is accepted where its image is stored and all of this holds:

- its last verdict is neither *reject* nor *flag*, which waits for another look;
- with ``require_keep`` the verdict is *keep*. By default an image without a verdict is accepted
  too,
  so that work can go on before a review;
- each measure is in its range. A *keep* does not override a range: remove or loosen the rule;
- of similar images, it is the one to keep.

Where a number of images is wanted, ``limit_to_wanted`` takes that many, in an order that does not
depend on the order of files: kept in a review before not reviewed, then the lower sample, then
prompt_id.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.arrow import as_array
from krea_dagster.engine.record import PRUNED
from krea_dagster.engine.states import State
from krea_dagster.engine.verdict import FLAG, KEEP, REJECT, Verdict
from krea_dagster.errors import ConfigError

#: Why a row is accepted or not. For a measure out of range, the reason is the rule's text.
ACCEPTED: Final = "accepted"
NOT_STORED: Final = "not stored"
FILE_PRUNED: Final = "file pruned"
REJECTED: Final = "rejected"
FLAGGED: Final = "flagged"
NOT_REVIEWED: Final = "not reviewed"
NOT_MEASURED: Final = "not measured"
DUPLICATE: Final = "duplicate"
#: More than wanted: the same image again, or one beyond the number.
SAME_IMAGE: Final = "same image"
SURPLUS: Final = "more than wanted"

#: Reasons that a verdict or a measure may still change.
WAITING: Final = (FLAGGED, NOT_REVIEWED, NOT_MEASURED)

#: The columns that ``judge`` needs of each row.
JUDGED: Final = ("prompt_id", "sample", "request_key", "status", "image_sha256")

VERDICT_SCHEMA: Final = pa.schema(
    [
        ("image_sha256", pa.string()),
        ("verdict", pa.string()),
        ("reviewer", pa.string()),
        ("reviewed_at", pa.timestamp("us", tz="UTC")),
        ("number", pa.int64()),
    ]
)

Mask = npt.NDArray[np.bool_]

_COMPARE: Final = {
    ">=": pc.greater_equal,
    "<=": pc.less_equal,
    ">": pc.greater,
    "<": pc.less,
}


@dataclass(frozen=True)
class Range:
    """A bound of one measure, such as ``sharpness>=120``; the operator is >=, <=, > or <."""

    measure: str
    operator: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Range:
        """Read ``MEASURE>=NUMBER``, such as ``sharpness>=120``. Raises ConfigError."""
        for operator in _COMPARE:  # the longer ones first
            name, found, number = text.partition(operator)
            if not found:
                continue
            try:
                bound = float(number)
            except ValueError:
                break
            if name.strip() and math.isfinite(bound):
                return cls(name.strip(), operator, bound)
            break
        raise ConfigError(
            f"the rule {text!r} cannot be read; write MEASURE>=NUMBER (or <=, >, <), "
            "such as sharpness>=120"
        )

    def __str__(self) -> str:
        return f"{self.measure}{self.operator}{self.bound:g}"

    def holds(self, values: pa.Array) -> pa.Array:
        """Return which values are in the range; null for null and NaN."""
        numbers = values.cast(pa.float64())
        found = _COMPARE[self.operator](numbers, self.bound)
        return pc.if_else(pc.is_nan(numbers), None, found)


@dataclass(frozen=True)
class Rules:
    """The conditions of an accepted image, in addition to being stored and not rejected.

    Args:
        require_keep: Accept only images whose last verdict is *keep*.
        ranges: Bounds of measures that must all hold.
        one_of_duplicates: Accept only the image to keep of each cluster of near-duplicates.
    """

    require_keep: bool = False
    ranges: tuple[Range, ...] = ()
    one_of_duplicates: bool = False

    @classmethod
    def parse(
        cls,
        ranges: Iterable[str] = (),
        *,
        require_keep: bool = False,
        one_of_duplicates: bool = False,
    ) -> Rules:
        """Return rules with ranges from texts such as ``sharpness>=120``. Raises ConfigError."""
        return cls(require_keep, tuple(map(Range.parse, ranges)), one_of_duplicates)

    @property
    def measures(self) -> list[str]:
        """Return the names of the measures needed, each once."""
        return list(dict.fromkeys(one.measure for one in self.ranges))


@dataclass(frozen=True)
class Evidence:
    """What the rules need in addition to the rows.

    ``verdicts`` has ``VERDICT_SCHEMA``, each image at most once. ``measures`` has ``image_sha256``
    and the rules' measures; None where no rule needs one. ``redundant`` is from ``redundant_rows``.
    """

    verdicts: pa.Table
    measures: pa.Table | None = None
    redundant: pa.Array | None = None


def verdict_table(verdicts: Iterable[Verdict]) -> pa.Table:
    """Return present verdicts as ``VERDICT_SCHEMA``."""
    rows = [(one.image_sha256, one.verdict, one.reviewer, one.at, one.number) for one in verdicts]
    columns = list(zip(*rows, strict=True)) or [() for _ in VERDICT_SCHEMA]
    return pa.table(
        [
            pa.array(column, field.type)
            for column, field in zip(columns, VERDICT_SCHEMA, strict=True)
        ],
        schema=VERDICT_SCHEMA,
    )


def verdicts_of(images: pa.Array, verdicts: pa.Table, columns: Sequence[str]) -> pa.Table:
    """Return these columns of each image's verdict; null where there is none."""
    places = pc.index_in(images, value_set=as_array(verdicts["image_sha256"]))
    return verdicts.select(list(columns)).take(places)


def judge(rows: pa.Table | pa.RecordBatch, rules: Rules, evidence: Evidence) -> pa.Array:
    """Return for each row why it is accepted or not: a text above, or a rule's.

    ``rows`` hold ``JUDGED``, and ``error_code`` where a file may have been pruned. Of several
    reasons the first applies: not stored, rejected, pruned, flagged, a range, not measured,
    duplicate, not reviewed. Raises ConfigError where the rules need measures that are not given.
    """
    images = _column(rows, "image_sha256")
    # A null status means that the request was never planned.
    is_stored = pc.equal(_column(rows, "status"), State.STORED.value).fill_null(False)
    stored = pc.and_(is_stored, pc.is_valid(images))
    verdicts = as_array(verdicts_of(images, evidence.verdicts, ["verdict"])["verdict"])
    reasons: list[tuple[pa.Array, str]] = [
        (pc.invert(stored), NOT_STORED),
        (pc.equal(verdicts, REJECT), REJECTED),
        (pc.equal(verdicts, FLAG), FLAGGED),
    ]
    if "error_code" in rows.schema.names:
        pruned = pc.equal(_column(rows, "error_code"), PRUNED)
        reasons.insert(2, (pc.and_(stored, pruned), FILE_PRUNED))
    if rules.ranges:
        if evidence.measures is None:
            raise ConfigError("the rules need measures, but none were read")
        places = pc.index_in(images, value_set=as_array(evidence.measures["image_sha256"]))
        found = evidence.measures.select(rules.measures).take(places)
        holds = {one: one.holds(as_array(found[one.measure])) for one in rules.ranges}
        # A failed range takes precedence over an unknown one.
        reasons += [(pc.invert(held), str(one)) for one, held in holds.items()]
        reasons += [(pc.is_null(held), NOT_MEASURED) for held in holds.values()]
    if rules.one_of_duplicates and evidence.redundant is not None:
        reasons.append((pc.is_in(row_names(rows), value_set=evidence.redundant), DUPLICATE))
    if rules.require_keep:
        kept = pc.equal(verdicts, KEEP).fill_null(False)
        reasons.append((pc.invert(kept), NOT_REVIEWED))
    found = pa.array(np.full(rows.num_rows, ACCEPTED, object), pa.string())
    for where, reason in reversed(reasons):
        found = pc.if_else(where.fill_null(False), reason, found)
    return found


def redundant_rows(
    duplicates: pa.Table, verdicts: pa.Table, *, require_keep: bool = False
) -> pa.Array:
    """Return the names (``row_names``) of the rows that are not the one to keep of their cluster.

    ``duplicates`` is the table ``near_duplicates``. Where a reviewer refused the one marked to keep
    (or, with ``require_keep``, has not kept it), the next one that was not refused takes its place:
    the one with the least distance to it.
    """
    judged = as_array(
        verdicts_of(_column(duplicates, "image_sha256"), verdicts, ["verdict"])["verdict"]
    )
    refused = pc.is_in(judged, value_set=pa.array([REJECT, FLAG]))
    if require_keep:
        refused = pc.invert(pc.equal(judged, KEEP).fill_null(False))
    order = pa.table(
        {
            "cluster": duplicates["cluster"],
            "refused": refused.fill_null(False).cast(pa.int8()),
            "not_kept": pc.invert(_column(duplicates, "keep")).cast(pa.int8()),
            "distance": duplicates["distance"],
            "image_sha256": duplicates["image_sha256"],
            "prompt_id": duplicates["prompt_id"],
            "sample": duplicates["sample"],
        }
    )
    places = pc.sort_indices(order, sort_keys=[(name, "ascending") for name in order.schema.names])
    clusters = _column(duplicates, "cluster").take(places)
    first = np.ones(len(clusters), np.bool_)
    if len(clusters) > 1:
        first[1:] = np.asarray(pc.not_equal(clusters[1:], clusters[:-1]))
    return row_names(duplicates.take(places.filter(pa.array(~first))))


def verdict_version(images: pa.Array, verdicts: pa.Table) -> str:
    """Return a version of the verdicts on these images: 16 hexadecimal digits.

    It depends only on the present verdicts (``VERDICT_SCHEMA``): an image without a verdict does
    not change it, nor does a verdict that was taken back.
    """
    found = verdicts.filter(pc.is_in(verdicts["image_sha256"], value_set=images))
    hashed = hashlib.sha256(b"krea-dagster/1/verdicts")
    for number in sorted(found["number"].to_pylist()):
        hashed.update(b"\x1f%d" % number)
    return hashed.hexdigest()[:16]


def row_names(rows: pa.Table | pa.RecordBatch) -> pa.Array:
    """Return a unique text for each row: its request, sample and prompt_id."""
    return pc.binary_join_element_wise(
        _column(rows, "request_key"),
        _column(rows, "sample").cast(pa.string()),
        _column(rows, "prompt_id"),
        "\x1f",
    )


def limit_to_wanted(
    reasons: pa.Array,
    rows: pa.Table,
    groups: npt.NDArray[np.int64],
    wanted: npt.NDArray[np.int64],
    *,
    kept: pa.Array,
) -> pa.Array:
    """Return the reasons with at most the wanted number of accepted rows per group.

    ``groups`` is the group of each row, ``wanted`` the number per group, -1 for no limit. ``kept``
    is true where the verdict is keep. ``rows`` hold ``JUDGED``. An image that two rows of a group
    share counts once.
    """
    accepted = np.asarray(pc.equal(reasons, ACCEPTED)) & (wanted[groups] >= 0)
    (places,) = np.nonzero(accepted)
    if not len(places):
        return reasons
    chosen = rows.select(["sample", "prompt_id", "image_sha256"]).take(pa.array(places))
    not_kept = ~np.asarray(kept.fill_null(False))[places]
    images = np.asarray(as_array(chosen["image_sha256"]).dictionary_encode().indices)
    table = pa.table(
        {
            "group": groups[places],
            "not_kept": not_kept.astype(np.int8),
            "sample": chosen["sample"],
            "prompt_id": chosen["prompt_id"],
            "image_sha256": chosen["image_sha256"],
        }
    )
    keys = [(name, "ascending") for name in table.schema.names]
    order = np.asarray(pc.sort_indices(table, sort_keys=keys))
    places, images, of = places[order], images[order], groups[places][order]
    _, firsts = np.unique(of * (int(images.max()) + 1) + images, return_index=True)
    first = np.zeros(len(places), np.bool_)
    first[firsts] = True
    beyond = first & (ranks(np.where(first, of, -1)) >= wanted[of])
    limited = np.array(reasons.to_pylist(), object)
    limited[places[~first]] = SAME_IMAGE
    limited[places[beyond]] = SURPLUS
    return pa.array(limited, pa.string())


def ranks(groups: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return for each row how many rows of its group come before it."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    begins = np.searchsorted(ordered, ordered, side="left")
    found = np.empty(len(groups), np.int64)
    found[order] = np.arange(len(groups)) - begins
    return found


def _column(rows: pa.Table | pa.RecordBatch, name: str) -> pa.Array:
    return as_array(rows.column(name))
