"""The use cases, without Dagster."""
