"""A command imports what it needs, so that a short one starts in half a second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from krea_dagster import Krea, Settings
from krea_dagster.prompts import PromptTable, parse_partition_by

#: What buying, showing and Dagster need.
NOT_NEEDED = {
    "PIL",
    "aiohttp",
    "alembic",
    "anyio",
    "dagster",
    "fsspec",
    "httpx",
    "jinja2",
    "pandas",
    "simplejpeg",
    "starlette",
    "svg",
    "uvicorn",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two images were bought."""
    folder = tmp_path_factory.mktemp("project")
    prompts = folder / "prompts.parquet"
    pq.write_table(pa.table({"prompt_id": ["a", "b"], "prompt": ["a boat", "a bird"]}), prompts)
    krea = Krea(Settings(emulator=True, prompts=str(prompts), storage=str(folder / "krea")))
    krea.run(PromptTable(str(prompts), parse_partition_by("hash:1")))
    return folder


def imported_by(project: Path, *arguments: str) -> tuple[str, set[str]]:
    """Run a command in a fresh process; returns its stdout, and the packages that it imported."""
    code = (
        "import sys\n"
        "from krea_dagster.cli import run\n"
        "try:\n"
        "    run()\n"
        "finally:\n"
        "    sys.stderr.write('\\n' + ' '.join(name for name in sys.modules if '.' not in name))"
    )
    environ = {
        **os.environ,
        "KREA_PROMPTS": str(project / "prompts.parquet"),
        "KREA_STORAGE": str(project / "krea"),
        "KREA_PARTITION_BY": "hash:1",
    }
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, set(ran.stderr.rpartition("\n")[2].split())


def figures(project: Path, *arguments: str) -> Any:
    return json.loads(imported_by(project, *arguments, "--json")[0])


@pytest.mark.parametrize("command", ["quote", "spend", "verify"])
def test_a_command_that_buys_nothing_imports_no_dagster_client_decoder_or_pandas(
    project: Path, command: str
) -> None:
    out, names = imported_by(project, command)
    assert out
    assert names & NOT_NEEDED == set()
    assert "sqlalchemy" in names


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_no_tables_and_no_journal(project: Path, option: str) -> None:
    _, names = imported_by(project, option)
    assert names & (NOT_NEEDED | {"pyarrow", "numpy", "sqlalchemy", "pydantic", "rich"}) == set()


def test_the_answer_to_a_query_keeps_its_nanoseconds(project: Path) -> None:
    """For which Arrow needs pandas, so that this command imports it."""
    query = "SELECT TIMESTAMP_NS '2026-01-01 00:00:00.000000001' AS at"
    assert figures(project, "spend", "--sql", query) == [{"at": "2026-01-01T00:00:00.000000001"}]


def test_a_table_partitioned_by_nanoseconds_is_quoted_without_pandas(
    project: Path, tmp_path: Path
) -> None:
    at = pa.array([1_767_225_600_000_000_001, 1_767_312_000_000_000_002], pa.timestamp("ns"))
    table = pa.table({"prompt_id": ["c", "d"], "prompt": ["a cat", "a dog"], "at": at})
    pq.write_table(table, tmp_path / "prompts.parquet")
    options = ["--prompts", str(tmp_path / "prompts.parquet"), "--partition-by", "day:at"]
    quoted = figures(project, "quote", *options)
    assert [line["partition"] for line in quoted["partitions"]] == ["2026-01-01", "2026-01-02"]


# -- completion by the tab key ------------------------------------------------------------------


def completed(*words: str) -> tuple[set[str], set[str]]:
    """What bash is offered for the last of these words, and the imported packages."""
    variables = {
        "_KREA_DAGSTER_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(("krea-dagster", *words)),
        "COMP_CWORD": str(len(words)),
    }
    code = (
        "import sys\n"
        "sys.argv = ['krea-dagster']\n"
        "from krea_dagster.cli import run\n"
        "try:\n"
        "    run()\n"
        "finally:\n"
        "    print(*(name for name in sys.modules if '.' not in name), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )
    return {line.split(",")[1] for line in done.stdout.splitlines()}, set(done.stderr.split())


def test_the_tab_key_completes_commands_without_importing_them() -> None:
    offered, imported = completed("s")
    assert offered == {"salvage", "spend"}
    assert not imported & (NOT_NEEDED | {"pyarrow", "duckdb"})


def test_the_tab_key_completes_options() -> None:
    assert completed("spend", "--m")[0] == {"--month"}


def test_the_line_in_the_help_turns_completion_on_in_bash() -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = (
        """line=$(krea-dagster --help | grep -o 'eval .*') && eval "$line" """
        "&& complete -p krea-dagster"
    )
    done = subprocess.run(
        ["/bin/bash", "--norc", "-c", script],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("complete -o nosort -F _krea_dagster_completion"), done.stderr
