"""The Dagster side of the package: assets, checks, sensors, and the component."""

from dagster_shared.libraries import DagsterLibraryRegistry

from krea_dagster import __version__

DagsterLibraryRegistry.register("krea-dagster", __version__, is_dagster_package=False)
