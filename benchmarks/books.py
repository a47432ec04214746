"""What a server's books say about its clients. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.bound import bound_of_s

#: Seconds from the first POST in which a client may still be learning the limits.
LEARNING_S = 10.0


@dataclass(frozen=True)
class Figures:
    """One run, by the server's books.

    ``makespan_s`` is from the first POST to the last byte of the last image, ``ratio`` that to
    the schedule bound. ``turned_away`` and ``turned_away_later`` are the share of POSTs answered
    429, in all and after the first 10 seconds. Reads are per image: ``single_reads``, and
    ``batch_reads`` where one call asks about up to 50.
    """

    images: int
    makespan_s: float
    bound_s: float
    turned_away: float
    turned_away_later: float
    single_reads: float
    batch_reads: float

    @property
    def ratio(self) -> float:
        """Makespan to bound."""
        return self.makespan_s / self.bound_s


def figures_of(books: dict[str, Any], images: int) -> Figures:
    """The figures of a run of so many images.

    Raises ValueError where an image was bought twice, or was not downloaded: then a makespan
    means nothing.
    """
    tasks = books["tasks"]
    if len(tasks) != images:
        raise ValueError(f"{len(tasks)} tasks were created for {images} images")
    missing = sum(task["downloaded_s"] is None for task in tasks)
    if missing:
        raise ValueError(f"{missing} of {images} images were never downloaded")
    first_s = books["first_post_s"]
    creates = books["creates"]
    later = [one for one in creates if one["at_s"] - first_s > LEARNING_S]
    return Figures(
        images=images,
        makespan_s=books["last_download_s"] - first_s,
        bound_s=bound_of_s(books),
        turned_away=_share_of_429(creates),
        turned_away_later=_share_of_429(later),
        single_reads=books["single_reads"] / images,
        batch_reads=books["batch_reads"] / images,
    )


def shares_of(books: dict[str, Any]) -> dict[str, float]:
    """Each worker's share of what was taken while all of them had something to submit.

    That is from when the last of them began until the first of them had its last one taken.
    """
    taken: dict[str, list[float]] = {}
    began: dict[str, float] = {}
    for one in books["creates"]:
        began.setdefault(one["worker"], one["at_s"])
        if one["outcome"] == "accepted":
            taken.setdefault(one["worker"], []).append(one["at_s"])
    from_s, to_s = max(began.values()), min(times[-1] for times in taken.values())
    within = {
        worker: sum(from_s <= at_s <= to_s for at_s in times) for worker, times in taken.items()
    }
    total = max(1, sum(within.values()))
    return {worker: count / total for worker, count in within.items()}


def most_at_once(books: dict[str, Any]) -> int:
    """The most tasks that were unfinished at one time."""
    steps = [(task["created_s"], 1) for task in books["tasks"]]
    steps += [(task["done_s"], -1) for task in books["tasks"]]
    most = now = 0
    for _, step in sorted(steps):
        now += step
        most = max(most, now)
    return most


def _share_of_429(creates: list[dict[str, Any]]) -> float:
    if not creates:
        return 0.0
    outcomes = [str(one["outcome"]) for one in creates]
    return outcomes.count("429") / len(outcomes)
