"""The sentences in which a run says what it will do, how far it is, and how it ended. Pure.

The command line and Dagster's log both take them from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from krea_dagster.models import credits_text

if TYPE_CHECKING:
    from krea_dagster.engine.run.report import Progress
    from krea_dagster.prompts.trial import TrialRows
    from krea_dagster.spend.quote import Quote


def trial_line(trial: TrialRows) -> str:
    """Return that a run or a quote is of some rows only."""
    is_all = trial.rows == trial.of
    others = "" if is_all else " The same without limit and sample takes the others."
    return f"A trial: {trial}.{others}"


def quote_line(quote: Quote, *, held: int = 0) -> str:
    """Return what a run is about to do: rows, their partitions, purchases, and their highest cost.

    ``held`` images are not stored and not wanted now; a quote counts them as reused.
    """
    total = quote.total
    parts = [f"{total.reused - held:,} stored already"]
    if total.to_buy:
        shared = f" in {total.purchases:,} purchases" if total.purchases < total.to_buy else ""
        parts.append(
            f"{total.to_buy:,} to buy{shared} for at most {credits_text(total.units)} credits"
        )
    else:
        parts.append("none to buy")
    if paid := total.taken_up + total.refetched:
        parts.append(f"{paid:,} paid for and to be fetched")
    if unknown := total.replayed + total.held:
        parts.append(
            f"{unknown:,} with an unknown outcome (at most {credits_text(total.at_stake_units)} "
            "credits)"
        )
    if total.ended:
        parts.append(f"{total.ended:,} failed before and not bought again")
    if held:
        parts.append(f"{held:,} held back")
    if quote.cap is not None:
        parts.append(
            f"{total.deferred:,} purchases of {credits_text(total.deferred_units)} credits "
            f"deferred: {quote.cap}"
        )
    partitions = len(quote.by_partition())
    places = f"{partitions:,} partition{'' if partitions == 1 else 's'}"
    return f"{total.asked:,} images in {places}: {', '.join(parts)}."


def progress_line(progress: Progress, seconds: float) -> str:
    """Return how far a run is, ``seconds`` after it has begun to buy, and the time to go."""
    to_come, rate = progress.total - progress.ended, _rate(progress, seconds)
    time_to_go = f", about {duration_text(to_come / rate)} to go" if rate and to_come else ""
    return (
        f"{progress.ended:,} of {progress.total:,} images{time_to_go}: {_delivered(progress)}, "
        f"{progress.in_flight:,} in flight, {rate_text(progress, seconds)}"
    )


def rate_text(progress: Progress, seconds: float) -> str:
    """Return the images per second, what they cost so far, and how many have no image."""
    return (
        f"{_rate(progress, seconds):.1f} images/s, {credits_text(progress.charged_units)} credits"
        f"{_without_image(progress)}"
    )


def _rate(progress: Progress, seconds: float) -> float:
    return progress.delivered / seconds if seconds > 0 else 0.0


def end_line(progress: Progress, seconds: float, where: str, *, manifests: bool = True) -> str:
    """Return how a run ended, and where its files are; ``generate`` writes no manifest."""
    written = f", manifests in {where}/manifest" if manifests else ""
    return (
        f"{progress.ended:,} of {progress.total:,} images ended: {_delivered(progress)}"
        f"{_without_image(progress)}. "
        f"{credits_text(progress.charged_units)} credits, {duration_text(seconds)}. "
        f"Images are in {where}/images{written}."
    )


def cancel_line(progress: Progress | None, next_run: str) -> str:
    """Return what is safe when a run was cancelled, and what was paid.

    ``next_run`` is the line of a quote that was made afterwards.
    """
    bought = "nothing was bought"
    if progress is not None and (progress.delivered or progress.charged_units):
        bought = (
            f"this run delivered {progress.delivered:,} images for "
            f"{credits_text(progress.charged_units)} credits, which are stored"
        )
    return (
        f"Cancelled: {bought}, and no image that is paid for is lost. "
        f"The next run of these partitions continues from here. {next_run}"
    )


def duration_text(seconds: float) -> str:
    """Return a duration in the unit that a person would use."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _delivered(progress: Progress) -> str:
    return f"{progress.delivered:,} delivered, {progress.reused:,} reused"


def _without_image(progress: Progress) -> str:
    failed = f", {progress.failed:,} failed" if progress.failed else ""
    left = f", {progress.left:,} left for later" if progress.left else ""
    return f"{failed}{left}"
