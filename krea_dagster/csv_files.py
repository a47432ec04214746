"""CSV files that people write, also with a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path


def read_csv(path: Path) -> tuple[Sequence[str], Sequence[tuple[int, list[str]]]]:
    """Read a CSV file in UTF-8.

    Returns:
        The names in its first line, in lower case, and its rows with their numbers, from 1. Rows
        without a value are left out, and counted.

    Raises:
        OSError, ValueError, csv.Error: for a file that cannot be read.
    """
    text = path.read_text(encoding="utf-8-sig")
    # Spreadsheets of many countries write semicolons.
    delimiter = max((",", ";", "\t"), key=text.partition("\n")[0].count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names = [name.strip().lower() for name in next(lines, [])]
    return names, [(number, cells) for number, cells in enumerate(lines, start=1) if any(cells)]
