"""The commands that go on from a run, as a shell in the same folder takes them."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import click
from click.core import ParameterSource

from krea_dagster import redact


def dagster_ui(dagster_home: str, *, without_key: bool) -> str:
    """Return the command that opens Dagster's UI on the result."""
    project = Path("definitions.py").exists()
    location = "-f definitions.py" if project else "-m krea_dagster.definitions"
    variables = [f"DAGSTER_HOME={shlex.quote(dagster_home)}", *_variables(without_key=without_key)]
    return f"{' '.join(variables)} {_script('dagster')} dev {location}"


def ui_is_installed() -> bool:
    """Return whether ``dagster dev`` has its web server."""
    return find_spec("dagster_webserver") is not None


def own_command(arguments: str) -> str:
    """Return a command of ``krea-dagster`` with the same project."""
    return " ".join([*_variables(without_key=False), _script("krea-dagster"), arguments])


def _variables(*, without_key: bool) -> Sequence[str]:
    """Return the options of this command as variables; they end with it, the shell's own do not.

    ``without_key`` empties the API key, without which the code location has the emulator too.
    """
    context = click.get_current_context()
    variables = [
        f"{option.envvar}={shlex.quote(redact.location(str(context.params[option.name])))}"
        for option in context.command.params
        if option.envvar
        and option.name in context.params
        and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
    ]
    if without_key and os.environ.get("EVOLINK_API_KEY"):
        variables.append("EVOLINK_API_KEY=")
    return variables


def _script(name: str) -> str:
    """Return how this shell calls a command of this environment."""
    script = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if found is not None and Path(found).parent.resolve() == script.parent.resolve():
        return name
    return shlex.quote(min(os.path.relpath(script), str(script), key=len))
