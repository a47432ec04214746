"""Values of the component's YAML that are templates, and what the errors of others say."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from dagster.components.resolved.errors import ResolutionException
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from krea_dagster import KreaImages
from krea_dagster.plugin.component_sections import CurationSettings, ScheduleSettings

#: The YAML is read by a function that Pydantic has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`parse_obj_as` is deprecated")


def component(text: str) -> KreaImages:
    made: KreaImages = KreaImages.resolve_from_yaml(f"prompts: data/prompts.parquet\n{text}")
    return made


def said_by_the_schema(text: str) -> list[str]:
    """What ``dg check yaml`` finds."""
    schema = Draft202012Validator(KreaImages.model().model_json_schema())
    given = {"prompts": "data/prompts.parquet", **yaml.safe_load(text)}
    return [".".join(map(str, error.absolute_path)) for error in schema.iter_errors(given)]


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("krea: {day_credits: '{{ env.GIVEN }}'}", "krea.day_credits", 20.0),
        ("krea: {max_in_flight: '{{ env.GIVEN | int }}'}", "krea.max_in_flight", 20),
        ("krea: {patience_s: \"{{ env('NOT_GIVEN', 7) }}\"}", "krea.patience_s", 7.0),
        ("krea: {on_unknown: '{{ env.HOLD }}'}", "krea.on_unknown", "hold"),
        ("krea: {storage: '/srv/{{ env.HOLD }}'}", "krea.storage", "/srv/hold"),
        ("krea: {budgets: ['month={{ env.GIVEN }}']}", "krea.budgets", ["month=20"]),
        ("partitions_per_run: '{{ env.GIVEN }}'", "partitions_per_run", 20),
        ("spend: '{{ env.NO }}'", "spend", False),
        ("curation: '{{ env.NO }}'", "curation", False),
        ("curation: {most_images: '{{ env.GIVEN }}'}", "curation.most_images", 20),
        ("checks: {spend: {prices: {1K: '{{ env.GIVEN }}'}}}", "checks.spend.prices", {"1K": 20.0}),
        ("key_prefix: '{{ env.GIVEN }}'", "key_prefix", "20"),
        ("defaults: {quality: '{{ env.QUALITY }}'}", "defaults.quality", "2K"),
        ("schedule: {running: '{{ env.NO }}'}", "schedule.running", False),
        ("schedule: '0 {{ env.GIVEN }} * * *'", "schedule", "0 20 * * *"),
    ],
)
def test_every_value_may_be_a_template(
    monkeypatch: pytest.MonkeyPatch, text: str, path: str, value: Any
) -> None:
    given = {"GIVEN": "20", "HOLD": "hold", "NO": "False", "QUALITY": "2K"}
    for name, one in given.items():
        monkeypatch.setenv(name, one)
    found: Any = component(text)
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)
    assert said_by_the_schema(text) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("krea: {day_credits: '{{ env.GIVEN }}'}", "day_credits is -5: .*greater than or equal"),
        ("krea: {on_unknown: '{{ env.GIVEN }}'}", "on_unknown is -5: "),
        ("partitions_per_run: '{{ env.GIVEN }}'", "partitions_per_run is -5: "),
    ],
)  # fmt: skip
def test_a_limit_is_applied_to_what_a_template_gives(
    monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    monkeypatch.setenv("GIVEN", "-5")
    with pytest.raises(ResolutionException, match=words):
        component(text)


def test_a_budget_whose_variable_is_not_set_is_an_error_and_not_without_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DAY_CREDITS", raising=False)
    with pytest.raises(ResolutionException) as caught:
        component("krea: {day_credits: '{{ env.DAY_CREDITS }}'}")
    assert "krea.day_credits" in str(caught.value)
    assert "day_credits is {{ env.DAY_CREDITS }}, which gives no value" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("krea: {day_credits: -5}", "krea.day_credits"),
        ("krea: {max_in_flight: many}", "krea.max_in_flight"),
        ("krea: {on_unknown: retry}", "krea.on_unknown"),
        ("defaults: {size: '7:5'}", "defaults.size"),
        ("launch_on_changed_prompts: sometimes", "launch_on_changed_prompts"),
    ],
)
def test_check_yaml_and_check_defs_refuse_the_same_values_and_name_their_key(
    text: str, path: str
) -> None:
    assert path in said_by_the_schema(text)
    with pytest.raises(ValidationError) as caught:
        component(text)
    assert path.rpartition(".")[2] in str(caught.value)


def test_check_yaml_knows_the_kinds_of_partitions() -> None:
    assert said_by_the_schema("partition_by: hours:8") == ["partition_by"]
    assert said_by_the_schema("partition_by: day:day@Europe/Berlin,column:campaign") == []


def test_a_section_may_be_a_word() -> None:
    assert component("schedule: true").schedule is True
    assert component("schedule: {timezone: UTC}").schedule == ScheduleSettings(timezone="UTC")
    assert component("curation: {wanted: [prompt=2]}").curation == CurationSettings(
        wanted=["prompt=2"]
    )


def test_the_yaml_describes_each_key() -> None:
    properties = KreaImages.model().model_json_schema()["properties"]
    assert {name for name, one in properties.items() if "description" not in one} == set()
