"""The storage root and the journal that the settings name, and what they hold of a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from krea_dagster import file_locks
from krea_dagster.application.callback_column import receiver_urls
from krea_dagster.application.settings import EMULATOR_KEY, ConnectionSettings
from krea_dagster.callbacks import CallbackUrls
from krea_dagster.engine.budget import Budget, Caps
from krea_dagster.engine.journal.database import database_in, has_database
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.prompt_table_log import identity_of
from krea_dagster.engine.journal.root_log import RootMarker
from krea_dagster.engine.policy import REJECTED, Policy
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import State
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError
from krea_dagster.models import parse_cap
from krea_dagster.prompts import Plan, PlannedImage, PromptTable
from krea_dagster.spend.prices import CreditPrices

if TYPE_CHECKING:
    from krea_dagster.api import KreaClient

#: After this time a salvage also takes what another table paid for and no run has collected:
#: half of the 24 hours that its link lives.
_TAKEN_FROM_OTHERS: Final = timedelta(hours=12)


class Backend:
    """Opens the storage root, the journal and the API of some settings."""

    def __init__(self, settings: ConnectionSettings) -> None:
        self.settings = settings

    def open_storage(self) -> Storage:
        """Return the storage root. Raises ConfigError."""
        return Storage(self.settings.storage, self.settings.storage_options)

    @contextmanager
    def open_journal(self) -> Iterator[Journal]:
        """Open the journal, and create it if there is none. Raises ConfigError or JournalError."""
        with closing(Journal(self._journal_url())) as journal:
            yield journal

    @contextmanager
    def existing_journal(self, contents: str) -> Iterator[Journal]:
        """Open the journal because of its ``contents``. Raises ConfigError if there is none."""
        if not self.has_journal():
            raise ConfigError(
                f"there is no journal, and {contents} are in the journal. Check that KREA_STORAGE "
                "and KREA_JOURNAL_URL are those of the runs"
            )
        with self.open_journal() as journal:
            yield journal

    def has_journal(self) -> bool:
        """Return whether the journal exists. Raises ConfigError."""
        return has_database(self._journal_url())

    def check(self) -> None:
        """Check the settings before anything is bought. Raises ConfigError or JournalError.

        Binds the journal to the origin that these settings buy from, and compares the storage
        root with what the journal knows of it.
        """
        file_locks.require()
        if not self.settings.emulator and not self.settings.api_key:
            raise ConfigError(
                "the API key is empty; set EVOLINK_API_KEY (in a resource, give "
                "dagster.EnvVar('EVOLINK_API_KEY') as api_key), or set emulator=True"
            )
        self.callback_urls()
        storage = self.open_storage()
        if not self.has_journal():
            refuse_without_journal(storage)
        with self.open_journal() as journal:
            journal.bind(self.settings.origin)
            journal.roots.check(storage)

    def check_origin(self) -> None:
        """Check that the journal, if there is one, has no images of another origin.

        ``check`` does so before a purchase; this binds nothing. Raises ConfigError.
        """
        if self.has_journal():
            with self.open_journal() as journal:
                journal.check_origin(self.settings.origin)

    def check_root(self) -> None:
        """Compare the storage root with the journal, if there is one.

        Raises ConfigError or JournalError.
        """
        if self.has_journal():
            with self.open_journal() as journal:
                journal.roots.check(self.open_storage())

    def has_purchases(self) -> bool:
        """Return whether a journal exists and knows a request or an accepted root."""
        if not self.has_journal():
            return False
        with self.open_journal() as journal:
            return journal.has_requests() or journal.roots.any_accepted()

    def journal_id(self) -> str:
        """Return the journal's id; empty if there is no journal."""
        if not self.has_journal():
            return ""
        with self.open_journal() as journal:
            return journal.database.journal_id

    def records(self, images: Iterable[PlannedImage]) -> dict[str, Record]:
        """Return the journal's records of these images, by request key."""
        with self.open_journal() as journal:
            return journal.records({image.request.request_key for image in images})

    def left_behind(self, tables: Sequence[PromptTable] | None = None) -> list[Record]:
        """Return what is paid for, not stored, and not claimed by a living run; oldest first.

        Of other tables than ``tables`` only what no run has collected for 12 hours.
        """
        with self.open_journal() as journal:
            table_ids = self.table_ids(journal, tables)
            return [one for one in paid_and_open(journal) if belongs_to(table_ids, one)]

    def unknown(self) -> list[Record]:
        """Return the purchases whose outcome is unknown; the oldest first."""
        with self.open_journal() as journal:
            return [record for record in journal.unsettled() if record.state is State.UNKNOWN]

    def table_id(self, journal: Journal, table: PromptTable, *, enter: bool = False) -> str:
        """Return a prompt table's id in the journal; empty if it has none and is not entered."""
        storage = self.open_storage()
        root_id = journal.roots.id_of(storage)
        if enter and not root_id:
            root_id = journal.roots.begin(storage, journal.roots.check(storage))
        name = identity_of(*_named(table), storage, root_id)

        def is_gone(path: str) -> bool:
            """Return whether a table is gone, or was this one before the root moved."""
            if storage.folder is not None:
                named = (storage.folder / path).absolute()
                return named == Path(table.place).absolute() or not named.exists()
            # In a store, the names are absolute: this one is from when the root was a folder.
            return not Path(path).is_absolute() and Path(path).name == Path(table.place).name

        seen = journal.tables.enter if enter else journal.tables.find
        return seen(*name, is_gone=is_gone)

    def table_ids(
        self, journal: Journal, tables: Sequence[PromptTable] | None
    ) -> frozenset[str] | None:
        """Return the ids of tables in the journal; None for None, which means all tables."""
        if tables is None:
            return None
        return frozenset(self.table_id(journal, table) for table in tables)

    def raise_attempts(
        self, table: PromptTable, samples: Iterable[tuple[str, int]], *, raised_by: str
    ) -> int:
        """Request another image of these (prompt_id, sample); returns how many were raised."""
        with self.open_journal() as journal:
            log = journal.attempts(self.table_id(journal, table, enter=True))
            at = datetime.now(timezone.utc)
            return len(log.raise_attempts(samples, raised_by=raised_by, at=at))

    def attempts(self, table: PromptTable) -> dict[tuple[str, int], int]:
        """Return the attempt of each (prompt_id, sample) that was raised."""
        return self._attempts(table)[0]

    def versions(self, table: PromptTable) -> Mapping[str, str]:
        """Return the data version of each partition of a table. Creates no journal."""
        attempts, drawn = self._attempts(table)
        return table.versions(attempts=attempts, drawn=drawn)

    def mark_of_attempts(self, table: PromptTable) -> str:
        """Return the number of a table's attempts in the journal, and their sum, which only grow.

        Creates no journal. Raises ConfigError or JournalError.
        """
        count = total = 0
        if self.has_journal():
            with self.open_journal() as journal:
                count, total = journal.attempts(self.table_id(journal, table)).fingerprint()
        return f"{count}/{total}"

    def plan(self, table: PromptTable, keys: Sequence[str] | None = None) -> Plan:
        """Return the images that a table's rows request, at their attempts. Creates no journal."""
        attempts, drawn = self._attempts(table)
        return table.plan(keys, attempts, drawn=drawn)

    def _attempts(
        self, table: PromptTable
    ) -> tuple[dict[tuple[str, int], int], frozenset[tuple[str, int]]]:
        _named(table)  # also where there is no journal yet
        if not self.has_journal():
            return {}, frozenset()
        with self.open_journal() as journal:
            log = journal.attempts(self.table_id(journal, table))
            return log.current(), log.drawn()

    def caps(self) -> Caps:
        """Return the caps and budgets, in units. Raises ConfigError for a malformed budget."""
        run, day = self.settings.run_credits, self.settings.day_credits
        return Caps(
            run_units=None if run is None else parse_cap(run, "run_credits"),
            day_units=None if day is None else parse_cap(day, "day_credits"),
            budgets=tuple(map(Budget.parse, self.settings.budgets)),
        )

    def soft_budgets(self) -> list[Budget]:
        """Return the budgets that only warn. Raises ConfigError for a malformed one."""
        return list(map(Budget.parse, self.settings.soft_budgets))

    def credit_prices(self) -> CreditPrices:
        """Return what a credit costs, by day. Raises ConfigError for a malformed price."""
        return CreditPrices.parse(self.settings.credit_prices)

    def budget_columns(self) -> list[str]:
        """Return the columns whose values have a budget. Raises ConfigError."""
        return list(dict.fromkeys(one.name for one in self.caps().budgets if one.name))

    def policy(self, retry_errors: Iterable[str] = ()) -> Policy:
        """Return what a run does about failures; ``retry_errors`` are bought again."""
        return Policy(
            on_unknown="hold" if self.settings.on_unknown == "hold" else "replay",
            patience_s=self.settings.patience_s,
            outage_patience_s=self.settings.outage_patience_s,
            retry_codes=frozenset(retry_errors),
        )

    def callback_urls(self) -> CallbackUrls | None:
        """Return the callback addresses; None without a receiver. Raises ConfigError."""
        return receiver_urls(
            self.settings.callback_base_url,
            self.settings.callback_secret,
            private_allowed=self.settings.synthetic,
        )

    @property
    def key(self) -> str:
        """The API key that purchases are made with."""
        return EMULATOR_KEY if self.settings.emulator else self.settings.api_key

    def client(self, base_url: str) -> KreaClient:
        """Return a client of the API at this address."""
        # Here, because only a purchase needs the HTTP library.
        from krea_dagster.api import KreaClient

        return KreaClient(
            self.key,
            base_url=base_url,
            timeout_s=self.settings.timeout_s,
            download_timeout_s=self.settings.download_timeout_s,
        )

    def run_options(self) -> Mapping[str, Any]:
        """Return options of ``Runner`` that replace what follows from the settings; none here."""
        return {}

    def _journal_url(self) -> str:
        return self.settings.journal_url or database_in(self.open_storage())


def _named(table: PromptTable) -> tuple[str, str]:
    """Return a table's name and its path or URL, one of which it needs. Raises ConfigError."""
    if not (table.name or table.place):
        raise ConfigError(
            f"{table.shown} needs a name, by which the journal knows its rows again; "
            "give it one (key_prefix, or PromptTable's name). Nothing was bought."
        )
    return table.name, table.place


def paid_and_open(journal: Journal) -> list[Record]:
    """Return what is to be collected; not what was fetched and rejected, which would come again."""
    return [
        record
        for record in journal.unattended()
        if record.state in (State.SUBMITTED, State.COMPLETED)
        and not (record.state is State.COMPLETED and record.error_code in REJECTED)
    ]


def belongs_to(table_ids: frozenset[str] | None, record: Record) -> bool:
    """Return whether a salvage for some tables (None: for all tables) takes a request."""
    if table_ids is None or record.table_id == "" or record.table_id in table_ids:
        return True
    since = record.sent_at
    return since is None or datetime.now(timezone.utc) - since > _TAKEN_FROM_OTHERS


def refuse_without_journal(storage: Storage) -> None:
    """Refuse to create a journal next to images: it would not know that they are paid for."""
    marker = RootMarker.read(storage)
    if marker is not None or storage.has_files("images"):
        named = f" (its id is {marker.journal_id})" if marker is not None else ""
        raise ConfigError(
            f"{storage.shown('images')} holds images, but the journal that bought them{named} is "
            "missing: a new one would buy them again. Nothing was bought. Restore the journal "
            "(KREA_JOURNAL_URL), or move the images away to start empty; or run "
            "`krea-dagster accept root`: a new journal then adopts these images, and their charge "
            "stays unknown."
        )
