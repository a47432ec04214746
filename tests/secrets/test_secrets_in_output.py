"""Commands run with marked secrets, and no output or file may contain a mark.

The marks are in the key, the callbacks' secret, and the users, passwords and signatures of the
prompt table's, the storage's and the journal's URL. The server leaks the key wherever it can.
Then everything that a command has written is looked through, and no mark may be found.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow.parquet as pq
import pytest

from krea_dagster.emulator import Emulator
from tests.dagster_bench import write_table
from tests.secrets.echoing_server import echoing, forms_of

#: Is in every secret, and nowhere else.
MARK: Final = "c4n4ry"
KEY: Final = f"sk-{MARK}-Key-5f3a9C7e1B2d4F60"
SECRET: Final = f"{MARK}-callbacks-0123456789abcdef0123"

#: The mark, and what of it in base64 does not depend on the letters around it.
_MARKS: Final = re.compile(f"{MARK}|YzRuNHJ5|M0bjRye|jNG40cn".encode(), re.IGNORECASE)

COMMANDS: Final[Sequence[Sequence[str]]] = (
    ("quote",),
    ("materialize",),
    ("materialize", "--json"),
    ("accept", "root"),
    ("accept", "key"),
    ("salvage",),
    ("salvage", "--json"),
    ("spend",),
    ("spend", "--html", "spend.html"),
    ("spend", "--sql", "select * from ledger"),
    ("spend", "--sql", "select * from failures", "--json"),
    ("verify",),
    ("gallery", "--output", "gallery.html", "--status", "any"),
    ("export", "--format", "webdataset", "--all"),
    ("export", "--format", "jsonl", "--all", "--json"),
    ("review", "--help"),
    ("drill", "--help"),
    ("callbacks", "--help"),
)


@dataclass(frozen=True)
class CommandOutput:
    """The output of a process, and the folder that it wrote to."""

    folder: Path
    codes: Sequence[int]
    out: str
    err: str

    def found(self) -> list[str]:
        """Return the streams and files that contain a mark."""
        texts: dict[str, bytes] = {"stdout": self.out.encode(), "stderr": self.err.encode()}
        for path in self.folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                texts[str(path.relative_to(self.folder))] = path.read_bytes()
            if path.suffix == ".parquet":  # packed: its cells are read
                cells = str(pq.read_table(path).to_pylist()).encode()
                texts[f"cells of {path.relative_to(self.folder)}"] = cells
        assert texts
        return sorted(name for name, text in texts.items() if _MARKS.search(text))


def run_commands(
    folder: Path, commands: Sequence[Sequence[str]], variables: Mapping[str, str]
) -> CommandOutput:
    """Run commands with these variables in their own folder."""
    work = folder / "work"
    work.mkdir(parents=True)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.endswith("_PROXY")},
        "EVOLINK_API_KEY": KEY,
        "KREA_STORAGE": str(work / "krea"),
        "KREA_PARTITION_BY": "hash:1",
        "DAGSTER_HOME": str(folder / "home"),
        **variables,
    }
    (folder / "home").mkdir()
    (folder / "home" / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")
    done = subprocess.run(
        [sys.executable, "-m", "tests.secrets.run_commands"],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=False,
        cwd=work,
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return CommandOutput(folder, json.loads(done.stdout.splitlines()[-1]), done.stdout, done.stderr)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server that leaks the key and serves the prompt table.

    A new one for each test: with callbacks the same request has another body, and its
    Idempotency-Key would be one of an older purchase.
    """
    table = write_table(
        tmp_path / "table.parquet",
        {"prompt_id": list("abcd"), "prompt": ["plain", "[refuse]", "[link]", "[fail] alas"]},
    )
    with (
        Emulator(
            api_key=KEY, latency_s=0.02, latency_jitter=0.0, callbacks_to_private=True
        ) as emulator,
        echoing(emulator, Path(table)) as address,
    ):
        yield address


def test_successful_commands_show_no_secret(server: str, tmp_path: Path) -> None:
    house = run_commands(
        tmp_path / "house",
        COMMANDS,
        {
            "EVOLINK_BASE_URL": f"http://{server}",
            "KREA_PROMPTS": (
                f"http://me-{MARK}:{MARK}%2Fpw@{server}/table.parquet?X-Amz-Signature={MARK}&a=1"
            ),
            "KREA_JOURNAL_URL": f"sqlite:///{tmp_path}/house/work/journal.db?password={MARK}",
        },
    )
    print(house.out, house.err)
    # The commands are used correctly; two rows have no image, as intended.
    assert not {2, -1} & set(house.codes), house.err
    assert house.out.count("refused") > 1
    # The search finds what is there, and the key in every form in which it was leaked.
    assert all(_MARKS.search(form.encode()) for form in forms_of(KEY))
    assert (house.folder / "work" / "journal.db").exists()
    assert b"[fail] alas" in (house.folder / "work" / "journal.db").read_bytes()
    assert house.found() == []


FAILING: Final[Mapping[str, Mapping[str, str]]] = {
    "prompts-away": {
        "KREA_PROMPTS": f"http://me:{MARK}/pw@127.0.0.1:9/table.parquet?X-Amz-Signature={MARK}",
    },
    "storage-away": {"KREA_STORAGE": f"ftp://me-{MARK}:{MARK}@127.0.0.1:9/krea"},
    "journal-away": {
        "KREA_JOURNAL_URL": (
            f"postgresql+psycopg://{MARK}:{MARK}@127.0.0.1:9/krea?password={MARK}&connect_timeout=2"
        ),
    },
    "callbacks-away": {
        "KREA_CALLBACK_BASE_URL": "https://127.0.0.1:9",
        "KREA_CALLBACK_SECRET": SECRET,
    },
    "key-wrong": {"EVOLINK_API_KEY": f"sk-{MARK}-Wrong-9d8c7b6a5f4e"},
}
SOME: Final = [one for one in COMMANDS if "--json" not in one and "--help" not in one]


def test_failing_commands_show_no_secret_and_no_traceback(server: str, tmp_path: Path) -> None:
    usual = {
        "EVOLINK_BASE_URL": f"http://{server}",
        "KREA_PROMPTS": f"http://{server}/table.parquet",
    }
    with ThreadPoolExecutor(2) as threads:
        houses = dict(
            zip(
                FAILING,
                threads.map(
                    lambda name: run_commands(tmp_path / name, SOME, {**usual, **FAILING[name]}),
                    FAILING,
                ),
                strict=True,
            )
        )
    assert {name: found for name, house in houses.items() if (found := house.found())} == {}
    for name, house in houses.items():
        assert -1 not in house.codes, (name, house.err)
        assert "Traceback" not in house.err, house.err
