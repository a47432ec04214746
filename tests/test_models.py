"""Shared rules: the syntax of task ids and of credits."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest

from krea_dagster.application.krea import Krea
from krea_dagster.application.settings import Settings
from krea_dagster.callbacks.receiver import claimed_task_id
from krea_dagster.engine.budget import Budget
from krea_dagster.engine.resolution import HasTask, parse_resolution
from krea_dagster.errors import ConfigError
from krea_dagster.models import is_task_id, parse_cap, parse_whole_number, units_from_credits
from krea_dagster.plugin.resource import KreaResource

# -- task ids -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["task-unified-1-a", "a", ".a", "a..b", "1:2_3-4.5", "a" * 128])
def test_valid_task_ids_are_valid_everywhere(text: str) -> None:
    assert is_task_id(text)
    assert parse_resolution(f"task:{text}") == HasTask(text)
    assert claimed_task_id(json.dumps({"id": text}).encode()) == text


@pytest.mark.parametrize(
    "text",
    ["", ".", "..", "...", "." * 128, "a" * 129, "a/b", "a b", "a\n", "\n", "é", "a?b", "%2e%2e"],
)
def test_invalid_task_ids_are_invalid_everywhere(text: str) -> None:
    assert not is_task_id(text)
    with pytest.raises(ConfigError, match="unknown decision"):
        parse_resolution(f"task:{text}")
    assert claimed_task_id(json.dumps({"id": text}).encode()) is None


@pytest.mark.parametrize("value", [None, 7, 1.5, b"task", ["task"], {"id": "task"}])
def test_only_text_can_be_a_task_id(value: object) -> None:
    assert not is_task_id(value)


# -- credits ------------------------------------------------------------------------------------

AMOUNTS = [
    ("0", 0),
    ("0.45", 4_500),
    ("900", 9_000_000),
    ("007", 70_000),
    ("0.0001", 1),
    ("999999999.9999", 9_999_999_999_999),
    ("1000000000", 10_000_000_000_000),
    ("1000000000.0000", 10_000_000_000_000),
]
NO_AMOUNTS = [
    "-1", "-0", "+5", " 5 ", "5 ", "\t5", "5\n", "1_000", "1,000", "1e3", "1E3", "1e25", "1e400",
    "inf", "-inf", "Infinity", "nan", "NaN", "sNaN", ".5", "5.", ".", "0.00001", "0x10", "١٢", "５",
    "1000000000.0001", "1000000001", "1" * 11, "9" * 5000, "five", "½", "--5", "5-", "5 5", "\x005",
]  # fmt: skip


@pytest.mark.parametrize(("text", "units"), AMOUNTS)
def test_a_cap_is_digits_with_at_most_four_decimals(text: str, units: int) -> None:
    assert parse_cap(text, "a cap") == units
    assert Budget.parse(f"month={text}").units == units
    settings = Settings.from_environment({"KREA_RUN_CREDITS": text, "KREA_BUDGETS": f"day={text}"})
    caps = Krea(settings).caps()
    assert caps.run_units == units
    assert [budget.units for budget in caps.budgets] == [units]


@pytest.mark.parametrize("text", NO_AMOUNTS)
@pytest.mark.parametrize("name", ["KREA_RUN_CREDITS", "KREA_DAY_CREDITS"])
def test_invalid_caps_are_refused_with_the_variable_and_the_rule(name: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.from_environment({name: text})
    said = str(caught.value)
    assert said.startswith(f"{name} is ")
    assert "from 0 to 1000000000, in plain digits with at most 4 decimals" in said
    assert len(said) < 250


# White space around the budgets of a list is not part of them.
@pytest.mark.parametrize(
    "text", [one for one in NO_AMOUNTS if one.strip() == one and "," not in one]
)
def test_invalid_budgets_are_refused_by_the_same_rule(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.from_environment({"KREA_BUDGETS": f"month={text}"})
    assert str(caught.value).startswith("KREA_BUDGETS: budget ")
    assert "in plain digits with at most 4 decimals" in str(caught.value)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0, 1e25, 1e10])
def test_the_resource_refuses_invalid_caps_too(value: float) -> None:
    for field in ("run_credits", "day_credits"):
        with pytest.raises(ValueError, match=rf"{field}\n  Input should be"):
            KreaResource.model_validate({field: value})


@pytest.mark.parametrize("value", [0.00001, 0.1 + 0.2])
def test_a_cap_with_five_decimals_is_refused_before_buying(
    value: float,
) -> None:
    with pytest.raises(ConfigError, match=r"run_credits is .* at most 4 decimals"):
        KreaResource(run_credits=value).krea().caps()


@pytest.mark.parametrize("field", ["patience_s", "timeout_s", "download_timeout_s", "max_per_s"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 0.0, -1.0, 1e12])
def test_all_numbers_of_the_resource_are_bounded(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        KreaResource.model_validate({field: value})


@pytest.mark.parametrize(
    "text", ["0", "-1", "+1", " 1", "1.0", "1e3", "4097", "١٢", "1_0", "9" * 99]
)
def test_a_whole_number_is_plain_digits(text: str) -> None:
    with pytest.raises(ConfigError, match=r"KREA_MAX_IN_FLIGHT is .* whole number from 1 to 4096"):
        Settings.from_environment({"KREA_MAX_IN_FLIGHT": text})
    assert parse_whole_number("4096", "x", most=4096) == 4096


@pytest.mark.parametrize(
    "value", ["nan", "inf", "-inf", "1e25", "1e400", "five", 1e300, Decimal("sNaN")]
)
def test_invalid_amounts_of_credits_are_refused(value: str | float | Decimal) -> None:
    with pytest.raises(ValueError, match="is not an amount of credits"):
        units_from_credits(value)
    assert units_from_credits(-0.45) == -4_500
