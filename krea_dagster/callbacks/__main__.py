"""Run the receiver: ``python -m krea_dagster.callbacks serve``."""

from __future__ import annotations

from krea_dagster.callbacks.command import callbacks_command

if __name__ == "__main__":
    callbacks_command(prog_name="python -m krea_dagster.callbacks")
