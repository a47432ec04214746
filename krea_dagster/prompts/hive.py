"""Columns that the folders of a table name, as Hive and Spark write them: ``theme=sea/``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from krea_dagster.errors import ConfigError
from krea_dagster.prompts.cells import Bad, shown
from krea_dagster.prompts.columns import type_of_text, value_of_text

#: What Hive writes for a missing value.
_MISSING: Final = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class FolderColumns:
    """The values that a file's folders give to all its rows, by column; ``texts`` as written."""

    values: Mapping[str, pa.Scalar] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, path: str, file: str) -> FolderColumns:
        """Read a path below the table's folder. Raises ConfigError, which names the ``file``."""
        values: dict[str, pa.Scalar] = {}
        texts: dict[str, str] = {}
        for folder in path.split("/")[:-1]:
            name, equals, text = (unquote(part) for part in folder.partition("="))
            if not (equals and name):
                continue
            if name in values:
                raise ConfigError(f"{file}: two folders of its path name the column {shown(name)}")
            value = value_of_text(name, "" if text == _MISSING else text)
            if isinstance(value, Bad):
                raise ConfigError(f"{file}: {name} is {value.value} by its folder; {value.allowed}")
            values[name] = pa.scalar(value, type_of_text(name))
            texts[name] = text
        return cls(values, texts)

    def added_to(self, schema: pa.Schema) -> pa.Schema:
        """Return a file's schema with the columns that only its folders have."""
        for name, value in self.values.items():
            if name not in schema.names:
                schema = schema.append(pa.field(name, value.type))
        return schema

    def guarantee(self, schema: pa.Schema) -> Any | None:
        """Return an expression that is true for all rows of a file of this schema, or None."""
        found = None
        for name, value in self.values.items():
            if name not in schema.names:
                one = ds.field(name) == value if value.is_valid else ds.field(name).is_null()
                found = one if found is None else found & one
        return found

    def complete(
        self, batch: pa.RecordBatch, columns: Sequence[str], file: str, first: int
    ) -> pa.RecordBatch:
        """Return these columns of some rows, the first of which has the number ``first``.

        Raises ConfigError if a column of the file contradicts its folder.
        """
        if not self.values:
            # By name: "a.b" as a path also means the member b of a structure a.
            return batch.select(columns)
        arrays = []
        for name in columns:
            if name not in batch.schema.names:
                arrays.append(pa.repeat(self.values[name], batch.num_rows))
                continue
            arrays.append(batch.column(name))
            if name in self.values:
                self._compare(name, arrays[-1], file, first)
        return pa.RecordBatch.from_arrays(arrays, names=list(columns))

    def _compare(self, name: str, cells: pa.Array, file: str, first: int) -> None:
        if not self.values[name].is_valid:
            same = cells.is_null()
        else:
            try:
                here = pa.scalar(self.texts[name]).cast(cells.type)
                same = pc.fill_null(pc.equal(cells, here), fill_value=False)
            except (pa.ArrowException, OverflowError):
                same = pa.repeat(pa.scalar(value=False), len(cells))
        at = pc.index(same, pa.scalar(value=False)).as_py()
        if at >= 0:
            raise ConfigError(
                f"{file} row {first + at}: {name} is {shown(cells[at].as_py())} in the file and "
                f"{shown(self.texts[name])} by its folder. Nothing was bought. Correct one of them."
            )
