"""The command group, which imports a subcommand when it is used, and the error handling."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from typing import Final, NoReturn

import click
from click.shell_completion import CompletionItem

from krea_dagster import redact
from krea_dagster.cli.exit_codes import NOT_DELIVERED, code_of
from krea_dagster.cli.garbage import collect_seldom
from krea_dagster.errors import KreaError

#: Options and variables whose URLs may contain credentials.
_PLACES: Final = {
    "--prompts": "KREA_PROMPTS",
    "--storage": "KREA_STORAGE",
    "--journal": "KREA_JOURNAL_URL",
    "--base-url": "EVOLINK_BASE_URL",
}

#: The subcommands: where each is, and its line in the group's help.
_COMMANDS: Final = {
    "account": ("cli.account:account_group", "Enter refunds and bought credits, or list them."),
    "accept": ("cli.accept:accept_group", "Accept what a run stopped for: a root, a key, a price."),
    "callbacks": ("callbacks.command:callbacks_command", "Receive EvoLink's callbacks."),
    "close": ("cli.close:close_command", "Close a month: write its statement, which stays."),
    "curate": ("cli.curate:curate_command", "Measure images, find duplicates, accept images."),
    "demo": ("cli.materialize:demo_command", "Try materialize with the emulator: no key, no cost."),
    "drill": ("drill.command:drill_command", "Kill workers while they buy, and check the result."),
    "emulator": ("emulator.command:emulator_command", "Run EvoLink's API on this machine."),
    "export": ("cli.export:export_command", "Export images as a dataset."),
    "gallery": ("cli.gallery:gallery_command", "Write an HTML page of images."),
    "materialize": ("cli.materialize:materialize_command", "Buy the missing images."),
    "prune": ("cli.prune:prune_command", "Remove old events from the journal."),
    "quote": ("cli.quote:quote_command", "Say what materialize would buy, and for how much."),
    "review": ("cli.review:review_command", "Keep, reject or flag images."),
    "salvage": ("cli.materialize:salvage_command", "Collect what is paid for; buy nothing."),
    "spend": ("cli.spend:spend_command", "Say where the credits went."),
    "verdicts": ("cli.verdicts:verdicts_group", "Write verdicts to a file, or read them."),
    "verify": ("cli.verify:verify_command", "Prove that every credit is accounted for."),
}

_EPILOG: Final = """
The API key is read from EVOLINK_API_KEY; without it an emulator makes synthetic images. Every
option with an environment variable takes its default from there, as definitions.py does.

\b
Completion by the tab key, in bash (zsh: zsh_source, fish: fish_source):
eval "$(_KREA_DAGSTER_COMPLETE=bash_source krea-dagster)"

\b
Exit codes: 0 done, 1 rows not delivered or accounts that do not agree,
2 wrong use or bad input, 3 the account or the key stops everything,
75 something was unavailable for too long: run again later.
"""


class _LazyGroup(click.Group):
    """A group that imports a subcommand when it is used, and lists all without an import."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, _ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[name][0].partition(":")
        command: click.Command = getattr(import_module(f"krea_dagster.{module}"), attribute)
        return command

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete a subcommand without importing all of them, which takes seconds."""
        named = [
            CompletionItem(name, help=line)
            for name, (_, line) in _COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return [*named, *click.Command.shell_complete(self, ctx, incomplete)]


@click.group(
    cls=_LazyGroup, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(package_name="krea-dagster")
def main() -> None:
    """Krea 2 Turbo images as Dagster assets: each bought once, verified, and accounted for."""


def run() -> None:
    """Run the command; the package's errors become one message and an exit code."""
    collect_seldom()
    places = [os.environ.get(name, "") for name in _PLACES.values()]
    # An option's value is the word after it, or what follows its "=".
    words = [word for text in sys.argv for word in text.split("=", text[:2] == "--") if word]
    places += [value for option, value in pairwise(words) if option in _PLACES]
    try:
        main()
    except KreaError as error:
        _say_and_exit(error, places)
    except Exception as error:
        from krea_dagster.file_systems import error_of_client

        if (said := error_of_client(error)) is not None:
            _say_and_exit(said, places)
        if redact.safe_cause(error, *places) is not None:
            raise
        # An unexpected error whose traceback would show a credential.
        sys.stderr.write(redact.text("".join(traceback.format_exception(error)), *places))
        sys.exit(NOT_DELIVERED)


def _say_and_exit(error: KreaError, places: Sequence[str]) -> NoReturn:
    from krea_dagster.cli.terminal import say_error

    say_error(redact.text(str(error), *places))
    sys.exit(code_of(error))
