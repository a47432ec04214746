"""pandas stays out of a command that has no use for it, and is there for the next one."""

from __future__ import annotations

import subprocess
import sys


def test_arrow_and_duckdb_convert_values_without_pandas_and_frames_afterwards() -> None:
    """In a fresh process, because Arrow looks for pandas once."""
    code = """
import sys
from krea_dagster.cli.without_pandas import without_pandas
with without_pandas():
    import duckdb
    import pyarrow as pa
    table = pa.table({"a": [1, None]})
    assert duckdb.execute("SELECT ?", [1]).fetchall() == [(1,)]
    assert "pandas" not in sys.modules
frame = table.to_pandas()
assert pa.Table.from_pandas(frame)["a"].to_pylist() == [1, None]
import pandas as pd
with without_pandas():
    import pandas
    assert pa.array(pd.Series([1.5, None])).to_pylist() == [1.5, None]
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
