"""Arrow helpers that every layer uses."""

from __future__ import annotations

import pyarrow as pa


def as_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Return a column as one contiguous array.

    ``ChunkedArray.combine_chunks`` may return a chunked array again, depending on type and size.
    """
    if isinstance(column, pa.Array):
        return column
    combined = column.combine_chunks()
    return pa.concat_arrays(combined.chunks) if isinstance(combined, pa.ChunkedArray) else combined
