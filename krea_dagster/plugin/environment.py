"""Reads the environment, once: the settings of definitions.py and of the command."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import dagster as dg
import httpx

from krea_dagster import redact
from krea_dagster.application.emulator_process import EMULATOR_KEY
from krea_dagster.engine.budget import Budget
from krea_dagster.errors import ConfigError
from krea_dagster.models import credits_from_units, parse_cap, parse_whole_number
from krea_dagster.plugin.definitions import build_krea_definitions
from krea_dagster.plugin.resource import KreaResource
from krea_dagster.prompts import PromptTable, parse_partition_by

KEY_VARIABLE: Final = "EVOLINK_API_KEY"
_SECRET_VARIABLE: Final = "KREA_CALLBACK_SECRET"  # noqa: S105 - the name of the variable


@dataclass(frozen=True)
class Settings:
    """What the environment says, with its defaults. Never holds the key or the secret itself."""

    has_key: bool
    base_url: str
    prompts: str = field(repr=False)
    storage: str = field(repr=False)
    journal_url: str = field(repr=False)
    partition_by: str
    max_in_flight: int
    on_unknown: str
    run_credits: float | None
    day_credits: float | None
    budgets: tuple[str, ...] = ()
    callback_base_url: str = ""
    has_callback_secret: bool = False
    collect_later: bool = False

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> "Settings":
        """Read the variables. Raises ConfigError, which names the variable."""
        values = os.environ if environ is None else environ
        on_unknown = values.get("KREA_ON_UNKNOWN") or "replay"
        if on_unknown not in ("replay", "hold"):
            raise ConfigError(f"KREA_ON_UNKNOWN is {on_unknown!r}; use replay or hold")
        callbacks = "KREA_CALLBACK_BASE_URL"
        collect = values.get("KREA_COLLECT") or "wait"
        if collect not in ("wait", "later"):
            raise ConfigError(f"KREA_COLLECT is {collect!r}; use wait or later")
        return cls(
            has_key=bool(values.get(KEY_VARIABLE)),
            base_url=_root(values, "EVOLINK_BASE_URL", "https://api.evolink.ai"),
            prompts=_absolute(values.get("KREA_PROMPTS") or "data/prompts.parquet"),
            storage=_absolute(values.get("KREA_STORAGE") or "data/krea"),
            journal_url=values.get("KREA_JOURNAL_URL") or "",
            partition_by=values.get("KREA_PARTITION_BY") or "hash:8",
            max_in_flight=_whole(values, "KREA_MAX_IN_FLIGHT", 64, most=4096),
            on_unknown=on_unknown,
            run_credits=_credits(values, "KREA_RUN_CREDITS"),
            day_credits=_credits(values, "KREA_DAY_CREDITS"),
            budgets=_budgets(values, "KREA_BUDGETS"),
            callback_base_url=_plain(values.get(callbacks) or "", callbacks),
            has_callback_secret=bool(values.get(_SECRET_VARIABLE)),
            collect_later=collect == "later",
        )

    @property
    def synthetic(self) -> bool:
        """Whether the pictures come from an emulator."""
        return not self.has_key or httpx.URL(self.base_url).scheme == "http"

    def resource(self) -> KreaResource:
        """The resource: EvoLink where there is a key, else an emulator on this machine."""
        key: str = ""
        if self.has_key:
            # Named, not read: Dagster shows the name of a variable and the text of a string.
            key = dg.EnvVar(KEY_VARIABLE)
        elif httpx.URL(self.base_url).scheme == "http":
            key = EMULATOR_KEY
        return KreaResource(
            api_key=key,
            base_url=self.base_url,
            emulator=not key,
            # A place with a password in it is named too.
            storage=self.storage if _is_plain(self.storage) else dg.EnvVar("KREA_STORAGE"),
            # Named as well: it may hold a password.
            journal_url=dg.EnvVar("KREA_JOURNAL_URL") if self.journal_url else "",
            max_in_flight=self.max_in_flight,
            on_unknown=self.on_unknown,
            run_credits=self.run_credits,
            day_credits=self.day_credits,
            budgets=list(self.budgets),
            callback_base_url=self.callback_base_url,
            callback_secret=dg.EnvVar(_SECRET_VARIABLE) if self.has_callback_secret else "",
        )

    def table(self) -> PromptTable:
        """The prompt table. Raises ConfigError for a partitioning that cannot be used."""
        return PromptTable(self.prompts, parse_partition_by(self.partition_by))

    def definitions(self) -> dg.Definitions:
        """The code location."""
        return build_krea_definitions(
            prompts=self.prompts,
            partition_by=self.partition_by,
            krea=self.resource(),
            collect_later=self.collect_later,
        )


def definitions_from_environment(environ: Mapping[str, str] | None = None) -> dg.Definitions:
    """Build the code location that the environment describes; unset variables have defaults.

    ``EVOLINK_API_KEY``, ``EVOLINK_BASE_URL``, ``KREA_PROMPTS``, ``KREA_STORAGE``,
    ``KREA_JOURNAL_URL``, ``KREA_PARTITION_BY``, ``KREA_MAX_IN_FLIGHT``, ``KREA_RUN_CREDITS``,
    ``KREA_DAY_CREDITS``, ``KREA_BUDGETS``, ``KREA_ON_UNKNOWN``, ``KREA_CALLBACK_BASE_URL``,
    ``KREA_CALLBACK_SECRET``, ``KREA_COLLECT``.
    Without a key the emulator is used, and the pictures are synthetic. Raises ConfigError.
    """
    return Settings.from_environment(environ).definitions()


def _absolute(place: str) -> str:
    return place if "://" in place else str(Path(place).absolute())


def _root(values: Mapping[str, str], name: str, default: str) -> str:
    text = values.get(name) or default
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, ValueError):  # the latter of an address that is none, such as [::1
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"{name} is {redact.address(text)!r}; use a URL such as {default}")
    return _plain(text, name)


def _is_plain(place: str) -> bool:
    return redact.location(place) == place


def _plain(url: str, name: str) -> str:
    """A URL that Dagster may show, because it holds no secret."""
    if not _is_plain(url):
        raise ConfigError(
            f"{name} holds a user, a password, a query or a fragment: {redact.location(url)} is "
            "what may stand there"
        )
    return url


def _whole(values: Mapping[str, str], name: str, default: int, *, most: int) -> int:
    text = values.get(name)
    return parse_whole_number(text, name, most=most) if text else default


def _budgets(values: Mapping[str, str], name: str) -> tuple[str, ...]:
    budgets = tuple(text.strip() for text in (values.get(name) or "").split(",") if text.strip())
    for budget in budgets:
        try:
            Budget.parse(budget)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    return budgets


def _credits(values: Mapping[str, str], name: str) -> float | None:
    text = values.get(name)
    return credits_from_units(parse_cap(text, name)) if text else None
