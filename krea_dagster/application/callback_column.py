"""Callback addresses: the receiver that the settings name, or the table's ``callback_url``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.callbacks import CallbackUrls, url_trouble
from krea_dagster.errors import ConfigError, Problem, PromptTableError
from krea_dagster.prompts import PLAN_SCHEMA, Plan

#: The column of the prompt table that holds addresses of a user's own receiver.
COLUMN: Final = "callback_url"

#: Maximum number of problems that an error lists.
_NAMED: Final = 20


def receiver_urls(base_url: str, secret: str, *, private_allowed: bool) -> CallbackUrls | None:
    """Return the receiver's addresses; None if none is configured. Raises ConfigError."""
    if bool(base_url) != bool(secret):
        given, missing = ("base_url", "secret") if base_url else ("secret", "base_url")
        raise ConfigError(
            f"callback_{given} is set and callback_{missing} is not. Nothing was bought. Set both "
            "(KREA_CALLBACK_BASE_URL and KREA_CALLBACK_SECRET), or neither: then tasks are polled."
        )
    return CallbackUrls(base_url, secret, private_allowed=private_allowed) if base_url else None


def check_own_urls(plan: Plan, source: str, *, private_allowed: bool) -> None:
    """Check the addresses in the table's column. Raises PromptTableError, before buying."""
    if COLUMN not in plan.passthrough.names:
        return
    known: dict[str | None, str | None] = {None: None}
    problems: list[Problem] = []
    count = 0
    for key in plan.keys:
        for batch in plan.batches(key):
            for url in pc.unique(_column(batch)).to_pylist():
                known.setdefault(url, url_trouble(url or "", private_allowed=private_allowed))
            if not any(known.values()):
                continue
            ids = batch.column(PLAN_SCHEMA.get_field_index("prompt_id")).to_pylist()
            for prompt_id, url in zip(ids, _column(batch).to_pylist(), strict=True):
                if trouble := known[url]:
                    count += 1
                    if len(problems) < _NAMED:
                        problems.append(Problem(None, prompt_id, COLUMN, "", f"it {trouble}"))
    if problems:
        raise PromptTableError(source, problems, count)


def own_urls(images: pa.RecordBatch) -> Sequence[str | None]:
    """Return the addresses of rows of a plan, None for a row without one."""
    return list(_column(images).to_pylist())


def _column(images: pa.RecordBatch) -> pa.Array:
    # The table's further columns come last. An empty text counts as null.
    texts = images.column(len(PLAN_SCHEMA) + images.schema.names[len(PLAN_SCHEMA) :].index(COLUMN))
    texts = texts.cast(pa.string())
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)
