"""What the README says is so: its code runs, and its names exist."""

from __future__ import annotations

import re
from pathlib import Path

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from krea_dagster.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_its_code_makes_a_code_location_with_the_assets_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVOLINK_API_KEY", "not-used")
    (tmp_path / "data").mkdir()
    table = pa.table({"prompt": ["a boat"], "category": ["Sea & Sky"]})
    pq.write_table(table, tmp_path / "data" / "prompts.parquet")

    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(block, names)  # noqa: S102 - the README's own code

    defs, delivered = names["defs"], names["delivered"]
    assert isinstance(defs, dg.Definitions)
    assert isinstance(delivered, dg.AssetsDefinition)
    together = dg.Definitions.merge(defs, dg.Definitions(assets=[delivered]))
    graph = together.resolve_asset_graph()
    for name in re.findall(r"^\| `(\w+)` \| (?:the table|buys|one Parquet)", README, re.MULTILINE):
        assert dg.AssetKey(name) in graph.get_all_asset_keys()
    assert together.resolve_job_def("krea_images")


def test_its_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    texts = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = re.findall(r"(?:^|`)make ([a-z-]+)", texts, re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_its_commands_and_options_exist() -> None:
    for name, options in re.findall(r"krea-dagster ([a-z]+)((?: --[a-z-]+)*)", README):
        command = main.commands[name]
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(options.split()) <= known, name


def test_every_command_is_in_it() -> None:
    for name in main.commands:
        assert f"krea-dagster {name}" in README, name


def test_its_variables_are_those_that_are_read() -> None:
    source = (ROOT / "krea_dagster" / "plugin" / "environment.py").read_text(encoding="utf-8")
    read = set(re.findall(r"\"((?:KREA|EVOLINK)_[A-Z_]+)\"", source))
    assert set(re.findall(r"^\| `((?:KREA|EVOLINK)_[A-Z_]+)`", README, re.MULTILINE)) == read


def test_its_pictures_are_there() -> None:
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).is_file(), picture
