"""KreaResource.generate: a few prompts in a custom asset or op, with the same journal."""

from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import pyarrow as pa
import pytest

from krea_dagster import Defaults, Krea, KreaResource, Settings
from krea_dagster.emulator import Emulator
from krea_dagster.errors import AccountStopped, ConfigError, PromptTableError
from krea_dagster.manifest import MANIFEST_SCHEMA
from krea_dagster.plugin.environment import resource_of
from tests.dagster_bench import OpenAccount, bought, posts


@pytest.fixture
def krea(tmp_path: Path, emulator: Emulator) -> KreaResource:
    return KreaResource(
        api_key="emulator",
        base_url=emulator.url,
        expected_latency_s=0.02,
        storage=str(tmp_path / "krea"),
    )


def test_texts_and_rows_become_a_manifest_with_a_row_for_each_image(
    krea: KreaResource, emulator: Emulator
) -> None:
    manifest = krea.generate(
        [
            "a heron, of generate",
            {"prompt": "a kite, of generate", "seed": 7, "size": "16:9", "campaign": "autumn"},
            {"prompt": "[emulator: refuse] of generate", "num_images": 2},
        ]
    )
    assert manifest.schema.names == [*MANIFEST_SCHEMA.names, "campaign"]
    rows = manifest.to_pylist()
    assert [row["status"] for row in rows] == ["stored", "stored", "refused", "refused"]
    assert [row["campaign"] for row in rows] == [None, "autumn", None, None]
    assert rows[1]["seed"] == 7
    assert all(Path(row["image_path"]).is_file() for row in rows[:2])
    assert "content_policy" in str(rows[2]["error_message"]) or rows[2]["error_code"]
    assert len(bought(emulator, "of generate")) == 2


def test_what_one_call_has_bought_no_other_buys_again(
    krea: KreaResource, emulator: Emulator
) -> None:
    first = krea.generate(["a lamp, bought once", "a boat, bought once"])
    before = posts(emulator)
    frame = pd.DataFrame({"prompt": ["a boat, bought once", "a lamp, bought once"]})
    again = krea.generate(frame)
    assert posts(emulator) == before
    assert again["reused"].to_pylist() == [True, True]
    assert set(again["image_path"].to_pylist()) == set(first["image_path"].to_pylist())
    arrow = krea.generate(pa.table({"prompt": ["a lamp, bought once"]}))
    assert arrow["image_sha256"].to_pylist() == [first["image_sha256"][0].as_py()]
    assert posts(emulator) == before


def test_an_asset_of_ones_own_names_itself_and_its_run(
    krea: KreaResource, instance: dg.DagsterInstance
) -> None:
    manifests: list[pa.Table] = []

    @dg.asset(key_prefix="shop")
    def hero(context: dg.AssetExecutionContext, krea: KreaResource) -> None:
        manifests.append(krea.generate(["the hero of the shop"], context=context))

    result = dg.materialize([hero], resources={"krea": krea}, instance=instance)
    (row,) = manifests[0].to_pylist()
    assert (row["run_id"], row["partition_key"]) == (result.run_id, "shop/hero")
    assert row["reused"] is False


def test_an_op_of_ones_own_does_the_same(krea: KreaResource, instance: dg.DagsterInstance) -> None:
    @dg.op
    def paint(context: dg.OpExecutionContext, krea: KreaResource) -> list[Any]:
        rows: list[Any] = krea.generate(["painted by an op"], context=context).to_pylist()
        return rows

    @dg.job(resource_defs={"krea": krea})
    def painting() -> None:
        paint()

    result = painting.execute_in_process(instance=instance)
    (row,) = result.output_for_node("paint")
    assert (row["run_id"], row["partition_key"]) == (result.run_id, "paint")


def test_defaults_fill_in_what_a_row_leaves_open(krea: KreaResource) -> None:
    defaults = Defaults(size="1:2", num_images=2)
    manifest = krea.generate(["a default shape"], defaults=defaults)
    assert manifest["size"].to_pylist() == ["1:2", "1:2"]
    assert manifest["sample"].to_pylist() == [0, 1]


def test_nothing_asked_for_is_an_empty_manifest(krea: KreaResource, emulator: Emulator) -> None:
    before = posts(emulator)
    manifest = krea.generate([])
    assert (manifest.num_rows, manifest.schema.names) == (0, MANIFEST_SCHEMA.names)
    assert posts(emulator) == before


def test_bad_prompts_are_named_by_number_and_column_before_anything_is_bought(
    krea: KreaResource, emulator: Emulator
) -> None:
    before = posts(emulator)
    with pytest.raises(PromptTableError, match="the given prompts: 2 problems") as caught:
        krea.generate([{"prompt": "fine"}, {"prompt": " "}, {"prompt": "x", "size": "7:1"}])
    assert [(p.row, p.column) for p in caught.value.problems] == [(2, "prompt"), (3, "size")]
    with pytest.raises(ConfigError, match="the column seed of the given prompts"):
        krea.generate([{"prompt": "a", "seed": 1}, {"prompt": "b", "seed": "two"}])
    with pytest.raises(TypeError, match="not one text or row"):
        krea.generate("a single text")
    with pytest.raises(TypeError, match="prompt 2 is a int"):
        krea.generate(["a", 5])
    assert posts(emulator) == before
    assert not krea.krea().has_journal()


def test_an_account_that_stops_is_an_error_and_what_is_paid_for_is_kept(
    tmp_path: Path, emulator: Emulator, open_account: OpenAccount
) -> None:
    key = open_account(0.5)
    krea = KreaResource(
        api_key=key,
        base_url=emulator.url,
        expected_latency_s=0.02,
        storage=str(tmp_path),
        max_in_flight=1,
    )
    with pytest.raises(AccountStopped):
        krea.generate([f"number {number} of a poor account" for number in range(8)])
    kept = len(bought(emulator, "of a poor account"))
    assert 0 < kept < 8
    stored = [path for path in (tmp_path / "images").rglob("*") if path.is_file()]
    assert len(stored) == kept


def test_a_variable_that_is_not_set_is_an_error_and_begins_no_other_journal(
    tmp_path: Path, emulator: Emulator
) -> None:
    krea = KreaResource(
        api_key="emulator",
        base_url=emulator.url,
        expected_latency_s=0.02,
        storage=str(tmp_path / "krea"),
        journal_url=dg.EnvVar("A_JOURNAL_THAT_IS_NOT_SET"),
    )
    with pytest.raises(ConfigError, match="the variable A_JOURNAL_THAT_IS_NOT_SET is not set"):
        krea.generate(["never bought"])
    assert not (tmp_path / "krea").exists()


def test_a_secret_in_the_storage_options_is_known_by_its_variable_only() -> None:
    options = {"key": "AKIA", "client_kwargs": {"secret": dg.EnvVar("STORE_SECRET")}}
    resource = KreaResource(emulator=True, storage="memory://krea", storage_options=options)
    named = {"key": "AKIA", "client_kwargs": {"secret": {"env": "STORE_SECRET"}}}
    assert resource.krea().settings.storage_options == named
    assert "AKIA" not in repr(resource)


def test_options_of_the_environment_reach_the_resource_by_the_name_of_their_variable() -> None:
    environ = {"KREA_STORAGE": "s3://krea", "KREA_STORAGE_OPTIONS": '{"secret": "s3cr3t-word"}'}
    resource = resource_of(Settings.from_environment(environ))
    assert resource.storage_options == {"env": "KREA_STORAGE_OPTIONS"}


def test_a_prompt_table_is_opened_as_a_storage_root_of_its_kind() -> None:
    options = {"endpoint_url": "http://store:9000"}
    store: dict[str, Any] = {
        "storage": "s3://krea/made",
        "journal_url": "sqlite:////tmp/journal.db",
    }
    settings = Settings(prompts="s3://krea/p.parquet", storage_options=options, **store)
    assert Krea(settings).table().storage_options == options
    elsewhere = settings.model_copy(update={"prompts": "/data/prompts.parquet"})
    assert Krea(elsewhere).table().storage_options == {}
    own = settings.model_copy(update={"prompts_options": {"anon": True}})
    assert Krea(own).table().storage_options == {"anon": True}
