"""The code location that the environment describes: ``dagster dev -m krea_dagster.definitions``."""

from krea_dagster import definitions_from_environment

defs = definitions_from_environment()
