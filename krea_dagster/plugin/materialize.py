"""Materializes partitions in this process, by runs of the job in a Dagster instance."""

import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster import file_locks
from krea_dagster.application.batch import Batch
from krea_dagster.application.buy_options import BuyOptions
from krea_dagster.application.finished import is_finished
from krea_dagster.application.krea import Krea
from krea_dagster.application.plan_state import PlanState
from krea_dagster.application.present_partitions import retire_departed
from krea_dagster.application.pruning import pruned_note, pruned_rows
from krea_dagster.application.run import check_options
from krea_dagster.application.run_log import SILENT, Listener
from krea_dagster.application.settings import Settings
from krea_dagster.engine.record import Record
from krea_dagster.engine.run.report import Progress, RunReport
from krea_dagster.errors import AccountStopped, ConfigError, RunStopped, TryLater
from krea_dagster.manifest import read_missing
from krea_dagster.plugin.data_versions import report_prompts
from krea_dagster.plugin.delivered import delivered_partitions
from krea_dagster.plugin.environment import definitions_of
from krea_dagster.plugin.failures import TRY_LATER
from krea_dagster.plugin.metadata import PREFIX
from krea_dagster.plugin.names import JOB_NAME, SALVAGE_JOB_NAME, Names
from krea_dagster.plugin.partitions import (
    partitions_for,
    range_tags,
    ranges,
    register_partitions,
    without_finished,
)
from krea_dagster.plugin.progress import observed
from krea_dagster.plugin.prompts_metadata import plan_metadata
from krea_dagster.prompts import EMPTY_PARTITION_VERSION
from krea_dagster.prompts.trial import TrialRows

#: The columns that are shown of a row without an image.
MISSING_COLUMNS: Final = ("prompt_id", "prompt", "status", "error_code", "error_message")

SALVAGED_IMAGES: Final = dg.AssetKey("salvaged_images")

_PROMPTS: Final = dg.AssetKey("prompts")

#: For an instance that this command creates: without telemetry and greeting.
_INSTANCE_SETTINGS: Final = "telemetry:\n  enabled: false\nnux:\n  enabled: false\n"

#: A file in DAGSTER_HOME that a process locks while it opens the instance.
_OPENING: Final = "krea-opening.lock"


@dataclass(frozen=True)
class Materialized:
    """The outcome of the partitions that were materialized.

    ``missing`` are the rows without an image (``MISSING_COLUMNS``). ``failures`` are the texts
    of runs that failed; ``try_later`` if a later run may succeed. ``waiting`` are partitions of the
    table that Dagster does not have yet (future dates). ``notes`` are findings of the runs, such as
    one file for several requests; ``table_notes`` were said before. ``unknown`` are all purchases
    of the journal with an unknown outcome, the oldest first. ``trial`` are the rows of a trial,
    whose ``missing`` are of these rows.
    """

    partitions: Sequence[str]
    missing: pa.Table
    progress: Progress
    seconds: float
    dagster_home: str
    run_ids: Sequence[str] = ()
    failures: Sequence[str] = ()
    stopped: AccountStopped | RunStopped | None = None
    try_later: bool = False
    left: Mapping[str, str] = field(default_factory=dict)
    caps_reached: Sequence[str] = ()
    price_increases: Sequence[str] = ()
    notes: Sequence[str] = ()
    missed_callbacks: int = 0
    waiting: Sequence[str] = ()
    unknown: Sequence[Record] = ()
    trial: TrialRows | None = None
    table_notes: Sequence[str] = ()


def materialize(
    settings: Settings,
    partitions: Sequence[str] = (),
    options: BuyOptions | None = None,
    *,
    listener: Listener = SILENT,
) -> Materialized:
    """Materialize these partitions of ``images`` and ``image_manifest``, or all that need it.

    A partition does not need it if all is stored, and the manifest and Dagster show that. The
    table and the settings are checked first, so that bad input launches nothing. Raises
    ConfigError, JournalError or PromptTableError.
    """
    started_s = time.monotonic()
    krea = Krea(settings)
    table = krea.table().pinned()
    partitions_def = partitions_for(table, name="krea")
    options = options or BuyOptions()
    trial = options.trial()
    runs, results = _Runs(listener), list[dg.ExecuteInProcessResult]()
    runs.doing("reading the prompt table")
    keys = list(partitions) or None
    with Batch.read(table, keys, krea, to_buy=True, look=True, trial=trial) as batch:
        for note in batch.notes:
            runs.say(f"Note: {note}.")
        samples = check_options(krea, batch, options)
        if options.regenerate and not samples:
            runs.say(f"Note: --again {', '.join(options.regenerate)} selects no row.")
        state = batch.state(krea)
        in_table = table.partition_keys()
        job = definitions_of(settings).resolve_job_def(JOB_NAME)
        home = _dagster_home(settings)
        with _instance_in(home) as instance:
            register_partitions(instance, partitions_def, in_table)
            known = list(partitions_def.get_partition_keys(dynamic_partitions_store=instance))
            chosen = _chosen(partitions, known, in_table)
            # Before the runs, so that they refer to the version that they buy.
            versions = {**dict.fromkeys(chosen, EMPTY_PARTITION_VERSION), **batch.versions()}
            report_prompts(
                instance,
                _PROMPTS,
                {key: versions[key] for key in chosen},
                plan_metadata(batch.plan),
            )
            to_run = chosen
            if not partitions or trial is not None:
                found = ranges(partitions_def, chosen, known)
                again = {image.partition_key for image in batch.images_of(samples)}
                to_run = _unfinished(
                    instance, krea, batch, found, known=known, state=state, again=again
                )
                runs.leave_out(batch, set(chosen) - set(to_run))
            with batch.handed_over(state):
                for start, end in ranges(partitions_def, to_run, known):
                    if runs.stopped is None:
                        keys = known[known.index(start) : known.index(end) + 1]
                        of_range = _of_range(options, batch, keys)
                        results.append(runs.run(job, instance, range_tags(start, end), of_range))
        pruned = pruned_rows(krea, batch.plan.all_digests)
        if not partitions:  # also if no partition needed a run
            retire_departed(krea, table)
        missing = read_missing(krea.open_storage(), chosen, MISSING_COLUMNS)
        if trial is not None:
            in_trial = pa.array(batch.trial_ids(), pa.string())
            missing = missing.filter(pc.is_in(missing["prompt_id"], value_set=in_trial))
        trial_rows, notes = batch.trial_rows, batch.notes
    return Materialized(
        partitions=chosen,
        missing=missing,
        progress=runs.total,
        seconds=time.monotonic() - started_s,
        dagster_home=str(home),
        run_ids=[result.run_id for result in results],
        failures=[text for result in results for text in _failures(result)],
        stopped=runs.stopped,
        try_later=isinstance(runs.stopped, TryLater) or any(map(_may_pass, results)),
        left={key: why for report in runs.reports for key, why in report.left.items()},
        missed_callbacks=sum(report.missed_callbacks for report in runs.reports),
        price_increases=list(
            dict.fromkeys(text for report in runs.reports for text in report.price_increases)
        ),
        notes=[
            *(text for report in runs.reports for text in (*report.recovered, *report.same_files)),
            *([pruned_note(pruned)] if pruned else []),
        ],
        caps_reached=list(
            dict.fromkeys(text for report in runs.reports for text in report.caps_reached)
        ),
        waiting=sorted(set(in_table) - set(known)),
        unknown=krea.unknown(),
        trial=trial_rows,
        table_notes=notes,
    )


def _of_range(options: BuyOptions, batch: Batch, keys: Sequence[str]) -> BuyOptions:
    """Return the options of the run of some partitions: with its own part of a trial's rows."""
    if batch.trial_rows is None:
        return options
    return options.of_rows(sum(batch.trial_rows.by_partition.get(key, 0) for key in keys))


def _unfinished(
    instance: dg.DagsterInstance,
    krea: Krea,
    batch: Batch,
    found: Sequence[tuple[str, str]],
    *,
    known: Sequence[str],
    state: PlanState,
    again: Collection[str],
) -> list[str]:
    """Return the partitions of these ranges, without those at their ends that need no run.

    Those without a row of a trial need none; those in ``again`` need one, though all is stored.
    """
    rows = None if batch.trial_rows is None else batch.trial_rows.by_partition
    delivered = delivered_partitions(instance, Names())
    with krea.open_journal() as journal:
        return without_finished(
            found,
            known,
            lambda key: (
                (rows is not None and not rows.get(key))
                or (
                    key in delivered
                    and key not in again
                    and is_finished(
                        krea, batch, journal, key, intact=state.intact[batch.plan.place(key)]
                    )
                )
            ),
        )


@dataclass(frozen=True)
class Salvaged:
    """The outcome of a salvage; ``figures`` are those of its materialization."""

    figures: Mapping[str, int | float]
    run_id: str
    failures: Sequence[str]
    unknown: Sequence[Record]


def salvage(settings: Settings, *, listener: Listener = SILENT) -> Salvaged:
    """Run the salvage job in this process. Raises ConfigError or JournalError."""
    krea = Krea(settings)
    krea.check()
    job = definitions_of(settings).resolve_job_def(SALVAGE_JOB_NAME)
    with _instance_in(_dagster_home(settings)) as instance:
        with observed(listener, lambda _: None):
            result = job.execute_in_process(
                instance=instance,
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
                raise_on_error=False,
            )
        figures = {
            name.removeprefix(PREFIX): value.value
            for event in result.all_events
            if event.is_step_materialization and event.asset_key == SALVAGED_IMAGES
            for name, value in event.step_materialization_data.materialization.metadata.items()
            if isinstance(value, dg.IntMetadataValue | dg.FloatMetadataValue)
            and value.value is not None
        }
    return Salvaged(figures, result.run_id, _failures(result), krea.unknown())


class _Runs:
    """Runs the job for several ranges of partitions, and adds up their progress."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.say, self.doing = listener.say, listener.doing
        self._before = Progress(total=0)
        self.total = Progress(total=0)
        self.reports: list[RunReport] = []

    @property
    def stopped(self) -> AccountStopped | RunStopped | None:
        """Why buying stopped."""
        return next((r.stopped for r in self.reports if r.stopped is not None), None)

    def run(
        self,
        job: dg.JobDefinition,
        instance: dg.DagsterInstance,
        tags: Mapping[str, str],
        options: BuyOptions,
    ) -> dg.ExecuteInProcessResult:
        """Run the job, and add its progress."""
        with observed(self, self.reports.append):
            result = job.execute_in_process(
                instance=instance,
                tags=tags,
                run_config={
                    "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
                    "ops": {"images": {"config": options.model_dump()}},
                },
                raise_on_error=False,
            )
        self._before = self.total
        return result

    def leave_out(self, batch: Batch, keys: Collection[str]) -> None:
        """Count the images of partitions that need no run."""
        if not keys:
            return
        rows = sum(int(batch.inside(key).sum()) for key in keys)
        self.progress(Progress(total=rows, reused=rows))
        self._before = self.total

    def progress(self, progress: Progress) -> None:
        """Add the progress of the present run."""
        self.total = self._before + progress
        self._listener.progress(self.total)


def _dagster_home(settings: Settings) -> Path:
    """Return DAGSTER_HOME, or a folder in the storage root."""
    if home := os.environ.get("DAGSTER_HOME"):
        return Path(home).absolute()
    root = Krea(settings).open_storage().folder
    if root is None:
        raise ConfigError("set DAGSTER_HOME to a folder: the storage root is not a folder")
    return root / "dagster"


@contextmanager
def _instance_in(home: Path) -> Iterator[dg.DagsterInstance]:
    """Open the instance in a folder, and create it if there is none.

    One process at a time: Dagster creates the tables of its SQLite files without a lock, so that
    processes that start together would fail.
    """
    home.mkdir(parents=True, exist_ok=True)
    with (home / _OPENING).open("a") as lock:
        file_locks.lock(lock)
        settings = home / "dagster.yaml"
        if not os.environ.get("DAGSTER_HOME") and not settings.exists():
            settings.write_text(_INSTANCE_SETTINGS)
        opened = dg.DagsterInstance.from_config(str(home))
    with opened as instance:
        yield instance


def _failures(result: dg.ExecuteInProcessResult) -> list[str]:
    """Return the messages of the failed steps, without Dagster's stack."""
    texts: list[str] = []
    for event in result.all_events:
        if event.event_type_value == "STEP_FAILURE":
            data = event.step_failure_data
            text = data.user_failure_data.description if data.user_failure_data else None
            if data.error and data.error.cls_name == "DagsterExecutionInterruptedError":
                text = "The run was interrupted. The next run collects what is paid for."
            texts.append(text or (data.error.message.strip() if data.error else "a step failed"))
    return texts


def _may_pass(result: dg.ExecuteInProcessResult) -> bool:
    """Return whether a step failed because something was unavailable."""
    for event in result.all_events:
        if event.event_type_value == "STEP_FAILURE":
            data = event.step_failure_data.user_failure_data
            if data is not None and TRY_LATER in data.metadata:
                return True
    return False


def _chosen(wanted: Sequence[str], known: Sequence[str], in_table: Sequence[str]) -> list[str]:
    if not wanted:
        return [key for key in known if key in set(in_table)]
    if unknown := [key for key in wanted if key not in set(known)]:
        shown = ", ".join(list(known)[:10]) + (", …" if len(known) > 10 else "")
        raise ConfigError(f"unknown partition {unknown[0]!r}; the partitions are {shown or 'none'}")
    return [key for key in known if key in set(wanted)]
