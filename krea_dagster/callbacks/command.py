"""The command that runs the callback receiver in the foreground."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import click

from krea_dagster.errors import ConfigError

_SECRET_VARIABLE = "KREA_CALLBACK_SECRET"  # noqa: S105 - the name of the variable

_EPILOG = """
\b
Environment:
  KREA_CALLBACK_SECRET  secret of the addresses, the same as for the runs
  KREA_STORAGE          storage root          [data/krea]
  KREA_JOURNAL_URL      SQLAlchemy URL        [SQLite in the storage root]

\b
Addresses are BASE/<deployment>/<request>.<proof>, and BASE/health is for a
load balancer. Behind a reverse proxy, set its address with --trust-proxy, or
all callers count as one client. The proxy should not log paths: a reader of a
path could send hints about that image, but nothing more.
"""


@click.group("callbacks")
def callbacks_command() -> None:
    """Receive EvoLink's callbacks, which announce finished images."""


@callbacks_command.command("serve", epilog=_EPILOG, context_settings={"show_default": True})
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option(
    "--port",
    default=8766,
    type=click.IntRange(0, 65535),
    help="Port to listen on; 0 takes a free one.",
)
@click.option(
    "--storage",
    envvar="KREA_STORAGE",
    default="data/krea",
    help="Storage root of the runs, with their journal.",
)
@click.option(
    "--journal",
    "journal_url",
    envvar="KREA_JOURNAL_URL",
    metavar="URL",
    help="URL of the journal if it is not in the storage root.",
)
@click.option(
    "--secret-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help=f"File with the secret.  [default: the variable {_SECRET_VARIABLE}]",
)
@click.option(
    "--tls-cert",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Certificate chain (PEM), to serve HTTPS without a proxy.",
)
@click.option(
    "--tls-key",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Private key (PEM) of the certificate.",
)
@click.option(
    "--trust-proxy",
    multiple=True,
    metavar="ADDRESS",
    help="Trust X-Forwarded-For of this proxy; may be repeated.",
)
@click.option(
    "--rate",
    default=1000.0,
    type=click.FloatRange(min=0, min_open=True),
    help="Most calls a second of one client.",
)
@click.option(
    "--burst",
    default=5000.0,
    type=click.FloatRange(min=1),
    help="Most calls at once of one client.",
)
@click.option(
    "--connections",
    default=1000,
    type=click.IntRange(1),
    help="Most connections of one client; a trusted proxy has no limit.",
)
@click.option(
    "--header-timeout",
    "header_timeout_s",
    default=10.0,
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Longest time for a client to send the headers of a request.",
)
def serve_command(
    *,
    host: str,
    port: int,
    storage: str,
    journal_url: str | None,
    secret_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    trust_proxy: tuple[str, ...],
    rate: float,
    burst: float,
    connections: int,
    header_timeout_s: float,
) -> None:
    """Receive callbacks and record which tasks should be read.

    A callback is a hint: the next run, or the current one, reads that one task from EvoLink. The
    content of a callback is not trusted, and it buys and changes nothing. EvoLink calls HTTPS
    only: use a reverse proxy with TLS, or --tls-cert and --tls-key. The address is printed on
    stdout.
    """
    from krea_dagster.callbacks.receiver import Receiver
    from krea_dagster.callbacks.server import TlsFiles, serve
    from krea_dagster.engine.journal.callback_log import CallbackLog
    from krea_dagster.engine.journal.database import database_in, has_database
    from krea_dagster.engine.storage.storage import Storage
    from krea_dagster.uvicorn_server import listen

    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key must be given together")
    secret = os.environ.get(_SECRET_VARIABLE, "")
    if secret_file is not None:
        secret = secret_file.read_text(encoding="utf-8").strip()
    url = journal_url or database_in(Storage(storage))
    if not has_database(url):
        raise ConfigError(
            "the journal does not exist yet, so no callback can belong to a purchase. Check that "
            "KREA_STORAGE or KREA_JOURNAL_URL is the one of the runs, or run `krea-dagster "
            "materialize` once, which creates the journal"
        )
    try:
        listener = listen(host, port)
    except OSError as error:
        raise click.UsageError(f"cannot listen on {host}:{port}: {error}") from None
    with listener, closing(CallbackLog.open(url)) as log:
        receiver = Receiver(secret, log.add, check=log.check, rate_per_s=rate, burst=burst)
        serve(
            receiver,
            listener,
            tls=None if tls_cert is None or tls_key is None else TlsFiles(tls_cert, tls_key),
            trusted_proxies=trust_proxy,
            client_connections=connections,
            header_timeout_s=header_timeout_s,
            on_ready=click.echo,
        )
