"""The asset image_measures: in one step for a range, figures shown, and nothing decoded twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest
from PIL import Image

from krea_dagster import KreaResource
from krea_dagster.curation.measures.custom import Measure
from krea_dagster.curation.measures.measures_table import MEASURES_SCHEMA
from krea_dagster.errors import ConfigError
from krea_dagster.plugin.assets.measures import build_image_measures, histogram_text
from krea_dagster.plugin.names import Names
from tests.curation.measures.stored_images import StoredImages, read_measures
from tests.dagster_bench import QUIET, RANGE_END, RANGE_START, values

FOLDERS = ["gauge"]
KEYS = ("a", "b/1", "c")
MEASURES = dg.AssetKey(["gauge", "image_measures"])


@pytest.fixture
def stored(tmp_path: Path) -> StoredImages:
    return StoredImages(str(tmp_path / "krea"))


def asset(further: Sequence[Measure] = ()) -> dg.AssetsDefinition:
    return build_image_measures(
        Names(("gauge",), resource_key="gauge_krea"),
        dg.StaticPartitionsDefinition(list(KEYS)),
        custom=further,
    )


def run(
    stored: StoredImages, first: str, last: str | None = None, further: Sequence[Measure] = ()
) -> dg.ExecuteInProcessResult:
    """Run the asset for one partition, or a range of them."""
    defs = dg.Definitions(
        assets=[asset(further)],
        resources={"gauge_krea": KreaResource(storage=stored.root)},
        jobs=[dg.define_asset_job("measure", selection=[MEASURES])],
    )
    how: dict[str, Any] = {"partition_key": first}
    if last is not None:
        how = {"tags": {RANGE_START: first, RANGE_END: last}}
    with dg.DagsterInstance.ephemeral() as instance:
        return defs.resolve_job_def("measure").execute_in_process(
            instance=instance, run_config=QUIET, raise_on_error=False, **how
        )


def shown(result: dg.ExecuteInProcessResult) -> dict[str, dict[str, Any]]:
    """The metadata of each partition."""
    found = {}
    for event in result.get_asset_materialization_events():
        one = event.materialization
        assert one.partition is not None
        found[one.partition] = values(one)
    return found


def records(metadata: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [dict(one.data) for one in metadata[name].records]


def test_a_range_is_measured_in_one_step_and_each_partition_has_its_file(
    stored: StoredImages,
) -> None:
    stored.write("a", [stored.row(number) for number in range(4)], FOLDERS)
    stored.write("b/1", [stored.row(9)], FOLDERS)
    result = run(stored, "a", "c")
    assert result.success
    assert len(result.get_step_success_events()) == 1
    found = shown(result)
    assert {key: one["dagster/partition_row_count"] for key, one in found.items()} == {
        "a": 4,
        "b/1": 1,
        "c": 0,
    }
    assert found["a"]["images_measured_now"] == 4
    table = read_measures(stored.storage, KEYS, folders=FOLDERS)
    assert table["partition_key"].to_pylist() == ["a"] * 4 + ["b/1"]
    assert found["a"]["path"] == str(Path(stored.root) / "measures/gauge/a.parquet")
    sharpness = table["sharpness"].to_numpy()[:4]
    assert found["a"]["sharpness_median"] == pytest.approx(np.median(sharpness))
    (line,) = [one for one in records(found["a"], "figures") if one["measure"] == "sharpness"]
    assert (line["images"], line["most"]) == (4, float(f"{sharpness.max():.4g}"))
    assert len(line["histogram"]) == 12


def test_a_second_run_reads_nothing_and_says_so(stored: StoredImages) -> None:
    stored.write("a", [stored.row(number) for number in range(3)], FOLDERS)
    run(stored, "a")
    (found,) = shown(run(stored, "a")).values()
    assert (found["images_measured_now"], found["images_reused"]) == (0, 3)


def test_files_that_cannot_be_measured_are_named_and_fail_nothing(stored: StoredImages) -> None:
    rows = [stored.row(0), stored.row(1, written=False)]
    stored.write("a", rows, FOLDERS)
    result = run(stored, "a")
    assert result.success
    (found,) = shown(result).values()
    assert found["images_not_measured"] == 1
    (one,) = records(found, "not_measured")
    assert (one["prompt_id"], one["measure"]) == ("row-0001", "all")
    assert (one["why"], one["image_path"]) == ("the file is missing", rows[1]["image_path"])


def test_own_measures_are_columns_and_figures_like_the_others(stored: StoredImages) -> None:
    stored.write("a", [stored.row(number) for number in range(3)], FOLDERS)
    score = Measure("score", lambda images: [0.25] * len(images), description="How nice")
    (found,) = shown(run(stored, "a", further=[score])).values()
    assert found["score_median"] == 0.25
    schema = asset([score]).metadata_by_key[MEASURES]["dagster/column_schema"]
    columns = {column.name: column for column in schema.columns}
    assert list(columns) == [*MEASURES_SCHEMA.names, "score"]
    assert columns["score"].description == "How nice (version 1)"
    assert all(column.description for column in columns.values())


def test_a_broken_function_fails_the_step_with_its_name_and_the_image(stored: StoredImages) -> None:
    stored.write("a", [stored.row(number) for number in range(12)], FOLDERS)

    def broken(images: list[Image.Image]) -> list[float]:
        raise RuntimeError("no model")

    result = run(stored, "a", further=[Measure("score", broken)])
    assert not result.success
    (failure,) = [event for event in result.all_events if event.is_step_failure]
    text = failure.step_failure_data.user_failure_data
    assert text is not None
    assert "the measure 'score' failed on 10 images" in str(text.description)
    assert "RuntimeError: no model" in str(text.description)


def test_two_measures_of_one_name_are_told_when_the_asset_is_built() -> None:
    with pytest.raises(ConfigError, match="two measures are named 'score'"):
        asset([Measure("score", len), Measure("score", len)])


def test_bars_are_as_tall_as_there_are_many() -> None:
    many = np.concatenate([np.zeros(70), np.full(10, 0.5), [1.0]])
    assert histogram_text(many) == "█▁▁▁▁▁▂▁▁▁▁▂"
    assert histogram_text(np.array([3.0])).count("█") == 1
