"""The command that runs the receiver of callbacks in the foreground."""

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
  KREA_CALLBACK_SECRET  the secret of the addresses, the same as for the runs
  KREA_STORAGE          root of what is made  [data/krea]
  KREA_JOURNAL_URL      SQLAlchemy URL        [SQLite in the storage root]

\b
Addresses are BASE/<deployment>/<request>.<proof>, and BASE/health answers a
load balancer. Behind a reverse proxy name its address with --trust-proxy, or
all callers count as one client. Do not let the proxy log paths: whoever has
read one may send hints about that image, though nothing more.
"""


@click.group("callbacks")
def callbacks_command() -> None:
    """Take EvoLink's callbacks, so that finished images announce themselves."""


@callbacks_command.command("serve", epilog=_EPILOG)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    default=8766,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="Port to listen on; 0 takes any that is free.",
)
@click.option(
    "--storage",
    envvar="KREA_STORAGE",
    default="data/krea",
    show_default=True,
    help="The storage root whose journal is written.",
)
@click.option(
    "--journal",
    "journal_url",
    envvar="KREA_JOURNAL_URL",
    default="",
    metavar="URL",
    help="The journal, where it is not in the storage root.",
)
@click.option(
    "--secret-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help=f"File that holds the secret.  [default: the variable {_SECRET_VARIABLE}]",
)
@click.option(
    "--tls-cert",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Certificate chain (PEM), where no proxy has TLS.",
)
@click.option(
    "--tls-key",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Its private key (PEM).",
)
@click.option(
    "--trust-proxy",
    multiple=True,
    metavar="ADDRESS",
    help="Believe X-Forwarded-For of this proxy; may be repeated.",
)
@click.option(
    "--rate",
    default=1000.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Calls a second that one client may make.",
)
@click.option(
    "--burst",
    default=5000.0,
    show_default=True,
    type=click.FloatRange(min=1),
    help="Calls that one client may make at once.",
)
@click.option(
    "--connections",
    default=1000,
    show_default=True,
    type=click.IntRange(1),
    help="Connections that one client may hold; a trusted proxy may hold any number.",
)
@click.option(
    "--header-timeout",
    "header_timeout_s",
    default=10.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="How long a client may take to send a request's headers.",
)
def serve_command(
    *,
    host: str,
    port: int,
    storage: str,
    journal_url: str,
    secret_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    trust_proxy: tuple[str, ...],
    rate: float,
    burst: float,
    connections: int,
    header_timeout_s: float,
) -> None:
    """Take callbacks and remember which images are worth asking about.

    A call is a hint: the next run, or the one at work, asks EvoLink about that one task. Nothing
    that a call claims is believed, and nothing is bought or changed by one. EvoLink calls HTTPS
    only: put a reverse proxy with TLS in front, or give --tls-cert and --tls-key. The address is
    printed on stdout.
    """
    from krea_dagster.callbacks.receiver import Receiver  # noqa: PLC0415 - keeps --help quick
    from krea_dagster.callbacks.server import TlsFiles, listen, serve  # noqa: PLC0415 - as above
    from krea_dagster.engine.journal.callback_log import CallbackLog  # noqa: PLC0415 - as above
    from krea_dagster.engine.journal.database import database_in, has_database  # noqa: PLC0415 - as above
    from krea_dagster.engine.storage.storage import Storage  # noqa: PLC0415 - as above

    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key are given together")
    secret = os.environ.get(_SECRET_VARIABLE, "")
    if secret_file is not None:
        secret = secret_file.read_text(encoding="utf-8").strip()
    url = journal_url or database_in(Storage(storage))
    if not has_database(url):
        raise ConfigError(
            "there is no journal yet, so no callback could belong to a purchase. Look whether "
            "KREA_STORAGE or KREA_JOURNAL_URL is what the runs have, or run `krea-dagster "
            "materialize` once, which makes it"
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
            request_within_s=header_timeout_s,
            on_ready=click.echo,
        )
