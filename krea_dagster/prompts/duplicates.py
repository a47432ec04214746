"""Find the rows whose prompt_id an earlier row of the table has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.errors import Problem
from krea_dagster.prompts.cells import Bad, shown
from krea_dagster.prompts.columns import text_values
from krea_dagster.prompts.files import TableFile
from krea_dagster.prompts.murmur import Hashes, hashes_of_texts
from krea_dagster.prompts.table_schema import MAX_PROBLEMS, Problems, problem_in


def hashes_of_ids(files: Sequence[TableFile]) -> list[Hashes]:
    """Return the hash of every usable prompt_id of a table; others are problems of their rows."""
    found = []
    for file in files:
        for _, batch in file.batches(["prompt_id"]):
            ids = text_values(batch.column(0))
            found.append(hashes_of_texts(ids.filter(pc.not_equal(ids, ""))))
    return found


def find_duplicates(parts: list[Hashes], files: Sequence[TableFile], problems: Problems) -> None:
    """Add a problem for every row whose prompt_id an earlier row has, over the whole table.

    ``parts``, which is emptied, holds the hashes of all prompt_ids: eight bytes each, so that a
    large table fits in memory. The texts are only read again where two hashes are equal.
    """
    hashes = np.concatenate([np.empty(0, np.uint64), *parts])
    parts.clear()
    hashes.sort()
    again = hashes[1:] == hashes[:-1]
    total = int(again.sum())
    if not total:
        return
    suspects = np.unique(hashes[1:][again])
    del hashes
    first_rows: dict[str, int] = {}
    found: list[Problem] = []
    for file in files:
        for first, batch in file.batches(["prompt_id"]):
            for row, cell in _suspects(first, batch.column(0), suspects):
                if cell in first_rows:
                    allowed = f"must be unique, but row {first_rows[cell]} has it too"
                    found.append(problem_in(row, cell, "prompt_id", Bad(shown(cell), allowed)))
                    if len(found) == MAX_PROBLEMS:
                        problems.add(*found, count=total)
                        return
                else:
                    first_rows[cell] = row
    problems.add(*found)


def _suspects(first: int, array: pa.Array, suspects: Hashes) -> list[tuple[int, str]]:
    """Return the rows whose hash is one of these, each with its prompt_id."""
    ids = text_values(array)
    at = np.flatnonzero(np.isin(hashes_of_texts(ids), suspects))
    found = ids.take(pa.array(at)).to_pylist()
    return [(first + int(row), cell) for row, cell in zip(at, found, strict=True) if cell]
