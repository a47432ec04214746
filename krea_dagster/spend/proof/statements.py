"""Whether the files of the statements are as they were when their months were closed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

from krea_dagster.engine.journal.closed_month_log import ClosedMonth
from krea_dagster.engine.storage.storage import Storage

#: The rows, and the page.
FILE_ENDINGS: Final = (".parquet", ".html")


def changed_statements(
    storage: Storage, closed: Sequence[ClosedMonth], *, endings: Sequence[str] = FILE_ENDINGS
) -> list[str]:
    """Return a sentence on each file that is missing or has other bytes. Raises StorageError."""
    found = []
    for one in closed:
        hashes = dict(zip(FILE_ENDINGS, (one.sha256, one.page_sha256), strict=True))
        for ending in endings:
            name = one.name + ending
            try:
                with storage.open(name) as file:
                    same = hashlib.sha256(file.read()).hexdigest() == hashes[ending]
            except FileNotFoundError:
                said = "is missing"
            else:
                if same:
                    continue
                said = "was changed since the month was closed"
            found.append(
                f"the statement {name} of {one.month} {said}. Restore it from a backup; its "
                f"SHA-256 is {hashes[ending]}"
            )
    return found
