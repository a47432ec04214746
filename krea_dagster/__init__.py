"""Krea 2 Turbo images as Dagster assets: each bought once, verified, and accounted for.

``build_krea_definitions`` makes a code location from a prompt table and a ``KreaResource``, and
``KreaImages`` the same from YAML; ``build_krea_assets`` makes the assets alone.
``KreaResource.generate`` buys a few prompts in a custom asset. ``Krea`` is the application without
Dagster, for notebooks and scripts, and ``KreaClient`` the client of EvoLink's API.

A name is imported when it is first used: importing Dagster takes two seconds, and not everything
needs it. ``krea_dagster.plugin`` registers the library with Dagster.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from krea_dagster.api import KreaClient
    from krea_dagster.application.buy_options import BuyOptions
    from krea_dagster.application.curation import Curation
    from krea_dagster.application.krea import Krea
    from krea_dagster.application.settings import Settings
    from krea_dagster.curation.export.spec import ExportSpec
    from krea_dagster.curation.measures.custom import Measure
    from krea_dagster.errors import KreaError
    from krea_dagster.plugin.assets.images import KreaAssets, build_krea_assets
    from krea_dagster.plugin.checks import (
        build_failure_share_check,
        build_files_check,
        build_images_check,
        build_manifest_schema_check,
        build_spend_check,
    )
    from krea_dagster.plugin.component import KreaImages
    from krea_dagster.plugin.definitions import build_krea_definitions
    from krea_dagster.plugin.environment import definitions_from_environment
    from krea_dagster.plugin.failures import KreaFailure, failure_of
    from krea_dagster.plugin.io_manager import KreaManifestIOManager
    from krea_dagster.plugin.resource import KreaResource
    from krea_dagster.plugin.schedules import build_krea_schedule
    from krea_dagster.plugin.sensors.prompts import on_prompts_changed
    from krea_dagster.plugin.sensors.spend_alerts import build_spend_alerts
    from krea_dagster.plugin.tables import build_krea_tables
    from krea_dagster.prompts import Defaults, PromptTable, SqlTable
    from krea_dagster.spend.warnings.spend_warning import SpendWarning

__all__ = [
    "BuyOptions",
    "Curation",
    "Defaults",
    "ExportSpec",
    "Krea",
    "KreaAssets",
    "KreaClient",
    "KreaError",
    "KreaFailure",
    "KreaImages",
    "KreaManifestIOManager",
    "KreaResource",
    "Measure",
    "PromptTable",
    "Settings",
    "SpendWarning",
    "SqlTable",
    "build_failure_share_check",
    "build_files_check",
    "build_images_check",
    "build_krea_assets",
    "build_krea_definitions",
    "build_krea_schedule",
    "build_krea_tables",
    "build_manifest_schema_check",
    "build_spend_alerts",
    "build_spend_check",
    "definitions_from_environment",
    "failure_of",
    "on_prompts_changed",
]

_MODULES: Final = {
    "BuyOptions": "application.buy_options",
    "Curation": "application.curation",
    "Defaults": "prompts",
    "ExportSpec": "curation.export.spec",
    "Krea": "application.krea",
    "KreaAssets": "plugin.assets.images",
    "KreaClient": "api",
    "KreaError": "errors",
    "KreaFailure": "plugin.failures",
    "KreaImages": "plugin.component",
    "KreaManifestIOManager": "plugin.io_manager",
    "KreaResource": "plugin.resource",
    "Measure": "curation.measures.custom",
    "PromptTable": "prompts",
    "Settings": "application.settings",
    "SpendWarning": "spend.warnings.spend_warning",
    "SqlTable": "prompts",
    "build_failure_share_check": "plugin.checks",
    "build_files_check": "plugin.checks",
    "build_images_check": "plugin.checks",
    "build_krea_assets": "plugin.assets.images",
    "build_krea_definitions": "plugin.definitions",
    "build_krea_schedule": "plugin.schedules",
    "build_krea_tables": "plugin.tables",
    "build_manifest_schema_check": "plugin.checks",
    "build_spend_alerts": "plugin.sensors.spend_alerts",
    "build_spend_check": "plugin.checks",
    "definitions_from_environment": "plugin.environment",
    "failure_of": "plugin.failures",
    "on_prompts_changed": "plugin.sensors.prompts",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module."""
    if name == "__version__":
        from importlib.metadata import version

        return version("krea-dagster")
    try:
        module = _MODULES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    return getattr(import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
