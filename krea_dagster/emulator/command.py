"""The command that runs the emulator in the foreground."""

from __future__ import annotations

import contextlib
import ssl
import tempfile
from pathlib import Path

import click

from krea_dagster.emulator import faults

_EPILOG = """
\b
NAME=VALUE: a VALUE with a decimal point or % is a rate (0.05, 5%), a whole
number is a count of the next requests. NAME=VALUE:ARG refines a fault:
  --fault drop_after_create=3      the next three create calls
  --fault fail=0.05:service_error  every twentieth task, with this code
  --fault 429=10%:2                Retry-After: 2
  --fault insufficient_quota_after=10.5   402 above 10.5 credits
  --fault callback_missing=10%     every tenth callback never comes
A prompt can request a fault: [emulator: refuse], [emulator: fail CODE],
[emulator: NAME], [emulator: NAME once].
"""


def _fault_options(
    _context: click.Context, _option: click.Parameter, values: tuple[str, ...]
) -> list[faults.FaultOption]:
    """Check each ``NAME=VALUE``."""
    try:
        return [faults.parse_fault_option(value) for value in values]
    except faults.UnknownFaultError as error:
        raise click.BadParameter(str(error)) from None


def _certificates(
    _context: click.Context, _option: click.Parameter, path: Path | None
) -> Path | None:
    """Check that a file contains certificates."""
    try:
        if path is not None:
            ssl.create_default_context(cafile=path)
    except OSError as error:  # ssl.SSLError is one
        raise click.BadParameter(f"{path} contains no certificates: {error}") from None
    return path


@click.command("emulator", epilog=_EPILOG, context_settings={"show_default": True})
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option(
    "--port",
    default=8765,
    type=click.IntRange(0, 65535),
    help="Port to listen on; 0 takes a free one.",
)
@click.option("--api-key", default="emulator", help="The key of the account.")
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder that keeps accounts and tasks across restarts. [default: a temporary one]",
)
@click.option(
    "--latency-s", default=1.0, type=click.FloatRange(min=0), help="Seconds that a task takes."
)
@click.option(
    "--latency-jitter",
    default=0.3,
    type=click.FloatRange(0, 1),
    help="Share by which the latency varies, up and down.",
)
@click.option(
    "--fault",
    "fault_options",
    multiple=True,
    metavar="NAME=VALUE",
    callback=_fault_options,
    help="Inject a fault; may be repeated. --list-faults shows the names.",
)
@click.option(
    "--credits",
    default=1000.0,
    type=click.FloatRange(min=0),
    help="Credits of a new account; an account in --state keeps its own.",
)
@click.option(
    "--other-key",
    "other_keys",
    multiple=True,
    metavar="KEY",
    help="The key of another account, with the same credits; may be repeated.",
)
@click.option(
    "--foreign-tasks",
    default="denied",
    type=click.Choice(["denied", "unknown"]),
    help="Response to a read of another account's task: 403, or 404 as for an unknown task.",
)
@click.option(
    "--max-concurrent",
    type=click.IntRange(min=1),
    help="Most unfinished tasks; above it the response is 429. [default: no limit]",
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    help="Most create calls a second; above it the response is 429. [default: no limit]",
)
@click.option(
    "--idempotency/--no-idempotency",
    default=True,
    help="Honour the Idempotency-Key; without it each repeat is bought again.",
)
@click.option("--batch/--no-batch", default=True, help="Serve POST /v1/tasks/batch.")
@click.option(
    "--callbacks-to-private",
    is_flag=True,
    help="Accept a callback_url at a private address, such as this machine.",
)
@click.option(
    "--callback-ca",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="PATH",
    callback=_certificates,
    help="Certificates (PEM) to trust for receivers of callbacks, in addition to the machine's.",
)
@click.option("--seed", default=0, help="Seed of all random draws.")
@click.option(
    "--until-unlocked",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Stop once this file has been without a shared flock for 2 s.",
)
@click.option(
    "--ready-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write {url, port, pid} as JSON here once connections are accepted.",
)
@click.option("--list-faults", is_flag=True, help="Print the faults and exit.")
def emulator_command(
    *,
    host: str,
    port: int,
    api_key: str,
    state: Path | None,
    latency_s: float,
    latency_jitter: float,
    fault_options: list[faults.FaultOption],
    credits: float,
    other_keys: tuple[str, ...],
    foreign_tasks: str,
    max_concurrent: int | None,
    rate: float | None,
    idempotency: bool,
    batch: bool,
    callbacks_to_private: bool,
    callback_ca: Path | None,
    seed: int,
    until_unlocked: Path | None,
    ready_file: Path | None,
    list_faults: bool,
) -> None:
    """Run EvoLink's API for krea-2-turbo on this machine.

    The images are synthetic and nothing is charged. A task with a callback_url is posted there
    over HTTPS when it ends, with retries after 1, 2 and 4 s until the response is 2xx. The
    address is printed on stdout.
    """
    from krea_dagster.emulator.foreground import serve
    from krea_dagster.emulator.server import Emulator
    from krea_dagster.emulator.state_file import StateInUseError

    if list_faults:
        for fault in faults.FAULTS.values():
            arg = f" (ARG: {fault.arg})" if fault.arg is not None else ""
            click.echo(f"{fault.name:24} {fault.kind:8} {fault.description}{arg}")
        return
    with contextlib.ExitStack() as stack:
        if state is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="krea-emulator-"))
            state = Path(folder)
        try:
            emulator = Emulator(
                api_key=api_key,
                credits=credits,
                other_accounts=dict.fromkeys(other_keys, credits),
                denies_foreign_tasks=foreign_tasks == "denied",
                state=state,
                host=host,
                port=port,
                seed=seed,
                latency_s=latency_s,
                latency_jitter=latency_jitter,
                max_concurrent=max_concurrent,
                rate=rate,
                idempotency=idempotency,
                batch=batch,
                callbacks_to_private=callbacks_to_private,
                callback_ca=callback_ca,
            )
        except StateInUseError as error:
            raise click.UsageError(str(error)) from None
        except OSError as error:
            raise click.UsageError(f"cannot listen on {host}:{port}: {error}") from None
        stack.callback(emulator.stop)
        for option in fault_options:
            emulator.world.apply(option)
        click.echo(
            "Emulator of EvoLink's API: the images are synthetic and nothing is charged. "
            f"State: {state}",
            err=True,
        )
        serve(
            emulator,
            until_unlocked=until_unlocked,
            ready_file=ready_file,
            on_ready=lambda running: click.echo(running.url),
        )
