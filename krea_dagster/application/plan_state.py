"""What is known of the images of a plan, and what a run is to do about each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from krea_dagster.application.callback_column import COLUMN, own_urls
from krea_dagster.digests import Digests, Mask, first_of_each
from krea_dagster.engine.budget import column_scope
from krea_dagster.engine.journal.attribution_log import attributes_text, attribution_id
from krea_dagster.engine.run.requested_image import BoughtFor, RequestedImage
from krea_dagster.prompts import Plan

#: The budget scopes of an image, the callback address of its row, and its row with its attributes.
_Further: TypeAlias = tuple[tuple[str, ...], str | None, BoughtFor, str | None]


@dataclass(frozen=True)
class PlanState:
    """The images of a plan: which of them the journal has ``seen``, and which are ``intact``.

    An image is intact if it is stored and complete: nothing is left to do for it.
    ``budget_columns`` are the columns whose values have a budget, ``attributes`` those whose values
    are written with each purchase; ``held`` and ``outside`` are those of ``Batch``; ``table_id`` is
    the prompt table's in the journal.
    """

    plan: Plan
    seen: Mask
    intact: Mask
    budget_columns: Sequence[str] = ()
    attributes: Sequence[str] = ()
    held: Mask | None = None
    outside: Mask | None = None
    table_id: str = ""

    def part(self, plan: Plan) -> PlanState:
        """Return the state of a part of its plan."""
        seen, intact = (
            np.concatenate([mask[:0], *(mask[self.plan.place(key)] for key in plan.keys)])
            for mask in (self.seen, self.intact)
        )
        return replace(self, plan=plan, seen=seen, intact=intact)

    @property
    def settled(self) -> Mask:
        """Images that a run does nothing for: intact, held back, or outside the trial."""
        settled = self.intact
        for mask in (self.held, self.outside):
            settled = settled if mask is None else settled | mask
        return settled

    @property
    def inside(self) -> Mask:
        """Images of the trial; all without one."""
        return np.ones_like(self.intact) if self.outside is None else ~self.outside

    @property
    def held_back(self) -> int:
        """Number of images that are neither intact nor wanted now, of the trial if there is one."""
        return int((self.settled & ~self.intact & self.inside).sum())

    def wanted(self) -> Iterator[RequestedImage]:
        """Yield each request that is not settled once, in the order of the plan."""
        open_ = np.flatnonzero(~self.settled)
        first, counts = first_of_each(self.digests[open_])
        chosen = np.zeros(len(self.digests), np.bool_)
        chosen[open_[first]] = True
        masks = self.by_partition(chosen)
        requests = self.plan.requests(masks)
        for (request, partition_key), rows, further in zip(
            requests, counts[first], self._further(masks), strict=True
        ):
            yield RequestedImage(request, partition_key, int(rows), *further)

    def _further(self, masks: Mapping[str, Mask]) -> Iterator[_Further]:
        """Yield what else each masked image is bought with, in the plan's order."""
        calls = COLUMN in self.plan.passthrough.names
        for key in self.plan.keys:
            mask, start = masks[key], 0
            for batch in self.plan.batches(key) if mask.any() else ():
                chosen = batch.filter(pa.array(mask[start : start + batch.num_rows]))
                start += batch.num_rows
                nothing = repeat((), chosen.num_rows)
                scopes = self.scopes_of(chosen) if self.budget_columns else nothing
                urls = own_urls(chosen) if calls else repeat(None, chosen.num_rows)
                yield from zip(scopes, urls, *self._rows_of(chosen), strict=True)

    def _rows_of(self, images: pa.RecordBatch) -> tuple[Iterable[BoughtFor], Iterable[str | None]]:
        """Return the row that each of these images is bought for, and its attributes as text."""
        attributes: Sequence[str | None] = [None] * images.num_rows
        if self.attributes:
            columns = [_texts_of(images, name) for name in self.attributes]
            texts: dict[tuple[str | None, ...], str] = {}
            rows = list(zip(*columns, strict=True))
            for values in dict.fromkeys(rows):
                named = dict(zip(self.attributes, values, strict=True))
                texts[values] = attributes_text(named)
            attributes = [texts[values] for values in rows]
        names = images.schema.names
        who = (images.column(names.index(name)).to_pylist() for name in ("prompt_id", "sample"))
        numbers = {text: None if text is None else attribution_id(text) for text in {*attributes}}
        bought_for = [
            BoughtFor(prompt_id, sample, numbers[text])
            for prompt_id, sample, text in zip(*who, attributes, strict=True)
        ]
        return bought_for, attributes

    def scopes_of(self, images: pa.RecordBatch) -> Sequence[tuple[str, ...]]:
        """Return the budget scopes of each of these images; empty if no column has a budget."""
        columns = []
        for name in self.budget_columns:
            values = pa.array(_texts_of(images, name), pa.string()).dictionary_encode()
            scopes = [column_scope(name, value) for value in values.dictionary.to_pylist()]
            places = values.indices.to_pylist()
            empty = column_scope(name, None)
            columns.append([empty if place is None else scopes[place] for place in places])
        return list(zip(*columns, strict=True))

    def by_partition(self, mask: Mask) -> dict[str, Mask]:
        """Split a mask over all images by partition."""
        return {key: mask[self.plan.place(key)] for key in self.plan.keys}

    @property
    def digests(self) -> Digests:
        """The request keys of all images as bytes, in the order of the plan."""
        return self.plan.all_digests


def _texts_of(images: pa.RecordBatch, name: str) -> list[str | None]:
    """Return the values of a column as text."""
    # The plan's own columns come first, and a further one may have the same name.
    column = images.column(images.schema.names.index(name))
    try:
        texts: list[str | None] = column.cast(pa.string()).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # a list or a struct
        texts = [None if value is None else str(value) for value in column.to_pylist()]
    return texts
