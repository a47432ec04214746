"""A small prompt table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

#: Four prompts in two categories.
SMALL_TABLE: Final[Mapping[str, Sequence[Any]]] = {
    "prompt_id": ["boat", "gull", "cliff", "kite"],
    "prompt": ["a boat in fog", "a gull over surf", "a chalk cliff at noon", "a red kite"],
    "category": ["sea", "sea", "land", "land"],
}


def write_prompts(folder: Path | str, columns: Mapping[str, Sequence[Any]] = SMALL_TABLE) -> str:
    """Write a prompt table as ``prompts.parquet``, and return its path.

    Args:
        folder: Where to write it; created if it does not exist.
        columns: Its columns by name.
    """
    path = Path(folder, "prompts.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), path)
    return str(path)
