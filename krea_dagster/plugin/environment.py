"""Builds the code location that environment variables describe."""

from collections.abc import Mapping

import dagster as dg

from krea_dagster.application.settings import (
    EMULATOR_KEY,
    ConnectionSettings,
    Settings,
    holds_secret,
    variable_of,
)
from krea_dagster.plugin.definitions import build_krea_definitions
from krea_dagster.plugin.partitions import backfill_policy_of
from krea_dagster.plugin.resource import KreaResource
from krea_dagster.prompts import parse_partition_by

#: Settings that Dagster must show by the name of their variable.
_SECRETS = ("api_key", "journal_url", "callback_secret")


def resource_of(settings: Settings) -> KreaResource:
    """Return the resource of settings that were read from the environment, without secrets."""
    values = settings.model_dump(include=set(ConnectionSettings.model_fields))
    for name in (*_SECRETS, "storage"):
        is_secret = name in _SECRETS or holds_secret(values[name])
        if values[name] and is_secret and values[name] != EMULATOR_KEY:
            values[name] = dg.EnvVar(variable_of(Settings.model_fields[name]))
    if values["storage_options"]:
        values["storage_options"] = {"env": variable_of(Settings.model_fields["storage_options"])}
    return KreaResource(**values)


def definitions_of(settings: Settings) -> dg.Definitions:
    """Return the code location of settings that were read from the environment."""
    parse_partition_by(settings.partition_by, variable_of(Settings.model_fields["partition_by"]))
    return build_krea_definitions(
        prompts=settings.prompts,
        prompts_options=settings.prompts_options,
        partition_by=settings.partition_by,
        prompt_columns=settings.prompt_columns,
        krea=resource_of(settings),
        backfill_policy=backfill_policy_of(settings.partitions_per_run),
        collect_later=settings.collect == "later",
    )


def definitions_from_environment(environ: Mapping[str, str] | None = None) -> dg.Definitions:
    """Build the code location that the environment describes; unset variables have defaults.

    The README lists the variables. Without ``EVOLINK_API_KEY`` the emulator is used, and the
    images are synthetic.

    Args:
        environ: The variables; the process's own by default.

    Raises:
        ConfigError: for a value that cannot be used; it names the variable.
    """
    return definitions_of(Settings.from_environment(environ))
