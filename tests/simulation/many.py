"""Plays many stories, adds up what happened in them, and tells of those that failed."""

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

from tests.simulation.play import StoryResult, memory, play
from tests.simulation.shrink import shrink
from tests.simulation.story import Story, draw

#: Real seconds after which a story goes on for ever without letting virtual time pass.
_LIMIT_S: Final = 60
#: Stories that a process is given together, and after how many all processes are replaced.
_TOGETHER: Final = 5
_BLOCK: Final = 1000


def tell(seed: int, parent: Path) -> StoryResult:
    """Play the story of a seed; what breaks the simulation itself is a failure, too."""
    return _played(draw(seed), parent=parent)


def _played(story: Story, *, keep_lines: bool = False, parent: Path | None = None) -> StoryResult:
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(_LIMIT_S)
    try:
        return play(story, keep_lines=keep_lines, parent=parent)
    except Exception:  # noqa: BLE001 - the other stories go on
        return StoryResult(story, [f"the simulation broke: {traceback.format_exc()}"])
    finally:
        signal.alarm(0)


def _too_long(_signal: int, _frame: FrameType | None) -> None:
    raise TimeoutError(f"the story has taken {_LIMIT_S} s of real time")


def prepare() -> None:
    """Look for garbage more rarely: a story leaves little."""
    gc.freeze()
    gc.set_threshold(50_000)


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends them
    prepare()


def one(seed: int, *, lines: bool) -> int:
    """Play one story and say how it went; returns the exit code."""
    prepare()
    told = _played(draw(seed), keep_lines=lines)
    if not told.failures:
        print(told.story)
        print(*told.lines, sep="\n")
        print(f"\nSeed {seed} went well: {told.virtual_s:.0f} virtual seconds, {told.digest[:16]}.")
        return 0
    _show(told, shortened=shrink(told))
    if lines:
        print(*_played(told.story, keep_lines=True).lines, sep="\n")
    return 1


def _told(seeds: Sequence[int], processes: int, parent: Path) -> Generator[StoryResult, None, None]:
    """Play the stories in other processes, which are replaced now and then: their memory grows."""
    spawn = multiprocessing.get_context("spawn")
    for block in _parts(seeds, _BLOCK):
        with ProcessPoolExecutor(processes, spawn, _prepare_worker) as pool:
            parts = [pool.submit(_tell_all, part, parent) for part in _parts(block, _TOGETHER)]
            try:
                for part in as_completed(parts):
                    yield from part.result()
            finally:
                pool.shutdown(cancel_futures=True)


def _tell_all(seeds: Sequence[int], parent: Path) -> list[StoryResult]:
    return [tell(seed, parent) for seed in seeds]


def _parts(seeds: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(seeds), size):
        yield seeds[start : start + size]


def several(
    seeds: Sequence[int], *, processes: int, most_failures: int, plain: bool = False
) -> int:
    """Play the stories of these seeds and print what came of them; returns the exit code."""
    prepare()
    began_s = time.monotonic()
    counts: Counter[str] = Counter()
    failed: list[StoryResult] = []
    done, virtual_s = 0, 0.0
    with (
        suppress(KeyboardInterrupt),  # what has been told is summed up all the same
        tempfile.TemporaryDirectory(prefix="krea-simulation-", dir=memory()) as folder,
        closing(_told(seeds, processes, Path(folder))) as stories,
    ):
        for told in stories:
            done += 1
            virtual_s += told.virtual_s
            counts += told.counts
            if told.failures:
                failed.append(told)
                print(f"seed {told.story.seed}: {told.failures[0][:300]}", flush=True)
                if len(failed) >= most_failures:
                    break
            if done % 500 == 0:
                print(f"{done} stories, {time.monotonic() - began_s:.0f} s", flush=True)
    seconds = time.monotonic() - began_s
    print("\nWhat happened, and how often:")
    for what, n in sorted(counts.items()):
        print(f"{n:10} {what}")
    for told in failed[: 0 if plain else 3]:
        _show(told, shortened=shrink(told))
    print(
        f"\n{done} stories ({seeds[0]} to {seeds[-1]}) in {seconds:.0f} s with {processes} "
        f"processes, {60 * done / seconds:.0f} a minute, {virtual_s / 3600:.0f} virtual hours: "
        f"{len(failed)} failed."
    )
    return 1 if failed else 0


def _show(told: StoryResult, *, shortened: StoryResult) -> None:
    seed = told.story.seed
    print(f"\nSeed {seed} fails. The shortest story with the same failure:\n\n{shortened.story}\n")
    for failure in shortened.failures:
        print(f"* {failure}")
    print(f"\nIt repeats: make simulate SEED={seed}", file=sys.stdout, flush=True)
