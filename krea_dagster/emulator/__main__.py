"""Run the emulator: ``python -m krea_dagster.emulator``."""

from __future__ import annotations

from krea_dagster.emulator.command import emulator_command

if __name__ == "__main__":
    emulator_command(prog_name="python -m krea_dagster.emulator")
