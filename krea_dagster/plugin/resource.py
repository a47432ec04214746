"""KreaResource: how EvoLink is reached, and where what is bought is kept."""

import asyncio
import contextvars
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import Any, Final, TypeVar

import dagster as dg
import httpx
import pyarrow as pa
from pydantic import Field

from krea_dagster.api import KreaClient
from krea_dagster.application.callback_column import receiver_urls
from krea_dagster.application.emulator_process import EMULATOR_KEY, local_emulator
from krea_dagster.callbacks import CallbackUrls
from krea_dagster.curation.measures.cache import measured_while_verified
from krea_dagster.engine.budget import Budget, Caps
from krea_dagster.engine.journal.database import database_in, has_database
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.prompt_table_log import identity_of
from krea_dagster.engine.journal.root_log import RootMarker
from krea_dagster.engine.policy import REJECTED, Policy
from krea_dagster.engine.record import Record
from krea_dagster.engine.resolution import Resolution
from krea_dagster.engine.run.latency import Latencies
from krea_dagster.engine.run.options import RunRoot
from krea_dagster.engine.run.report import Progress, RunReport
from krea_dagster.engine.run.runner import Runner
from krea_dagster.engine.run.worklist import RequestedImage
from krea_dagster.engine.states import State
from krea_dagster.engine.storage.images import ImageStore
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError
from krea_dagster.models import MOST_CREDITS, credits_text, parse_cap
from krea_dagster.prompts import Defaults, Plan, PlannedImage, PromptTable

_T = TypeVar("_T")

#: What another table has paid for, and nobody has taken for so long, any salvage takes: half of
#: what its link lives.
_TAKEN_BY_OTHERS: Final = timedelta(hours=12)


class KreaResource(dg.ConfigurableResource[None], extra="forbid"):
    """Buys images of Krea 2 Turbo from EvoLink, each once, and keeps them verified.

    Give the key as ``dagster.EnvVar("EVOLINK_API_KEY")``: a plain string would be shown in
    the UI.
    """

    api_key: str = Field(
        default="",
        repr=False,
        description="EvoLink API key, as dagster.EnvVar. May stay empty with the emulator.",
    )
    base_url: str = Field(
        default="https://api.evolink.ai",
        description="Root of the API. http is taken for addresses of this machine or network only.",
    )
    emulator: bool = Field(
        default=False,
        description=(
            "Use an emulator on this machine instead of base_url: the pictures are synthetic, "
            "and nothing is charged."
        ),
    )
    storage: str = Field(
        default="data/krea",
        description="Root of what is made: a folder, or a URL that fsspec knows.",
    )
    journal_url: str = Field(
        default="",
        repr=False,
        description=(
            "SQLAlchemy URL of the journal. Empty: SQLite in the storage root, where that is a "
            "folder. Runs that share a journal never buy the same image twice. With a password "
            "in it, give it as dagster.EnvVar."
        ),
    )
    max_in_flight: int = Field(
        default=64,
        ge=1,
        le=4096,
        description=(
            "Most tasks of one run at the server at once. What the account takes is found by "
            "itself, also where it is less."
        ),
    )
    max_per_s: float | None = Field(
        default=None,
        gt=0,
        le=10_000,
        description=(
            "Most images a second that one run asks for, where the account's limit is known. "
            "Without it the limit is found by itself."
        ),
    )
    expected_latency_s: float | None = Field(
        default=None,
        gt=0,
        le=900,
        description=(
            "Seconds from an order to its image, as far as they are known: when a run asks about "
            "its first tasks. Without it 2 (1K) and 7 (2K). What comes is learned from either way."
        ),
    )
    look_at_images: bool = Field(
        default=True,
        description=(
            "Decode each image once before it counts as stored, to find damage, a wrong size and "
            "flat colour. Without it the hash, the length and the file's header are checked."
        ),
    )
    measure_images: bool = Field(
        default=True,
        description=(
            "Measure each image in the decode that verifies it, for `image_measures`, which else "
            "decodes it again. Without look_at_images nothing is measured in a run."
        ),
    )
    on_unknown: str = Field(
        default="replay",
        pattern="^(replay|hold)$",
        description=(
            "What is done about a purchase whose outcome is unknown: replay repeats it with the "
            "same Idempotency-Key within 23 hours, hold leaves it to a person."
        ),
    )
    run_credits: float | None = Field(
        default=None,
        ge=0,
        le=MOST_CREDITS,
        description="Most credits that one run may commit; the rows beyond it are deferred.",
    )
    day_credits: float | None = Field(
        default=None,
        ge=0,
        le=MOST_CREDITS,
        description=(
            "Most credits that all runs which share the journal may commit in one UTC day; the "
            "rows beyond it are deferred."
        ),
    )
    budgets: list[str] = Field(
        default=[],
        description=(
            "Most credits that all runs which share the journal may commit, each as SCOPE=CREDITS: "
            "day, month, partition (each), partition:KEY, column:NAME (each value) or "
            "column:NAME:VALUE, such as month=900 or column:campaign:autumn=100. The rows beyond "
            "are deferred."
        ),
    )
    callback_base_url: str = Field(
        default="",
        description=(
            "Where `krea-dagster callbacks serve` is reached from outside, https://. Then finished "
            "images announce themselves, and tasks are hardly asked about in vain. Empty: none."
        ),
    )
    callback_secret: str = Field(
        default="",
        repr=False,
        description=(
            "What callback addresses are made with, 32 characters or more, the same as the "
            "receiver's. Give it as dagster.EnvVar."
        ),
    )
    patience_s: float = Field(
        default=1800.0,
        gt=0,
        le=30 * 86_400,
        description=(
            "Seconds after its submission that a run waits for a task. Then it detaches, and "
            "the next run takes the task up again."
        ),
    )
    outage_patience_s: float = Field(
        default=300.0,
        ge=0,
        le=86_400,
        description=(
            "Seconds that EvoLink's API, the journal's database or the storage root may be away. "
            "Meanwhile a run buys nothing new and keeps what it holds; then it ends."
        ),
    )
    timeout_s: float = Field(
        default=60.0, gt=0, le=3600, description="Seconds that EvoLink may take to answer a call."
    )
    download_timeout_s: float = Field(
        default=60.0, gt=0, le=86_400, description="Seconds without a byte that end a download."
    )

    def open_storage(self) -> Storage:
        """Return the storage root. Raises ConfigError."""
        return Storage(_text(self.storage))

    @contextmanager
    def open_journal(self) -> Iterator[Journal]:
        """Open the journal. Raises ConfigError or JournalError."""
        with closing(Journal(self._journal_url())) as journal:
            yield journal

    def has_journal(self) -> bool:
        """Return whether there is a journal yet; makes none. Raises ConfigError."""
        return has_database(self._journal_url())

    def check(self) -> None:
        """Check what can be checked before anything is bought. Raises ConfigError or JournalError.

        Binds the journal to where these settings buy, and sees that the storage root is as the
        journal left it.
        """
        if not self.emulator and not _text(self.api_key):
            raise ConfigError(
                "KreaResource.api_key is empty; give dagster.EnvVar('EVOLINK_API_KEY') and set "
                "that variable, or set emulator=True"
            )
        self._callback_urls()
        storage = self.open_storage()
        if not self.has_journal():
            refuse_without_journal(storage)
        with self.open_journal() as journal:
            journal.bind(self.origin)
            journal.roots.check(storage)

    def check_root(self) -> None:
        """See that the storage root is as the journal left it. Raises ConfigError or JournalError.

        Makes no journal where there is none.
        """
        if self.has_journal():
            with self.open_journal() as journal:
                journal.roots.check(self.open_storage())

    def has_purchases(self) -> bool:
        """Return whether the journal is there and knows of a request or an accepted root."""
        if not self.has_journal():
            return False
        with self.open_journal() as journal:
            return bool(journal.count_by_state()) or journal.roots.any_accepted()

    def journal_id(self) -> str:
        """Return the journal's id; empty where there is none."""
        if not self.has_journal():
            return ""
        with self.open_journal() as journal:
            return journal.database.journal_id

    def accept_root(self) -> str:
        """Take the storage root as it is for the journal's; returns what that means, for people."""
        with self.open_journal() as journal:
            return journal.roots.accept(self.open_storage())

    def accept_key(self, same_as: str = "") -> str:
        """Declare the API key to be of the account that the journal's images were bought with."""
        with self.open_journal() as journal:
            fingerprint = journal.api_keys.fingerprint(self._key())
            count = journal.api_keys.accept(fingerprint, same_as)
        return (
            f"the API key with the fingerprint {fingerprint} is of the account that {count} "
            "purchases were made with"
        )

    def accept_price(self, quality: str, *, dismiss: bool = False) -> str:
        """Believe the price of a quality that was far from the expected one, or ``dismiss`` it."""
        with self.open_journal() as journal:
            if dismiss:
                journal.prices.dismiss(quality)
                return (
                    f"the doubted price of {quality} counts as a mistake; its charge stays unknown"
                )
            units, settled = journal.prices.accept(quality, datetime.now(timezone.utc))
        return (
            f"{quality} costs {credits_text(units)} credits from now on; the charges of {settled} "
            "purchases at that price are settled"
        )

    def generate(
        self,
        prompts: Any,
        *,
        context: dg.AssetExecutionContext | dg.OpExecutionContext | None = None,
        defaults: Defaults | None = None,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> pa.Table:
        """Buy, fetch and verify the images of a few prompts, and return their manifest.

        For an asset or op of one's own, with the same journal and storage as the assets of this
        package: what any of them has bought is not bought again. ``prompts`` are texts, or rows
        with the columns of a prompt table, or a table (pandas, Polars or Arrow). Give the
        ``context`` of the asset or op, whose run and name stand in the journal and in the
        manifest's ``run_id`` and ``partition_key``. ``defaults`` fill in what a row leaves open.

        The manifest has a row for each image asked for, also where there is none: ``status`` and
        ``error_message`` say why. Raises ConfigError or PromptTableError before anything is
        bought, AccountStopped or RunStopped where buying ended, JournalError or StorageError
        where what was bought could not be written; what is paid for is taken up by the next call.
        """
        from krea_dagster.application.generate import generate, ids_of  # noqa: PLC0415 - it needs this

        run_id, name = ids_of(context)
        return generate(
            self,
            prompts,
            run_id=run_id,
            name=name,
            defaults=defaults,
            on_progress=on_progress,
        )

    def carry(
        self,
        wanted: Iterable[RequestedImage],
        *,
        run_id: str,
        table: PromptTable | None = None,
        reused_rows: int = 0,
        launch: str = "",
        ask_again: Iterable[str] = (),
        resolutions: Mapping[str, Resolution] | None = None,
        wait: bool = True,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> RunReport:
        """Buy, fetch and verify what is not at hand yet, and return when nothing more can be done.

        ``wanted`` is taken up as it comes; ``table`` is the prompt table that asks for it;
        ``reused_rows`` counts the images beside it that are
        known to be at hand. ``launch`` names the runs that stop together where the account stops
        one. ``ask_again`` are error codes whose rows are bought again; ``resolutions`` a person's
        decisions about unknown outcomes, by request key. Without ``wait`` it submits, fetches what
        earlier runs submitted and has probably ended, and returns: a later run collects the rest.

        Raises ConfigError for a wrong setting before anything is bought, and JournalError
        where the journal cannot be written. What EvoLink refuses or loses is in the report
        and in the journal, not an exception.
        """
        with self._runner(run_id, on_progress, table) as runner:
            wishful = replace(
                runner,
                policy=replace(runner.policy, retry_codes=frozenset(ask_again), wait=wait),
                launch=launch,
                resolutions=resolutions or {},
            )
            return _run(wishful.run(wanted, reused_rows=reused_rows))

    def salvage(
        self,
        *,
        run_id: str,
        table: PromptTable | None = None,
        only: Callable[[Record], bool] = lambda _: True,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> tuple[RunReport, dict[str, Record]]:
        """Ask for and fetch what is paid for and at hand nowhere; buys nothing.

        The oldest first, because links live for a day. What was given up as lost within the last
        week is asked about once more. Of all this it takes up what ``only`` says. Returns the
        report, and what became of
        each request that it took up, by request key. Of other tables than ``table`` it takes what
        nobody has taken for 12 hours. Raises as ``carry`` does.
        """
        with self._runner(run_id, on_progress, table) as runner:
            mine = partial(_is_own, runner.table_id if table else None)
            since = datetime.now(timezone.utc) - timedelta(seconds=runner.policy.lost_for_s)
            known = [*_paid(runner.journal), *runner.journal.expired_since(since)]
            paid = [record for record in known if mine(record) and only(record)]
            wanted = [RequestedImage(record.request, record.partition_key) for record in paid]
            policy = replace(runner.policy, revive=True)
            report = _run(replace(runner, buying=False, policy=policy).run(wanted))
            return report, runner.journal.records([record.request_key for record in paid])

    def records(self, images: Iterable[PlannedImage]) -> dict[str, Record]:
        """Return what the journal knows of these images, by request key. Needs no network."""
        with self.open_journal() as journal:
            return journal.records({image.request.request_key for image in images})

    def left_behind(self, table: PromptTable | None = None) -> list[Record]:
        """Return what is paid for, not stored, and held by no living run; the oldest first.

        Of other tables than ``table`` only what nobody has taken for 12 hours.
        """
        with self.open_journal() as journal:
            table_id = None if table is None else self.table_id(journal, table)
            return list(filter(partial(_is_own, table_id), _paid(journal)))

    def unknown(self) -> list[Record]:
        """Return the purchases whose outcome is unknown; the oldest first."""
        with self.open_journal() as journal:
            return [record for record in journal.unsettled() if record.state is State.UNKNOWN]

    def table_id(self, journal: Journal, table: PromptTable, *, enter: bool = False) -> str:
        """Return the id that a prompt table has in the journal; empty where it has none yet."""
        storage = self.open_storage()
        root_id = journal.roots.id_of(storage)
        if enter and not root_id:
            root_id = journal.roots.begin(storage, journal.roots.check(storage))
        name = identity_of(table.name, table.source, storage, root_id)

        def is_gone(path: str) -> bool:
            return storage.folder is not None and not (storage.folder / path).exists()

        seen = journal.tables.enter if enter else journal.tables.find
        return seen(*name, is_gone=is_gone)

    def raise_attempts(
        self, table: PromptTable, samples: Iterable[tuple[str, int]], *, raised_by: str
    ) -> int:
        """Ask for another image of these (prompt_id, sample) of a table; returns of how many."""
        with self.open_journal() as journal:
            log = journal.attempts(self.table_id(journal, table, enter=True))
            at = datetime.now(timezone.utc)
            return len(log.raise_attempts(samples, raised_by=raised_by, at=at))

    def attempts(self, table: PromptTable) -> dict[tuple[str, int], int]:
        """Return how often another image was asked for, by prompt_id and sample."""
        return self._attempts(table)[0]

    def versions(self, table: PromptTable) -> dict[str, str]:
        """Return the data version of each partition of a table. Makes no journal."""
        attempts, drawn = self._attempts(table)
        return table.versions(attempts=attempts, drawn=drawn)

    def plan(
        self, table: PromptTable, keys: Sequence[str] | None = None, *, keep: bool = True
    ) -> Plan:
        """Return the images that a table's rows ask for, at their attempts. Makes no journal."""
        attempts, drawn = self._attempts(table)
        return table.plan(keys, attempts, drawn=drawn, keep=keep)

    def _attempts(
        self, table: PromptTable
    ) -> tuple[dict[tuple[str, int], int], frozenset[tuple[str, int]]]:
        if not self.has_journal():
            return {}, frozenset()
        with self.open_journal() as journal:
            log = journal.attempts(self.table_id(journal, table))
            return log.current(), log.drawn()

    def caps(self) -> Caps:
        """Return the caps and budgets in units. Raises ConfigError for a budget that is none."""
        return Caps(
            run_units=None
            if self.run_credits is None
            else parse_cap(self.run_credits, "run_credits"),
            day_units=None
            if self.day_credits is None
            else parse_cap(self.day_credits, "day_credits"),
            budgets=tuple(map(Budget.parse, self.budgets)),
        )

    def budget_columns(self) -> list[str]:
        """Return the columns whose values have a budget. Raises ConfigError."""
        return list(dict.fromkeys(one.name for one in self.caps().budgets if one.name))

    def policy(self, ask_again: Iterable[str] = ()) -> Policy:
        """Return what a run does about failures; ``ask_again`` as for ``generate``."""
        return Policy(
            on_unknown="hold" if self.on_unknown == "hold" else "replay",
            patience_s=self.patience_s,
            outage_patience_s=self.outage_patience_s,
            retry_codes=frozenset(ask_again),
        )

    @contextmanager
    def _runner(
        self,
        run_id: str,
        on_progress: Callable[[Progress], None],
        table: PromptTable | None = None,
    ) -> Iterator[Runner]:
        self.check()
        storage = self.open_storage()
        with ExitStack() as stack:
            journal = stack.enter_context(self.open_journal())
            root_id = journal.roots.begin(storage, journal.roots.check(storage))
            fingerprint = journal.api_keys.fingerprint(self._key())
            account = journal.api_keys.enter(fingerprint)
            on_image = None
            if self.measure_images and self.look_at_images:
                on_image = stack.enter_context(measured_while_verified(storage))
            yield Runner(
                connect=self._connect,
                journal=journal,
                images=ImageStore(storage, verify=self.look_at_images, on_image=on_image),
                run_id=run_id,
                root=RunRoot(
                    root_id,
                    adopts=journal.roots.adopts(root_id),
                    elsewhere=lambda keys: journal.roots.elsewhere(keys, root_id),
                ),
                table_id="" if table is None else self.table_id(journal, table, enter=True),
                api_key=fingerprint,
                policy=replace(self.policy(), account_keys=account),
                max_in_flight=self.max_in_flight,
                max_per_s=self.max_per_s,
                latencies=Latencies.expecting(self.expected_latency_s),
                caps=self.caps(),
                callback_url_of=None if (urls := self._callback_urls()) is None else urls.url,
                on_progress=on_progress,
            )
            # Another token, so that a copy of the journal from during the run is known for old.
            journal.roots.begin(storage, root_id)

    def _callback_urls(self) -> CallbackUrls | None:
        return receiver_urls(
            _text(self.callback_base_url),
            _text(self.callback_secret),
            private_allowed=self.synthetic,
        )

    def _key(self) -> str:
        return EMULATOR_KEY if self.emulator else _text(self.api_key)

    def _journal_url(self) -> str:
        if url := _text(self.journal_url):
            return url
        return database_in(self.open_storage())

    @property
    def synthetic(self) -> bool:
        """Whether images are bought of an emulator, on this machine or its network."""
        return self.emulator or httpx.URL(self.base_url).scheme == "http"

    @property
    def origin(self) -> str:
        """Where images are bought: EvoLink's host, or an emulator on some port of this machine."""
        return "an emulator" if self.synthetic else httpx.URL(self.base_url).host

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[KreaClient]:
        if not self.emulator:
            async with self._client(_text(self.api_key), self.base_url) as client:
                yield client
            return
        folder = self.open_storage().folder
        if folder is None:
            raise ConfigError("the emulator keeps its state in the storage root: use a folder")
        with local_emulator(folder / "emulator") as url:
            async with self._client(EMULATOR_KEY, url) as client:
                yield client

    def _client(self, api_key: str, base_url: str) -> KreaClient:
        return KreaClient(
            api_key,
            base_url=base_url,
            timeout_s=self.timeout_s,
            download_timeout_s=self.download_timeout_s,
        )


def krea_of(
    context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext, key: str
) -> KreaResource:
    """The KreaResource of a step. Raises Failure where another resource has its key."""
    resource = getattr(context.resources, key)
    if not isinstance(resource, KreaResource):
        raise dg.Failure(f"resource {key!r} is a {type(resource).__name__}, not a KreaResource")
    return resource


def _text(value: str) -> str:
    """A setting's text, also outside a run, where Dagster has left an EnvVar as it is.

    Raises ConfigError where its variable is not set: without the URL of a journal another one
    would be begun, which knows of no purchase.
    """
    if not isinstance(value, dg.EnvVar):
        return value
    text = value.get_value()
    if text is None:
        raise ConfigError(f"the variable {value.env_var_name} is not set; nothing was bought")
    return text


def _paid(journal: Journal) -> list[Record]:
    """What is to be collected; what was fetched and rejected would come again as it is."""
    return [
        record
        for record in journal.unattended()
        if record.state in (State.SUBMITTED, State.COMPLETED)
        and not (record.state is State.COMPLETED and record.error_code in REJECTED)
    ]


def _is_own(table_id: str | None, record: Record) -> bool:
    """Whether a salvage for a table (None: for all) takes a request."""
    if table_id is None or record.table_id in ("", table_id):
        return True
    since = record.sent_at
    return since is None or datetime.now(timezone.utc) - since > _TAKEN_BY_OTHERS


def refuse_without_journal(storage: Storage) -> None:
    """Refuse to begin a journal beside images: another one knows that they are paid for."""
    marker = RootMarker.read(storage)
    if marker is not None or storage.has_files("images"):
        named = f" (its id is {marker.journal_id})" if marker is not None else ""
        raise ConfigError(
            f"{storage.shown('images')} holds images, and the journal that bought them is not "
            f"there{named}: a new one would buy them again. Nothing was bought. Put the journal "
            "back (KREA_JOURNAL_URL), or move the images away to start empty; or run "
            "`krea-dagster accept root`: a new journal then takes up what lies there, without a "
            "charge that is known."
        )


def _run(main: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end in a thread, and stop it gently where this one is interrupted.

    Dagster ends a run by raising in the main thread, wherever that is. Within an event loop this
    would tear a POST from its answer; here it becomes a cancellation, on which the engine writes
    what it knows. So it also runs where this thread has an event loop (a notebook).
    """
    under_way: Future[tuple[asyncio.AbstractEventLoop, asyncio.Future[_T]]] = Future()

    async def stoppable() -> _T:
        task = asyncio.ensure_future(main)
        under_way.set_result((asyncio.get_running_loop(), task))
        return await task

    with ThreadPoolExecutor(max_workers=1) as pool:
        ended = pool.submit(contextvars.copy_context().run, asyncio.run, stoppable())
        try:
            return ended.result()
        except BaseException:
            loop, task = under_way.result()
            with suppress(RuntimeError):  # the loop is closed: it has ended by itself
                loop.call_soon_threadsafe(task.cancel)
            raise
