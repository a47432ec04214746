"""The command krea-dagster: what it prints where, how it exits, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from krea_dagster import cli
from krea_dagster.application import emulator_process
from krea_dagster.emulator import Emulator
from tests.cli.shell import Shell
from tests.dagster_bench import posts

REPOSITORY = Path(__file__).parents[2]
REFUSE = "[emulator: refuse]"

#: The subcommands by name.
COMMANDS: dict[str, click.Command] = {
    name: cli.main.get_command(click.Context(cli.main), name) or cli.main
    for name in cli.main.list_commands(click.Context(cli.main))
}


# -- materialize ------------------------------------------------------------------------------


def test_all_delivered_is_exit_0_with_figures_on_stdout_and_progress_on_stderr(
    shell: Shell, emulator: Emulator
) -> None:
    shell.table(prompt=["a quay at dawn", "a quay at dusk"])
    # As a person runs it: another process, its two streams apart.
    command = [sys.executable, "-m", "krea_dagster.cli", "materialize", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=shell.folder)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert {name: figures[name] for name in ("asked", "delivered", "reused", "failed", "left")} == {
        "asked": 2,
        "delivered": 2,
        "reused": 0,
        "failed": 0,
        "left": 0,
    }
    assert figures["credits_charged"] == 0.9
    assert figures["failures"] == figures["not_delivered"] == []
    first, last = done.stderr.splitlines()[-2:]
    assert first == (
        "2 images in 2 partitions: 0 stored already, 2 to buy for at most 0.9 credits."
    )
    assert last.startswith("2 of 2 images ended: 2 delivered, 0 reused. 0.9 credits, ")

    # And again: nothing is bought, and it says so.
    before = posts(emulator)
    again = shell.run("materialize")
    assert again.code == 0
    assert "Nothing was bought: every image was already there." in again.out
    assert posts(emulator) == before


def test_rows_without_an_image_are_exit_1_and_are_named_with_their_reasons(shell: Shell) -> None:
    shell.table(prompt=[f"one {REFUSE}", f"two {REFUSE}"], prompt_id=["first", "second"])
    done = shell.run("materialize")
    assert done.code == 1
    (line,) = [line for line in done.out.splitlines() if "refused (content_policy" in line]
    assert line.startswith("  2 × ")
    assert "first" in line
    assert "second" in line


def test_only_the_partitions_that_are_named_are_materialized(shell: Shell) -> None:
    names = ["Still life", "Land & sea", "Land & sea"]
    shell.table(prompt=[f"{n} {REFUSE}" for n in range(3)], category=names)
    shell.patch.setenv("KREA_PARTITION_BY", "column:category")
    done = shell.run("materialize", "--partition", "Land & sea", "--json")
    figures = json.loads(done.out)
    assert (figures["partitions"], figures["asked"]) == (["Land & sea"], 2)
    (manifest,) = (shell.folder / "krea" / "manifest").iterdir()
    assert pq.read_table(manifest)["category"].unique().to_pylist() == ["Land & sea"]


def test_a_rejected_key_is_exit_3_with_the_sentence_and_without_the_key(shell: Shell) -> None:
    shell.table(prompt=["for a key that nobody knows"])
    shell.patch.setenv("EVOLINK_API_KEY", "sk-nobody-knows-this")
    done = shell.run("materialize", "--json")
    assert done.code == 3
    figures = json.loads(done.out)
    assert figures["stopped"].startswith("401 ")
    assert figures["left"] == 1
    assert "Buying stopped, EvoLink rejects the key" in done.err
    assert "sk-nobody-knows-this" not in done.out + done.err


# -- wrong use and bad input ------------------------------------------------------------------


def wrong_partition(shell: Shell) -> list[str]:
    return ["--partition", "bucket-999"]


def wrong_option(shell: Shell) -> list[str]:
    return ["--partitions", "bucket-000"]


def missing_table(shell: Shell) -> list[str]:
    (shell.folder / "prompts.parquet").unlink()
    return []


def bad_row(shell: Shell) -> list[str]:
    shell.table(prompt=["fine", "  "])
    return []


def bad_variable(shell: Shell) -> list[str]:
    shell.patch.setenv("KREA_MAX_IN_FLIGHT", "lots")
    return []


def bad_address(shell: Shell) -> list[str]:
    shell.patch.setenv("EVOLINK_BASE_URL", "evolink")
    return []


def bad_journal(shell: Shell) -> list[str]:
    shell.patch.setenv("KREA_JOURNAL_URL", "nonsense")
    return []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (wrong_partition, "bucket-999"),
        (wrong_option, "No such option"),
        (missing_table, "prompts.parquet does not exist"),
        (bad_row, "row 2: prompt is '  '"),
        (bad_variable, "KREA_MAX_IN_FLIGHT is 'lots'; use a whole number from 1 to 4096"),
        (bad_address, "EVOLINK_BASE_URL is 'evolink'"),
        (bad_journal, "the journal's URL cannot be read"),
    ],
)
def test_wrong_use_and_bad_input_are_exit_2_before_any_request(
    shell: Shell, emulator: Emulator, wrong: Callable[[Shell], list[str]], said: str
) -> None:
    shell.table(prompt=["never asked for"])
    before = posts(emulator)
    done = shell.run("materialize", *wrong(shell))
    assert done.code == 2
    assert said in done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    assert posts(emulator) == before
    assert not (shell.folder / "krea" / "manifest").exists()


def test_a_partition_that_a_column_does_not_have_is_exit_2_and_names_those_that_it_has(
    shell: Shell,
) -> None:
    shell.table(prompt=[f"x {REFUSE}"], topic=["Harbour"])
    shell.patch.setenv("KREA_PARTITION_BY", "column:topic")
    done = shell.run("materialize", "--partition", "Harbor")
    assert done.code == 2
    assert "unknown partition 'Harbor'; the partitions are Harbour" in done.err


def test_a_day_to_come_waits_and_is_said(shell: Shell) -> None:
    shell.table(prompt=[f"{n} {REFUSE}" for n in range(2)], day=["2026-01-31", "2999-12-31"])
    shell.patch.setenv("KREA_PARTITION_BY", "day:day")
    done = shell.run("materialize")
    assert "partition 2999-12-31 skipped: its date is in the future" in done.out
    files = (shell.folder / "krea" / "manifest").iterdir()
    assert [file.stem for file in files] == ["2026-01-31"]


def test_a_journal_of_an_emulators_pictures_refuses_to_buy_from_evolink(shell: Shell) -> None:
    shell.table(prompt=[f"bound {REFUSE}"])
    assert shell.run("materialize").code == 1
    shell.patch.delenv("EVOLINK_BASE_URL")  # with a key and no address: EvoLink itself
    done = shell.run("materialize")
    assert done.code == 2
    assert "holds images from an emulator, and this run would buy from api.evolink.ai" in done.err
    assert "Nothing was bought." in done.err


# -- what is printed --------------------------------------------------------------------------

#: Moves the cursor, clears the screen, sets the title, begins a sequence in one byte, turns text
#: around, and would be markup to the library that prints.
HOSTILE = "\x1b[2J\x1b]0;owned\x07 \x9b31m \u202etxt.exe [red]not red[/red] \r end"


@pytest.mark.parametrize("how", [[], ["--json"]])
def test_text_from_the_table_cannot_move_the_terminal(shell: Shell, how: list[str]) -> None:
    shell.table(prompt=[f"{HOSTILE} {REFUSE}"], prompt_id=[HOSTILE])
    done = shell.run("materialize", *how)
    assert done.code == 1
    for text in (done.out, done.err):
        controls = {
            character
            for character in text
            if unicodedata.category(character) in {"Cc", "Cf"} and character != "\n"
        }
        assert controls == set()
    assert "[red]not red[/red]" in done.out
    if how:
        (reason,) = json.loads(done.out)["not_delivered"]
        assert HOSTILE[:40] in reason["rows"]


def test_a_hostile_cell_in_an_error_about_the_table_is_shown_as_text(shell: Shell) -> None:
    shell.table(prompt=["fine"], prompt_id=[HOSTILE], size=[HOSTILE])
    done = shell.run("materialize")
    assert done.code == 2
    assert "\x1b" not in done.err
    assert "\x9b" not in done.err
    assert "size is '\\x1b[2J" in done.err


def test_the_line_that_opens_the_ui_can_be_pasted_whatever_the_folder_is_called(
    shell: Shell, dagster_home: Path, tmp_path: Path
) -> None:
    home = tmp_path / "my home; rm"
    home.mkdir()
    home.joinpath("dagster.yaml").write_text(dagster_home.joinpath("dagster.yaml").read_text())
    shell.patch.setenv("DAGSTER_HOME", str(home))
    shell.table(prompt=[f"quoted {REFUSE}"])
    (line,) = [line for line in shell.run("materialize").out.splitlines() if "Dagster UI" in line]
    variable = line.split("Dagster UI ", 1)[1].rsplit(" ", 4)[0]
    shown = ["bash", "-c", f'{variable} && printf %s "$DAGSTER_HOME"']
    assert subprocess.run(shown, capture_output=True, text=True, check=True).stdout == str(home)


# -- settings that no command takes -----------------------------------------------------------

_AMOUNTS = [
    "1_000",
    "1e3",
    "1e25",
    "1e400",
    "inf",
    "nan",
    "-0",
    "+5",
    " 5 ",
    "١٢",
    "0.00001",
    "1" * 11,
]


@pytest.mark.parametrize("amount", _AMOUNTS)
@pytest.mark.parametrize("name", ["KREA_RUN_CREDITS", "KREA_DAY_CREDITS", "KREA_BUDGETS"])
def test_a_cap_that_is_none_is_exit_2_with_the_variable_and_the_rule(
    shell: Shell, name: str, amount: str
) -> None:
    if name == "KREA_BUDGETS":
        amount = f"month={amount}"
    shell.patch.setenv(name, amount)
    shell.table(prompt=["never asked for"])
    for command in ("quote", "materialize"):
        done = shell.run(command)
        assert done.code == 2
        assert name in done.err
        assert "in plain digits with at most 4 decimals" in " ".join(done.err.split())
        assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "KREA_STORAGE",
            "nosuch://me:s3cr3t#pw@host/krea?s3cr3t",
            "storage root 'nosuch://host/krea'",
        ),
        (
            "KREA_STORAGE",
            "ftp://me:p@s3cr3t@127.0.0.1:9/krea",
            "storage root 'ftp://127.0.0.1:9/krea'",
        ),
        (
            "KREA_PROMPTS",
            "http://me:s3cr/3t@127.0.0.1:9/s.parquet?s3cr3t",
            "http://127.0.0.1:9/s.parquet",
        ),
        (
            "KREA_JOURNAL_URL",
            "postgresql+psycopg://me:p@s3cr3t:w@h:x/db",
            "postgresql+psycopg://***",
        ),
        (
            "KREA_JOURNAL_URL",
            "postgresql+psycopg://me:s3cr3t@[::1/db",
            "the journal's URL cannot be read",
        ),
        (
            "KREA_JOURNAL_URL",
            "postgresql+psycopg://me:s3cr3t@h:99999/db",
            "postgresql+psycopg://h:99999/db",
        ),
        ("EVOLINK_BASE_URL", "https://me:s3cr3t@api.invalid", "EVOLINK_BASE_URL contains a user"),
        ("EVOLINK_BASE_URL", "me:s3cr3t@api.invalid", "EVOLINK_BASE_URL is 'api.invalid'"),
        ("EVOLINK_BASE_URL", "https://api.invalid/?key=s3cr3t", "use https://api.invalid/"),
        (
            "KREA_CALLBACK_BASE_URL",
            "https://me:s3cr3t@h.example.com",
            "KREA_CALLBACK_BASE_URL contains",
        ),
        ("KREA_CALLBACK_SECRET", "s3cr3t", "callback_secret"),
    ],
)
def test_a_place_that_cannot_be_used_is_told_without_its_secrets(
    shell: Shell, name: str, value: str, said: str
) -> None:
    shell.table(prompt=["never asked for"])
    shell.patch.setenv(name, value)
    for command in ("materialize", "salvage"):
        done = shell.run(command)
        # A salvage reads the prompt table only to write the manifests of what it has collected.
        assert done.code in (1, 2) or (command, name) == ("salvage", "KREA_PROMPTS")
        assert re.search("s3cr|3t@", done.out + done.err) is None
        assert "Traceback" not in done.err
        if command == "materialize":
            assert done.code == 2
            assert said in " ".join(done.err.split())


@pytest.mark.parametrize("form", ["{option}={value}", "{option} {value}"])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--journal", "postgresql+psycopg://me:p@s3cr3t:w@h:x/db"),
        ("--storage", "nosuch://me:s3cr3t#pw@host/krea?s3cr3t"),
        ("--prompts", "http://me:s3cr/3t@127.0.0.1:9/s.parquet?s3cr3t"),
        ("--base-url", "https://me:s3cr3t@api.invalid"),
    ],
)
def test_nor_does_an_option_show_its_secrets(
    shell: Shell, option: str, value: str, form: str
) -> None:
    shell.table(prompt=["never bought"])
    done = shell.run("quote", *form.format(option=option, value=value).split())
    assert done.code in (1, 2)
    assert re.search("s3cr|3t@", done.out + done.err) is None


def test_an_unexpected_error_shows_no_secret_of_an_option(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("login of me with p@s3cr3t:w failed")

    monkeypatch.setattr(cli.main, "callback", fail)
    done = shell.run("quote", "--journal", "postgresql+psycopg://me:p@s3cr3t:w@h:x/db")
    assert (done.code, "s3cr3t" in done.err, "RuntimeError" in done.err) == (1, False, True)


# -- demo and salvage -------------------------------------------------------------------------


def test_the_demo_never_uses_the_key_and_says_that_its_pictures_are_synthetic(
    shell: Shell, emulator: Emulator
) -> None:
    shell.table(prompt=[f"meant to fail {REFUSE}"])
    before = posts(emulator)
    done = shell.run("demo")
    assert done.code == 0, "rows that ask the emulator for a failure are meant to fail"
    assert "synthetic" in done.err
    assert "1 × refused" in done.out
    assert posts(emulator) == before, "it has an emulator of its own"
    # Which ends by itself, once nobody uses it: nobody is left to end it.
    assert emulator_process._started[-1].wait(timeout=30) == 0


def test_the_demo_asks_no_proxy_for_its_own_emulator(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell.table(prompt=["a quay behind a proxy"])
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody is
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    assert shell.run("demo").code == 0
    assert emulator_process._started[-1].wait(timeout=30) == 0


def test_a_salvage_with_nothing_left_behind_is_exit_0(shell: Shell, emulator: Emulator) -> None:
    shell.table(prompt=["never bought"])
    before = posts(emulator)
    done = shell.run("salvage")
    assert done.code == 0
    assert "Nothing that was paid for is left behind." in done.out
    assert posts(emulator) == before


# -- help -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_says_what_a_command_does_and_what_each_option_means(shell: Shell, name: str) -> None:
    command = COMMANDS[name]
    done = shell.run(name, "--help")
    assert done.code == 0
    assert (command.help or "").splitlines()[0].split(".")[0] in " ".join(done.out.split())
    for option in command.params:
        if name == "close" and option.name == "months":
            continue
        assert isinstance(option, click.Option), "the commands take options only"
        assert option.help, option.name
        assert max(option.opts, key=len) in done.out


def test_the_group_lists_every_command_the_variables_and_the_exit_codes(shell: Shell) -> None:
    done = shell.run("--help")
    for name in COMMANDS:
        assert re.search(rf"^  {name}  ", done.out, re.MULTILINE), name
    for word in ("EVOLINK_API_KEY", "0 done", "3 the account"):
        assert word in done.out


@pytest.mark.parametrize("name", ["materialize", "salvage", "quote", "spend", "verify", "demo"])
def test_every_command_takes_the_project_by_the_same_options(shell: Shell, name: str) -> None:
    out = " ".join(shell.run(name, "--help").out.split())
    for option, variable in (
        ("--prompts", "KREA_PROMPTS"),
        ("--storage", "KREA_STORAGE"),
        ("--journal", "KREA_JOURNAL_URL"),
        ("--partition-by", "KREA_PARTITION_BY"),
    ):
        assert f" {option} " in out
        assert f"[env var: {variable}]" in out


def test_an_option_overrides_its_variable_for_this_command_alone(shell: Shell) -> None:
    shell.table(prompt=["one", "two"])
    elsewhere = shell.folder / "elsewhere"
    assert shell.run("quote", "--partition-by", "hash:1", "--storage", str(elsewhere)).code == 0
    quoted = json.loads(shell.run("quote", "--partition-by", "hash:1", "--json").out)
    assert [one["partition"] for one in quoted["partitions"]] == ["bucket-000"]
    wrong = shell.run("quote", "--max-in-flight", "many")
    assert (wrong.code, "KREA_MAX_IN_FLIGHT is 'many'" in wrong.err) == (2, True)
    assert json.loads(shell.run("quote", "--json").out)["total"]["asked"] == 2


def test_a_table_is_bought_once_in_all_the_kinds_of_its_files(shell: Shell) -> None:
    lines = "prompt_id,prompt,seed\n007,an oak of text,\n8,an elm of text,9\n"
    (shell.folder / "ideas.csv").write_text(lines)
    bought = shell.run("materialize", "--prompts", str(shell.folder / "ideas.csv"))
    assert bought.code == 0, bought.err
    rows = [
        {"prompt_id": "007", "prompt": "an oak of text", "seed": None},
        {"prompt_id": "8", "prompt": "an elm of text", "seed": 9},
    ]
    (shell.folder / "ideas.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_deltalake(str(shell.folder / "ideas"), pa.Table.from_pylist(rows))
    shell.table(prompt_id=["007", "8"], prompt=["an oak of text", "an elm of text"], seed=[None, 9])
    for name in ("ideas.csv", "ideas.jsonl", "ideas", "prompts.parquet"):
        quoted = shell.run("quote", "--json", "--prompts", str(shell.folder / name))
        total = json.loads(quoted.out)["total"]
        assert (total["asked"], total["to_buy"]) == (2, 0), name


def test_a_broken_line_of_a_table_is_exit_2_before_anything_is_bought(
    shell: Shell, emulator: Emulator
) -> None:
    before = posts(emulator)
    (shell.folder / "ideas.csv").write_text("prompt,seed\nan oak\n")
    for command in ("quote", "materialize"):
        outcome = shell.run(command, "--prompts", str(shell.folder / "ideas.csv"))
        assert outcome.code == 2
        assert "ideas.csv line 2: it has 1 cells, and the header has 2" in outcome.err
    assert posts(emulator) == before
