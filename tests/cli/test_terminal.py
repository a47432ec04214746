"""What the terminal says about money is true however a run ended."""

from __future__ import annotations

import pyarrow as pa
import pytest

from krea_dagster.application.settings import Settings
from krea_dagster.cli.show_runs import materialized_figures, show_materialized
from krea_dagster.cli.terminal import say_synthetic
from krea_dagster.engine.run.report import Progress
from krea_dagster.manifest import MANIFEST_SCHEMA
from krea_dagster.plugin.materialize import MISSING_COLUMNS, Materialized


def ended(progress: Progress, *rows: dict[str, object]) -> Materialized:
    return Materialized(
        partitions=["p"],
        missing=pa.Table.from_pylist(list(rows), MANIFEST_SCHEMA).select(MISSING_COLUMNS),
        progress=progress,
        seconds=1.0,
        dagster_home="/home",
    )


@pytest.mark.parametrize(
    ("how", "progress", "nothing"),
    [
        ("all refused", Progress(total=2, failed=2), True),
        ("all at hand", Progress(total=2, reused=2), True),
        ("one bought", Progress(total=2, reused=1, delivered=1, charged_units=4500), False),
        ("stopped while tasks were under way", Progress(total=2, in_flight=2), False),
        ("detached from tasks that are paid for", Progress(total=2, left=2), False),
        ("charged, and not fetched", Progress(total=1, left=1, charged_units=4500), False),
    ],
)
def test_nothing_was_bought_is_said_only_where_it_is_certain(
    capsys: pytest.CaptureFixture[str], how: str, progress: Progress, nothing: bool
) -> None:
    show_materialized(ended(progress), where="made", commands={})
    assert ("Nothing was bought" in capsys.readouterr().out) == nothing, how


def test_rows_with_the_same_code_are_one_reason_although_each_message_has_its_own_request_id() -> (
    None
):
    rows: list[dict[str, object]] = [
        {
            "prompt_id": f"row-{number}",
            "status": "refused",
            "error_code": "content_policy_violation",
            "error_message": f"Content refused (request id {number})",
        }
        for number in range(7)
    ]
    figures = materialized_figures(ended(Progress(total=7, failed=7), *rows), where="made")
    assert figures["not_delivered"] == [
        {
            "reason": "refused (content_policy_violation), Content refused (request id 0)",
            "count": 7,
            "rows": "row-0, row-1, row-2, row-3, row-4 …",
        }
    ]


@pytest.mark.parametrize(
    ("environ", "advice"),
    [
        ({}, "Set EVOLINK_API_KEY to buy"),
        (
            {"EVOLINK_API_KEY": "k", "EVOLINK_BASE_URL": "http://127.0.0.1:9"},
            "Unset EVOLINK_BASE_URL and set EVOLINK_API_KEY to buy",
        ),
    ],
)
def test_how_to_buy_real_images_fits_the_settings(
    capsys: pytest.CaptureFixture[str], environ: dict[str, str], advice: str
) -> None:
    say_synthetic(Settings.from_environment(environ))
    assert f"\n│ {advice} " in capsys.readouterr().err
