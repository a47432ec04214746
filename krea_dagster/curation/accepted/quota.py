"""Exactly N accepted: which slots are bought, regenerated or held back, and why some stay short.

Pure. A slot is one sample of a row (``num_images`` of them) and holds one image at a time. A number
of accepted images is wanted of each group (a prompt, or a value of a column). Missing is the wanted
number less the images that are accepted or undecided: not reviewed yet, at the server, of unknown
outcome. Never more is bought than is missing:

- first slots without an image, then those whose image was refused, with the next attempt; the
  fewest
  attempts first, then the lowest sample, then the order of the table;
- a slot with a seed in the table would give the same image again, and is left alone;
- a slot whose task failed or was refused is left alone too, except for the errors that every run
  retries and those in ``retry_errors``: these count as slots without an image;
- nothing beyond the candidate budget, a number of images and of credits per group. All purchases
  count. Failed and refused tasks cost nothing and do not count.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.curation.accepted import rules
from krea_dagster.curation.accepted.rules import ranks
from krea_dagster.engine.policy import REPEATABLE_TASK_ERRORS
from krea_dagster.engine.states import AT_STAKE, State
from krea_dagster.errors import ConfigError
from krea_dagster.models import credits_from_units, units_from_credits

Numbers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

#: The state of a slot.
IS_ACCEPTED: Final = 0
IS_UNDECIDED: Final = 1
IS_OPEN: Final = 2
IS_REFUSED: Final = 3
IS_FIXED: Final = 4
IS_FAILED: Final = 5

#: The default candidate budget: images bought for each wanted one.
CANDIDATES_EACH: Final = 4

#: The default credit budget of a group, in units: no limit.
_NO_LIMIT: Final = 2**62

_AT_STAKE: Final = pa.array(sorted(state.value for state in AT_STAKE))
_UNASKED: Final = pa.array([State.PLANNED.value, State.DEFERRED.value])
_REPEATABLE: Final = pa.array(sorted(REPEATABLE_TASK_ERRORS))
_ENDED: Final = pa.array([State.FAILED.value, State.REFUSED.value])


@dataclass(frozen=True)
class WantedImages:
    """How many accepted images are wanted, of what, and how many candidates may be bought.

    Args:
        number: Wanted images of each prompt, or of each value of ``column``; None where only
            ``values`` have a number.
        column: The column whose values are counted; empty counts prompts.
        values: Wanted images of single values or prompts, in place of ``number``.
        most_images: The most images bought per group, over all attempts; None for 4 times the
            number.
        most_units: The most units (1/10,000 credits) spent per group; None for no limit.
    """

    number: int | None
    column: str = ""
    values: Mapping[str, int] = field(default_factory=dict)
    most_images: int | None = None
    most_units: int | None = None

    @classmethod
    def parse(
        cls,
        texts: Sequence[str],
        *,
        most_images: int | None = None,
        most_credits: float | None = None,
    ) -> WantedImages | None:
        """Return the wanted images from texts; None for no texts.

        Args:
            texts: ``prompt=N``, or ``column:NAME=N`` and ``column:NAME:VALUE=N``, all of one
            column. most_images: The most images bought per group. most_credits: The most credits
            spent per group.

        Raises:
            ConfigError: A text is invalid or repeated, or a budget is negative or has no number.
        """
        if not texts:
            if most_images is not None or most_credits is not None:
                raise ConfigError(
                    "a candidate budget needs a number of wanted images; give one, such as prompt=3"
                )
            return None
        number: int | None = None
        columns: set[str] = set()
        values: dict[str, int] = {}
        for text in texts:
            column, value, count = _read(text)
            columns.add(column)
            if (value is None and number is not None) or (value is not None and value in values):
                raise ConfigError(f"duplicate wanted images {text!r}")
            if value is None:
                number = count
            else:
                values[value] = count
        if len(columns) > 1:
            raise ConfigError(
                "images are wanted per prompt or per value of one column, not both and not of "
                f"several columns: {', '.join(texts)}"
            )
        if (most_images is not None and most_images < 0) or (
            most_credits is not None and not 0 <= most_credits < 1e12
        ):
            raise ConfigError("a candidate budget of images or credits must not be negative")
        return cls(
            number,
            columns.pop(),
            values,
            most_images,
            None if most_credits is None else units_from_credits(most_credits),
        )

    @property
    def of(self) -> str:
        """Return the name of a group: ``prompt`` or ``value of COLUMN``."""
        return f"value of {self.column}" if self.column else "prompt"

    def numbers(self, names: Sequence[str]) -> Numbers:
        """Return the wanted number of these groups, -1 for no limit."""
        rest = -1 if self.number is None else self.number
        return np.array([self.values.get(name, rest) for name in names], np.int64)

    def most(self, numbers: Numbers) -> Numbers:
        """Return how many images of each group may be bought in total."""
        if self.most_images is None:
            return numbers * CANDIDATES_EACH
        return np.full(len(numbers), self.most_images, np.int64)


def _read(text: str) -> tuple[str, str | None, int]:
    scope, equals, count = text.rpartition("=")
    kind, colon, rest = scope.partition(":")
    column, second, value = rest.partition(":")
    known = scope == "prompt" or (kind == "column" and colon and column)
    if not equals or not known or not count.strip().isdecimal():
        raise ConfigError(
            f"invalid wanted images {text!r}; use prompt=N, column:NAME=N or column:NAME:VALUE=N, "
            "such as prompt=3"
        )
    return column, value if second else None, int(count)


#: The columns of slots.
SLOT_SCHEMA: Final = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("attempt", pa.int32()),
        ("seed", pa.int32()),
        ("drawn", pa.bool_()),  # another attempt has another seed
        ("request_key", pa.string()),
        ("partition_key", pa.string()),
        ("value", pa.string()),  # of the counted column; null for prompts
        ("status", pa.string()),
        ("image_sha256", pa.string()),
        ("error_code", pa.string()),
        ("price_units", pa.int64()),  # the highest price of the request
        ("bought_images", pa.int32()),  # at all its attempts
        ("bought_units", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Groups:
    """The groups of some rows: their names, and the group number of each row."""

    names: Sequence[str]
    of: Numbers

    @classmethod
    def by(cls, wanted: WantedImages, rows: pa.Table) -> Groups:
        """Group rows that have ``prompt_id`` and ``value``."""
        column = rows["value"].fill_null("") if wanted.column else rows["prompt_id"]
        encoded = column.combine_chunks().dictionary_encode()
        if isinstance(encoded, pa.ChunkedArray):  # more rows than fit into one array
            encoded = encoded.unify_dictionaries().combine_chunks()
        return cls(encoded.dictionary.to_pylist(), np.asarray(encoded.indices).astype(np.int64))


@dataclass(frozen=True)
class GroupResult:
    """The state of one group after a decision or at the end; counts of slots.

    ``images`` and ``units`` are its purchases so far, at all attempts. ``why`` is the reason that
    it stays below its number; empty where it does not, or that is not known yet (``undecided`` and
    ``asked`` are under way).
    """

    name: str
    wanted: int
    accepted: int
    undecided: int
    asked: int
    images: int
    units: int
    why: str

    @property
    def reached(self) -> bool:
        """Whether the wanted number is accepted."""
        return self.accepted >= self.wanted

    @property
    def short(self) -> int:
        """Return how many images will stay missing unless something is changed."""
        return max(0, self.wanted - self.accepted - self.undecided - self.asked)


@dataclass(frozen=True)
class QuotaDecision:
    """What is done with slots, as masks, and the result of each group.

    ``ask`` have no image yet and are bought; ``again`` get another attempt; ``held`` have no image
    and are not bought now.
    """

    ask: Mask
    again: Mask
    held: Mask
    outcomes: Sequence[GroupResult]

    @property
    def totals(self) -> Mapping[str, Any]:
        """Return counts over all groups with a wanted number."""
        return quota_totals(self.outcomes)


def quota_totals(outcomes: Sequence[GroupResult]) -> Mapping[str, Any]:
    """Return counts over groups, of images and in credits, for metadata."""
    return {
        "groups": len(outcomes),
        "groups_reached": sum(one.reached for one in outcomes),
        "groups_short": sum(one.short > 0 for one in outcomes),
        "wanted": sum(one.wanted for one in outcomes),
        "accepted": sum(min(one.accepted, one.wanted) for one in outcomes),
        "undecided": sum(one.undecided for one in outcomes),
        "asked": sum(one.asked for one in outcomes),
        "candidates": sum(one.images for one in outcomes),
        "candidate_credits": credits_from_units(sum(one.units for one in outcomes)),
    }


def slot_states(
    slots: pa.Table, reasons: pa.Array, *, retry_errors: Collection[str] = ()
) -> npt.NDArray[np.int8]:
    """Return the state of each slot; ``reasons`` are from ``rules.judge``.

    ``slots`` has ``SLOT_SCHEMA``; a null status means that the request was never planned.
    """
    status = slots["status"].fill_null(State.PLANNED.value)
    stored = pc.equal(status, State.STORED.value)
    codes = slots["error_code"]
    retried = pc.is_in(codes, value_set=pa.array(sorted(retry_errors), pa.string()))
    # Every run retries these, so another slot in their place would be one too many.
    repeated = pc.and_(pc.equal(status, State.FAILED.value), pc.is_in(codes, value_set=_REPEATABLE))
    unasked = pc.or_(
        pc.is_in(status, value_set=_UNASKED),
        pc.or_(repeated, pc.and_(pc.is_in(status, value_set=_ENDED), retried)),
    )
    found = np.full(slots.num_rows, IS_FAILED, np.int8)
    found[np.asarray(pc.is_in(status, value_set=_AT_STAKE))] = IS_UNDECIDED
    found[np.asarray(unasked)] = IS_OPEN
    is_stored = np.asarray(stored)
    waiting = np.asarray(pc.is_in(reasons, value_set=pa.array(rules.WAITING)))
    accepted = np.asarray(pc.equal(reasons, rules.ACCEPTED))
    drawn = np.asarray(slots["drawn"])
    found[is_stored & drawn] = IS_REFUSED
    found[is_stored & ~drawn] = IS_FIXED
    found[is_stored & waiting] = IS_UNDECIDED
    found[is_stored & accepted] = IS_ACCEPTED
    return found


def decide(wanted: WantedImages, slots: pa.Table, states: npt.NDArray[np.int8]) -> QuotaDecision:
    """Decide what is bought. ``slots`` has ``SLOT_SCHEMA``, in the order of the table.

    Two slots of a group that share a request count as one: it is bought once and is one image. Two
    requests of a group that gave the same file are one accepted image; the later counts as refused.
    """
    groups = Groups.by(wanted, slots)
    of, number = groups.of, len(groups.names)
    states = _without_same_images(of, slots, states)
    numbers = wanted.numbers(groups.names)
    governed = numbers[of] >= 0
    first = _first_of_each(of, slots["request_key"])
    counted = governed & first

    def count(*kinds: int) -> Numbers:
        return np.bincount(of[counted & np.isin(states, kinds)], minlength=number)

    # The cost of a shared request counts once for the group.
    images = _sums(of[counted], _numbers(slots, "bought_images")[counted], number)
    units = _sums(of[counted], _numbers(slots, "bought_units")[counted], number)
    accepted, undecided = count(IS_ACCEPTED), count(IS_UNDECIDED)
    missing = np.maximum(numbers - accepted - undecided, 0)
    room = np.maximum(wanted.most(numbers) - images, 0)
    credits_left = (_NO_LIMIT if wanted.most_units is None else wanted.most_units) - units
    candidates = counted & np.isin(states, (IS_OPEN, IS_REFUSED))
    picked = _pick(
        of,
        slots,
        states,
        candidates=candidates,
        most=np.minimum(missing, room),
        most_units=credits_left,
    )
    asked = np.bincount(of[picked], minlength=number)
    left = count(IS_OPEN, IS_REFUSED) - asked
    # Slots that share a request are treated the same.
    picked = _with_shared_requests(of, slots["request_key"], picked, first)
    is_open = states == IS_OPEN
    fixed, failed = count(IS_FIXED), count(IS_FAILED)
    outcomes = [
        GroupResult(
            groups.names[at],
            int(numbers[at]),
            int(accepted[at]),
            int(undecided[at]),
            int(asked[at]),
            int(images[at]),
            int(units[at]),
            _why(
                int(missing[at] - asked[at]),
                left=int(left[at]),
                room=int(room[at] - asked[at]),
                most=wanted.most_units,
                images=int(images[at] + asked[at]),
                fixed=int(fixed[at]),
                failed=int(failed[at]),
            ),
        )
        for at in np.flatnonzero(numbers >= 0).tolist()
    ]
    return QuotaDecision(
        ask=is_open & (picked | ~governed),
        again=picked & (states == IS_REFUSED) & first,
        held=is_open & governed & ~picked,
        outcomes=outcomes,
    )


def _pick(
    of: Numbers,
    slots: pa.Table,
    states: npt.NDArray[np.int8],
    *,
    candidates: Mask,
    most: Numbers,
    most_units: Numbers,
) -> Mask:
    """Return the candidates to buy: at most ``most`` and for at most ``most_units`` of each group.

    Open ones first, then the fewest attempts, the lowest sample, the order of the table.
    """
    (places,) = np.nonzero(candidates)
    keys = (_numbers(slots, "sample"), _numbers(slots, "attempt"), states, of)
    order = places[np.lexsort((places, *(key[places] for key in keys)))]
    of_each, prices = of[order], _numbers(slots, "price_units")[order]
    place_in_group = ranks(of_each)
    # The running cost within the group: the total less the total before the group's first row.
    running = np.cumsum(prices)
    before = running - prices
    begins = np.arange(len(order)) - place_in_group
    within = running - before[begins] if len(order) else running
    chosen = (place_in_group < most[of_each]) & (within <= most_units[of_each])
    picked = np.zeros(len(of), np.bool_)
    picked[order[chosen]] = True
    return picked


def _without_same_images(
    of: Numbers, slots: pa.Table, states: npt.NDArray[np.int8]
) -> npt.NDArray[np.int8]:
    """Return the states, with one accepted slot where requests of a group gave the same file."""
    (places,) = np.nonzero(states == IS_ACCEPTED)
    order = places[np.lexsort((places, _numbers(slots, "sample")[places], of[places]))]
    chosen = slots.select(["image_sha256", "request_key"]).take(pa.array(order))
    images = _requests(of[order], pc.coalesce(chosen["image_sha256"], chosen["request_key"]))
    requests = _requests(of[order], chosen["request_key"])
    _, first, image = np.unique(images, return_index=True, return_inverse=True)
    again = order[requests != requests[first][image]]
    if not len(again):
        return states
    found: npt.NDArray[np.int8] = states.copy()
    found[again] = np.where(np.asarray(slots["drawn"])[again], IS_REFUSED, IS_FIXED)
    return found


def _why(
    short: int, *, left: int, room: int, most: int | None, images: int, fixed: int, failed: int
) -> str:
    if short <= 0:
        return ""
    reasons = []
    if left and room <= 0:
        reasons.append(f"the candidate budget is spent at {images} images")
    elif left:
        reasons.append(
            f"the candidate budget of {credits_from_units(most or 0):g} credits does not cover "
            "another one"
        )
    if short > left:
        if fixed:
            reasons.append(
                f"{fixed} refused with a seed in the table, which would give the same image again"
            )
        if failed:
            reasons.append(f"{failed} failed at the server (retry_errors buys them again)")
        if short > left + fixed + failed:
            reasons.append("its rows ask for too few images (num_images)")
    return "; ".join(reasons)


def _first_of_each(of: Numbers, keys: pa.ChunkedArray) -> Mask:
    """Return which slots are the first of their group with their request."""
    _, first = np.unique(_requests(of, keys), return_index=True)
    found = np.zeros(len(of), np.bool_)
    found[first] = True
    return found


def _with_shared_requests(of: Numbers, keys: pa.ChunkedArray, chosen: Mask, first: Mask) -> Mask:
    """Return the chosen slots, and those of their group that share a request with one."""
    if first.all():
        return chosen
    requests = _requests(of, keys)
    return np.isin(requests, requests[chosen])


def _requests(of: Numbers, keys: pa.ChunkedArray) -> Numbers:
    """Return a number for each pair of a group and a text, such as a request key."""
    encoded = pa.chunked_array(keys.chunks, pa.string()).combine_chunks().dictionary_encode()
    found: Numbers = of * (len(encoded.dictionary) + 1) + np.asarray(encoded.indices)
    return found


def _numbers(slots: pa.Table, name: str) -> Numbers:
    found: Numbers = np.asarray(slots[name]).astype(np.int64)
    return found


def _sums(of: Numbers, values: Numbers, number: int) -> Numbers:
    """Return the sums by group, as integers."""
    found = np.zeros(number, np.int64)
    np.add.at(found, of, values)
    return found
