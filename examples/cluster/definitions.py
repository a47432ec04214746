"""The code location of every process of the cluster: what its environment describes."""

from krea_dagster import definitions_from_environment

defs = definitions_from_environment()
