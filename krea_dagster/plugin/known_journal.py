"""Which journal bought the images that Dagster's instance has: a new one would buy them again."""

from typing import Final

import dagster as dg

from krea_dagster.errors import ConfigError
from krea_dagster.plugin.resource import KreaResource

#: The metadata entry of a materialization of ``images``.
JOURNAL_ENTRY: Final = "krea_journal"


def refuse_second_journal(
    context: dg.AssetExecutionContext, images: dg.AssetKey, krea: KreaResource
) -> None:
    """Refuse to begin a journal where the instance has images of another one.

    A storage root that is not mounted, and a relative one in another working folder, look like a
    first run to everything but Dagster. Raises ConfigError, with nothing bought.
    """
    if krea.has_purchases():
        return
    event = context.instance.get_latest_materialization_event(images)
    found = event and event.asset_materialization and event.asset_materialization.metadata
    entry = found.get(JOURNAL_ENTRY) if found else None
    before = str(entry.value) if entry is not None else ""
    here = krea.journal_name()
    if not before or before == here or before.partition(" ")[2] != here.partition(" ")[2]:
        return
    raise ConfigError(
        f"Dagster has images of {images.to_user_string()} that the journal "
        f"{before.partition(' ')[0]} bought, and the journal of the storage root "
        f"{krea.open_storage().shown('')} has bought nothing: is the root not mounted, or a "
        "relative path in another working folder? A run would buy everything again. Nothing was "
        "bought. Mount it, or set storage (KREA_STORAGE) to the absolute path; if the journal is "
        "gone for good, run `krea-dagster accept root`."
    )
