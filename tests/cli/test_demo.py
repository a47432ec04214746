"""The command demo in a folder that is empty, as after ``pip install krea-dagster``."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "data"


@dataclass(frozen=True)
class Terminal:
    """A shell in a folder, with none of this project's variables."""

    folder: Path
    variables: dict[str, str]

    def run(self, command: str, **more: str) -> tuple[str, str]:
        """Return what a command printed on stdout and stderr. It must end with 0."""
        done = subprocess.run(
            ["/bin/bash", "-c", command],
            cwd=self.folder,
            env={**self.variables, **more},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, done.stderr


@pytest.fixture
def terminal(tmp_path: Path) -> Terminal:
    folder = tmp_path / "an empty folder"
    folder.mkdir()
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("KREA_", "EVOLINK_", "DAGSTER_"))
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return Terminal(folder, {**kept, "PATH": path})


def commands_in(out: str) -> dict[str, str]:
    """The commands that are printed last, by their names."""
    return dict(re.findall(r"^(Dagster UI|review|gallery) +(.+)$", out, flags=re.MULTILINE))


def test_the_sample_in_the_package_is_the_one_in_the_repository() -> None:
    packaged = DATA.parent / "krea_dagster" / "cli" / "sample_prompts.parquet"
    assert packaged.read_bytes() == (DATA / "prompts.parquet").read_bytes()


def test_in_an_empty_folder_the_demo_brings_its_table_and_its_commands_work_there(
    terminal: Terminal,
) -> None:
    out, err = terminal.run("krea-dagster demo")
    assert re.search(r"^delivered +66 *$", out, flags=re.MULTILINE)
    assert "data/prompts.parquet: it is now a sample of 60 prompts" in err
    commands = commands_in(out)
    assert commands == {
        "Dagster UI": (
            f"DAGSTER_HOME={shlex.quote(str(terminal.folder / 'data' / 'krea' / 'dagster'))} "
            "dagster dev -m krea_dagster.definitions"
        ),
        "review": "krea-dagster review",
        "gallery": "krea-dagster gallery",
    }
    terminal.run(commands["gallery"])
    assert terminal.folder.joinpath("gallery.html").stat().st_size > 10_000
    # Does what `dagster dev` does at its start.
    terminal.run(commands["Dagster UI"].replace(" dev ", " definitions validate "))
    again, err = terminal.run("krea-dagster demo")
    assert "Nothing was bought" in again
    assert "it is now a sample" not in err


def test_the_commands_repeat_the_options_and_leave_the_key_out(terminal: Terminal) -> None:
    table = terminal.folder / "my prompts.csv"
    table.write_text("prompt\na heron in reeds\n")
    out, _ = terminal.run(
        "krea-dagster demo --prompts 'my prompts.csv' --storage made --partition-by hash:1",
        EVOLINK_API_KEY="a-real-key",
    )
    assert not terminal.folder.joinpath("data").exists()
    commands = commands_in(out)
    options = "KREA_PROMPTS='my prompts.csv' KREA_STORAGE=made KREA_PARTITION_BY=hash:1"
    assert commands["review"] == f"{options} krea-dagster review"
    home = shlex.quote(str(terminal.folder / "made" / "dagster"))
    assert commands["Dagster UI"] == (
        f"DAGSTER_HOME={home} {options} EVOLINK_API_KEY= dagster dev -m krea_dagster.definitions"
    )


def test_a_folder_with_definitions_of_its_own_opens_these(terminal: Terminal) -> None:
    terminal.folder.joinpath("definitions.py").write_text("import dagster as dg\n")
    terminal.folder.joinpath("prompts.csv").write_text("prompt\na heron in reeds\n")
    out, _ = terminal.run("krea-dagster demo --prompts prompts.csv --partition-by hash:1")
    assert commands_in(out)["Dagster UI"].endswith(" dagster dev -f definitions.py")
