"""New prompts each day, bought by a schedule and a sensor; three days, played in seconds.

``python examples/daily_prompts/play.py``. ``Player`` does by hand what Dagster's daemon does where
it runs: it ticks the sensor, evaluates the condition, and ticks the schedule.
"""

import os
import warnings
from collections.abc import Iterable
from datetime import date, datetime, timedelta, timezone
from pathlib import Path

import dagster as dg
import pandas as pd

from krea_dagster import (
    KreaResource,
    build_krea_definitions,
    build_krea_schedule,
    on_prompts_changed,
)

#: The new rows of each day: the day that a prompt is for, and the prompt.
DAYS = {
    "2025-03-03": [("2025-03-03", "a tram in the rain"), ("2025-03-03", "a kite over stubble")],
    "2025-03-04": [("2025-03-04", "three lemons and a jug")],
    # The third day also brings a late prompt for the first.
    "2025-03-05": [("2025-03-05", "a fox in the snow"), ("2025-03-03", "a tram depot at night")],
}
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


def build(folder: Path) -> dg.Definitions:
    """Return the code location: a table by day, an automation, and a schedule."""
    images = build_krea_definitions(
        prompts=str(folder / "prompts.parquet"),
        partition_by="day:day",
        start=min(DAYS),
        krea=KreaResource(emulator=True, storage=str(folder / "krea")),
        automation_condition=on_prompts_changed(),
        checks=(),
    )
    return dg.Definitions.merge(images, dg.Definitions(schedules=[build_krea_schedule(images)]))


class Player:
    """Does the work of Dagster's daemon, with its own clock."""

    def __init__(self, folder: Path, instance: dg.DagsterInstance) -> None:
        self.defs, self.instance = build(folder), instance
        self.evaluated: dg.EvaluateAutomationConditionsResult | None = None

    def changed(self, at: datetime) -> list[str]:
        """Tick the sensor of the prompts, and return the partitions that the condition launches."""
        context = dg.build_sensor_context(self.instance, resources=self.defs.resources)
        tick = self.defs.resolve_sensor_def("krea_prompts").evaluate_tick(context)
        for event in tick.asset_events:
            self.instance.report_runless_asset_event(event)
        self.evaluated = dg.evaluate_automation_conditions(
            self.defs,
            self.instance,
            evaluation_time=at,
            cursor=self.evaluated.cursor if self.evaluated else None,
        )
        launched = self.evaluated.get_requested_partitions(dg.AssetKey("images"))
        return sorted(partition for partition in launched if partition is not None)

    def scheduled(self, at: datetime) -> list[str]:
        """Tick the schedule, and return the partitions that it launches."""
        context = dg.build_schedule_context(self.instance, scheduled_execution_time=at)
        tick = self.defs.resolve_schedule_def("krea_schedule").evaluate_tick(context)
        return [
            request.tags["dagster/asset_partition_range_start"]
            for request in tick.run_requests or ()
        ]

    def run(self, partitions: Iterable[str]) -> list[str]:
        """Run the job for these partitions, and return the prompts that were bought."""
        job = self.defs.resolve_job_def("krea_images")
        bought: list[str] = []
        for partition in partitions:
            result = job.execute_in_process(
                run_config=QUIET, instance=self.instance, partition_key=partition
            )
            (made,) = result.asset_materializations_for_node("image_manifest")
            manifest = pd.read_parquet(str(made.metadata["krea/path"].value))
            bought += manifest.query("run_id == @result.run_id")["prompt"].tolist()
        return bought


def play(folder: Path) -> None:
    """Play the days: write the prompts, run the launched partitions, and print what was bought."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, str]] = []
    with dg.DagsterInstance.local_temp(str(folder)) as instance:
        player = Player(folder, instance)
        for day, new in DAYS.items():
            rows += new
            pd.DataFrame(rows, columns=["day", "prompt"]).to_parquet(folder / "prompts.parquet")
            noon = datetime.combine(date.fromisoformat(day), datetime.min.time(), timezone.utc)
            noon += timedelta(hours=12)
            launched = player.changed(noon)
            print(f"{day} the sensor saw {launched}, bought {player.run(launched)}")
            launched = player.scheduled(noon + timedelta(hours=12))
            print(f"{day} the schedule took {launched}, bought {player.run(launched)}")


if __name__ == "__main__":
    # Evaluating conditions by hand is beta in Dagster; its daemon does the same.
    warnings.simplefilter("ignore", dg.BetaWarning)
    play(Path(os.environ.get("EXAMPLE_FOLDER", "data/examples/daily_prompts")).absolute())
