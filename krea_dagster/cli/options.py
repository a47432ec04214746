"""Options for the settings, made of their definitions; each has its environment variable."""

from __future__ import annotations

import functools
import getpass
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from krea_dagster.application.settings import Settings, metavar_of, variable_of
from krea_dagster.cli.without_pandas import without_pandas

if TYPE_CHECKING:
    from krea_dagster.application.krea import Krea

_Command = TypeVar("_Command", bound=Callable[..., Any])

#: The settings that every command with a project takes.
PROJECT: Final = ("prompts", "storage", "journal_url", "partition_by", "prompt_columns")

#: Further settings of the commands that buy, or say what would be bought.
BUYING: Final = (
    "base_url",
    "max_in_flight",
    "run_credits",
    "day_credits",
    "budgets",
    "on_unknown",
    "callback_base_url",
)

_NAMES: Final = {"journal_url": "--journal"}


def open_krea(*, reads_values: bool = True) -> Krea:
    """Return the application with the settings of the command.

    A command that reads no values of a user's own columns needs no pandas, which Arrow needs for
    times in nanoseconds.
    """
    if not reads_values:
        click.get_current_context().with_resource(without_pandas())
    from krea_dagster.application.krea import Krea

    return Krea.from_environment()


def login_name() -> str:
    """Return the name of the person who uses the command."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "reviewer"


def project_options(command: _Command) -> _Command:
    """Add the options of ``PROJECT``."""
    return _with_options(command, PROJECT)


def buying_options(command: _Command) -> _Command:
    """Add the options of ``PROJECT`` and ``BUYING``."""
    return _with_options(command, (*PROJECT, *BUYING))


def prices_option(command: _Command) -> _Command:
    """Add the option of what a credit costs."""
    return _with_options(command, ("credit_prices",))


def _with_options(command: _Command, names: tuple[str, ...]) -> _Command:
    @functools.wraps(command)
    def with_settings(*args: Any, **values: Any) -> Any:
        given = {name: values.pop(name) for name in names}
        variables = {
            variable_of(Settings.model_fields[name]): text
            for name, text in given.items()
            if text is not None
        }
        with _environment(variables):
            return command(*args, **values)

    decorated: Any = with_settings
    for name in reversed(names):
        field = Settings.model_fields[name]
        default = ",".join(field.default) if isinstance(field.default, list) else field.default
        shown = f"  [default: {default}]" if default not in (None, "", []) else ""
        decorated = click.option(
            _NAMES.get(name, f"--{name.replace('_', '-')}"),
            name,
            envvar=variable_of(field),
            show_envvar=True,
            metavar=metavar_of(field),
            help=f"{field.description}{shown}",
        )(decorated)
    return decorated  # type: ignore[no-any-return]


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables while a command runs.

    An option becomes its variable, because the settings are read from there, and because Dagster
    shows the name of a variable where it would show the text of a string with a password.
    """
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, text in before.items():
            if text is None:
                del os.environ[name]
            else:
                os.environ[name] = text


def where_option(command: _Command) -> _Command:
    """Add ``--where``."""
    option = click.option(
        "--where",
        multiple=True,
        metavar="COLUMN=VALUE",
        help=(
            'Only rows with this value, or with >=, <=, >, < or != (quoted: "sharpness>=20"). '
            "Values of one column are alternatives, all else must hold together. Repeatable."
        ),
    )
    return option(command)


def earlier_option(command: _Command) -> _Command:
    """Add ``--earlier``."""
    option = click.option(
        "--earlier",
        is_flag=True,
        help="Also images of rows that were changed or removed, and of earlier attempts.",
    )
    return option(command)


def json_option(command: _Command) -> _Command:
    """Add ``--json``."""
    option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
    return option(command)


def trial_options(command: _Command) -> _Command:
    """Add ``--limit`` and ``--sample``."""
    for name, which in (
        ("--sample", "N rows from all over the table, the same ones each time"),
        ("--limit", "the first N rows"),
    ):
        command = click.option(
            name,
            type=click.IntRange(min=1),
            metavar="N",
            help=f"A trial: only {which}. Run again without it for the others.",
        )(command)
    return command


def partition_option(command: _Command) -> _Command:
    """Add ``--partition``."""
    option = click.option(
        "--partition",
        "partitions",
        multiple=True,
        metavar="KEY",
        help="Only this partition; may be repeated.  [default: all]",
    )
    return option(command)
