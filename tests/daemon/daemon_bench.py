"""A real ``dagster dev`` on an instance on disk, driven as the UI drives it: by GraphQL."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

import dagster as dg
import httpx
from dagster._core.execution.backfill import BULK_ACTION_TERMINAL_STATUSES

from tests.dagster_bench import end_group

#: Seconds in which sensors, automation and run queue have all looked at least twice.
_QUIET_S = 11.0
#: Seconds after which something hangs: on a busy machine most takes several times as long.
_MOST_S = 600.0

ROOT = Path(__file__).parents[2]

#: Runs are waited for, not polled from a queue; the rest is Dagster as it is installed.
_SETTINGS = """\
telemetry:
  enabled: false
nux:
  enabled: false
"""

#: A code location with the automation as it is shipped, but for shorter intervals.
DEFINITIONS = """\
import os
import dagster as dg
from krea_dagster import (
    KreaManifestIOManager, KreaResource, PromptTable, build_krea_assets, on_prompts_changed,
)
from krea_dagster.plugin.names import Names
from krea_dagster.plugin.sensors.prompts import build_automation_sensor, build_prompts_sensor
from krea_dagster.plugin.sensors.collect import build_collect_sensor
from krea_dagster.prompts import parse_partition_by

table = PromptTable(os.environ["TABLE"], parse_partition_by(os.environ["PARTITION_BY"]))
width = int(os.environ["WIDTH"])
automated = os.environ["AUTOMATED"] == "yes"
made = build_krea_assets(
    table,
    backfill_policy=dg.BackfillPolicy.multi_run(width) if width else None,
    automation_condition=on_prompts_changed() if automated else None,
    collect_later=os.environ["COLLECT"] == "later",
)
sensors = [
    build_prompts_sensor(Names(), table, made.partitions_def, minimum_interval_s=1),
    build_automation_sensor(
        [made.images, made.image_manifest], name="krea_automation", minimum_interval_s=1
    ),
]
collecting = [build_collect_sensor(Names(), minimum_interval_s=1)]
storage = os.environ["STORAGE"]
callbacks = {}
if "CALLBACK_BASE_URL" in os.environ:
    callbacks = {
        "callback_base_url": os.environ["CALLBACK_BASE_URL"],
        "callback_secret": dg.EnvVar("CALLBACK_SECRET"),
    }
defs = dg.Definitions(
    assets=made.all,
    jobs=[dg.define_asset_job("krea_images", selection=[made.images, made.image_manifest])],
    sensors=sensors if automated else collecting if os.environ["COLLECT"] == "later" else [],
    resources={
        "krea": KreaResource(
            api_key=dg.EnvVar("DAEMON_KEY"), base_url=os.environ["BASE_URL"], storage=storage,
            **callbacks,
        ),
        "krea_manifest": KreaManifestIOManager(storage=storage),
    },
    executor=dg.in_process_executor,
)
"""


@dataclass(frozen=True)
class Dagster:
    """A running ``dagster dev``: its web server's GraphQL, and the instance on disk."""

    folder: Path
    url: str
    instance: dg.DagsterInstance
    process: subprocess.Popen[bytes]

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        """The answer of a GraphQL query or mutation."""
        answer = httpx.post(
            f"{self.url}/graphql",
            json={"query": dedent(query), "variables": variables},
            timeout=60.0,
            trust_env=False,
        ).json()
        assert "errors" not in answer, answer
        data: dict[str, Any] = answer["data"]
        return data

    def wait(self, what: Callable[[], bool], seconds: float = _MOST_S) -> None:
        """Wait until it is so."""
        until_s = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < until_s, self.log()
            time.sleep(0.2)

    def log(self) -> str:
        """The last that it wrote."""
        return (self.folder / "dagster.log").read_text()[-6000:]

    def runs(self) -> list[dg.DagsterRun]:
        """All runs, the oldest first."""
        return list(reversed(self.instance.get_runs()))

    def wait_until_quiet(self, seconds: float = _MOST_S) -> None:
        """Wait until nothing runs or is about to, for as long as sensors and daemon need to look.

        They look every one to five seconds.
        """
        until_s = time.monotonic() + seconds
        quiet_since_s = time.monotonic()
        while time.monotonic() - quiet_since_s < _QUIET_S:
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < until_s, self.log()
            if not self._idle():
                quiet_since_s = time.monotonic()
            time.sleep(0.5)

    def _idle(self) -> bool:
        backfills = self.instance.get_backfills()
        return all(run.is_finished for run in self.runs()) and all(
            backfill.status in BULK_ACTION_TERMINAL_STATUSES for backfill in backfills
        )

    def backfill(
        self,
        partitions: list[str],
        assets: Sequence[Sequence[str]] = (["images"], ["image_manifest"]),
    ) -> str:
        """Launch a backfill as the button does; its id."""
        data = self.ask(
            """
            mutation($params: LaunchBackfillParams!) {
              launchPartitionBackfill(backfillParams: $params) {
                __typename
                ... on LaunchBackfillSuccess { backfillId }
                ... on PythonError { message }
              }
            }
            """,
            params={
                "assetSelection": [{"path": list(path)} for path in assets],
                "partitionNames": partitions,
            },
        )["launchPartitionBackfill"]
        return str(data["backfillId"])

    def backfill_status(self, backfill_id: str) -> str:
        """How a backfill stands."""
        data = self.ask(
            "query($id: String!) { partitionBackfillOrError(backfillId: $id) "
            "{ ... on PartitionBackfill { status } } }",
            id=backfill_id,
        )
        return str(data["partitionBackfillOrError"]["status"])

    def launch(
        self,
        partition: str | None = None,
        tags: Mapping[str, str] | None = None,
        *,
        job: str = "krea_images",
    ) -> str:
        """Launch a job as the launchpad does, for one partition if it has any; the run's id."""
        given = {**({"dagster/partition": partition} if partition else {}), **(tags or {})}
        data = self.ask(
            """
            mutation($params: ExecutionParams!) {
              launchRun(executionParams: $params) {
                __typename
                ... on LaunchRunSuccess { run { runId } }
                ... on PythonError { message }
              }
            }
            """,
            params={
                "selector": {
                    "repositoryLocationName": "location.py",
                    "repositoryName": "__repository__",
                    "jobName": job,
                },
                "runConfigData": {},
                "executionMetadata": {
                    "tags": [{"key": key, "value": value} for key, value in given.items()]
                },
            },
        )["launchRun"]
        return str(data["run"]["runId"])


@contextmanager
def dagster_dev(
    folder: Path,
    *,
    base_url: str,
    api_key: str,
    partition_by: str,
    automated: bool = False,
    width: int = 0,
    settings: str = "",
    collect: str = "wait",
    callbacks: Mapping[str, str] | None = None,
    definitions: str = DEFINITIONS,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Dagster]:
    """Run ``dagster dev`` over a code location of one table, and end it.

    ``collect`` is ``wait`` or ``later``; ``callbacks`` are the variables of a receiver, and
    ``variables`` those of ``definitions``.
    """
    home = folder / "home"
    home.mkdir(parents=True)
    (home / "dagster.yaml").write_text(_SETTINGS + settings)
    (folder / "location.py").write_text(definitions)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "DAGSTER_HOME": str(home),
        "TABLE": str(folder / "prompts.parquet"),
        "PARTITION_BY": partition_by,
        "WIDTH": str(width),
        "AUTOMATED": "yes" if automated else "no",
        "STORAGE": str(folder / "krea"),
        "DAEMON_KEY": api_key,
        "BASE_URL": base_url,
        "COLLECT": collect,
        **(callbacks or {}),
        **(variables or {}),
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    command = [Path(sys.executable).with_name("dagster"), "dev", "-f", "location.py"]
    url = f"http://127.0.0.1:{port}"
    # Opened first: two processes that make its database at once would be in each other's way.
    with (
        dg.DagsterInstance.from_config(str(home)) as instance,
        (folder / "dagster.log").open("wb") as log,
    ):
        process = subprocess.Popen(
            [*map(str, command), "-h", "127.0.0.1", "-p", str(port)],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            running = Dagster(folder, url, instance, process)
            running.wait(lambda: _answers(url))
            yield running
        finally:
            end_group(process)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/server_info", timeout=2.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
