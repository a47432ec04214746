"""The application without Dagster: its documentation runs, and its use cases fit together."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from krea_dagster import BuyOptions, Krea, PromptTable
from krea_dagster.emulator import Emulator
from krea_dagster.errors import ConfigError
from krea_dagster.prompts import parse_partition_by
from tests.dagster_bench import SettingsOf, write_table

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "python.md"


@pytest.fixture
def krea(settings_of: SettingsOf) -> Krea:
    prompts = {"prompt_id": ["ash", "birch"], "prompt": ["an ash", "a birch"], "size": ["1:2"] * 2}
    settings = settings_of("hash:2")
    write_table(Path(settings.prompts), prompts)
    return Krea(settings)


def creates(emulator: Emulator) -> int:
    return int(emulator.stats(tasks=False)["creates"])


def test_the_documentation_runs_from_its_first_line_to_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "data" / "prompts.parquet", {"prompt": ["a boat", "a kite"]})
    made: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(PAGE), "exec", dont_inherit=True), made)  # noqa: S102 - the page's code
    assert made["ran"].report.progress.delivered == 2
    assert list(made["manifest"]["credits_charged"]) == [0.5, 0.5] or len(made["manifest"]) == 2
    assert all(pixel.size[0] > 0 for pixel in made["pixels"])
    assert made["made"]["status"].to_pylist() == ["stored", "stored"]
    assert made["exported"].summary()["images"] == 4  # also the two of generate


def test_a_run_buys_what_the_quote_said_and_a_second_run_buys_nothing(
    krea: Krea, emulator: Emulator
) -> None:
    before = creates(emulator)
    assert krea.quote().total.to_buy == 2
    assert krea.run().summary.statuses == {"stored": 2}
    assert creates(emulator) == before + 2
    assert krea.quote().total.to_buy == 0
    assert krea.run().report.progress.delivered == 0
    assert creates(emulator) == before + 2
    assert sorted(krea.manifest()["prompt_id"]) == ["ash", "birch"]
    assert krea.verify().adds_up


def test_a_row_is_regenerated_on_request(krea: Krea, emulator: Emulator) -> None:
    krea.run()
    before = creates(emulator)
    krea.run(options=BuyOptions(regenerate=["ash"]))
    assert creates(emulator) == before + 1
    attempts = krea.manifest().set_index("prompt_id")["attempt"]
    assert attempts.to_dict() == {"ash": 1, "birch": 0}


def test_images_of_a_generate_call_need_no_manifest_to_be_accounted_for(krea: Krea) -> None:
    krea.generate(["a lighthouse in fog"], name="notebook")
    proof = krea.verify()
    assert (proof.adds_up, [finding.text for finding in proof.findings]) == (True, [])
    assert proof.figures.charges == 1


def test_one_partition_can_be_run_alone(krea: Krea, emulator: Emulator) -> None:
    table = krea.table()
    key = table.partition_keys()[0]
    before = creates(emulator)
    ran = krea.run(table, [key])
    assert creates(emulator) - before == ran.summary.rows
    assert {*krea.manifest()["partition_key"]} == {key}


def test_without_a_journal_there_are_no_verdicts_and_nothing_to_verify(krea: Krea) -> None:
    assert krea.verdicts().empty
    with pytest.raises(ConfigError, match="nothing to verify"):
        krea.verify()
    assert not Path(krea.settings.storage).exists()


def test_without_a_journal_nothing_is_curated_and_none_is_created(krea: Krea) -> None:
    """A new journal next to images would not know that they are paid for."""
    images = Path(krea.settings.storage, "images", "ab")
    images.mkdir(parents=True)
    (images / "abcd.png").write_bytes(b"paid for")
    with pytest.raises(ConfigError, match="has no journal yet"):
        krea.curate()
    with pytest.raises(ConfigError, match="the journal that bought them is missing"):
        krea.run()


@pytest.mark.parametrize("rows", [{"regenerate": ["nobody"]}, {"resolve": {"ash": "lost"}}])
def test_options_that_name_nothing_are_refused_before_anything_is_bought(
    krea: Krea, emulator: Emulator, rows: dict[str, Any]
) -> None:
    before = creates(emulator)
    with pytest.raises(ConfigError, match=r"no row has|names no purchase"):
        krea.run(options=BuyOptions(**rows))
    assert creates(emulator) == before


def test_settings_without_a_table_say_so(tmp_path: Path) -> None:
    from krea_dagster.application.settings import ConnectionSettings  # noqa: PLC0415

    krea = Krea(ConnectionSettings(emulator=True, storage=str(tmp_path)))
    with pytest.raises(ConfigError, match="name no prompt table"):
        krea.quote()
    source = write_table(tmp_path / "prompts.parquet", {"prompt": ["a boat"]})
    table = PromptTable(source, parse_partition_by("hash:1"))
    assert krea.quote(table).total.to_buy == 1


@pytest.mark.parametrize("use", ["krea.quote()", "krea.run()", "krea.verify()", "krea.spend()"])
def test_it_imports_no_dagster(tmp_path: Path, use: str) -> None:
    write_table(tmp_path / "prompts.parquet", {"prompt": ["a boat"]})
    code = (
        "import sys; from krea_dagster import Krea, Settings\n"
        f"krea = Krea(Settings(emulator=True, prompts={str(tmp_path / 'prompts.parquet')!r}, "
        f"storage={str(tmp_path / 'krea')!r}, partition_by='hash:1'))\n"
        f"krea.run()\n{use}\nprint('dagster' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_a_function_that_makes_prompts_is_called_once_a_run(krea: Krea) -> None:
    calls: list[str] = []

    def ideas() -> list[dict[str, str]]:
        calls.append("called")
        return [{"prompt_id": f"idea-{number}", "prompt": "an elm"} for number in range(3)]

    table = PromptTable(ideas, parse_partition_by("hash:2"), name="ideas")
    assert krea.run(table=table).summary.statuses == {"stored": 3}
    assert calls == ["called"]
    assert krea.quote(table).total.to_buy == 0


def test_a_table_without_a_path_needs_a_name_before_anything_is_bought(
    krea: Krea, emulator: Emulator
) -> None:
    before = creates(emulator)
    table = PromptTable([{"prompt": "an elm"}], parse_partition_by("hash:2"))
    with pytest.raises(ConfigError, match="the prompt table given as a list needs a name"):
        krea.run(table=table)
    assert creates(emulator) == before
    assert not krea.has_journal()
