"""A trial: some rows of a table, to see their images before the others are bought.

The plan has all rows, so that data versions and the manifest stay whole. A trial is a choice among
them, always the same for the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.digests import Mask
from krea_dagster.prompts.identity import sha256
from krea_dagster.prompts.plan import PLAN_SCHEMA, Plan
from krea_dagster.prompts.requests import SEPARATOR

_ID: Final = PLAN_SCHEMA.get_field_index("prompt_id")


@dataclass(frozen=True)
class Trial:
    """How many rows, and which: the first ones, or a ``sample``.

    A sample has the rows whose prompt_id has the lowest hashes. So a larger sample contains a
    smaller one, and a new row of the table replaces at most one row of it.
    """

    rows: int
    sample: bool = False

    def of(self, plan: Plan) -> TrialRows:
        """Return the rows of a plan that are in the trial."""
        numbers, ranks = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
        for key in plan.keys:
            for rows, images in plan.numbered_batches(key):
                numbers.append(rows)
                ranks.append(_hashes(images.column(_ID)) if self.sample else rows.astype(np.uint64))
        of_images = np.concatenate(numbers)
        distinct, first = np.unique(of_images, return_index=True)
        order = np.lexsort((distinct, np.concatenate(ranks)[first]))
        chosen = distinct[order[: self.rows]]
        inside = np.isin(of_images, chosen)
        by_partition = {
            key: len(np.unique(of_images[plan.place(key)][inside[plan.place(key)]]))
            for key in plan.keys
        }
        return TrialRows(len(chosen), len(distinct), inside, by_partition)


@dataclass(frozen=True)
class TrialRows:
    """The rows of a trial, and ``of`` how many.

    ``inside`` masks their images in the order of the plan; ``by_partition`` counts the rows.
    """

    rows: int
    of: int
    inside: Mask
    by_partition: Mapping[str, int]

    def __str__(self) -> str:
        return f"{self.rows:,} of {self.of:,} rows"


def _hashes(prompt_ids: pa.Array) -> npt.NDArray[np.uint64]:
    texts = pc.binary_join_element_wise("krea-dagster/1/sample", prompt_ids, SEPARATOR)
    digests = sha256(texts)
    return np.ascontiguousarray(digests[:, :8]).view(">u8")[:, 0].astype(np.uint64)
