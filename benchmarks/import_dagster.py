"""The least that a command of a Dagster project does: python -m benchmarks.import_dagster."""

import dagster

assert dagster.__version__
