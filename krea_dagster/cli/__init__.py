"""The command ``krea-dagster``: parse, call the application, print."""

from krea_dagster.cli.main import main, run

__all__ = ["main", "run"]
