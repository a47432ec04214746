"""The files of a table as one table: the same columns in each, under the names they are read by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from krea_dagster.prompts.cells import is_text, plain
from krea_dagster.prompts.column_names import read_names
from krea_dagster.prompts.files import TableFile


@dataclass(frozen=True)
class MissingColumn:
    """A column that some files do not have: it is empty in their rows."""

    name: str
    files: int
    of: int
    first: str

    def __str__(self) -> str:
        return (
            f"{plain(self.name)} is not a column of {self.files} of {self.of} files, and is empty "
            f"in their rows (the first is {self.first})"
        )


def united(
    files: Sequence[TableFile], wanted: Mapping[str, str]
) -> tuple[list[TableFile], list[MissingColumn]]:
    """Return the files with the columns of all of them, and which files lack which of these.

    ``wanted`` are the names under which columns are read, by their names in the table.
    """
    renamed = [_renamed(file, wanted) for file in files]
    columns = dict.fromkeys(name for file in renamed for name in file.schema.names)
    without = {name: [one for one in renamed if name not in one.schema.names] for name in columns}
    missing = [
        MissingColumn(name, len(lacking), len(files), lacking[0].name)
        for name, lacking in without.items()
        if lacking
    ]
    return [_with_all(file, columns) for file in renamed], missing


def widest_type(kinds: Sequence[pa.DataType]) -> pa.DataType | None:
    """Return a type that holds the values of all these types exactly, or None."""
    try:
        (field,) = pa.unify_schemas(
            [pa.schema([("", kind)]) for kind in kinds], promote_options="permissive"
        )
        for kind in kinds:
            pa.nulls(1, kind).cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        return None
    types = pa.types
    rounds = types.is_floating(field.type) and any(map(types.is_decimal, kinds))
    loses_text = any(map(is_text, kinds)) and not is_text(field.type)
    return None if rounds or loses_text else field.type


def _renamed(file: TableFile, wanted: Mapping[str, str]) -> TableFile:
    names = read_names(file.schema.names, wanted)
    if not names:
        return file
    schema = pa.schema([one.with_name(names.get(one.name, one.name)) for one in file.schema])
    return replace(file, schema=schema, renamed={new: old for old, new in names.items()})


def _with_all(file: TableFile, columns: Mapping[str, None]) -> TableFile:
    lacking = [pa.field(name, pa.null()) for name in columns if name not in file.schema.names]
    return replace(file, schema=pa.schema([*file.schema, *lacking])) if lacking else file
