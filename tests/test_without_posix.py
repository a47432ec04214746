"""What works where the modules and functions of POSIX are missing, as on Windows.

The systems differ in more than that: this shows that the package can be imported, says what it
offers, and refuses to buy.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

#: Imports all once, for what other packages need of POSIX here, and again without it.
SCRIPT = """
import importlib, os, pkgutil, signal, sys
import krea_dagster

def import_all():
    names = [found.name for found in pkgutil.walk_packages(krea_dagster.__path__, "krea_dagster.")]
    for name in names:
        # A program, the migrations, which alembic runs, and what the drill's processes do.
        if not name.endswith("__main__") and ".migrations." not in name and ".drill." not in name:
            importlib.import_module(name)
    return names

import_all()
for name in [name for name in sys.modules if name.split(".")[0] == "krea_dagster"]:
    del sys.modules[name]
for name in ("fcntl", "pwd", "grp", "resource", "termios", "tty", "pty", "syslog"):
    sys.modules[name] = None
for name in ("fork", "register_at_fork", "getuid", "geteuid", "killpg", "setsid", "sync", "fchmod"):
    delattr(os, name)
for name in ("SIGKILL", "SIGCHLD", "SIGHUP", "SIGUSR1"):
    delattr(signal, name)

import krea_dagster
print(len(import_all()), "modules")

import dagster as dg
from krea_dagster.definitions import defs
dg.Definitions.validate_loadable(defs)
print("definitions")

from click.testing import CliRunner
from krea_dagster.cli import main
for command in ((), *((name,) for name in main.list_commands(None))):
    shown = CliRunner().invoke(main, [*command, "--help"])
    assert shown.exit_code == 0, (command, shown.output)
print("help")

from krea_dagster import Krea, Settings
from krea_dagster.errors import ConfigError
try:
    Krea(Settings(prompts="prompts.csv", storage="krea", emulator=True)).run()
except ConfigError as error:
    print(error)
"""


def test_all_is_imported_the_definitions_load_and_a_purchase_is_refused(tmp_path: Path) -> None:
    tmp_path.joinpath("prompts.csv").write_text("prompt\na heron in reeds\n")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    modules, *rest, refused = done.stdout.splitlines()
    assert modules.endswith(" modules")
    assert rest == ["definitions", "help"]
    assert "Linux and macOS" in refused
    assert refused.endswith("Nothing was bought.")
    assert not any(tmp_path.joinpath("krea", "images").rglob("*"))
