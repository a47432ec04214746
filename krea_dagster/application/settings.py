"""The settings, each defined once: name, type, bounds, default, description, and variable.

``KreaResource`` and the component inherit their fields, the command line makes its options of
them, and ``Settings.from_environment`` reads their variables.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo
from typing_extensions import Self

from krea_dagster import redact
from krea_dagster.callbacks.urls import url_parts
from krea_dagster.engine.budget import Budget
from krea_dagster.errors import ConfigError
from krea_dagster.file_systems import parse_options
from krea_dagster.models import MOST_CREDITS, credits_from_units, parse_cap, parse_whole_number
from krea_dagster.spend.prices import PUBLISHED, CreditPrices
from krea_dagster.spend.warnings.anomaly import THRESHOLD
from krea_dagster.spend.warnings.history import BALANCE_DAYS

#: The emulator's default API key.
EMULATOR_KEY: Final = "emulator"


def _setting(
    default: Any, description: str, *, variable: str = "", metavar: str = "", **bounds: Any
) -> Any:
    """Define a setting; ``metavar`` is how the command line shows its value."""
    extra: JsonDict = {"variable": variable, "metavar": metavar}
    return Field(default=default, description=description, json_schema_extra=extra, **bounds)


class SharedSettings(BaseModel):
    """The settings that hold no secret; the component has them under the same names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_url: str = _setting(
        "https://api.evolink.ai",
        "Root of the API. http is allowed only for addresses of this machine or network.",
        variable="EVOLINK_BASE_URL",
        metavar="URL",
    )
    storage: str = _setting(
        "data/krea",
        "Storage root: a folder, or a URL that fsspec supports.",
        variable="KREA_STORAGE",
        metavar="FOLDER|URL",
        repr=False,  # a URL may contain a password
    )
    storage_options: dict[str, Any] = _setting(
        {},
        "How fsspec opens a storage root behind a URL, such as its endpoint and credentials, and "
        'other URLs of its kind. A value {"env": "NAME"} at any depth names a variable.',
        variable="KREA_STORAGE_OPTIONS",
        metavar="JSON",
        repr=False,
    )
    max_in_flight: int = _setting(
        64,
        "Maximum number of tasks that a run has at the server at the same time. The run finds the "
        "account's own limit, which may be lower.",
        variable="KREA_MAX_IN_FLIGHT",
        metavar="N",
        ge=1,
        le=4096,
    )
    max_per_s: float | None = _setting(
        None,
        "Maximum number of images per second that a run requests. By default the run finds the "
        "account's limit.",
        gt=0,
        le=10_000,
    )
    expected_latency_s: float | None = _setting(
        None,
        "Expected seconds per image, used to schedule the first polls. Defaults to 2 s (1K) and "
        "7 s (2K); the run adapts to observed latencies.",
        gt=0,
        le=900,
    )
    verify_images: bool = _setting(
        True,
        "Decode each image once before it counts as stored, to find damage, a wrong size and flat "
        "color. Otherwise only the hash, the length and the file's header are checked.",
    )
    measure_images: bool = _setting(
        True,
        "Measure each image while verify_images decodes it, so that image_measures does not have "
        "to decode it again.",
    )
    on_unknown: str = _setting(
        "replay",
        "What to do about a purchase with an unknown outcome: replay repeats it under the same "
        "Idempotency-Key within 23 hours, hold leaves the decision to a person.",
        variable="KREA_ON_UNKNOWN",
        metavar="replay|hold",
        pattern="^(replay|hold)$",
    )
    run_credits: float | None = _setting(
        None,
        "Maximum credits that one run may commit. Rows beyond it are deferred.",
        variable="KREA_RUN_CREDITS",
        metavar="CREDITS",
        ge=0,
        le=MOST_CREDITS,
    )
    day_credits: float | None = _setting(
        None,
        "Maximum credits per UTC day for all runs that share the journal. Rows beyond it are "
        "deferred.",
        variable="KREA_DAY_CREDITS",
        metavar="CREDITS",
        ge=0,
        le=MOST_CREDITS,
    )
    budgets: list[str] = _setting(
        [],
        "Maximum credits for all runs that share the journal, each as SCOPE=CREDITS: day, month, "
        "partition (each), partition:KEY, column:NAME (each value) or column:NAME:VALUE, such as "
        "month=900 or column:campaign:autumn=100. Rows beyond a budget are deferred.",
        variable="KREA_BUDGETS",
        metavar="SCOPE=CREDITS,…",
    )
    soft_budgets: list[str] = _setting(
        [],
        "Budgets that only warn and stop nothing, written as the budgets.",
        variable="KREA_SOFT_BUDGETS",
        metavar="SCOPE=CREDITS,…",
    )
    spend_threshold: float = _setting(
        THRESHOLD,
        "How many standard deviations spend must differ from the usual one to be a warning. Less "
        "finds more, and warns without cause more often.",
        variable="KREA_SPEND_THRESHOLD",
        metavar="N",
        ge=1,
        le=100,
    )
    credit_prices: list[str] = _setting(
        [str(PUBLISHED)],
        "What a credit costs: the credits that one unit of a currency buys, from a day on, such as "
        "68/USD,2026-10-01=60/EUR. A purchase has the price of its day.",
        variable="KREA_CREDIT_PRICES",
        metavar="[DAY=]CREDITS/CURRENCY,…",
    )
    balance_days: int = _setting(
        BALANCE_DAYS,
        "Days before the account's credits are expected to run out from which it is a warning.",
        variable="KREA_BALANCE_DAYS",
        metavar="DAYS",
        ge=1,
        le=365,
    )
    spend_by: list[str] = _setting(
        [],
        "Columns of the prompt table whose values are written with each purchase, such as a "
        "campaign, so that a later change of the table does not move what was spent.",
        variable="KREA_SPEND_BY",
        metavar="COLUMN,…",
    )
    spend_tags: list[str] = _setting(
        [],
        "Tags of Dagster runs whose values are kept with the purchases of the run.",
        variable="KREA_SPEND_TAGS",
        metavar="TAG,…",
    )
    timezone: str = _setting(
        "UTC",
        "Time zone of the days, weeks and months that `spend` shows, such as Europe/Berlin. "
        "Budgets and the table spend_daily have UTC days.",
        variable="KREA_TIMEZONE",
        metavar="ZONE",
    )
    callback_base_url: str = _setting(
        "",
        "Public https:// address of `krea-dagster callbacks serve`. EvoLink then reports finished "
        "tasks, and few of them are polled. Empty: no callbacks.",
        variable="KREA_CALLBACK_BASE_URL",
        metavar="URL",
    )
    patience_s: float = _setting(
        1800.0,
        "Seconds after its submission that a run waits for a task. Then the run detaches, and the "
        "next run takes the task up again.",
        gt=0,
        le=30 * 86_400,
    )
    outage_patience_s: float = _setting(
        300.0,
        "Seconds that a run waits for EvoLink's API, the journal's database or the storage root "
        "when they are unavailable. It buys nothing meanwhile; then it ends.",
        ge=0,
        le=86_400,
    )
    timeout_s: float = _setting(60.0, "Timeout of a call to EvoLink, in seconds.", gt=0, le=3600)
    download_timeout_s: float = _setting(
        60.0, "Seconds without a byte after which a download is aborted.", gt=0, le=86_400
    )


class ConnectionSettings(SharedSettings):
    """Where to buy, and where to keep what was bought: the settings of ``KreaResource``."""

    api_key: str = _setting(
        "", "EvoLink API key. Not needed with the emulator.", variable="EVOLINK_API_KEY", repr=False
    )
    emulator: bool = _setting(
        False,
        "Use an emulator on this machine instead of base_url: the images are synthetic, and "
        "nothing is charged.",
    )
    journal_url: str = _setting(
        "",
        "SQLAlchemy URL of the journal. Empty: SQLite in the storage root, if that is a folder. "
        "Runs that share a journal never buy the same image twice.",
        variable="KREA_JOURNAL_URL",
        metavar="URL",
        repr=False,
    )
    callback_secret: str = _setting(
        "",
        "Secret of the callback addresses, at least 32 characters, the same as the receiver's.",
        variable="KREA_CALLBACK_SECRET",
        repr=False,
    )

    @property
    def synthetic(self) -> bool:
        """Whether images come from an emulator, on this machine or its network."""
        return self.emulator or url_parts(self.base_url).scheme == "http"

    @property
    def origin(self) -> str:
        """The host that images are bought from; all emulators are one origin."""
        return "an emulator" if self.synthetic else url_parts(self.base_url).hostname or ""


class Settings(ConnectionSettings):
    """All settings of ``Krea``: also the prompt table."""

    prompts: str = _setting(
        "data/prompts.parquet",
        "Prompt table: a Parquet, CSV or JSONL file, a folder of Parquet files, a Delta or Iceberg "
        "table, or a URL.",
        variable="KREA_PROMPTS",
        metavar="FILE|FOLDER|URL",
        repr=False,
    )
    prompts_options: dict[str, Any] = _setting(
        {},
        "How fsspec opens a prompt table behind a URL. Empty: as the storage root, if that is of "
        "the same kind.",
        variable="KREA_PROMPTS_OPTIONS",
        metavar="JSON",
        repr=False,
    )
    prompt_columns: list[str] = _setting(
        [],
        "Columns of the prompt table that are read under another name, such as text=prompt, and "
        "columns that are only copied to the manifest although their names suggest more, such as "
        "n or Seed.",
        variable="KREA_PROMPT_COLUMNS",
        metavar="COLUMN=NAME,…",
    )
    partition_by: str = _setting(
        "hash:8",
        "How the table is partitioned: hash:N, column:NAME, day:NAME, week:NAME or month:NAME.",
        variable="KREA_PARTITION_BY",
        metavar="HOW",
    )
    partitions_per_run: int | None = _setting(
        None,
        "Maximum partitions of a backfill's run, so that several workers share a backfill. By "
        "default one run has them all.",
        variable="KREA_PARTITIONS_PER_RUN",
        metavar="N",
        ge=1,
        le=100_000,
    )
    collect: str = _setting(
        "wait",
        "wait: a Dagster run waits for its images. later: it submits and ends, and a sensor "
        "launches the runs that collect.",
        variable="KREA_COLLECT",
        metavar="wait|later",
        pattern="^(wait|later)$",
    )

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Read the variables; an unset or empty one has its default.

        Without a key, and with no emulator's address in ``EVOLINK_BASE_URL``, the images come from
        an emulator on this machine. Raises ConfigError, which names the variable.
        """
        given = os.environ if environ is None else environ
        texts = {
            name: given[variable]
            for name, field in cls.model_fields.items()
            if given.get(variable := variable_of(field))
        }
        values: dict[str, Any] = {
            name: _read(text, cls.model_fields[name], name) for name, text in texts.items()
        }
        for name in ("prompts", "storage"):
            values[name] = _absolute(values.get(name) or cls.model_fields[name].default)
        if not values.get("api_key"):
            is_emulator = url_parts(values.get("base_url", "")).scheme == "http"
            values |= {"api_key": EMULATOR_KEY} if is_emulator else {"emulator": True}
        return cls(**values)


def variable_of(field: FieldInfo) -> str:
    """Return the environment variable of a setting; empty if it has none."""
    extra = field.json_schema_extra
    return str(extra["variable"]) if isinstance(extra, dict) else ""


def metavar_of(field: FieldInfo) -> str:
    """Return how the command line shows the value of a setting."""
    extra = field.json_schema_extra
    return str(extra["metavar"]) if isinstance(extra, dict) else ""


def _read(text: str, field: FieldInfo, name: str) -> Any:
    variable = variable_of(field)
    match name:
        case "on_unknown" | "collect":
            choices = metavar_of(field).split("|")
            if text not in choices:
                raise ConfigError(f"{variable} is {text!r}; use {' or '.join(choices)}")
        case "base_url":
            return _api_root(text, variable)
        case "callback_base_url":
            return without_secret(text, variable)
        case "max_in_flight" | "partitions_per_run" | "spend_threshold" | "balance_days":
            return _number(text, field, variable)
        case "run_credits" | "day_credits":
            return credits_from_units(parse_cap(text, variable))
        case "budgets" | "soft_budgets" | "credit_prices":
            return _checked(text, variable, name)
        case "prompt_columns" | "spend_by" | "spend_tags":
            return _names(text)
        case "storage_options" | "prompts_options":
            return parse_options(text, variable)
    return text


def _absolute(place: str) -> str:
    return place if "://" in place else str(Path(place).absolute())


def _api_root(text: str, variable: str) -> str:
    url = url_parts(text) if text.isprintable() else url_parts("")
    if url.scheme not in ("http", "https") or not url.hostname or " " in url.hostname:
        default = SharedSettings.model_fields["base_url"].default
        raise ConfigError(f"{variable} is {redact.address(text)!r}; use a URL such as {default}")
    return without_secret(text, variable)


def holds_secret(place: str) -> bool:
    """Return whether a path or URL holds a user, a password, a query or a fragment."""
    return redact.location(place) != place


def without_secret(url: str, variable: str) -> str:
    """Return a URL that may be shown. Raises ConfigError if it holds a secret."""
    if holds_secret(url):
        raise ConfigError(
            f"{variable} contains a user, a password, a query or a fragment; use "
            f"{redact.location(url)}"
        )
    return url


def _number(text: str, field: FieldInfo, variable: str) -> float:
    """Parse a number within the bounds of a setting. Raises ConfigError."""
    (least,) = (bound.ge for bound in field.metadata if hasattr(bound, "ge"))
    (most,) = (bound.le for bound in field.metadata if hasattr(bound, "le"))
    if not isinstance(field.default, float):
        return parse_whole_number(text, variable, most=most)
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) or not least <= float(text) <= most:
        raise ConfigError(f"{variable} is {text[:60]!r}; use a number from {least} to {most}")
    return float(text)


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _checked(text: str, variable: str, name: str) -> list[str]:
    """Return a list of budgets, or of prices, that can be parsed."""
    given = _names(text)
    try:
        if name == "credit_prices":
            CreditPrices.parse(given)
        else:
            list(map(Budget.parse, given))
    except ConfigError as error:
        raise ConfigError(f"{variable}: {error}") from None
    return given
