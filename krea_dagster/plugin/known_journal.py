"""Refuses a new journal for images of another one, because it would buy them again."""

from typing import Final

import dagster as dg

from krea_dagster.application.backend import Backend
from krea_dagster.errors import ConfigError
from krea_dagster.plugin.metadata import krea_entry
from krea_dagster.prompts import PromptTable

#: The metadata entry of a materialization of ``images``.
JOURNAL_ENTRY: Final = "journal"


def journal_entry(krea: Backend, table: PromptTable, relative: str) -> dg.JsonMetadataValue:
    """Return the metadata entry about the journal that bought the images.

    ``relative`` is the storage root as written in the definitions, if that is a relative path.
    """
    return dg.MetadataValue.json(
        {
            "journal": krea.journal_id(),
            "origin": krea.settings.origin,
            "root": krea.open_storage().shown(""),
            "relative": relative,
            "prompts": table.shown,
        }
    )


def refuse_second_journal(
    context: dg.AssetExecutionContext,
    images: dg.AssetKey,
    krea: Backend,
    table: PromptTable,
    relative: str,
) -> None:
    """Raise ConfigError if the journal is new, but Dagster has images of another from this root.

    A storage root that is not mounted, and a relative one in another working folder, look like a
    first run; only Dagster's instance knows better.
    """
    if krea.has_purchases():
        return
    event = context.instance.get_latest_materialization_event(images)
    made = event.asset_materialization if event is not None else None
    entry = None
    if made is not None:  # earlier versions called it krea_journal
        entry = krea_entry(made.metadata, JOURNAL_ENTRY) or made.metadata.get("krea_journal")
    before = entry.value if isinstance(entry, dg.JsonMetadataValue) else None
    if not isinstance(before, dict) or before.get("origin") != krea.settings.origin:
        return
    here = krea.open_storage().shown("")
    same_place = before.get("root") == here
    if relative and before.get("prompts") == table.shown:
        same_place = same_place or before.get("relative") == relative
    if not same_place or before.get("journal") == krea.journal_id():
        return
    raise ConfigError(
        f"Dagster has images of {images.to_user_string()} in {before.get('root')}, but the journal "
        f"of the storage root {here} is empty. Either the root is not mounted, or a relative path "
        "is used in another working folder. A run would buy everything again; nothing was bought. "
        "Mount the root, or set storage (KREA_STORAGE) to the absolute path. If the journal is "
        "lost, run `krea-dagster accept root`."
    )
