"""Which columns of a table are read under another name, and which are meant as they are. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from krea_dagster.errors import ConfigError
from krea_dagster.prompts.cells import plain

#: How to write it, for messages.
SETTING: Final = "prompt_columns (KREA_PROMPT_COLUMNS)"


def parse_prompt_columns(entries: Iterable[str]) -> Mapping[str, str]:
    """Return the name under which each of these columns is read, by its name in the table.

    An entry is ``COLUMN=NAME``, or ``COLUMN``, which is only copied to the manifest. Raises
    ConfigError for another entry, or two entries for one name.
    """
    if isinstance(entries, str):
        raise ConfigError(f"{SETTING} is one text; give a list such as ['text=prompt']")
    found: dict[str, str] = {}
    for entry in entries:
        column, equals, name = (part.strip() for part in entry.partition("="))
        name = name if equals else column
        if not column or not name:
            raise ConfigError(f"{SETTING} has {entry!r}; write COLUMN=NAME, or COLUMN alone")
        if column in found or name in found.values():
            doubled = column if column in found else name
            raise ConfigError(f"{SETTING} names {doubled!r} twice")
        found[column] = name
    return found


def read_names(names: Sequence[str], wanted: Mapping[str, str]) -> Mapping[str, str]:
    """Return the name under which each column of a file is read, for those that have another."""
    given = {entry: _column(entry, names) for entry in wanted}
    return {
        column: wanted[entry]
        for entry, column in given.items()
        if column is not None and wanted[entry] != column
    }


def accepted(names: Sequence[str], wanted: Mapping[str, str]) -> set[str]:
    """Return the columns that are meant as they are."""
    return {
        column
        for entry, name in wanted.items()
        if entry == name and (column := _column(entry, names)) is not None
    }


def check_prompt_columns(names: Sequence[str], wanted: Mapping[str, str], source: str) -> None:
    """Raise ConfigError for an entry whose column the table does not have."""
    for entry, name in wanted.items():
        # What was read from text has its new names already.
        if _column(entry, names) is None and name not in names:
            there = ", ".join(plain(one) for one in names)
            raise ConfigError(
                f"{SETTING} names the column {entry!r}, which {source} does not have; its columns "
                f"are: {there}. Nothing was bought."
            )


def read_as(column: str, name: str) -> str:
    """Return how a column is read under another name without changing the table."""
    return f"{SETTING} {plain(column.strip())}={name}"


def _column(entry: str, names: Sequence[str]) -> str | None:
    """Return the column that an entry names; blanks around a column's name need not be written."""
    if entry in names:
        return entry
    return next((name for name in names if name.strip() == entry), None)
