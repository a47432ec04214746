"""The only folder that knows Dagster: turns the engine into assets, checks and sensors."""

from dagster_shared.libraries import DagsterLibraryRegistry

from krea_dagster import __version__

DagsterLibraryRegistry.register("krea-dagster", __version__, is_dagster_package=False)
