"""Whole runs on virtual time: some hundred scenarios are clean, repeat exactly, and find a bug."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from tests.simulation.loop import Stuck, VirtualLoop
from tests.simulation.mutations import MUTATIONS, Mutation, simulate
from tests.simulation.scenario import Kill, Run, Scenario, ScriptedFault, draw

_ROOT = Path(__file__).parents[2]

#: How many scenarios the suite plays; `make simulate` plays 10,000.
_SCENARIOS = 240


def _simulation(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.simulation", *arguments]
    return subprocess.run(
        command, cwd=_ROOT, env=dict(os.environ), capture_output=True, text=True, check=False
    )


def test_hundreds_of_scenarios_end_with_every_image_and_every_credit_in_its_place() -> None:
    ended = _simulation("--seeds", str(_SCENARIOS), "--processes", "2")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    counts = {what: int(n) for n, what in re.findall(r"^ +(\d+) (.+)$", ended.stdout, re.MULTILINE)}
    assert counts["ended stored"] > 3 * _SCENARIOS
    # The faults have really occurred.
    for what in ("event outcome_unknown", "event replaying", "callback", "clock set"):
        assert counts[what] > 10, what
    assert sum(n for what, n in counts.items() if what.startswith("killed")) > _SCENARIOS / 10
    assert sum(n for what, n in counts.items() if what.startswith("fault ")) > _SCENARIOS
    assert sum(n for what, n in counts.items() if what.startswith("journal ")) > 0
    assert sum(n for what, n in counts.items() if what.startswith("store ")) > 0


_SEEDS = (3, 12, 32)


def test_one_seed_is_one_scenario_however_often_it_is_told() -> None:
    seeds = [word for seed in _SEEDS for word in ("--seed", str(seed))]
    result = [_simulation(*seeds, "--lines") for _ in range(2)]
    assert result[0].returncode == 0, result[0].stdout
    assert result[0].stdout == result[1].stdout
    told = re.split(r"\nSeed \d+ passed.*\n", result[0].stdout)
    assert [len(one.splitlines()) > 20 for one in told] == [True] * len(_SEEDS) + [False]


def test_another_seed_is_another_scenario() -> None:
    assert len({str(draw(seed)) for seed in range(100)}) == 100


def test_a_bug_that_is_put_back_is_found_and_told_as_a_short_scenario() -> None:
    (mutation,) = [one for one in MUTATIONS if one.name == "claims-kept"]
    ended = simulate(mutation, "--seeds", "40", "--until", "1")
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "still claimed by" in ended.stdout
    scenario = ended.stdout.partition("Shortest scenario with the same failure:")[2]
    events = re.findall(r"^- ", scenario, re.MULTILINE)
    assert 1 <= len(events) <= 2
    assert re.search(r"make simulate SEED=\d+", scenario)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda one: one.name)
def test_each_bug_can_be_put_back_into_the_present_text(mutation: Mutation) -> None:
    for name, old, _ in mutation.changes:
        assert old in (_ROOT / "krea_dagster" / name).read_text()


def test_a_scenario_is_told_in_words() -> None:
    run = Run(1, (0,), on_unknown="hold")
    strike = ScriptedFault(2.0, "drop_after_create", 3)
    scenario = Scenario(1, draw(1).rows[:1], draw(1).server, (run, Kill(1, 7, "after"), strike))
    assert str(scenario).splitlines()[-3:] == [
        (
            "- 0.0 s after the beginning, run 1 wants the rows [0], it holds unknown outcomes; 16 "
            "at once, patience 600 s"
        ),
        "- run 1 is killed after its call 7",
        "- from 2.0 s on, 3 × drop_after_create",
    ]


# -- the loop ---------------------------------------------------------------------------------


def _on_virtual_time(main: object) -> float:
    loop = VirtualLoop()
    try:
        loop.run_until_complete(main)  # type: ignore[arg-type]
        return loop.time()
    finally:
        loop.close()


def test_a_day_takes_no_time() -> None:
    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep, 24 * 3600)
            group.start_soon(anyio.sleep, 3600)

    assert _on_virtual_time(main()) == pytest.approx(24 * 3600, abs=0.01)


def test_a_wait_that_never_ends_is_found() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    main_ = main()
    with pytest.raises(Stuck, match="hangs for ever"):
        _on_virtual_time(main_)
    main_.close()


def test_a_loop_without_a_pause_is_found() -> None:
    async def main() -> None:
        while True:  # noqa: ASYNC110
            await asyncio.sleep(0)

    main_ = main()
    with pytest.raises(Stuck, match="round in circles"):
        _on_virtual_time(main_)
    main_.close()


def test_a_thread_is_refused() -> None:
    async def main() -> None:
        await asyncio.to_thread(print)

    with pytest.raises(RuntimeError, match="in a thread"):
        _on_virtual_time(main())
