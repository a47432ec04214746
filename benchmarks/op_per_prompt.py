"""A Dagster job with one op per prompt, as the tutorials have it: dynamic outputs and requests.

    python -m benchmarks.op_per_prompt --url URL --images 20 --folder FOLDER [--in-process]

Run with Dagster's own default: every step in a process of its own, one per core at a time.
"""

# Without the import of annotations: Dagster cannot read them as text.

import json
import os
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import requests

from benchmarks.baselines import PATH, TASKS, body_of

POLL_S = 0.5


@dg.op(out=dg.DynamicOut(int))
def prompts() -> Iterator[dg.DynamicOutput[int]]:
    """One output per prompt."""
    for number in range(int(os.environ["BENCH_IMAGES"])):
        yield dg.DynamicOutput(number, mapping_key=f"p{number}")


@dg.op
def image(number: int) -> None:
    """Buy, wait for, and fetch one image."""
    url, headers = os.environ["BENCH_URL"], {"Authorization": "Bearer bench"}
    answer = requests.post(url + PATH, json=body_of(number), headers=headers, timeout=60)
    answer.raise_for_status()
    task = answer.json()
    while task["status"] != "completed":
        time.sleep(POLL_S)
        answer = requests.get(url + TASKS + task["id"], headers=headers, timeout=60)
        answer.raise_for_status()
        task = answer.json()
    file = requests.get(task["results"][0], timeout=60)
    file.raise_for_status()
    (Path(os.environ["BENCH_FOLDER"]) / f"{number}.jpg").write_bytes(file.content)


@dg.job
def op_per_prompt() -> None:
    """All prompts."""
    prompts().map(image)


def main() -> None:
    """Run the command."""
    add = ArgumentParser(prog="python -m benchmarks.op_per_prompt")
    add.add_argument("--url", required=True)
    add.add_argument("--images", type=int, required=True)
    add.add_argument("--folder", type=Path, required=True)
    options = add.parse_args()
    os.environ["BENCH_URL"] = options.url
    os.environ["BENCH_IMAGES"] = str(options.images)
    os.environ["BENCH_FOLDER"] = str(options.folder)
    home = options.folder / "dagster"
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")
    quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
    began_s = time.monotonic()
    with dg.DagsterInstance.from_config(str(home)) as instance:
        dg.execute_job(
            dg.reconstructable(op_per_prompt),
            instance=instance,
            run_config=quiet,
            raise_on_error=True,
        )
    wall_s = time.monotonic() - began_s
    delivered = sum(1 for _ in options.folder.glob("*.jpg"))
    print(json.dumps({"delivered": delivered, "wall_s": wall_s}))


if __name__ == "__main__":
    # By its own name: the steps' processes import the module that the job says it is in.
    from benchmarks import op_per_prompt as by_name

    by_name.main()
