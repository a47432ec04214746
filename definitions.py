"""The code location of this folder: what the environment describes, see README.md."""

from krea_dagster import definitions_from_environment

defs = definitions_from_environment()
