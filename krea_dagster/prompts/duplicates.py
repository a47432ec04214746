"""Find the rows whose prompt_id an earlier row of the table has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from krea_dagster.errors import Problem
from krea_dagster.prompts import validate_columns
from krea_dagster.prompts.cells import Bad, shown, text_cells
from krea_dagster.prompts.files import TableFile
from krea_dagster.prompts.murmur import Numbers, hashes_of_texts
from krea_dagster.prompts.table_schema import MAX_PROBLEMS, Problems, problem_in


def hashes_of_ids(files: Sequence[TableFile]) -> list[Numbers]:
    """Return the hash of every prompt_id of a table that is usable."""
    return [
        hashes_of_texts(_ids(batch.column(0)))
        for file in files
        for _, batch in file.batches(["prompt_id"])
    ]


def find_doubles(parts: list[Numbers], files: Sequence[TableFile], problems: Problems) -> None:
    """Note every row whose prompt_id an earlier row has, over the whole table.

    ``parts``, which are used up, are the hashes of all prompt_ids (``hashes_of_texts``): eight
    bytes each, so that a large table fits in memory. The texts are read again only where two
    hashes agree.
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
                    said = f"must be unique, but row {first_rows[cell]} has it too"
                    found.append(problem_in(row, cell, "prompt_id", Bad(shown(cell), said)))
                    if len(found) == MAX_PROBLEMS:
                        problems.add(*found, count=total)
                        return
                else:
                    first_rows[cell] = row
    problems.add(*found)


def _suspects(first: int, array: pa.Array, suspects: Numbers) -> list[tuple[int, str]]:
    """Return the rows whose hash is one of these, each with its prompt_id."""
    cells = validate_columns.texts(array)
    if cells is None:
        numbers = range(first, first + len(array))
        return [
            (row, cell)
            for row, cell in zip(numbers, text_cells(array), strict=True)
            if isinstance(cell, str) and cell
        ]
    at = np.flatnonzero(np.isin(hashes_of_texts(cells), suspects))
    found = cells.take(pa.array(at)).to_pylist()
    return [(first + int(row), cell) for row, cell in zip(at, found, strict=True) if cell]


def _ids(array: pa.Array) -> pa.Array:
    """Return the prompt_ids that are usable; the others are problems of their own rows."""
    cells = validate_columns.texts(array)
    if cells is None:
        cells = pa.array([cell for cell in text_cells(array) if isinstance(cell, str)], pa.string())
    return cells.filter(pa.compute.not_equal(cells, ""))
