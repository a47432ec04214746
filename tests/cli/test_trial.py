"""A trial first: some rows are quoted and bought, and the next whole run buys only the others."""

from __future__ import annotations

import json

import pyarrow.parquet as pq

from krea_dagster.emulator import Emulator
from tests.cli.shell import Shell
from tests.dagster_bench import posts

NAMES = [f"row-{number:02}" for number in range(12)]


def statuses(shell: Shell) -> dict[str, str]:
    table = pq.read_table(shell.folder / "krea" / "manifest").to_pylist()
    return {row["prompt_id"]: row["status"] for row in table}


def test_a_trial_is_quoted_bought_and_then_only_the_others(
    shell: Shell, emulator: Emulator
) -> None:
    shell.table(prompt_id=NAMES, prompt=[f"{name} of a trial" for name in NAMES])
    quoted = shell.run("quote", "--limit", "3")
    assert quoted.code == 0
    assert (
        "A trial: 3 of 12 rows. The same without limit and sample takes the others." in quoted.out
    )
    figures = json.loads(shell.run("quote", "--limit", "3", "--json").out)
    assert (figures["trial"], figures["total"]["asked"]) == ({"rows": 3, "of": 12}, 3)
    assert figures["total"]["credits"] == 1.35

    before = posts(emulator)
    done = shell.run("materialize", "--limit", "3")
    assert done.code == 0, done.err
    assert posts(emulator) == before + 3
    assert {line.split()[0]: line.split()[1:] for line in done.out.splitlines()[:3]} == {
        "trial": ["3", "of", "12", "rows"],
        "asked": ["3"],
        "delivered": ["3"],
    }
    assert "planned" not in done.out, "the other rows are not missing"
    assert statuses(shell) == {name: "stored" if name in NAMES[:3] else "planned" for name in NAMES}

    again = shell.run("materialize", "--limit", "3")
    assert (again.code, posts(emulator)) == (0, before + 3)
    assert "Nothing was bought: every image was already there." in again.out

    rest = json.loads(shell.run("quote", "--json").out)
    assert (rest["trial"], rest["total"]["reused"], rest["total"]["to_buy"]) == (None, 3, 9)
    whole = shell.run("materialize", "--json")
    assert (whole.code, posts(emulator)) == (0, before + 12)
    assert json.loads(whole.out)["reused"] == 3
    assert set(statuses(shell).values()) == {"stored"}


def test_a_sample_is_the_same_in_quote_and_run_and_may_grow(
    shell: Shell, emulator: Emulator
) -> None:
    shell.table(prompt_id=NAMES, prompt=[f"{name} of a sample" for name in NAMES])
    before = posts(emulator)
    assert json.loads(shell.run("materialize", "--sample", "2", "--json").out)["asked"] == 2
    few = {name for name, status in statuses(shell).items() if status == "stored"}
    quoted = json.loads(shell.run("quote", "--sample", "4", "--json").out)["total"]
    assert (quoted["asked"], quoted["reused"], quoted["to_buy"]) == (4, 2, 2)
    assert shell.run("materialize", "--sample", "4").code == 0
    assert posts(emulator) == before + 4
    assert few < {name for name, status in statuses(shell).items() if status == "stored"}


def test_a_row_of_a_trial_that_fails_is_exit_1_and_named(shell: Shell) -> None:
    shell.table(
        prompt_id=["fails", "later"],
        prompt=["[emulator: refuse] of a trial", "[emulator: refuse] x"],
    )
    done = shell.run("materialize", "--limit", "1")
    assert done.code == 1
    assert "1 × refused" in done.out
    assert "fails" in done.out
    assert "later" not in done.out.replace("left for later", "")


def test_rows_are_chosen_in_one_way(shell: Shell, emulator: Emulator) -> None:
    shell.table(prompt_id=["a", "b"], prompt=["one way", "another way"])
    before = posts(emulator)
    for arguments, said in (
        (("--limit", "1", "--sample", "1"), "limit and sample exclude each other"),
        (("--limit", "1", "--again", "a"), "limit and sample choose rows, and so do --again"),
        (("--sample", "0"), "0 is not in the range x>=1"),
    ):
        done = shell.run("materialize", *arguments)
        assert done.code == 2
        assert said in done.err
    assert posts(emulator) == before


# -- what is said of the table --------------------------------------------------------------------


def test_rows_that_share_an_image_and_unread_columns_are_said_before_anything_is_bought(
    shell: Shell,
) -> None:
    shell.table(
        prompt=["a twin", "a twin", "a  twin", "alone"],
        seed=[1, 1, 1, 2],
        negative_prompt=["x"] * 4,
    )
    unread, blanks, sharing = json.loads(shell.run("quote", "--json").out)["notes"]
    assert unread.startswith("negative_prompt is not read: Krea 2 Turbo has no negative prompt")
    assert blanks.startswith("1 prompt differs from another only by blanks")
    assert sharing == (
        "2 rows share 1 image: they request the same one; num_images buys more of one prompt"
    )
    assert f"note: {sharing}" in shell.run("quote").out
    done = shell.run("materialize")
    assert done.code == 0
    for note in (unread, blanks, sharing):
        assert done.err.index(f"Note: {note}.") < done.err.index("4 images in")


def test_a_near_miss_stops_both_commands_and_can_be_meant(shell: Shell, emulator: Emulator) -> None:
    shell.table(prompt=["a near miss"], Seed=[5], n=[2])
    before = posts(emulator)
    for name in ("quote", "materialize"):
        done = shell.run(name)
        assert done.code == 2
        assert "Seed is not read; is seed meant?" in done.err
        assert "n is not read; is num_images meant?" in done.err
    assert posts(emulator) == before
    done = shell.run("materialize", "--prompt-columns", "Seed=seed,n")
    assert done.code == 0, done.err
    (row,) = pq.read_table(shell.folder / "krea" / "manifest").to_pylist()
    assert (row["seed"], row["n"]) == (5, 2)


def test_a_quote_refuses_what_a_run_would_refuse(shell: Shell) -> None:
    """Images of an emulator are not reused for a run that would buy from EvoLink."""
    shell.table(prompt=["of an emulator"])
    assert shell.run("materialize").code == 0
    shell.patch.setenv("EVOLINK_BASE_URL", "https://api.evolink.ai")
    said = [shell.run(name) for name in ("quote", "materialize")]
    assert [done.code for done in said] == [2, 2]
    assert (
        "holds images from an emulator, and this run would buy from api.evolink.ai" in said[0].err
    )
    assert said[0].err == said[1].err
