"""The command krea-dagster: parse, call, print."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from krea_dagster import redact
from krea_dagster.callbacks.command import callbacks_command
from krea_dagster.curation.export.command import export_command
from krea_dagster.curation.gallery.command import gallery_command
from krea_dagster.curation.review.command import review_command
from krea_dagster.drill.command import drill_command
from krea_dagster.emulator import emulator_command
from krea_dagster.errors import InputError, JournalUnavailable, KreaError, StorageUnavailable

if TYPE_CHECKING:
    from krea_dagster.plugin.config import KreaImagesConfig
    from krea_dagster.plugin.environment import Settings
    from krea_dagster.plugin.materialize import Materialized

#: What the exit code says; the same for every command.
DONE: Final = 0
NOT_DELIVERED: Final = 1
WRONG_USE: Final = 2
STOPPED: Final = 3
#: EX_TEMPFAIL of sysexits.h: the same command later may do what this one could not.
TRY_LATER: Final = 75

#: For the demo: an address that is not asked, whatever the environment says.
_NO_ADDRESS: Final = "https://emulator.invalid"

#: Variables whose URLs may hold credentials.
_PLACES: Final = ("KREA_PROMPTS", "KREA_STORAGE", "KREA_JOURNAL_URL", "EVOLINK_BASE_URL")

_EPILOG: Final = """
\b
Environment (the same that definitions.py reads):
  EVOLINK_API_KEY    the key; without it an emulator draws synthetic pictures
  EVOLINK_BASE_URL   API root                    [https://api.evolink.ai]
  KREA_PROMPTS       prompt table                [data/prompts.parquet]
  KREA_STORAGE       root of what is made        [data/krea]
  KREA_JOURNAL_URL   SQLAlchemy URL              [SQLite in the storage root]
  KREA_PARTITION_BY  hash:N, column:NAME, day:NAME            [hash:8]
  KREA_MAX_IN_FLIGHT most tasks at the server    [64]
  KREA_RUN_CREDITS   most credits of one run     [no cap]
  KREA_DAY_CREDITS   most credits of a UTC day, all runs together [no cap]
  KREA_BUDGETS       budgets, such as month=900,column:campaign:autumn=100 [none]
  KREA_ON_UNKNOWN    replay or hold              [replay]
  KREA_CALLBACK_BASE_URL where callbacks are taken, https:// [no callbacks]
  KREA_CALLBACK_SECRET   32 characters or more, the same for runs and receiver
  KREA_COLLECT       wait, or later: Dagster's runs submit and end [wait]

\b
Exit codes: 0 done, 1 rows not delivered or books that do not add up,
2 wrong use or bad input, 3 the account or the key stops everything,
75 something was away for too long: run again later.
"""


@click.group(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="krea-dagster")
def main() -> None:
    """Krea 2 Turbo images as Dagster assets: each bought once, verified, and accounted for."""


main.add_command(emulator_command, "emulator")
main.add_command(drill_command, "drill")
main.add_command(callbacks_command, "callbacks")
main.add_command(review_command, "review")
main.add_command(export_command, "export")
main.add_command(gallery_command, "gallery")


@main.command("materialize", epilog=_EPILOG)
@click.option(
    "--partition",
    "partitions",
    multiple=True,
    metavar="KEY",
    help="Materialize this partition; may be given several times. Default: all.",
)
@click.option(
    "--again",
    multiple=True,
    metavar="ROWS",
    help=(
        "Buy another image of a row: its attempt is raised, the old image stays. ROWS is a "
        "prompt_id, @FILE (one prompt_id a line), error:CODE (the rows that failed with it), or "
        "rejected (the rows whose image was rejected in the review). If the run is "
        "killed, the same command continues it, and buys no second image."
    ),
)
@click.option(
    "--new-seed",
    is_flag=True,
    help="With --again: draw a new seed for rows whose seed the table fixes, else refused.",
)
@click.option(
    "--retry",
    "retry_errors",
    multiple=True,
    metavar="ERROR_CODE",
    help="Buy the rows again that failed or were refused with this error code.",
)
@click.option(
    "--resolve",
    "decisions",
    multiple=True,
    metavar="ROW=DECISION",
    help=(
        "Decide about a purchase whose outcome is unknown. ROW is a prompt_id or request_key; "
        "DECISION is replay (send it again under the same key), not-charged (buy it anew), lost, "
        "or task:ID (it was charged, and this is its task)."
    ),
)
@click.option("--json", "as_json", is_flag=True, help="Print figures as JSON on stdout.")
def materialize_command(
    partitions: Sequence[str],
    again: Sequence[str],
    retry_errors: Sequence[str],
    decisions: Sequence[str],
    *,
    new_seed: bool,
    as_json: bool,
) -> None:
    """Buy what is missing of the prompt table, and write the manifest.

    Runs the Dagster job krea_images in this process. Its events are in DAGSTER_HOME, or where
    that is not set, in the folder dagster/ of the storage root. Run it again at any time: what
    is at hand is not bought again, and what was interrupted goes on.
    """
    from krea_dagster.application.regenerate import with_files  # noqa: PLC0415 - --help stays quick
    from krea_dagster.plugin.config import KreaImagesConfig  # noqa: PLC0415
    from krea_dagster.plugin.environment import Settings  # noqa: PLC0415

    wishes = KreaImagesConfig(
        again=with_files(again),
        new_seed=new_seed,
        retry_errors=list(retry_errors),
        resolve=_decisions(decisions),
        wait=True,
    )
    done = _materialize(Settings.from_environment(), partitions, wishes, as_json=as_json)
    sys.exit(_exit_code(done, done.progress.failed + done.progress.left))


@main.group("accept", epilog=_EPILOG)
def accept_group() -> None:
    """Say that something is right which a run stops for: a storage root, an API key, a price."""


@accept_group.command("root", epilog=_EPILOG)
def accept_root_command() -> None:
    """Take the storage root (KREA_STORAGE) as it is for the journal's.

    After a run has said that the root is empty, older or newer than the journal, or another
    journal's. Images that are missing in it are fetched by their links, as far as those live;
    images that the journal does not know are taken up without a known charge. Buys nothing.
    """
    from krea_dagster.plugin.environment import Settings  # noqa: PLC0415 - --help stays quick

    click.echo(Settings.from_environment().resource().accept_root())


@accept_group.command("key", epilog=_EPILOG)
@click.option(
    "--same-as",
    default="",
    metavar="FINGERPRINT",
    help="A key of the same account, where the journal has keys of several.",
)
def accept_key_command(same_as: str) -> None:
    """Say that EVOLINK_API_KEY is of the account that the journal's images were bought with.

    For a key that was rotated: without it, what was bought with the old one is neither repeated
    nor given up. Buys nothing.
    """
    from krea_dagster.plugin.environment import Settings  # noqa: PLC0415 - --help stays quick

    click.echo(Settings.from_environment().resource().accept_key(same_as))


@accept_group.command("price", epilog=_EPILOG)
@click.argument("quality", type=click.Choice(["1K", "2K"]))
@click.option("--dismiss", is_flag=True, help="The price was a mistake: do not believe it.")
def accept_price_command(quality: str, *, dismiss: bool) -> None:
    """Believe the price of a quality that was far from the expected one.

    The charges of the purchases at that price are settled, and caps reckon with it. Buys nothing.
    """
    from krea_dagster.plugin.environment import Settings  # noqa: PLC0415 - --help stays quick

    click.echo(Settings.from_environment().resource().accept_price(quality, dismiss=dismiss))


@main.command("demo")
@click.option("--json", "as_json", is_flag=True, help="Print figures as JSON on stdout.")
def demo_command(*, as_json: bool) -> None:
    """Do the main job against the emulator: no key, no cost, synthetic pictures.

    Materializes every partition of the prompt table (KREA_PROMPTS, or the sample). Never uses
    EVOLINK_API_KEY. Rows whose prompt asks the emulator for a failure are meant to fail.
    """
    from krea_dagster.plugin.environment import Settings  # noqa: PLC0415 - --help stays quick

    settings = replace(Settings.from_environment(), has_key=False, base_url=_NO_ADDRESS)
    done = _materialize(settings, (), None, as_json=as_json)
    meant = sum("[emulator:" in prompt for prompt in done.missing["prompt"].to_pylist())
    sys.exit(_exit_code(done, done.missing.num_rows - meant))


@main.command("salvage", epilog=_EPILOG)
@click.option("--json", "as_json", is_flag=True, help="Print figures as JSON on stdout.")
def salvage_command(*, as_json: bool) -> None:
    """Collect what is paid for and at hand nowhere; buys nothing.

    Asks for the tasks that earlier runs left behind and fetches their images, the most urgent
    link first: links live for 24 hours. What was given up as lost is asked about once more.
    Runs the Dagster job krea_salvage in this process.
    """
    from krea_dagster import terminal  # noqa: PLC0415 - --help stays quick
    from krea_dagster.plugin.environment import Settings  # noqa: PLC0415
    from krea_dagster.plugin.materialize import salvage  # noqa: PLC0415

    with terminal.progress_bar() as on_progress:
        done = salvage(Settings.from_environment(), on_progress=on_progress)
    if as_json:
        unknown = terminal.unknown_figures(done.unknown)
        terminal.show_json({**done.figures, "run_id": done.run_id, "unknown": unknown})
    else:
        terminal.show_salvaged(done)
    for failure in done.failures:
        terminal.say_error(failure)
    waiting = done.figures.get("still_waiting", 0) + done.figures.get("lost", 0)
    sys.exit(NOT_DELIVERED if waiting or done.failures else DONE)


@main.command("quote", epilog=_EPILOG)
@click.option(
    "--partition",
    "partitions",
    multiple=True,
    metavar="KEY",
    help="Quote this partition; may be given several times. Default: all.",
)
@click.option("--by-partition", is_flag=True, help="List every partition, however many there are.")
@click.option(
    "--credits-per-usd",
    type=click.FloatRange(min=0, min_open=True, max=1e9),
    default=68.0,  # engine.budget.CREDITS_PER_USD, which --help need not import
    show_default=True,
    help="Credits that one US dollar buys.",
)
@click.option("--json", "as_json", is_flag=True, help="Print figures as JSON on stdout.")
def quote_command(
    partitions: Sequence[str], credits_per_usd: float, *, by_partition: bool, as_json: bool
) -> None:
    """Say what materialize would buy now, and what that costs at most. Buys nothing.

    Reads the prompt table, the journal and the files, and needs no network. The price of a
    quality is the highest that this account was seen to pay, and before that the published one.
    """
    from krea_dagster import terminal  # noqa: PLC0415 - --help stays quick
    from krea_dagster.application.quotes import quote_partitions  # noqa: PLC0415
    from krea_dagster.plugin.environment import Settings  # noqa: PLC0415

    settings = Settings.from_environment()
    quoted = quote_partitions(
        settings.resource(), settings.table(), partitions, credits_per_usd=credits_per_usd
    )
    if as_json:
        terminal.show_json(terminal.quote_figures(quoted))
    else:
        terminal.show_quote(quoted, by_partition=by_partition)


@main.command("spend", epilog=_EPILOG)
@click.option(
    "--by",
    multiple=True,
    metavar="COLUMN",
    help=(
        "Sum by this column of the ledger or the manifest (day, month, quality, partition_key, "
        "status, or one that your table carries); may be given several times."
    ),
)
@click.option("--since", type=click.DateTime(["%Y-%m-%d"]), help="From this UTC day on.")
@click.option("--month", metavar="YYYY-MM", help="Only this UTC month.")
@click.option(
    "--sql",
    metavar="QUERY",
    help="Answer one SELECT over the views ledger, daily, failures, manifest and prompts.",
)
@click.option("--json", "as_json", is_flag=True, help="Print figures as JSON on stdout.")
@click.option("--csv", "as_csv", is_flag=True, help="Print figures as CSV on stdout.")
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the report: one page with charts, tables and warnings, no network needed.",
)
def spend_command(
    by: Sequence[str],
    since: datetime | None,
    month: str | None,
    sql: str | None,
    *,
    as_json: bool,
    as_csv: bool,
    html: Path | None,
) -> None:
    """Say where the credits went: today, this month and in all, or by any column.

    Brings the tables under spend/ of the storage root up to the journal first. Buys nothing, and
    needs no network.
    """
    from krea_dagster import terminal  # noqa: PLC0415 - --help stays quick
    from krea_dagster.application.spend import answer_of, report_of, spend_of  # noqa: PLC0415
    from krea_dagster.plugin.environment import Settings  # noqa: PLC0415

    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other")
    if sql is not None and (by or since or month):
        raise click.UsageError("--sql asks for itself: leave --by, --since and --month out")
    if since is not None and month is not None:
        raise click.UsageError("--since and --month exclude each other")
    if html is not None and (as_json or as_csv or since or month or sql):
        raise click.UsageError("--html writes the whole report: give it with --by alone")
    settings = Settings.from_environment()
    if html is not None:
        terminal.show_report(html, report_of(settings.resource(), html, by=by))
        return
    if sql is not None:
        answer = answer_of(settings.resource(), sql, settings.prompts)
        terminal.show_answer(answer, "json" if as_json else "csv" if as_csv else "table")
        return
    found = spend_of(
        settings.resource(), by, since=None if since is None else since.date(), month=month
    )
    if as_json:
        terminal.show_json(terminal.spend_figures(found))
    elif as_csv:
        terminal.show_csv(found)
    else:
        terminal.show_spend(found)


@main.command("verify", epilog=_EPILOG)
@click.option(
    "--no-files", is_flag=True, help="Compare only the size of the files, not their hash."
)
@click.option("--json", "as_json", is_flag=True, help="Print figures as JSON on stdout.")
def verify_command(*, no_files: bool, as_json: bool) -> None:
    """Prove that every credit is accounted for; exit with 1 where something does not add up.

    Holds against each other: every charge in the journal, its task, its file (read again, and
    hashed), its manifest row, the events, the sums under the caps, and what the account said it
    used. Changes nothing, and needs no network.
    """
    from krea_dagster import terminal  # noqa: PLC0415 - --help stays quick
    from krea_dagster.plugin.checks.spend_proof import prove  # noqa: PLC0415
    from krea_dagster.plugin.environment import Settings  # noqa: PLC0415

    with terminal.proof_progress() as on_progress:
        proof = prove(
            Settings.from_environment().resource(),
            hash_bytes=0 if no_files else None,
            on_progress=on_progress,
        )
    if as_json:
        terminal.show_json(terminal.proof_figures(proof))
    else:
        terminal.show_proof(proof)
    sys.exit(DONE if proof.adds_up else NOT_DELIVERED)


def _decisions(texts: Sequence[str]) -> dict[str, str]:
    decisions: dict[str, str] = {}
    for text in texts:
        row, equals, decision = text.rpartition("=")
        if not equals:
            raise click.BadParameter(f"{text!r} is not ROW=DECISION", param_hint="--resolve")
        decisions[row] = decision
    return decisions


def _materialize(
    settings: Settings,
    partitions: Sequence[str],
    wishes: KreaImagesConfig | None,
    *,
    as_json: bool,
) -> Materialized:
    from krea_dagster import terminal  # noqa: PLC0415 - --help stays quick
    from krea_dagster.plugin.materialize import materialize  # noqa: PLC0415

    if settings.synthetic:
        terminal.say_synthetic()
    with terminal.progress_bar() as on_progress:
        done = materialize(settings, partitions, wishes, on_progress=on_progress)
    if as_json:
        terminal.show_json(
            terminal.materialized_figures(done, where=redact.location(settings.storage))
        )
    else:
        terminal.show_materialized(done, where=redact.location(settings.storage), ui=_ui_line(done))
    for failure in done.failures:
        terminal.say_error(failure)
    return done


def _ui_line(done: Materialized) -> str:
    """The one line that opens Dagster's UI on what was just made."""
    dagster = Path(sys.executable).with_name("dagster")
    home, command = shlex.quote(done.dagster_home), shlex.quote(os.path.relpath(dagster))
    return f"DAGSTER_HOME={home} {command} dev -f definitions.py"


def _exit_code(done: Materialized, missing: int) -> int:
    if done.try_later:
        return TRY_LATER
    if done.stopped is not None:
        return STOPPED
    return NOT_DELIVERED if missing or done.failures else DONE


def _code_of(error: KreaError) -> int:
    if isinstance(error, JournalUnavailable | StorageUnavailable):
        return TRY_LATER
    return WRONG_USE if isinstance(error, InputError) else NOT_DELIVERED


def run() -> None:
    """Run the command; errors of ours become one message and an exit code."""
    places = [os.environ.get(name, "") for name in _PLACES]
    try:
        main()
    except KreaError as error:
        from krea_dagster.terminal import say_error  # noqa: PLC0415 - as above

        say_error(redact.text(str(error), *places))
        sys.exit(_code_of(error))
    except Exception as error:
        if redact.safe_cause(error, *places) is not None:
            raise
        # Nobody foresaw it, and its traceback would show a credential.
        sys.stderr.write(redact.text("".join(traceback.format_exception(error)), *places))
        sys.exit(NOT_DELIVERED)


if __name__ == "__main__":
    run()
