"""What the README and the pages in docs/ say is so: their code runs, and their names exist."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import click
import dagster as dg
import pyarrow.parquet as pq
import pytest
import yaml
from dagster._core.definitions.reconstruct import repository_def_from_target_def
from dagster._core.workspace.autodiscovery import loadable_targets_from_python_file

import krea_dagster
from krea_dagster import KreaImages
from krea_dagster.cli import main
from krea_dagster.emulator import Emulator
from krea_dagster.prompts import (
    ColumnPartitions,
    HashPartitions,
    MultiPartitions,
    TimePartitions,
    parse_partition_by,
)
from tests.dagster_bench import QUIET, RANGE_END, RANGE_START, OpenAccount, run_job, write_table
from tests.prompts.reference import key_for

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


OWN_PROJECT = page("how-to/own-project")
#: The pages whose code is read as one file, after the README's.
ONE_FILE = ("how-to/own-project", "how-to/automation", "reference/checks", "how-to/manifests")

#: The subcommands by name.
COMMANDS: dict[str, click.Command] = {
    name: main.get_command(click.Context(main), name) or main
    for name in main.list_commands(click.Context(main))
}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory, emulator: Emulator) -> Iterator[dict[str, Any]]:
    """What the code of the README and of ``ONE_FILE`` makes, in a folder with a table.

    The code is run as it stands, but that the emulator is at the address of EvoLink.
    """
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("EVOLINK_API_KEY", "emulator")
        table = {
            "prompt_id": ["boat", "kite"],
            "prompt": ["a boat of the readme", "a kite of the readme"],
            "category": ["Sea & Sky", "Sea & Sky"],
            "day": ["2026-11-02", "2026-11-02"],
        }
        write_table(folder / "data" / "prompts.parquet", table)
        made: dict[str, Any] = {}
        key = 'api_key=dg.EnvVar("EVOLINK_API_KEY")'
        for block in [
            one for text in (README, *map(page, ONE_FILE)) for one in blocks("python", text)
        ]:
            text = block.replace(key, f'{key}, base_url="{emulator.url}"')
            # Not with this file's own __future__: Dagster cannot read annotations that are text.
            code = compile(text, "docs", "exec", dont_inherit=True)
            exec(code, made)  # noqa: S102 - our own code
        yield made


@pytest.fixture(scope="module")
def result(names: dict[str, Any], instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    """A run of its own assets, after one of its first code location."""
    own = [names[name] for name in ("delivered", "most_expensive", "spend", "first_bytes", "hero")]
    defs = dg.Definitions.merge(names["defs"], dg.Definitions(assets=own))
    assert run_job(defs, instance, "bucket-000", "bucket-007").success
    job = defs.resolve_implicit_global_asset_job_def()
    return job.execute_in_process(
        instance=instance, asset_selection=[asset.key for asset in own], run_config=QUIET
    )


def test_its_code_makes_a_code_location_with_the_assets_and_jobs_that_it_names(
    names: dict[str, Any],
) -> None:
    defs = names["defs"]
    listed = re.findall(r"^\| `(\w+)` \|[^|]*\|$", OWN_PROJECT, re.MULTILINE)
    assert {dg.AssetKey(name) for name in listed} == set(
        defs.resolve_asset_graph().get_all_asset_keys()
    )
    assert defs.resolve_job_def("krea_images")
    assert defs.resolve_sensor_def("krea_prompts")


def test_its_assets_alone_are_a_code_location_too(
    names: dict[str, Any], instance: dg.DagsterInstance
) -> None:
    defs = names["poster_defs"]
    dg.Definitions.validate_loadable(defs)
    result = defs.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=instance,
        run_config=QUIET,
        tags={RANGE_START: "bucket-000", RANGE_END: "bucket-001"},
    )
    assert result.success
    assert len(result.asset_materializations_for_node("posters__images")) == 2


def test_its_readers_get_what_they_are_annotated_with(result: dg.ExecuteInProcessResult) -> None:
    files = result.output_for_node("delivered")
    assert len(files) == 2
    assert all(Path(file).is_file() for file in files)
    assert set(result.output_for_node("most_expensive")) == {"boat", "kite"}
    assert result.output_for_node("spend") == pytest.approx(0.9)
    assert result.output_for_node("first_bytes") == [b"\x89PNG\r\n\x1a\n"] * 2


def test_its_own_asset_buys_a_few_prompts(result: dg.ExecuteInProcessResult) -> None:
    (event,) = result.asset_materializations_for_node("hero")
    files = event.metadata["files"].value
    assert isinstance(files, list)
    assert len(files) == 2
    assert all(Path(str(file)).is_file() for file in files)


def test_its_application_buys_what_a_table_lacks(
    names: dict[str, Any], emulator: Emulator, open_account: OpenAccount, tmp_path: Path
) -> None:
    environ = {
        "EVOLINK_API_KEY": open_account(),
        "EVOLINK_BASE_URL": emulator.url,
        "KREA_PROMPTS": write_table(tmp_path / "prompts.parquet", {"prompt": ["a gull", "a tern"]}),
        "KREA_STORAGE": str(tmp_path / "krea"),
    }
    files = names["buy_missing"](environ)
    assert len(files) == 2
    assert all(Path(file).is_file() for file in files)


def test_its_client_asks_for_the_credits(
    names: dict[str, Any], emulator: Emulator, open_account: OpenAccount
) -> None:
    key = open_account(12.5)
    assert asyncio.run(names["credits_left"](key, emulator.url)) == 12.5


def test_its_client_over_a_mock_of_httpx_asks_and_fetches(names: dict[str, Any]) -> None:
    answer = {"id": "t", "status": "completed", "results": ["https://files.evolink.ai/t.png"]}
    assert asyncio.run(names["image_of"]("t", answer, b"image")) == b"image"


def test_its_automation_and_its_schedule_are_of_the_same_assets(names: dict[str, Any]) -> None:
    together = names["daily"]()
    dg.Definitions.validate_loadable(together)
    assert together.resolve_sensor_def("daily_krea_automation")
    assert together.resolve_schedule_def("daily_krea_schedule").job_name == "daily_krea_images"


#: The emulator instead of a key, so that a file of the README needs neither.
KEY = 'api_key=dg.EnvVar("EVOLINK_API_KEY")'


def test_its_first_file_buys_everything_by_the_command_below_it(tmp_path: Path) -> None:
    section = README.split("## Ten lines")[1].split("\n## ")[0]
    code, (command, *_) = blocks("python", section)[0], blocks("console", section)
    (tmp_path / "definitions.py").write_text(code.replace(KEY, "emulator=True"))
    write_table(tmp_path / "data" / "prompts.parquet", {"prompt": ["a boat", "a kite"]})
    environment = {**os.environ, "DAGSTER_HOME": ""}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = ["bash", "-euc", command]
    done = subprocess.run(program, cwd=tmp_path, env=environment, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert len(list((tmp_path / "data" / "krea" / "images").rglob("*.png"))) == 2


def test_its_automation_saved_as_a_file_is_what_dagster_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = blocks("python", page("how-to/automation"))
    (tmp_path / "daily.py").write_text(code.replace(KEY, "emulator=True"))
    write_table(
        tmp_path / "data" / "prompts.parquet", {"prompt": ["a boat"], "day": ["2026-11-02"]}
    )
    monkeypatch.chdir(tmp_path)
    (target,) = loadable_targets_from_python_file(str(tmp_path / "daily.py"))
    assert target.attribute == "daily"
    repository = repository_def_from_target_def(target.target_definition)
    assert repository is not None
    assert repository.has_schedule_def("daily_krea_schedule")


def test_its_table_of_checks_names_each_with_its_builder(names: dict[str, Any]) -> None:
    text = page("reference/checks")
    table = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", text, re.MULTILINE))
    builders = {name for name in krea_dagster.__all__ if name.endswith("_check")}
    assert set(re.findall(r"`(build_\w+)`", " ".join(table.values()))) == builders
    key = dg.AssetKey("image_manifest")
    for name, by in table.items():
        if builder := re.search(r"`(build_\w+)`", by):
            (spec,) = getattr(krea_dagster, builder[1])(key).check_specs
            assert spec.name == name
    default = {name for name, by in table.items() if by.startswith("default")}
    always = {"all_rows_delivered", "spend_proof", "no_near_duplicates"}
    assert checks_of(names["defs"]) == default | always
    assert checks_of(names["checked_defs"]) == {
        *always, "failure_share", "files_whole", "spend_expected",
    }  # fmt: skip


def checks_of(defs: dg.Definitions) -> set[str]:
    keys = defs.resolve_asset_graph().asset_check_keys
    return {key.name for key in keys if key.asset_key.path[-1] != "spend_daily"}


#: The rows of the table of partitions: the text, and a key.
PARTITIONS = re.findall(
    r"^\| `((?:hash|column|day|week|month):[^`]+)` \|.*\| (.+) \|$",
    page("reference/prompt-table"),
    re.MULTILINE,
)


@pytest.mark.parametrize(("text", "key"), PARTITIONS)
def test_its_partitionings_are_taken_and_have_keys_of_that_form(text: str, key: str) -> None:
    by = parse_partition_by(text.replace("hash:N", "hash:8").replace("NAME", "made_for"))
    key = key.strip("`").replace("\\|", "|")
    match by:
        case HashPartitions():
            assert key == "bucket-000"
            assert key_for(by, "any prompt_id")[:-3] == key[:-3]
        case TimePartitions():
            assert key == by.key_of(date(2026, 11, 2))
        case MultiPartitions():
            assert MultiPartitions.split(key) == ("flux", "2026-11-02")
        case ColumnPartitions():
            assert key == "the value"


#: Dagster reads its YAML by a function that Pydantic has deprecated.
@pytest.mark.filterwarnings("ignore:`parse_obj_as` is deprecated")
def test_its_component_is_one(names: dict[str, Any]) -> None:
    text = page("how-to/dg-project")
    (block,) = blocks("yaml", text)
    content = yaml.safe_load(block)
    assert content["type"] == "krea_dagster.KreaImages"
    component = KreaImages.resolve_from_dict(content["attributes"])
    assert component.krea.day_credits == 100
    assert len(component.build_checks() or ()) == 2
    for hook in ("build_resource", "build_checks", "get_asset_spec", "count_tokens"):
        assert f"`{hook}`" in text
        assert callable(getattr(KreaImages, hook))


def test_the_list_of_public_names_is_whole_and_says_what_was_left_out() -> None:
    text = page("reference/public-names")
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", text, re.MULTILINE)
    assert [name for name, _ in rows] == krea_dagster.__all__
    for name, sentence in rows:
        assert sentence.endswith("."), name
        assert sentence.count(". ") == 0, name
    assert "## Left out on purpose" in text


def test_its_commands_from_a_table_to_a_dataset_run(tmp_path: Path) -> None:
    """All but the review, which waits for a person."""
    section = README.split("## From a table to a dataset")[1].split("\n## ")[0]
    (table,) = blocks("python", section)
    commands = "".join(blocks("console", section)).replace("krea-dagster review\n", "")
    commands = commands.replace("krea-dagster materialize --again rejected\n", "")
    ours = ("DAGSTER_", "EVOLINK_", "KREA_")  # without a key the emulator is used
    environment = {name: text for name, text in os.environ.items() if not name.startswith(ours)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for program in ([sys.executable, "-c", table], ["bash", "-euc", commands]):
        subprocess.run(program, cwd=tmp_path, env=environment, check=True)
    assert len(list((tmp_path / "dataset" / "latest").rglob("*.png"))) == 2


def test_the_commands_of_the_tutorial_make_a_dataset(tmp_path: Path) -> None:
    """All but the review, which waits for a person."""
    commands = "".join(blocks("console", page("tutorial"))).replace("krea-dagster review\n", "")
    ours = ("DAGSTER_", "EVOLINK_", "KREA_")  # without a key the emulator is used
    environment = {name: text for name, text in os.environ.items() if not name.startswith(ours)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = ["bash", "-euc", commands]
    subprocess.run(program, cwd=tmp_path, env=environment, check=True)
    shards = (tmp_path / "dataset" / "latest").rglob("train-*.parquet")
    texts = [text for shard in shards for text in pq.read_table(shard)["text"].to_pylist()]
    assert len(texts) == 8
    assert "a lighthouse in fog" in texts
    for file in ("gallery.html", "definitions.py"):
        assert (tmp_path / file).is_file()


def test_its_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    texts = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = re.findall(r"(?:^|`)make ([a-z-]+)", texts, re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_its_commands_and_options_exist() -> None:
    for name, options in re.findall(r"krea-dagster ([a-z]+)((?: --[a-z-]+)*)", README):
        command = COMMANDS[name]
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(options.split()) <= known, name


def test_its_pictures_are_there() -> None:
    for path in (ROOT / "README.md", *PAGES):
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / picture).is_file(), f"{path.name}: {picture}"


@pytest.mark.parametrize("name", ["callbacks", "curation", "upstream-prompts", "several-tables"])
def test_the_code_of_the_pages_in_docs_makes_code_locations(
    names: dict[str, Any], name: str
) -> None:
    """After the README's own, whose names it may use."""
    made = dict(names)
    for block in blocks("python", page(f"how-to/{name}")):
        exec(compile(block, name, "exec", dont_inherit=True), made)  # noqa: S102 - our own code
    locations = [
        one
        for key, one in made.items()
        if isinstance(one, dg.Definitions) and one is not names.get(key)
    ]
    assert locations
    for one in locations:
        dg.Definitions.validate_loadable(one)


def test_the_job_of_the_page_on_upstream_assets_makes_the_prompts_first(
    instance: dg.DagsterInstance,
    emulator: Emulator,
    open_account: OpenAccount,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)  # its storage root is below the working folder
    monkeypatch.setenv("EVOLINK_API_KEY", open_account())
    key = 'api_key=dg.EnvVar("EVOLINK_API_KEY")'
    made: dict[str, Any] = {}
    for block in blocks("python", page("how-to/upstream-prompts")):
        text = block.replace(key, f'{key}, base_url="{emulator.url}"')
        exec(compile(text, "upstream.md", "exec", dont_inherit=True), made)  # noqa: S102 - our own code
    job, last = "product_dataset", "bucket-007"
    result = run_job(made["product_images"], instance, "bucket-000", last, job=job)
    assert result.success
    steps = [event.step_key for event in result.all_events if event.is_step_materialization]
    assert list(dict.fromkeys(steps)) == [
        "product_prompts", "products__images", "products__image_manifest",
    ]  # fmt: skip
    assert len(list((tmp_path / "data" / "krea" / "images").rglob("*.png"))) == 2


def test_the_commands_and_options_of_the_pages_exist() -> None:
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for name, options in re.findall(r"^krea-dagster ([a-z]+)(.*)$", text, re.MULTILINE):
            command = COMMANDS[name]
            below = command.commands.values() if isinstance(command, click.Group) else ()
            parameters = [each for one in (command, *below) for each in one.params]
            known = {option for parameter in parameters for option in parameter.opts}
            assert set(re.findall(r"(?<= )--[a-z-]+", options)) <= known | {"--port"}, (path, name)
