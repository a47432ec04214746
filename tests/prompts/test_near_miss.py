"""Columns whose names nearly mean something: nothing else is bought than what was meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from krea_dagster.errors import ConfigError, PromptTableError
from krea_dagster.prompts import PromptTable, parse_partition_by
from krea_dagster.prompts.near_miss import field_meant, near_misses
from tests.prompts.reference import read_rows

Open = Callable[..., PromptTable]


def refused(table: PromptTable) -> str:
    with pytest.raises(PromptTableError) as caught:
        table.plan()
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("Seed", "seed"),
        ("seed ", "seed"),
        ("seeds", "seed"),
        ("sede", "seed"),
        ("SIZE", "size"),
        ("num_image", "num_images"),
        ("numImages", "num_images"),
        ("Num-Images", "num_images"),
        ("n", "num_images"),
        ("qualitiy", "quality"),
        ("nsfw check", "nsfw_check"),
        ("promptID", "prompt_id"),
        ("aspect_ratio", "size"),
        ("webhook", "callback_url"),
    ],
)
def test_a_name_that_almost_is_a_field_means_it(name: str, field: str) -> None:
    assert field_meant(name) == field


@pytest.mark.parametrize(
    "name",
    [
        "site",
        "need",
        "feed",
        "id",
        "prompt2",
        "theme",
        "caption",
        "style",
        "image",
        "count",
        "sd",
        "",
    ],
)
def test_a_name_that_is_another_word_means_nothing(name: str) -> None:
    assert field_meant(name) is None


def test_a_column_that_would_change_what_is_bought_is_a_problem(open_table: Open) -> None:
    said = refused(open_table({"prompt": ["a"], "Seed": [5], "SIZE": ["16:9"], "n": [2]}))
    assert "3 problems. Nothing was bought." in said
    assert "Seed is not read; is seed meant?" in said
    assert "read it by prompt_columns (KREA_PROMPT_COLUMNS) Seed=seed" in said
    assert "SIZE is not read; is size meant?" in said
    assert "n is not read; is num_images meant?" in said


def test_with_the_field_itself_in_the_table_the_other_column_is_only_said(open_table: Open) -> None:
    with open_table({"prompt": ["a"], "seed": [1], "Seed": [5]}).plan() as plan:
        assert [image.request.seed for image in plan.named(_ids(plan))] == [1]
        (note,) = plan.notes
    assert note.startswith("Seed is not read: is seed meant?")


def test_a_parameter_that_the_model_does_not_have_is_said(open_table: Open) -> None:
    table = open_table({"prompt": ["a"], "negative_prompt": ["blur"], "guidanceScale": [7.5]})
    with table.plan() as plan:
        only_copied = "and the column is only copied to the manifest"
        assert plan.notes == (
            f"negative_prompt is not read: Krea 2 Turbo has no negative prompt, {only_copied}",
            f"guidanceScale is not read: Krea 2 Turbo has no guidance scale, {only_copied}",
        )


def test_a_column_that_decides_the_partition_is_meant_as_it_is() -> None:
    assert not list(near_misses(["prompt", "n"], {"n"}))


@pytest.mark.parametrize("name", ["text", "Caption", "description"])
def test_a_table_without_prompts_is_asked_for_the_usual_other_name(
    name: str, open_table: Open
) -> None:
    said = refused(open_table({name: ["a fox"]}))
    assert f"is {name} meant?" in said
    assert f"KREA_PROMPT_COLUMNS) {name}=prompt" in said


def test_the_manifest_s_width_leads_to_the_size(open_table: Open) -> None:
    said = refused(open_table({"prompt": ["a"], "width": [1024], "height": [768]}))
    assert "width: the image manifest has a column of this name; rename it, or read it by" in said
    assert "the shape of an image is its size, a ratio such as 16:9" in said


# -- I mean it ----------------------------------------------------------------------------------


def test_a_column_is_read_under_another_name(open_table: Open) -> None:
    columns = {"text": ["a fox"], "Seed": [7], "n": [3], "width": [640]}
    wanted = ["text=prompt", "Seed=seed", "n", "width=table_width"]
    rows = read_rows(open_table(columns, prompt_columns=wanted))
    (row,) = rows.rows
    assert (row.prompt, row.seed, row.num_images) == ("a fox", 7, 1)
    assert rows.passthrough.to_pylist() == [{"n": 3, "table_width": 640}]


def test_a_renamed_column_can_decide_the_partition(open_table: Open) -> None:
    columns = {"prompt": ["a", "b"], "Kind": ["x", "y"]}
    table = open_table(columns, "column:theme", prompt_columns=["Kind=theme"])
    assert table.partition_keys() == ["x", "y"]
    assert [row.prompt for row in read_rows(table, ["y"]).rows] == ["b"]
    assert table.column_names() == ["prompt", "theme"]


def test_a_renamed_column_of_a_csv_file_has_the_type_of_its_new_name(tmp_path: Path) -> None:
    path = tmp_path / "ideas.csv"
    path.write_text("text,Seed\nA fox,7\nA hare,\n")
    table = PromptTable(
        path, parse_partition_by("hash:2"), prompt_columns=["text=prompt", "Seed=seed"]
    )
    assert [(row.prompt, row.seed) for row in read_rows(table).rows] == [
        ("A fox", 7),
        ("A hare", None),
    ]


def test_the_blanks_around_a_name_need_not_be_written(open_table: Open) -> None:
    rows = read_rows(open_table({"prompt": ["a"], "seed ": [7]}, prompt_columns=["seed =seed"]))
    assert [row.seed for row in rows.rows] == [7]


def test_a_name_that_the_table_has_already_is_a_problem(open_table: Open) -> None:
    table = open_table({"prompt": ["a"], "text": ["b"]}, prompt_columns=["text=prompt"])
    assert "prompt is there 2 times in" in refused(table)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (["texts=prompt"], "names the column 'texts', which"),
        (["text="], "has 'text='; write COLUMN=NAME"),
        (["text=prompt", "text"], "names 'text' twice"),
        (["text=prompt", "caption=prompt"], "names 'prompt' twice"),
        ("text=prompt", "is one text; give a list"),
    ],
)
def test_an_entry_that_cannot_be_used_is_refused(wanted: Any, said: str, open_table: Open) -> None:
    with pytest.raises(ConfigError, match=said):
        open_table(
            {"prompt_id": ["x"], "text": ["a"], "caption": ["b"]}, prompt_columns=wanted
        ).plan()


def _ids(plan: Any) -> list[str]:
    return [one for key in plan.keys for b in plan.batches(key) for one in b[0].to_pylist()]
