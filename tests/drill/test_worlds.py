"""Worlds in which the drill is held: what happens in each, and what the package makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import anyio
import pytest
from click.testing import CliRunner

from krea_dagster.drill.command import drill_command
from krea_dagster.drill.drill import DrillResult, drill
from krea_dagster.drill.edges import UNANSWERED
from krea_dagster.drill.instrumented import ShiftedClock
from krea_dagster.drill.job import DrillPaths, WorkerJob
from krea_dagster.drill.plan import KILL_FAULTS, DrillPlan
from krea_dagster.drill.worlds import WORLDS, WorldEpisode, WorldPart, on_host

#: Small enough for a test, and with an episode of each kind.
PLAN = DrillPlan(
    requests=24, kills=5, rates=dict.fromkeys(KILL_FAULTS, 0.01), hung_after_s=20.0, seed=1
)

#: The process namespace of the process that reads it.
PROCESSES = "/proc/self/ns/pid"


def run(plan: DrillPlan, folder: Path) -> DrillResult:
    return anyio.run(drill, plan, folder)


@pytest.mark.parametrize(
    ("world", "number"),
    [
        pytest.param(name, number, id=f"{name}-{number + 1}")
        for name, world in WORLDS.items()
        for number in range(len(world.parts))
        if name != "plain"  # test_drill.py
    ],
)
def test_in_an_odd_world_nothing_is_bought_twice_or_lost(
    world: str, number: int, tmp_path: Path
) -> None:
    if lacking := WORLDS[world].lacking():
        pytest.skip(lacking)
    result = run(PLAN.of(WORLDS[world].parts[number]), tmp_path)
    assert result.violations == []


def test_a_worker_that_refuses_an_odd_world_is_counted_and_the_mended_one_is_finished(
    tmp_path: Path,
) -> None:
    def lose(paths: DrillPaths, _number: int) -> None:
        paths.journal.parent.rename(paths.folder / "lost")

    def find(paths: DrillPaths, _number: int, *, refused: bool) -> None:
        assert refused
        assert not paths.journal.exists()
        (paths.folder / "lost").rename(paths.journal.parent)

    part = WorldPart(episode=WorldEpisode(enter=lose, leave=find))
    result = run(PLAN.of(part), tmp_path)
    assert result.violations == []
    assert (result.counts.episodes, result.counts.refused, result.counts.stopped) == (1, 1, 0)
    assert "but the journal that bought them" in (tmp_path / "workers.log").read_text()


def test_a_stored_image_that_is_written_again_in_an_episode_is_a_violation(tmp_path: Path) -> None:
    def write_again(paths: DrillPaths, _number: int) -> None:
        for image in (paths.storage / "images").glob("??/*"):
            content = image.read_bytes()
            image.unlink()
            image.write_bytes(content)

    result = run(PLAN.of(WorldPart(episode=WorldEpisode(enter=write_again))), tmp_path)
    assert result.counts.overwritten
    assert result.violations == [f"{len(result.counts.overwritten)} stored images overwritten"]


@pytest.mark.parametrize("policy", ["replay", "hold"])
def test_a_worker_is_killed_while_the_server_keeps_its_answer_back(
    policy: str, tmp_path: Path
) -> None:
    plan = replace(PLAN, kills=2, edges=(UNANSWERED,), rates={}, on_unknown=policy)  # type: ignore[arg-type]  # one of the two
    result = run(replace(plan, honours_key=policy == "replay"), tmp_path)
    assert result.violations == []
    assert result.counts.kills == {UNANSWERED: 2}
    assert any(one.charged for one in result.reconciliation.unknown) == (policy == "hold")


def test_the_command_tells_of_each_world_and_of_all(tmp_path: Path) -> None:
    arguments = ["--world=plain", "--world=server", "--requests=20", "--kills=5", "--json"]
    done = CliRunner().invoke(drill_command, [*arguments, f"--keep={tmp_path}"])
    figures = json.loads(done.stdout)
    assert figures == json.loads((tmp_path / "drill.json").read_text())
    assert [one["world"] for one in figures["worlds"]] == ["plain", "server", "server", "server"]
    assert [one["requests"] for one in figures["worlds"]] == [20, 8, 8, 4]
    assert figures["passed"] == all(one["passed"] for one in figures["worlds"])
    assert done.exit_code == (0 if figures["passed"] else 1)
    held = figures["worlds"][2]
    assert (held["policy"], held["server_honours_idempotency_key"]) == ("hold", False)
    assert (held["lost"], held["bought_twice"]) == ([], [])


def test_a_world_for_which_the_machine_lacks_something_is_skipped_and_says_why() -> None:
    arguments = ["--world=two-hosts", "--world=full-disk"]
    done = CliRunner().invoke(drill_command, arguments, env={"PATH": ""})
    assert done.exit_code == 0, done.output
    assert "two-hosts: skipped, it needs Linux, root and unshare --uts --pid" in done.stdout
    assert "full-disk: skipped, it needs Linux, root and mount -t tmpfs" in done.stdout


def test_the_help_names_every_world_and_what_is_odd_in_it() -> None:
    said = CliRunner().invoke(drill_command, ["--help"]).output
    assert all(f"  {name:12} {world.description}" in said for name, world in WORLDS.items())


def test_the_storm_is_a_drill_of_its_own() -> None:
    done = CliRunner().invoke(drill_command, ["--storm", "--world=clock"])
    assert (done.exit_code, "leave out --world" in done.stderr) == (2, True)


def test_the_parts_of_a_world_share_its_requests_and_kills() -> None:
    plan = DrillPlan(requests=1000, kills=200, rates={"500": 0.1})
    for name, world in WORLDS.items():
        parts = [plan.of(part) for part in world.parts]
        assert sum(part.requests for part in parts) <= 1000, name
        assert sum(part.kills for part in parts) <= 200, name
        assert all(part.kills == 0 and not part.rates for part in parts if not part.part.kills)


def test_a_host_has_a_name_and_processes_of_its_own() -> None:
    if lacking := WORLDS["two-hosts"].lacking():
        pytest.skip(lacking)
    says = "import os, socket as s; print(s.gethostname(), os.getpid(), os.readlink(PROCESSES))"
    command = on_host("krea-drill-x", [sys.executable, "-c", f"{PROCESSES=}; {says}"])
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    name, process, namespace = done.stdout.split()
    assert (name, process) == ("krea-drill-x", "1")
    assert namespace != str(Path(PROCESSES).readlink())


def test_a_wall_clock_is_ahead_and_is_set_when_it_was_looked_at_so_often() -> None:
    job = WorkerJob(1, "", "", 0, 0, 0.1, ahead_s=3600.0, step_s=-7200.0, step_after=3)
    clock = ShiftedClock(job)
    hour = timedelta(hours=1)
    ahead = [round((clock.now() - datetime.now(timezone.utc)) / hour) for _ in range(4)]
    assert ahead == [1, 1, -1, -1]
