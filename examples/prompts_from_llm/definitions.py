"""Prompts that a language model writes for topics, bought by automation topic by topic.

``python examples/prompts_from_llm/definitions.py``. ``ask`` stands for the call of the model, and
``automation`` does by hand what Dagster's daemon does where it runs.
"""

import json
import os
import warnings
from itertools import count
from pathlib import Path

import dagster as dg
import pandas as pd

from krea_dagster import KreaResource, build_krea_definitions, on_prompts_changed

FOLDER = Path(os.environ.get("EXAMPLE_FOLDER", "data/examples/prompts_from_llm")).absolute()
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
calls = count(1)


def ask(topic: str) -> list[str]:
    """Stands for a language model: each answer has other words than the one before."""
    call = next(calls)
    return [f"{topic}, {view}, draft {call}" for view in ("from above", "at night")]


@dg.asset
def llm_prompts() -> list[dict[str, str]]:
    """Two prompts for each topic. A topic that has an answer is not asked for again.

    Otherwise each materialization would bring other prompts, and so other images to buy.
    """
    kept = FOLDER / "answers.json"
    answers = json.loads(kept.read_text()) if kept.exists() else {}
    for topic in (FOLDER / "topics.txt").read_text().splitlines():
        if topic not in answers:
            answers[topic] = ask(topic)
    kept.write_text(json.dumps(answers))
    return [
        {"prompt_id": f"{topic}-{number}", "prompt": prompt, "topic": topic}
        for topic, prompts in answers.items()
        for number, prompt in enumerate(prompts)
    ]


images = build_krea_definitions(
    prompts=llm_prompts,
    partition_by="column:topic",  # the sensor adds a partition for each new topic
    # A model that writes too much stops at this: the other rows are left for later.
    krea=KreaResource(emulator=True, storage=str(FOLDER / "krea"), run_credits=10),
    automation_condition=on_prompts_changed(),
    checks=(),
)
defs = dg.Definitions.merge(
    images,
    dg.Definitions(
        assets=[llm_prompts],
        jobs=[dg.define_asset_job("write_prompts", selection=[llm_prompts])],
        resources={"io_manager": dg.FilesystemIOManager(base_dir=str(FOLDER / "values"))},
    ),
)


class Automation:
    """Does the work of Dagster's daemon: the sensor, the condition, and the runs."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self.instance = instance
        self.evaluated: dg.EvaluateAutomationConditionsResult | None = None

    def launched(self) -> list[str]:
        """Return the topics that the condition launches, after a tick of the sensor."""
        context = dg.build_sensor_context(
            self.instance, repository_def=defs.get_repository_def(), resources=defs.resources
        )
        tick = defs.resolve_sensor_def("krea_prompts").evaluate_tick(context)
        for request in tick.dynamic_partitions_requests or ():
            self.instance.add_dynamic_partitions(
                request.partitions_def_name, list(request.partition_keys)
            )
        for event in tick.asset_events:
            self.instance.report_runless_asset_event(event)
        cursor = self.evaluated.cursor if self.evaluated else None
        self.evaluated = dg.evaluate_automation_conditions(defs, self.instance, cursor=cursor)
        return sorted(map(str, self.evaluated.get_requested_partitions(dg.AssetKey("images"))))

    def run(self, job: str, partition: str | None = None) -> None:
        """Run a job, for a topic if it has partitions."""
        defs.resolve_job_def(job).execute_in_process(
            instance=self.instance, partition_key=partition, run_config=QUIET
        )


def play() -> None:
    """Write prompts three times: for two topics, for the same, and for one more."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with dg.DagsterInstance.local_temp() as instance:
        automation = Automation(instance)
        for topics in (["a lighthouse", "a market"],) * 2 + (
            ["a lighthouse", "a market", "a fox"],
        ):
            (FOLDER / "topics.txt").write_text("\n".join(topics))
            automation.run("write_prompts")
            launched = automation.launched()
            for topic in launched:
                automation.run("krea_images", topic)
            total = len(pd.read_parquet(FOLDER / "krea" / "manifest"))
            print(f"{len(topics)} topics: launched {launched}, {total} images in all")


if __name__ == "__main__":
    # Evaluating conditions by hand is beta in Dagster; its daemon does the same.
    warnings.simplefilter("ignore", dg.BetaWarning)
    play()
