"""Opens Parquet files so that Arrow's threads need no Python object."""

from __future__ import annotations

import io
import os
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq


def open_parquet(file: BinaryIO) -> pq.ParquetFile:
    """Open a Parquet file that Python has opened.

    Of a local file Arrow gets the path. It would read a Python file in threads of its own, and one
    that lets go of it after the interpreter has ended aborts the process (SIGABRT).
    """
    name = getattr(file, "name", None)
    if isinstance(file, io.BufferedReader) and isinstance(name, str | os.PathLike):
        return pq.ParquetFile(pa.OSFile(os.fspath(name)))
    return pq.ParquetFile(file)
