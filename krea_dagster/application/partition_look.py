"""What a person wants to see of a prompt table's partition: its rows, and some of its prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.prompts import Plan

#: Prompts that are shown of a partition.
_SHOWN: Final = 3


@dataclass(frozen=True)
class PartitionLook:
    """The number of a partition's rows, and its first prompts."""

    rows: int = 0
    prompts: tuple[str, ...] = ()

    def __add__(self, other: PartitionLook) -> PartitionLook:
        return PartitionLook(self.rows + other.rows, (*self.prompts, *other.prompts)[:_SHOWN])


def looks_of(keys: pa.Array, prompts: pa.Array) -> Mapping[str, PartitionLook]:
    """Return the look of each partition, from the keys and the prompts of some rows."""
    encoded = keys.dictionary_encode()
    numbers = np.asarray(encoded.indices.to_numpy(zero_copy_only=False), np.int64)
    counts = np.bincount(numbers, minlength=len(encoded.dictionary))
    ends = np.cumsum(counts)
    order = np.argsort(numbers, kind="stable")
    places = [order[end - count : end] for end, count in zip(ends, counts, strict=True)]
    return {
        key: PartitionLook(int(count), tuple(prompts.take(pa.array(own[:_SHOWN])).to_pylist()))
        for key, count, own in zip(encoded.dictionary.to_pylist(), counts, places, strict=True)
    }


def looks_of_plan(plan: Plan, keys: Iterable[str]) -> Mapping[str, PartitionLook]:
    """Return the look of these partitions of a plan, in which a row may be several images."""
    found: dict[str, PartitionLook] = {}
    for key in keys:
        look = PartitionLook()
        for batch in plan.batches(key):
            rows = batch.filter(pc.equal(batch.column("sample"), 0))
            look += PartitionLook(
                rows.num_rows, tuple(rows.column("prompt").slice(0, _SHOWN).to_pylist())
            )
        found[key] = look
    return found
