"""A directive that shows a table of the code: settings, columns, events.

``.. code-table:: settings`` reads the fields, schemas and enums that the package itself uses, so
the reference cannot differ from the code.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import pyarrow as pa
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from krea_dagster.application.settings import Settings, variable_of
from krea_dagster.curation.measures.measures_table import MEASURES_DESCRIPTIONS, MEASURES_SCHEMA
from krea_dagster.curation.similarity.near_duplicates import (
    NEAR_DUPLICATES_DESCRIPTIONS,
    NEAR_DUPLICATES_SCHEMA,
)
from krea_dagster.curation.verdict_files import VERDICT_FILE_DESCRIPTIONS, VERDICT_FILE_SCHEMA
from krea_dagster.engine import states
from krea_dagster.manifest import DESCRIPTIONS, MANIFEST_SCHEMA
from krea_dagster.spend.statements.statement import STATEMENT_DESCRIPTIONS, STATEMENT_SCHEMA
from krea_dagster.spend.tables.balance import BALANCE_DESCRIPTIONS, BALANCE_SCHEMA
from krea_dagster.spend.tables.daily import DAILY_DESCRIPTIONS, daily_schema
from krea_dagster.spend.tables.entries import ENTRIES_DESCRIPTIONS, ENTRIES_SCHEMA
from krea_dagster.spend.tables.ledger import LEDGER_DESCRIPTIONS, LEDGER_SCHEMA

#: A table: its head, and its rows of Markdown.
Table = tuple[Sequence[str], list[Sequence[str]]]


def settings() -> Table:
    """The settings: as an argument, as a variable, their default and meaning."""
    rows = []
    for name, field in Settings.model_fields.items():
        variable = variable_of(field)
        value = ",".join(field.default) if isinstance(field.default, list) else field.default
        default = f"`{value}`" if value not in (None, "", {}) else ""
        rows.append((f"`{name}`", f"`{variable}`" if variable else "", default, _text(field)))
    return ("setting", "variable", "default", "meaning"), rows


def _text(field: Any) -> str:
    return str(field.description)


def columns(schema: pa.Schema, described: Mapping[str, str]) -> Table:
    """The columns of a Parquet file, in their order."""
    rows = [(f"`{one.name}`", f"`{one.type}`", described.get(one.name, "")) for one in schema]
    return ("column", "type", "meaning"), rows


def events() -> Table:
    """The journal's events, with the comment above each, and the states they lead to."""
    comments = _comments(inspect.getsource(states.Event))
    rows = []
    for event in states.Event:
        ways = [
            f"{before.value if before else 'new'} → {after.value}"
            for (before, by), after in states.TRANSITIONS.items()
            if by is event
        ]
        if event is states.Event.FOUND:
            ways = ["any → stored"]
        rows.append((f"`{event.value}`", comments[event.name], "; ".join(ways)))
    return ("event", "meaning", "states"), rows


def _comments(source: str) -> dict[str, str]:
    """The ``#:`` comments of an enum, by member."""
    lines = source.splitlines()
    found: dict[str, str] = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if not isinstance(node, ast.Assign):
            continue
        above: list[str] = []
        line = node.lineno - 2
        while lines[line].strip().startswith("#:"):
            above.insert(0, lines[line].strip().removeprefix("#:").strip())
            line -= 1
        found[node.targets[0].id] = " ".join(above)  # type: ignore[attr-defined]
    return found


class CodeTable(SphinxDirective):
    """``.. code-table:: NAME``."""

    required_arguments = 1
    tables: ClassVar[dict[str, Callable[[], Table]]] = {
        "settings": settings,
        "manifest": lambda: columns(MANIFEST_SCHEMA, DESCRIPTIONS),
        "ledger": lambda: columns(LEDGER_SCHEMA, LEDGER_DESCRIPTIONS),
        "daily": lambda: columns(daily_schema(()), DAILY_DESCRIPTIONS),
        "entries": lambda: columns(ENTRIES_SCHEMA, ENTRIES_DESCRIPTIONS),
        "statement": lambda: columns(STATEMENT_SCHEMA, STATEMENT_DESCRIPTIONS),
        "balance": lambda: columns(BALANCE_SCHEMA, BALANCE_DESCRIPTIONS),
        "measures": lambda: columns(MEASURES_SCHEMA, MEASURES_DESCRIPTIONS),
        "near_duplicates": lambda: columns(NEAR_DUPLICATES_SCHEMA, NEAR_DUPLICATES_DESCRIPTIONS),
        "verdicts": lambda: columns(VERDICT_FILE_SCHEMA, VERDICT_FILE_DESCRIPTIONS),
        "events": events,
    }

    def run(self) -> list[nodes.Node]:
        """Parse the table as Markdown, in place."""
        head, rows = self.tables[self.arguments[0]]()
        lines = [head, ["---"] * len(head), *rows]
        escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
        return self.parse_text_to_nodes("\n".join("| " + " | ".join(one) + " |" for one in escaped))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("code-table", CodeTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
