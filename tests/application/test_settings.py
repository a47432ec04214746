"""Each setting is defined once, and the resource, component, environment and command agree."""

from __future__ import annotations

import pytest

from krea_dagster import KreaResource, Settings
from krea_dagster.application.settings import ConnectionSettings, SharedSettings, variable_of
from krea_dagster.errors import ConfigError
from krea_dagster.plugin.component_sections import KreaSettings


@pytest.mark.parametrize("name", ConnectionSettings.model_fields)
def test_the_resource_has_the_setting_as_it_is_defined(name: str) -> None:
    ours, defined = KreaResource.model_fields[name], ConnectionSettings.model_fields[name]
    assert (ours.default, ours.description) == (defined.default, defined.description)


@pytest.mark.parametrize("name", SharedSettings.model_fields)
def test_the_component_has_the_setting_as_it_is_defined(name: str) -> None:
    ours, defined = KreaSettings.model_fields[name], SharedSettings.model_fields[name]
    assert (ours.default, ours.description) == (defined.default, defined.description)


def test_no_two_settings_share_a_variable() -> None:
    variables = [variable_of(field) for field in Settings.model_fields.values()]
    named = [variable for variable in variables if variable]
    assert len(named) == len(set(named)) == 25


def test_secrets_are_not_in_the_repr() -> None:
    settings = Settings(
        api_key="sk-secret-1",
        journal_url="postgresql://me:secret-2@host/db",
        callback_secret="secret-3",
        storage="s3://me:secret-4@bucket/x",
        prompts="https://me:secret-5@host/p.parquet",
    )
    assert "secret" not in repr(settings).replace("callback_secret", "")


def test_without_a_key_the_images_come_from_an_emulator() -> None:
    assert Settings.from_environment({}).emulator
    given = Settings.from_environment({"EVOLINK_BASE_URL": "http://127.0.0.1:9"})
    assert (given.emulator, given.synthetic, given.origin) == (False, True, "an emulator")
    real = Settings.from_environment({"EVOLINK_API_KEY": "sk-1"})
    assert (real.synthetic, real.origin) == (False, "api.evolink.ai")


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("KREA_ON_UNKNOWN", "retry"),
        ("KREA_COLLECT", "never"),
        ("EVOLINK_BASE_URL", "not a URL"),
        ("KREA_MAX_IN_FLIGHT", "1e3"),
        ("KREA_PARTITIONS_PER_RUN", "0"),
        ("KREA_RUN_CREDITS", "many"),
        ("KREA_SPEND_THRESHOLD", "0.5"),
        ("KREA_SPEND_THRESHOLD", "nan"),
        ("KREA_BUDGETS", "weekly=3"),
    ],
)
def test_a_wrong_variable_is_named(variable: str, text: str) -> None:
    with pytest.raises(ConfigError, match=variable):
        Settings.from_environment({variable: text})
