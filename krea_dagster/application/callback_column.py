"""Where EvoLink is told to call: the receiver of the settings, or an address of a row's own."""

from collections.abc import Sequence
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.callbacks import CallbackUrls, url_trouble
from krea_dagster.errors import ConfigError, Problem, PromptTableError
from krea_dagster.prompts import PLAN_SCHEMA, Plan

#: The column of the prompt table that holds addresses of receivers of the user's own.
COLUMN: Final = "callback_url"

#: Problems that are named one by one.
_NAMED: Final = 20


def receiver_urls(base_url: str, secret: str, *, private_allowed: bool) -> CallbackUrls | None:
    """The addresses of the receiver; None where the settings name none. Raises ConfigError."""
    if bool(base_url) != bool(secret):
        given, missing = ("base_url", "secret") if base_url else ("secret", "base_url")
        raise ConfigError(
            f"callback_{given} is set and callback_{missing} is not; nothing was bought. Set both "
            "(KREA_CALLBACK_BASE_URL and KREA_CALLBACK_SECRET), or neither: then tasks are asked "
            "about when they have probably ended."
        )
    return CallbackUrls(base_url, secret, private_allowed=private_allowed) if base_url else None


def check_own_urls(plan: Plan, source: str, *, private_allowed: bool) -> None:
    """Look at the addresses that rows bring along. Raises PromptTableError, before buying."""
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
    """The addresses of rows of a plan, None where a row has none."""
    return list(_column(images).to_pylist())


def _column(images: pa.RecordBatch) -> pa.Array:
    # The table's further columns come last, and an empty text says as little as a null.
    texts = images.column(len(PLAN_SCHEMA) + images.schema.names[len(PLAN_SCHEMA) :].index(COLUMN))
    texts = texts.cast(pa.string())
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)
