"""The commands ``materialize``, ``demo`` and ``salvage``: runs of Dagster jobs in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from krea_dagster import redact
from krea_dagster.application.settings import Settings
from krea_dagster.cli.exit_codes import DONE, NOT_DELIVERED, STOPPED, TRY_LATER
from krea_dagster.cli.garbage import importing
from krea_dagster.cli.options import (
    buying_options,
    json_option,
    partition_option,
    project_options,
    trial_options,
)
from krea_dagster.cli.terminal import err, run_shown, say_error, say_synthetic, show_json

if TYPE_CHECKING:
    from krea_dagster.application.buy_options import BuyOptions
    from krea_dagster.plugin.materialize import Materialized

#: The demo's base URL: no request is sent to it.
_NO_ADDRESS: Final = "https://emulator.invalid"

#: The file in this folder that is a copy of the repository's data/prompts.parquet.
SAMPLE: Final = "sample_prompts.parquet"


@click.command("materialize")
@buying_options
@partition_option
@trial_options
@click.option(
    "--again",
    multiple=True,
    metavar="ROWS",
    help=(
        "Buy another image of a row: its attempt is raised, the old image stays. ROWS is a "
        "prompt_id, @FILE (one prompt_id per line), error:CODE (rows that failed with it), "
        "rejected (rows whose image was rejected in the review), or pruned (rows whose image was "
        "pruned). If the run is killed, the same "
        "command continues it and buys no second image."
    ),
)
@click.option(
    "--new-seed",
    is_flag=True,
    help="With --again: draw a seed for rows whose seed the table fixes; else they are refused.",
)
@click.option(
    "--retry",
    "retry_errors",
    multiple=True,
    metavar="ERROR_CODE",
    help="Buy rows again that failed or were refused with this error code.",
)
@click.option(
    "--resolve",
    "decisions",
    multiple=True,
    metavar="ROW=DECISION",
    help=(
        "Decide about a purchase with an unknown outcome. ROW is a prompt_id or request_key; "
        "DECISION is replay (send it again under the same key), not-charged (buy it again), lost, "
        "or task:ID (it was charged, and this is its task)."
    ),
)
@json_option
def materialize_command(
    partitions: Sequence[str],
    again: Sequence[str],
    retry_errors: Sequence[str],
    decisions: Sequence[str],
    *,
    limit: int | None,
    sample: int | None,
    new_seed: bool,
    as_json: bool,
) -> None:
    """Buy the missing images of the prompt table, and write the manifest.

    Runs the Dagster job krea_images in this process, with its events in DAGSTER_HOME, or by
    default in dagster/ of the storage root. Repeat it at any time: what is stored is not bought
    again, and what was interrupted is continued. Partitions with nothing to do are left out,
    unless --partition names them.
    """
    from krea_dagster.application.buy_options import BuyOptions, with_files

    options = BuyOptions(
        limit=limit,
        sample=sample,
        regenerate=with_files(again),
        new_seed=new_seed,
        retry_errors=list(retry_errors),
        resolve=_decisions(decisions),
        wait=True,
    )
    done = _materialize(Settings.from_environment(), partitions, options, as_json=as_json)
    sys.exit(_exit_code(done, done.progress.failed + done.progress.left))


@click.command("demo")
@project_options
@json_option
def demo_command(*, as_json: bool) -> None:
    """Try materialize with the emulator: no key, no cost, synthetic images.

    Materializes every partition of the prompt table. In a folder without one it first writes a
    sample, data/prompts.parquet. Never uses EVOLINK_API_KEY. Rows whose prompt asks the emulator
    for a failure are meant to fail.
    """
    if not os.environ.get("KREA_PROMPTS"):
        _write_sample(Path(Settings.model_fields["prompts"].default))
    settings = Settings.from_environment().model_copy(
        update={"api_key": "", "emulator": True, "base_url": _NO_ADDRESS}
    )
    done = _materialize(settings, (), None, as_json=as_json, demo=True)
    meant = sum("[emulator:" in prompt for prompt in done.missing["prompt"].to_pylist())
    sys.exit(_exit_code(done, done.missing.num_rows - meant))


@click.command("salvage")
@buying_options
@json_option
def salvage_command(*, as_json: bool) -> None:
    """Collect what is paid for and not stored; buys nothing.

    Polls the tasks that earlier runs left behind and fetches their images, the most urgent link
    first: links expire after 24 hours. What was given up as lost is polled once more. Runs the
    Dagster job krea_salvage in this process.
    """
    with importing():
        from krea_dagster.cli.show_runs import show_salvaged, unknown_figures
        from krea_dagster.plugin.materialize import salvage

    with run_shown() as listener:
        done = salvage(Settings.from_environment(), listener=listener)
    if as_json:
        unknown = unknown_figures(done.unknown)
        show_json({**done.figures, "run_id": done.run_id, "unknown": unknown})
    else:
        show_salvaged(done)
    for failure in done.failures:
        say_error(failure)
    waiting = done.figures.get("still_waiting", 0) + done.figures.get("lost", 0)
    sys.exit(NOT_DELIVERED if waiting or done.failures else DONE)


def _decisions(texts: Sequence[str]) -> dict[str, str]:
    decisions: dict[str, str] = {}
    for text in texts:
        row, equals, decision = text.rpartition("=")
        if not equals:
            raise click.BadParameter(f"{text!r} is not ROW=DECISION", param_hint="--resolve")
        decisions[row] = decision
    return decisions


def _write_sample(path: Path) -> None:
    """Write the sample table, unless there is a table."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(resources.files("krea_dagster.cli").joinpath(SAMPLE).read_bytes())
        err.print(f"There was no {path}: it is now a sample of 60 prompts.")


def _materialize(
    settings: Settings,
    partitions: Sequence[str],
    options: BuyOptions | None,
    *,
    as_json: bool,
    demo: bool = False,
) -> Materialized:
    with importing():
        from krea_dagster.cli.next_steps import dagster_ui, own_command, ui_is_installed
        from krea_dagster.cli.show_runs import materialized_figures, show_materialized
        from krea_dagster.plugin.materialize import materialize

    if settings.synthetic:
        say_synthetic(settings)
    with run_shown() as listener:
        done = materialize(settings, partitions, options, listener=listener)
    where = redact.location(settings.storage)
    if as_json:
        show_json(materialized_figures(done, where=where))
    else:
        commands = {"Dagster UI": dagster_ui(done.dagster_home, without_key=demo)}
        if demo:
            commands["review"] = own_command("review")
            commands["gallery"] = own_command("gallery")
        show_materialized(done, where=where, commands=commands)
        if not ui_is_installed():
            err.print("Dagster's UI is an extra: pip install 'krea-dagster[ui]'", markup=False)
    for failure in done.failures:
        say_error(failure)
    return done


def _exit_code(done: Materialized, missing: int) -> int:
    if done.try_later:
        return TRY_LATER
    if done.stopped is not None:
        return STOPPED
    return NOT_DELIVERED if missing or done.failures else DONE
