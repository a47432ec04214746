"""Plays many scenarios, adds up their events, and prints those that failed."""

from __future__ import annotations

import gc
import multiprocessing
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing, suppress
from pathlib import Path
from types import FrameType
from typing import Final

from tests.simulation.play import ScenarioResult, memory, play
from tests.simulation.scenario import Scenario, draw
from tests.simulation.shrink import shrink

#: Real seconds after which a scenario counts as endless.
_LIMIT_S: Final = 60
#: Scenarios that a process gets together, and after how many all processes are replaced.
_TOGETHER: Final = 5
_BLOCK: Final = 1000


def play_seed(seed: int, parent: Path) -> ScenarioResult:
    """Play the scenario of a seed; an error of the simulation itself is a failure too."""
    return _played(draw(seed), parent=parent)


def _played(
    scenario: Scenario, *, keep_lines: bool = False, parent: Path | None = None
) -> ScenarioResult:
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(_LIMIT_S)
    try:
        return play(scenario, keep_lines=keep_lines, parent=parent)
    except Exception:  # noqa: BLE001 - the other scenarios go on
        return ScenarioResult(scenario, [f"the simulation broke: {traceback.format_exc()}"])
    finally:
        signal.alarm(0)


def _too_long(_signal: int, _frame: FrameType | None) -> None:
    raise TimeoutError(f"the scenario has taken {_LIMIT_S} s of real time")


def prepare() -> None:
    """Collect garbage less often: a scenario leaves little."""
    gc.freeze()
    gc.set_threshold(50_000)


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends them
    prepare()


def run_one(seed: int, *, lines: bool) -> int:
    """Play one scenario and print its result; return the exit code."""
    prepare()
    result = _played(draw(seed), keep_lines=lines)
    if not result.failures:
        print(result.scenario)
        print(*result.lines, sep="\n")
        print(
            f"\nSeed {seed} passed: {result.virtual_s:.0f} virtual seconds, {result.digest[:16]}."
        )
        return 0
    _show(result, shortened=shrink(result))
    if lines:
        print(*_played(result.scenario, keep_lines=True).lines, sep="\n")
    return 1


def _results(
    seeds: Sequence[int], processes: int, parent: Path
) -> Generator[ScenarioResult, None, None]:
    """Play the scenarios in other processes, which are replaced before their memory grows."""
    spawn = multiprocessing.get_context("spawn")
    for block in _parts(seeds, _BLOCK):
        with ProcessPoolExecutor(processes, spawn, _prepare_worker) as pool:
            parts = [pool.submit(_play_seeds, part, parent) for part in _parts(block, _TOGETHER)]
            try:
                for part in as_completed(parts):
                    yield from part.result()
            finally:
                pool.shutdown(cancel_futures=True)


def _play_seeds(seeds: Sequence[int], parent: Path) -> list[ScenarioResult]:
    return [play_seed(seed, parent) for seed in seeds]


def _parts(seeds: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(seeds), size):
        yield seeds[start : start + size]


def run_many(
    seeds: Sequence[int], *, processes: int, most_failures: int, plain: bool = False
) -> int:
    """Play the scenarios of these seeds and print their results; return the exit code."""
    prepare()
    began_s = time.monotonic()
    counts: Counter[str] = Counter()
    failed: list[ScenarioResult] = []
    done, virtual_s = 0, 0.0
    with (
        suppress(KeyboardInterrupt),  # the results so far are still summed up
        tempfile.TemporaryDirectory(prefix="krea-simulation-", dir=memory()) as folder,
        closing(_results(seeds, processes, Path(folder))) as scenarios,
    ):
        for result in scenarios:
            done += 1
            virtual_s += result.virtual_s
            counts += result.counts
            if result.failures:
                failed.append(result)
                print(f"seed {result.scenario.seed}: {result.failures[0][:300]}", flush=True)
                if len(failed) >= most_failures:
                    break
            if done % 500 == 0:
                print(f"{done} scenarios, {time.monotonic() - began_s:.0f} s", flush=True)
    seconds = time.monotonic() - began_s
    print("\nWhat happened, and how often:")
    for what, n in sorted(counts.items()):
        print(f"{n:10} {what}")
    for result in failed[: 0 if plain else 3]:
        _show(result, shortened=shrink(result))
    print(
        f"\n{done} scenarios ({seeds[0]} to {seeds[-1]}) in {seconds:.0f} s with {processes} "
        f"processes, {60 * done / seconds:.0f} a minute, {virtual_s / 3600:.0f} virtual hours: "
        f"{len(failed)} failed."
    )
    return 1 if failed else 0


def _show(result: ScenarioResult, *, shortened: ScenarioResult) -> None:
    seed = result.scenario.seed
    print(
        f"\nSeed {seed} fails. Shortest scenario with the same failure:\n\n{shortened.scenario}\n"
    )
    for failure in shortened.failures:
        print(f"* {failure}")
    print(f"\nIt repeats: make simulate SEED={seed}", file=sys.stdout, flush=True)
