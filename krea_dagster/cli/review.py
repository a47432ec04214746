"""The command ``krea-dagster review``."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click

from krea_dagster.cli.options import login_name, open_krea, project_options
from krea_dagster.errors import ConfigError

_TOKEN_VARIABLE: Final = "KREA_REVIEW_TOKEN"  # noqa: S105 - the name of the variable

_EPILOG = f"""
Verdicts are in the journal when the page shows them as saved. If the server stops, the page keeps
unsaved verdicts: restart it with the same --port and token (--token-file or {_TOKEN_VARIABLE}), or
open the new address in the same browser.

Several people can review at the same time: each runs the command on their own machine with the
same --journal and --storage, or they open one server's page through a tunnel and enter their names.
"""


@click.command("review", epilog=_EPILOG)
@project_options
@click.option("--reviewer", metavar="NAME", help="The reviewer's name.  [default: the login name]")
@click.option(
    "--port",
    default=0,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="Port on 127.0.0.1; 0 uses a free one.",
)
@click.option(
    "--token-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help=f"File with the token.  [default: {_TOKEN_VARIABLE}, or a new token]",
)
@click.option(
    "--reason",
    "reasons",
    multiple=True,
    metavar="TEXT",
    help="A rejection reason, on the keys 1 to 9; repeatable.",
)
@click.option("--no-open", is_flag=True, help="Do not open a browser.")
def review_command(
    *,
    reviewer: str | None,
    port: int,
    token_file: Path | None,
    reasons: tuple[str, ...],
    no_open: bool,
) -> None:
    """Review images in a browser: keep, reject or flag them by keyboard.

    A verdict is written to the journal immediately, with the reviewer and the time. None is
    overwritten: the last one on an image counts. The printed address is secret: everyone on this
    machine who has it can give verdicts.
    """
    if len(reasons) > 9:
        raise click.UsageError("--reason can be given at most nine times, for the keys 1 to 9")

    with _redirect_page() as redirect:

        def ready(address: str, rows: int) -> None:
            click.echo(address)
            if not no_open and not webbrowser.open(redirect(address)):
                click.echo("Open this address in a browser on this machine.", err=True)
            click.echo(f"{rows:,} rows; press Ctrl+C to stop.", err=True)

        open_krea().review(
            reviewer=reviewer or login_name(),
            port=port,
            token=_token(token_file),
            reasons=reasons,
            on_ready=ready,
        )


@contextmanager
def _redirect_page() -> Iterator[Callable[[str], str]]:
    """Yield a function that writes a page which redirects to an address, and returns its file URL.

    The address holds the token, and every user of the machine can read a browser's command line;
    only this user can read the page.
    """
    with tempfile.TemporaryDirectory(prefix="krea-review-") as folder:  # of mode 0700

        def make(address: str) -> str:
            page = Path(folder, "review.html")
            page.write_text(
                '<!doctype html><meta charset="utf-8"><title>Review</title>'
                f'<meta http-equiv="refresh" content="0;url={address}">'
                f'<a href="{address}">The review</a>\n',
                encoding="utf-8",
            )
            return page.as_uri()

        yield make


def _token(file: Path | None) -> str:
    token = os.environ.get(_TOKEN_VARIABLE, "")
    if file is not None:
        token = file.read_text(encoding="utf-8").strip()
    if not token:
        return secrets.token_urlsafe(24)
    # It is part of an address, and the only protection from other users of this machine.
    if not re.fullmatch(r"[A-Za-z0-9_-]{16,200}", token):
        raise ConfigError(
            f"the token ({_TOKEN_VARIABLE} or --token-file) must have 16 to 200 letters, digits, "
            "- or _"
        )
    return token
