"""The use cases as methods of one class: the whole application, without Dagster."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from krea_dagster.application.backend import Backend
from krea_dagster.application.settings import Settings, variable_of
from krea_dagster.engine.run.report import Progress
from krea_dagster.errors import ConfigError
from krea_dagster.file_systems import Options, same_kind
from krea_dagster.models import credits_text
from krea_dagster.prompts import Defaults, PromptTable, parse_partition_by

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from krea_dagster.application.buy_options import BuyOptions
    from krea_dagster.application.close import Closing
    from krea_dagster.application.curation import Curated, Curation
    from krea_dagster.application.pruning import PrunedImages
    from krea_dagster.application.quotes import Quoted
    from krea_dagster.application.run import Ran
    from krea_dagster.application.spend import Spend
    from krea_dagster.application.verdicts import ImportedVerdicts
    from krea_dagster.curation.export.export import Exported
    from krea_dagster.curation.export.spec import ExportSpec
    from krea_dagster.curation.gallery.filter import GalleryFilter
    from krea_dagster.curation.gallery.page import GallerySummary
    from krea_dagster.engine.journal.closed_month_log import ClosedMonth
    from krea_dagster.engine.journal.entry_log import AccountEntry, EnteredRows
    from krea_dagster.engine.journal.prune import Pruned
    from krea_dagster.engine.record import Record
    from krea_dagster.engine.run.report import RunReport
    from krea_dagster.spend.proof.findings import Proof, ProofFigures
    from krea_dagster.spend.warnings.spend_warning import SpendWarning

_OnProgress = Callable[[Progress], None]


class Krea(Backend):
    """Buys images, keeps them verified, and accounts for them; needs no Dagster.

    Example:
        >>> krea = Krea.from_environment()
        >>> krea.quote().total.to_buy
        >>> krea.run()
        >>> krea.manifest()[["prompt_id", "seed", "image_path"]]

    Every method that takes a ``table`` uses the settings' prompt table by default.
    """

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Krea:
        """Read the settings from environment variables. Raises ConfigError, which names one."""
        return cls(Settings.from_environment(environ))

    def table(self) -> PromptTable:
        """Return the prompt table of the settings. Raises ConfigError if they have none."""
        settings = self.settings
        if not isinstance(settings, Settings):
            raise ConfigError("these settings name no prompt table; pass one")
        return PromptTable(
            settings.prompts,
            parse_partition_by(
                settings.partition_by, variable_of(Settings.model_fields["partition_by"])
            ),
            storage_options=self._prompts_options(settings),
            prompt_columns=settings.prompt_columns,
        )

    def _prompts_options(self, settings: Settings) -> Options:
        if settings.prompts_options or not same_kind(settings.prompts, settings.storage):
            return settings.prompts_options
        return settings.storage_options

    # -- buying ----------------------------------------------------------------------------------

    def quote(
        self,
        table: PromptTable | None = None,
        partitions: Sequence[str] = (),
        options: BuyOptions | None = None,
    ) -> Quoted:
        """Quote what ``run`` would buy now, and at most for how much. Buys nothing.

        Args:
            table: The prompt table.
            partitions: Keys; all that a run would take by default.
            options: Their ``limit`` or ``sample``: a trial of some rows.

        Raises:
            ConfigError: for an unknown partition or a wrong setting.
            PromptTableError: for a table with errors, which it lists by row and column.
            JournalError: if the journal cannot be read.
        """
        from krea_dagster.application.quotes import quote_partitions

        return quote_partitions(
            self,
            table or self.table(),
            partitions,
            trial=None if options is None else options.trial(),
        )

    def generate(
        self,
        prompts: Any,
        *,
        name: str = "generate",
        run_id: str = "",
        defaults: Defaults | None = None,
        on_progress: _OnProgress = lambda _: None,
    ) -> pa.Table:
        """Buy, fetch and verify the images of a few prompts, and return their manifest.

        What was bought before, by this method or by an asset with the same journal, is not bought
        again.

        Args:
            prompts: Texts, or rows with the columns of a prompt table, or a table (pandas, Polars
                or Arrow).
            name: The partition key of these images in the manifest.
            run_id: Is written with every purchase; a random one by default.
            defaults: Values for what a row leaves open.
            on_progress: Is called whenever something changed.

        Returns:
            The manifest: one row for each requested image, also if it is missing (``status`` and
            ``error_message`` then say why).

        Raises:
            ConfigError, PromptTableError: before anything is bought.
            AccountStopped, RunStopped: if buying stopped. The next call takes up what is paid for.
            JournalError, StorageError: if what was bought could not be written.
        """
        from krea_dagster.application.generate import generate

        return generate(
            self,
            prompts,
            run_id=run_id or _run_id(),
            name=name,
            defaults=defaults,
            on_progress=on_progress,
        )

    def run(
        self,
        table: PromptTable | None = None,
        partitions: Sequence[str] = (),
        options: BuyOptions | None = None,
        *,
        curation: Curation | None = None,
        run_id: str = "",
        on_progress: _OnProgress = lambda _: None,
    ) -> Ran:
        """Buy what partitions of a table lack, and write their manifests.

        Does what the assets ``images`` and ``image_manifest`` do, without Dagster's events.

        Args:
            table: The prompt table.
            partitions: Keys; all by default.
            options: Rows to regenerate, error codes to retry, decisions about unknown outcomes.
            curation: How many accepted images are wanted, and which are accepted.
            run_id: Is written with every purchase; a random one by default.
            on_progress: Is called whenever something changed.

        Raises:
            ConfigError, PromptTableError: before anything is bought.
            JournalError, StorageError: if what was bought could not be written.
        """
        from krea_dagster.application.buy_options import BuyOptions
        from krea_dagster.application.run import run

        return run(
            self,
            table or self.table(),
            list(partitions) or None,
            options or BuyOptions(),
            curation=curation,
            run_id=run_id or _run_id(),
            on_progress=on_progress,
        )

    def salvage(
        self,
        table: PromptTable | None = None,
        *,
        run_id: str = "",
        on_progress: _OnProgress = lambda _: None,
    ) -> tuple[RunReport, dict[str, Record]]:
        """Poll and fetch what is paid for and not stored; buys nothing.

        With a ``table``, other tables' images are left to their runs for 12 hours. Returns the
        engine's report, and the record of each request that was taken up, by request key. Raises
        ConfigError, JournalError or StorageError.
        """
        from krea_dagster.application.purchase import collect

        tables = None if table is None else [table]
        return collect(self, tables=tables, run_id=run_id or _run_id(), on_progress=on_progress)

    # -- accounting ------------------------------------------------------------------------------

    def spend(
        self,
        by: Sequence[str] = (),
        *,
        since: date | None = None,
        until: date | None = None,
        month: str | None = None,
        zone: str | None = None,
    ) -> Spend:
        """Sum up what was spent: today, this month and in total, or by columns.

        Args:
            by: Columns of the ledger or the prompt table.
            since: First day.
            until: Last day.
            month: One month, as ``YYYY-MM``, instead.
            zone: Time zone of the days; the setting ``timezone`` by default.

        Raises:
            ConfigError: for an unknown column or time zone, or a malformed month.
            JournalError: if the journal cannot be read.
        """
        from krea_dagster.application.spend import SpendPeriod, spend_of

        period = SpendPeriod.of(since, until, month, zone or self.settings.timezone)
        return spend_of(self, by, period=period)

    def spend_sql(self, query: str, *, zone: str | None = None) -> pa.Table:
        """Answer a SELECT over the views of the spend tables.

        Raises ConfigError or JournalError.
        """
        from krea_dagster.application.spend import answer_of

        settings = self.settings
        if not isinstance(settings, Settings):
            return answer_of(self, query, zone=zone)
        return answer_of(self, query, settings.prompts, self._prompts_options(settings), zone=zone)

    def spend_report(
        self,
        path: Path,
        *,
        by: Sequence[str] = (),
        since: date | None = None,
        until: date | None = None,
        month: str | None = None,
        zone: str | None = None,
    ) -> list[SpendWarning]:
        """Write the HTML report of a period (see ``spend``), and return its warnings.

        Raises ConfigError or JournalError.
        """
        from krea_dagster.application.spend import SpendPeriod
        from krea_dagster.application.spend_report import report_of

        period = SpendPeriod.of(since, until, month, zone or self.settings.timezone)
        return report_of(self, path, by=by, period=period)

    def spend_focus(
        self,
        path: Path,
        *,
        since: date | None = None,
        until: date | None = None,
        month: str | None = None,
        zone: str | None = None,
    ) -> int:
        """Write the charges of a period (see ``spend``) in the columns of FOCUS 1.2.

        Args:
            path: A file whose name ends with .csv or .parquet.
            since: First day, UTC.
            until: Last day.
            month: One month, as ``YYYY-MM``, instead.
            zone: Must be UTC.

        Returns:
            The number of rows.

        Raises:
            InputError: for another name, or another time zone.
            ConfigError: for a malformed period, or a statement that was changed.
            JournalError: if the journal cannot be read.
        """
        from krea_dagster.application.focus import write_focus
        from krea_dagster.application.spend import SpendPeriod

        period = SpendPeriod.of(since, until, month, zone or self.settings.timezone)
        return write_focus(self, path, period)

    def acknowledge_warning(
        self, warning_id: str, reason: str | None, *, by: str
    ) -> SpendWarning | None:
        """Acknowledge a warning about the spend: it is listed, but not posted, and fails no check.

        Args:
            warning_id: Its id.
            reason: Why it is expected; None withdraws an acknowledgement.
            by: Who says so.

        Returns:
            The warning; None if it is not found with these settings.

        Raises:
            InputError: for a malformed id, an empty reason, or nothing to withdraw.
            ConfigError: if there is no journal.
            JournalError: if it cannot be written.
        """
        from krea_dagster.application.acknowledge import acknowledge

        return acknowledge(self, warning_id, reason, by=by)

    def verify(
        self,
        *,
        hash_bytes: int | None = None,
        on_progress: Callable[[ProofFigures], None] = lambda _: None,
    ) -> Proof:
        """Prove that journal, files, manifests and account agree. Changes nothing.

        Args:
            hash_bytes: Maximum number of bytes of images to hash again; None for all.
            on_progress: Is called with the figures so far.

        Raises:
            ConfigError: if there is no journal.
            JournalError: if it cannot be read.
        """
        from krea_dagster.application.proof import prove

        return prove(self, hash_bytes=hash_bytes, on_progress=on_progress)

    # -- curation --------------------------------------------------------------------------------

    def manifest(
        self,
        partitions: Sequence[str] | None = None,
        *,
        columns: Sequence[str] | None = None,
        images: str | None = None,
    ) -> pd.DataFrame:
        """Return the manifest as a DataFrame: one row per requested image.

        Args:
            partitions: Keys; all that have a manifest by default.
            columns: Columns to read; all by default.
            images: ``bytes`` or ``pil`` adds a column ``image``, for at most 1,000 rows.

        Raises:
            ConfigError: for an unknown column, or a missing image.
        """
        import pandas as pd

        from krea_dagster.application.manifest_frames import Selection, load
        from krea_dagster.manifest import manifest_partitions

        storage = self.open_storage()
        keys = manifest_partitions(storage) if partitions is None else partitions
        selection = Selection(columns, images)
        frame: pd.DataFrame = load(storage, keys, (), annotation=pd.DataFrame, selection=selection)
        return frame

    def earlier(self) -> pd.DataFrame:
        """Return the images that no manifest lists now, one per row, with the manifest's columns.

        They are those of rows that were changed or removed, and of earlier attempts. ``successor``
        is the request_key of the row that took the place of an image's row, null without one.

        Raises:
            ConfigError: if there is no journal.
            JournalError: if it cannot be read.
        """
        from krea_dagster.application.earlier import earlier_images_of

        frame: pd.DataFrame = earlier_images_of(self).to_pandas()
        return frame

    def verdicts(self) -> pd.DataFrame:
        """Return the verdict that counts of each reviewed image, with reviewer, reason and time."""
        import pandas as pd

        found: list[dict[str, Any]] = []
        if self.has_journal():
            with self.open_journal() as journal:
                found = [asdict(one) for one in journal.verdicts.current().values()]
        frame: pd.DataFrame = pd.DataFrame(found)
        shown: pd.DataFrame = frame.drop(columns=["annotates", "tag_change"], errors="ignore")
        return shown

    def export_verdicts(self, path: Path, *, history: bool = False) -> int:
        """Write the verdicts, with tags and notes, to a CSV or Parquet file.

        Args:
            path: The file; its name ends with ``.csv`` or ``.parquet``.
            history: Write every verdict that was ever given, instead of those that count.

        Returns:
            The number of rows.

        Raises:
            ConfigError: if there is no journal.
            InputError: for another name.
            StorageError: if the file cannot be written.
        """
        from krea_dagster.application.verdicts import export_verdicts

        return export_verdicts(self, path, history=history)

    def import_verdicts(self, paths: Sequence[Path], *, reviewer: str = "") -> ImportedVerdicts:
        """Add the verdicts of CSV or Parquet files: all of them, or none if a row is wrong.

        On each image the last verdict by time counts. Rows that are here already, that are older
        than the verdict here, or whose image is not here, are counted and left out, so a repeated
        import changes nothing.

        Args:
            paths: Files as ``export_verdicts`` writes them. A row needs one of ``image_sha256``,
                ``request_key`` and ``prompt_id`` (with ``sample``), and a verdict, tags or a note.
                A row without ``reviewed_at`` is from now.
            reviewer: Who reviewed the rows without a reviewer.

        Raises:
            ConfigError: if there is no journal.
            InputError: names every row that is wrong; nothing is imported.
            JournalError: if the journal cannot be written.
        """
        from krea_dagster.application.verdicts import import_verdicts

        return import_verdicts(self, paths, reviewer=reviewer)

    def curate(self, curation: Curation | None = None) -> Curated:
        """Measure all stored images, find near-duplicates, and write the accepted images.

        Raises ConfigError, JournalError or StorageError.
        """
        from krea_dagster.application.curation import curate

        return curate(self, curation)

    def export(
        self,
        spec: ExportSpec | None = None,
        to: str | None = None,
        *,
        folders: Sequence[str] = (),
        fresh: bool = False,
        keep: int | None = None,
        threads: int | None = None,
        on_progress: Callable[[Any], None] = lambda _: None,
    ) -> Exported:
        """Export the accepted images as a dataset, each compared with its hash.

        If there are no accepted images yet, they are made first, by the usual rules (``curate``).

        Args:
            spec: Format, splits, filters; see ``ExportSpec``.
            to: Folder or URL; ``exports/FORMAT`` in the storage root by default.
            folders: Those of the manifests, if their asset has a key prefix.
            fresh: Assign images to shards again, instead of as in the last version.
            keep: Number of complete versions to keep; all by default.
            threads: One per core by default, 8 for URLs.
            on_progress: Is called with the images exported so far.

        Raises:
            ConfigError: if there is nothing to export, or images were rejected or flagged since
                they were accepted.
            ImagesNotAsStored: if images are missing or changed; nothing is published.
            StorageError: if the target or the Hub's repository cannot be written.
        """
        from krea_dagster.application.curation import (
            curate,
            images_origin,
            refused_images,
            verdicts_to_export,
        )
        from krea_dagster.application.earlier import earlier_to_export
        from krea_dagster.curation.accepted.accepted_table import has_accepted
        from krea_dagster.curation.export.export import export
        from krea_dagster.curation.export.hub import HubRepository
        from krea_dagster.curation.export.spec import ExportSpec

        spec, storage = spec or ExportSpec(), self.open_storage()
        to = to or storage.locate(f"exports/{spec.form}")
        repository = None if spec.push is None else HubRepository.of(spec, to)
        if not spec.everything and not has_accepted(storage, folders):
            curate(self, folders=folders)
        done = export(
            storage,
            spec,
            to,
            folders=folders,
            origin=images_origin(self),
            refused=frozenset() if spec.everything else refused_images(self),
            earlier=earlier_to_export(self, spec) if spec.earlier else None,
            verdicts=verdicts_to_export(self) if spec.verdicts else None,
            fresh=fresh,
            keep=keep,
            threads=threads,
            on_progress=on_progress,
        )
        if repository is None:
            return done
        return replace(done, pushed=repository.push(done.path, done.version, done.facts.splits))

    def gallery(
        self,
        output: Path,
        filters: GalleryFilter | None = None,
        *,
        title: str = "Gallery",
        side: int = 320,
        most_bytes: int = 25_000_000,
        on_selected: Callable[[int, int, int], None] = lambda *_: None,
        on_progress: Callable[[int], None] = lambda _: None,
    ) -> GallerySummary:
        """Write one HTML file with thumbnails of images.

        Args:
            output: The file.
            filters: The rows to show; all stored ones by default.
            title: The page's heading.
            side: Longest side of the thumbnails, in pixels.
            most_bytes: Maximum size of the file; further rows are left out.
            on_selected: Is called with the rows to show, all matching rows, and the estimated size
                in bytes.
            on_progress: Is called with the number of finished rows.

        Raises:
            ConfigError: if no row matches, or verdicts are filtered without a journal.
            StorageError: if the file cannot be written.
        """
        from krea_dagster.application.gallery import write

        return write(
            self,
            output,
            filters,
            title=title,
            side=side,
            most_bytes=most_bytes,
            on_selected=on_selected,
            on_progress=on_progress,
        )

    def review(
        self,
        *,
        reviewer: str,
        port: int = 0,
        token: str = "",
        reasons: Sequence[str] = (),
        on_ready: Callable[[str, int], object] = print,
    ) -> None:
        """Serve the review page on this machine until it is interrupted.

        Args:
            reviewer: Is written with every verdict.
            port: Port on 127.0.0.1; 0 takes a free one.
            token: Secret part of the address; a random one by default.
            reasons: Reasons for a rejection, on the keys 1 to 9.
            on_ready: Is called with the page's address, which is a secret, and the number of rows.

        Raises:
            ConfigError: if there is no journal, or the port is taken.
        """
        from krea_dagster.application.review import review

        review(self, reviewer=reviewer, port=port, token=token, reasons=reasons, on_ready=on_ready)

    # -- a person's decisions --------------------------------------------------------------------

    def accept_root(self) -> str:
        """Accept the storage root as it is; returns a sentence on what that means."""
        from krea_dagster.application.pruning import take_back

        with self.open_journal() as journal:
            said = journal.roots.accept(self.open_storage())
            back = take_back(journal, self.open_storage())
        return f"{said}; {back} that were pruned are there again" if back else said

    def accept_key(self, same_as: str = "") -> str:
        """Declare that the API key belongs to the account of the journal's purchases."""
        with self.open_journal() as journal:
            fingerprint = journal.api_keys.fingerprint(self.key)
            count = journal.api_keys.accept(fingerprint, same_as)
        return (
            f"the API key with the fingerprint {fingerprint} belongs to the account of {count} "
            "earlier purchases"
        )

    def accept_price(self, quality: str, *, dismiss: bool = False) -> str:
        """Accept the price of a quality that was far from the expected one, or ``dismiss`` it."""
        with self.open_journal() as journal:
            if dismiss:
                journal.prices.dismiss(quality)
                return (
                    f"the reported price of {quality} counts as a mistake; the charges at it stay "
                    "unknown"
                )
            units, settled = journal.prices.accept(quality, datetime.now(timezone.utc))
        return (
            f"{quality} now costs {credits_text(units)} credits; the charges of {settled} "
            "purchases at that price are settled"
        )

    # -- the account ------------------------------------------------------------------------------

    def account_entries(self) -> list[AccountEntry]:
        """Return what was entered of the account, by day. Raises ConfigError or JournalError."""
        from krea_dagster.application.account import entries_of

        return entries_of(self)

    def add_account_entry(self, **row: str) -> EnteredRows:
        """Enter a refund, credits bought or given, or a correction.

        It changes what ``spend`` says, and never what is bought. An entry that is known is not
        entered again.

        Args:
            row: ``kind``, ``credits``, ``on`` and others, as text: the columns of a file of
                ``import_account_entries``.

        Raises:
            InputError: for a wrong value; it begins with the column.
            ConfigError: if there is no journal.
            JournalError: if it cannot be written.
        """
        from krea_dagster.application.account import add_entries

        return add_entries(self, [row])

    def import_account_entries(self, path: Path) -> EnteredRows:
        """Enter the rows of a CSV file, or none if one is wrong, as ``add_account_entry``.

        Raises InputError, which names each wrong row and column, ConfigError or JournalError.
        """
        from krea_dagster.application.account import import_entries

        return import_entries(self, path)

    def close(self, month: str, *, folder: Path | None = None) -> Closing:
        """Close a UTC month: write its statement (Parquet and HTML), which nothing changes.

        A month that is closed keeps its statement, which is returned. What becomes known later is
        an adjustment in the next statement.

        Args:
            month: The month, as ``YYYY-MM``.
            folder: A folder that gets copies of the files, too.

        Raises:
            InputError: if the month has not ended, or earlier ones are open.
            ConfigError: if an earlier statement is missing or was changed, or without a journal.
            JournalError, StorageError: if it cannot be written.
        """
        from krea_dagster.application.close import close_month

        return close_month(self, month, folder=folder)

    def closed_months(self) -> list[ClosedMonth]:
        """Return the closed months in their order. Raises ConfigError or JournalError."""
        from krea_dagster.application.close import closed_months_of

        return closed_months_of(self)

    def changed_statements(self) -> list[str]:
        """Return a sentence on each file of a statement that is missing or was changed.

        Raises ConfigError, JournalError or StorageError.
        """
        from krea_dagster.application.close import changed_of

        return changed_of(self)

    # -- the size of root and journal ------------------------------------------------------------

    def prune(
        self,
        *,
        rejected: bool = False,
        replaced: bool = False,
        unlisted: bool = False,
        dry_run: bool = True,
        table: PromptTable | None = None,
    ) -> PrunedImages:
        """Remove the files of images that nothing needs; the journal keeps all else of them.

        They are neither fetched nor bought again, also if a row requests one of them later:
        ``BuyOptions(regenerate=["pruned"])`` buys another image of such rows.

        Args:
            rejected: Those whose last verdict is reject.
            replaced: Those of changed rows and of earlier attempts, whose successor is stored.
            unlisted: Those of rows that left the table.
            dry_run: Only say what would be removed.
            table: The prompt table whose rows are asked; that of the settings by default. Images of
                other tables are left alone, unless they are rejected.

        Raises:
            ConfigError: if there is no journal, or nothing is chosen.
            PromptTableError: if the table has errors; then nothing is removed.
            JournalError, StorageError: the next call continues.
        """
        from krea_dagster.application.pruning import prune_images

        chosen = {"rejected": rejected, "replaced": replaced, "unlisted": unlisted}
        wanted = frozenset(name for name, is_chosen in chosen.items() if is_chosen)
        return prune_images(self, wanted, table=table or self._table_if_any(), dry_run=dry_run)

    def _table_if_any(self) -> PromptTable | None:
        """Return the settings' prompt table; None without one, or if its path is not there."""
        settings = self.settings
        if not isinstance(settings, Settings):
            return None
        table = self.table()
        gone = "://" not in settings.prompts and not Path(settings.prompts).exists()
        return None if gone else table

    def prune_events(self, older_than: timedelta) -> Pruned:
        """Remove the events that no account needs of images stored long ago, and their callbacks.

        Requests, purchases and charges stay: nothing is bought again, and ``verify`` and ``spend``
        say the same as before. Runs may buy meanwhile.

        Args:
            older_than: How long a stored request must not have changed; at least a day.

        Raises:
            ConfigError: if it is less than a day, or there is no journal.
            JournalError: if the journal cannot be written.
        """
        from krea_dagster.engine.journal.prune import prune

        if older_than < timedelta(days=1):
            raise ConfigError("only events that are at least a day old can be removed")
        if not self.has_journal():
            raise ConfigError("there is no journal yet: there is nothing to remove")
        with self.open_journal() as journal:
            return prune(journal.database, datetime.now(timezone.utc) - older_than)


def _run_id() -> str:
    return f"without-dagster-{uuid.uuid4()}"
