"""Runs the command: ``python -m krea_dagster.cli``."""

from krea_dagster.cli.main import run

if __name__ == "__main__":
    run()
