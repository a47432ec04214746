"""The spend in the columns of FOCUS 1.2, checked against the rules of the specification.

``focus_1_2_columns.csv`` is made of the files of the tag v1.2 of
https://github.com/FinOps-Open-Cost-and-Usage-Spec/FOCUS_Spec (CC BY 4.0), which its last column
names. The rules between columns below are those of the same files.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from datetime import date, datetime, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from krea_dagster.application.close import close_month
from krea_dagster.errors import InputError
from krea_dagster.spend.statements.focus import FOCUS_SCHEMA
from tests.spend.project_harness import ProjectHarness
from tests.spend.statements.test_close import set_purchase
from tests.spend.test_attribution import materialize

RULES = {
    row["column"]: row
    for row in csv.DictReader(
        Path(__file__).with_name("focus_1_2_columns.csv").read_text().splitlines()
    )
}
#: Columns that must be there if the provider supports what they are about, and EvoLink does not:
#: discounts by commitment, reserved capacity, regions, provisioned resources, sub accounts, and
#: several types of billing accounts.
NOT_SUPPORTED = re.compile("Commitment|Capacity|Region|Resource|SubAccount|BillingAccountType")
TYPES = {
    "Decimal": pa.types.is_decimal,
    "String": pa.types.is_string,
    "JSON": pa.types.is_string,
    "Date/Time": pa.types.is_timestamp,
}


@pytest.fixture
def project(project: ProjectHarness) -> ProjectHarness:
    """Purchases at prices in two currencies, every kind of entry, and a closed month."""
    project = project.with_settings(
        spend_by=["campaign"], credit_prices=["68/USD", "2026-10-01=60/EUR"]
    )
    project = project.with_rows("ash", "birch", "cedar", "date", campaign="autumn")
    materialize(project, "run-1")
    days = [date(2026, 9, 3), date(2026, 9, 30), date(2026, 10, 5), date(2026, 11, 2)]
    for number, (day, units) in enumerate(zip(days, [4_500, None, 18_000, 4_501], strict=True)):
        set_purchase(project, number, day, units)
    krea = project.krea
    close_month(krea, "2026-09", now=datetime(2026, 10, 1, tzinfo=timezone.utc))
    set_purchase(project, 1, date(2026, 9, 30), 4_700)
    keys = {row["prompt_id"]: row["idempotency_key"] for row in ledger(project)}
    for entry in (
        {"kind": "top-up", "credits": "700", "paid": "10", "currency": "EUR", "on": "2026-10-02",
         "reference": "INV-123", "id": "pack"},
        {"kind": "top-up", "credits": "300", "on": "2026-10-02", "id": "without-price"},
        {"kind": "promotion", "credits": "100", "on": "2026-10-02"},
        {"kind": "refund", "credits": "0.2", "on": "2026-10-20", "purchase": keys["ash"]},
        {"kind": "refund", "credits": "1.5", "on": "2026-10-20", "note": "outage"},
        {"kind": "correction", "credits": "-0.1", "on": "2026-11-03", "note": "charged twice"},
        {"kind": "correction", "reverses": "pack", "on": "2026-11-04"},
    ):  # fmt: skip
        krea.add_account_entry(**entry)
    return project


def ledger(project: ProjectHarness) -> list[dict[str, Any]]:
    return project.krea.spend_sql("SELECT * FROM ledger").to_pylist()  # type: ignore[no-any-return]


def exported(project: ProjectHarness, **period: Any) -> list[dict[str, Any]]:
    path = project.folder / "focus.parquet"
    count = project.krea.spend_focus(path, **period)
    table = pq.read_table(path)
    assert table.num_rows == count
    assert table.schema.equals(FOCUS_SCHEMA)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def test_every_column_that_must_be_there_is_there_with_its_type() -> None:
    ours = [name for name in FOCUS_SCHEMA.names if not name.startswith("x_")]
    assert set(ours) <= set(RULES), "FOCUS knows each, and others begin with x_"
    assert FOCUS_SCHEMA.names[: len(ours)] == ours, "those of FOCUS come first"
    for name, rule in RULES.items():
        if rule["feature_level"] == "Mandatory" or (
            rule["feature_level"] == "Conditional" and not NOT_SUPPORTED.search(name)
        ):
            assert name in ours, name
    for name in ours:
        assert TYPES[RULES[name]["data_type"]](FOCUS_SCHEMA.field(name).type), name


def test_every_row_follows_the_rules_of_its_columns(project: ProjectHarness) -> None:
    rows = exported(project)
    kinds = {(row["ChargeCategory"], row["ChargeClass"]) for row in rows}
    assert kinds == {
        ("Usage", None), ("Usage", "Correction"), ("Purchase", None), ("Credit", None),
        ("Credit", "Correction"), ("Adjustment", None),
    }  # fmt: skip
    for row in rows:
        for name, rule in RULES.items():
            if name in row:
                assert row[name] is not None or rule["allows_nulls"] == "True", name
                assert row[name] != "", "null, and not an empty text"
                if rule["allowed_values"] and row[name] is not None:
                    assert row[name] in rule["allowed_values"].split(";"), name
        assert_rules_between_columns(row)


def assert_rules_between_columns(row: Mapping[str, Any]) -> None:
    category, corrects = row["ChargeCategory"], row["ChargeClass"] == "Correction"
    priced = category in ("Usage", "Purchase") and not corrects
    for name in (
        *("ContractedUnitPrice", "ListUnitPrice", "PricingCategory", "PricingQuantity", "SkuId"),
        *("SkuPriceId", "PricingCurrencyContractedUnitPrice", "PricingCurrencyListUnitPrice"),
    ):
        assert row[name] is not None or not priced, name
    for name in ("Contracted", "List"):
        unit = row[f"{name}UnitPrice"]
        if unit is not None and row["PricingQuantity"] is not None and not corrects:
            assert unit >= 0
            product = unit * row["PricingQuantity"]
            assert abs(product - row[f"{name}Cost"]) < Decimal("1e-9")
    assert (row["PricingUnit"] is None) == (row["PricingQuantity"] is None)
    assert (row["ConsumedUnit"] is None) == (row["ConsumedQuantity"] is None)
    assert (row["ConsumedQuantity"] is None) == (category != "Usage" or corrects)
    assert row["SkuMeter"] is None or row["SkuId"] is not None
    assert row["PricingCurrencyEffectiveCost"] is not None
    if category == "Purchase":
        assert row["EffectiveCost"] == row["PricingCurrencyEffectiveCost"] == 0, "prepaid"
        assert row["ChargeFrequency"] == "One-Time"
    else:
        assert row["BilledCost"] == 0
    assert re.fullmatch("[A-Z]{3}", row["BillingCurrency"])
    assert row["PricingCurrency"] == (
        row["BillingCurrency"] if category == "Purchase" else "Credits"
    )
    assert row["BillingPeriodStart"].day == row["BillingPeriodEnd"].day == 1
    assert row["BillingPeriodStart"] < row["BillingPeriodEnd"]
    assert row["ChargePeriodStart"] < row["ChargePeriodEnd"]
    inside = row["BillingPeriodStart"] <= row["ChargePeriodStart"] < row["BillingPeriodEnd"]
    assert inside or corrects
    tags = json.loads(row["Tags"] or "{}")
    assert all(isinstance(value, str | int | float | bool | None) for value in tags.values())


def test_the_rows_say_what_was_bought_used_and_given_back(project: ProjectHarness) -> None:
    rows = exported(project)
    by = {row["x_FactId"]: row for row in rows}
    pack = by["pack"]
    assert (pack["BilledCost"], pack["BillingCurrency"], pack["InvoiceId"]) == (
        10,
        "EUR",
        "INV-123",
    )
    assert (pack["PricingQuantity"], pack["x_Credits"]) == (700, -700)
    assert "without-price" not in by, "what it cost is not known"
    used = [row for row in rows if row["ChargeCategory"] == "Usage"]
    assert {json.loads(row["Tags"])["campaign"] for row in used} == {"autumn"}
    late = [row for row in used if row["ChargeClass"]]
    assert [(row["x_Credits"], row["BillingPeriodStart"].month, row["ChargePeriodStart"].month)
            for row in late] == [(Decimal("0.47"), 10, 9)]  # fmt: skip
    refunds = {row["ChargeClass"]: row for row in rows if row["x_Kind"] == "refund"}
    assert refunds["Correction"]["EffectiveCost"] == Decimal("-0.0029411764705882")
    assert refunds["Correction"]["BillingCurrency"] == "USD", "at the price of its purchase"
    assert refunds[None]["EffectiveCost"] == Decimal("-0.025")


def test_the_file_adds_up_to_what_spend_says(project: ProjectHarness) -> None:
    rows = exported(project)
    spend = project.krea.spend(["quality"])
    for currency in ("USD", "EUR"):
        effective = sum(row["EffectiveCost"] for row in rows if row["BillingCurrency"] == currency)
        net = sum(line.costs(net=True).get(currency, Fraction(0)) for line in spend.lines)
        assert abs(Fraction(effective) - net) < Fraction(1, 10**12)
    assert sum(row["BilledCost"] for row in rows) == 0, "the top-up was reversed"
    credits = sum(row["PricingCurrencyEffectiveCost"] for row in rows)
    assert credits * 10_000 == sum(line.net_units for line in spend.lines)
    months = [exported(project, month=f"2026-{month:02}") for month in (9, 10, 11)]
    assert [row for month in months for row in month] == rows
    assert exported(project, since=date(2026, 11, 3)) == [
        row for row in rows if row["ChargePeriodStart"].date() >= date(2026, 11, 3)
    ]


def test_a_csv_file_has_the_same_values_in_the_formats_of_focus(project: ProjectHarness) -> None:
    rows = exported(project)
    path = project.folder / "focus.csv"
    project.krea.spend_focus(path)
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(rows)
    for text, row in zip(read, rows, strict=True):
        for name, value in row.items():
            if value is None:
                assert text[name] == ""
            elif isinstance(value, Decimal):
                assert re.fullmatch(r"-?\d+(\.\d+)?", text[name])
                assert Decimal(text[name]) == value
            elif isinstance(value, datetime):
                assert text[name] == f"{value:%Y-%m-%dT%H:%M:%SZ}"
            else:
                assert text[name] == value


def test_another_kind_of_file_or_day_is_refused(project: ProjectHarness) -> None:
    with pytest.raises(InputError, match=r"ends with .csv or .parquet"):
        project.krea.spend_focus(project.folder / "focus.xlsx")
    with pytest.raises(InputError, match="has UTC days"):
        project.krea.spend_focus(project.folder / "focus.csv", zone="Europe/Berlin")
