"""An asset of a user's own shows what it bought: by ``generate``, and by calls that it wraps."""

import asyncio
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from krea_dagster import KreaClient, KreaResource, PromptTable
from krea_dagster.emulator import Emulator
from krea_dagster.models import ImageRequest
from krea_dagster.plugin.usage import Usage
from krea_dagster.prompts import parse_partition_by
from tests.dagster_bench import QUIET, OpenAccount, values, write_table


@pytest.fixture
def krea(tmp_path: Path, emulator: Emulator, open_account: OpenAccount) -> KreaResource:
    return KreaResource(
        api_key=open_account(),
        base_url=emulator.url,
        expected_latency_s=0.02,
        storage=str(tmp_path / "krea"),
    )


def shown(asset: dg.AssetsDefinition, krea: KreaResource) -> dict[str, Any]:
    """Materialize an asset, and return the metadata that its page shows."""
    result = dg.materialize([asset], resources={"krea": krea}, run_config=QUIET)
    (event,) = result.asset_materializations_for_node(asset.op.name)
    return values(event)


def test_generate_shows_thumbnails_counts_and_credits_on_the_asset_that_calls_it(
    krea: KreaResource,
) -> None:
    @dg.asset
    def hero(context: dg.AssetExecutionContext, krea: KreaResource) -> dg.MaterializeResult[None]:
        krea.generate(["a boat", "a gull [emulator: refuse]"], context=context)
        return dg.MaterializeResult(metadata={"own": 1})

    first = shown(hero, krea)
    assert list(first)[:3] == ["own", "thumbnails", "images_bought"]
    assert first["thumbnails"].startswith("![images](data:image/jpeg;base64,")
    named = ("images_bought", "images_reused", "credits_spent_by_run", "credits_charged")
    assert [first[name] for name in named] == [1, 0, 0.45, 0.45]
    assert (first["rows"], first["rows_stored"], first["rows_refused"]) == (2, 1, 1)
    assert first["own"] == 1
    again = shown(hero, krea)
    assert [again[name] for name in named] == [0, 1, 0.0, 0.45]


def test_several_calls_are_added_up_and_an_image_counts_once(krea: KreaResource) -> None:
    @dg.asset
    def heroes(context: dg.AssetExecutionContext, krea: KreaResource) -> None:
        krea.generate(["a boat", "a gull"], context=context)
        krea.generate(["a gull", "a tern"], context=context)

    found = shown(heroes, krea)
    assert (found["images_bought"], found["credits_spent_by_run"]) == (3, pytest.approx(1.35))


def test_it_can_be_turned_off(krea: KreaResource) -> None:
    @dg.asset
    def quiet(context: dg.AssetExecutionContext, krea: KreaResource) -> None:
        krea.generate(["a boat"], context=context, metadata=False)

    assert shown(quiet, krea) == {}


def test_an_asset_that_a_test_calls_directly_needs_no_run(krea: KreaResource) -> None:
    @dg.asset
    def hero(context: dg.AssetExecutionContext, krea: KreaResource) -> str:
        (run_id,) = krea.generate(["a boat"], context=context)["run_id"].to_pylist()
        return str(run_id)

    first, second = (hero(dg.build_asset_context(), krea=krea) for _ in range(2))
    assert first == second != "EPHEMERAL"


def test_an_op_that_a_test_calls_directly_needs_no_run_either(krea: KreaResource) -> None:
    @dg.op
    def draw(context: dg.OpExecutionContext, krea: KreaResource) -> str:
        (name,) = krea.generate(["a boat"], context=context)["partition_key"].to_pylist()
        return str(name)

    assert draw(dg.build_op_context(), krea=krea) == "draw"


def test_of_a_step_with_several_outputs_the_named_one_shows_the_usage(krea: KreaResource) -> None:
    @dg.multi_asset(outs={"left": dg.AssetOut(), "right": dg.AssetOut()})
    def both(context: dg.AssetExecutionContext, krea: KreaResource) -> tuple[int, int]:
        krea.generate(["a boat"], context=context)
        krea.generate(["a gull"], context=context, output_name="right")
        return 1, 2

    result = dg.materialize([both], resources={"krea": krea}, run_config=QUIET)
    found = {
        event.asset_key.path[-1]: values(event)
        for event in result.asset_materializations_for_node("both")
    }
    assert "images_bought" not in found["left"]
    assert found["right"]["images_bought"] == 2


def test_a_wrapped_run_over_a_table_is_shown(krea: KreaResource, tmp_path: Path) -> None:
    table = write_table(tmp_path / "posters.parquet", {"prompt": ["a tern", "a heron"]})

    @dg.asset
    def posters(context: dg.AssetExecutionContext, krea: KreaResource) -> None:
        run = krea.with_usage_metadata(context, krea.krea().run)
        run(PromptTable(table, parse_partition_by("hash:1")))

    found = shown(posters, krea)
    assert (found["images_bought"], found["credits_spent_by_run"]) == (2, 0.9)


def test_a_wrapped_submission_of_the_client_is_shown_with_what_it_reserves(
    krea: KreaResource,
) -> None:
    async def submit(context: dg.AssetExecutionContext, krea: KreaResource) -> None:
        async with KreaClient(krea.api_key, base_url=krea.base_url) as client:
            send = krea.with_usage_metadata(context, client.submit)
            for _ in range(2):  # the second is recognised by its key, and buys nothing
                request = ImageRequest("", "a heron", "1:1", "1K", 7, nsfw_check=False, attempt=0)
                await send(request, idempotency_key="a-key-of-the-test")

    @dg.asset
    def sent(context: dg.AssetExecutionContext, krea: KreaResource) -> None:
        asyncio.run(submit(context, krea))

    assert shown(sent, krea) == {"submissions": 1, "credits_reserved": 0.45}


def test_what_has_no_usage_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="a str has no usage: wrap"):
        Usage().add("a text")


def test_the_log_of_its_run_says_how_a_call_of_generate_ended(krea: KreaResource) -> None:
    @dg.asset
    def hero(context: dg.AssetExecutionContext, krea: KreaResource) -> None:
        krea.generate(["a boat"], context=context)

    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize(
            [hero], resources={"krea": krea}, run_config=QUIET, instance=instance
        )
        lines = [entry.user_message for entry in instance.all_logs(result.run_id)]
    (line,) = [line for line in lines if " images ended: " in line]
    assert line.startswith("1 of 1 images ended: 1 delivered, 0 reused. 0.45 credits, ")
    assert line.endswith(f"Images are in {krea.storage}/images.")
