"""The command that runs the drill and prints what came of it."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from krea_dagster.drill.reconcile import Fate
from krea_dagster.drill.worlds import WORLDS, Part
from krea_dagster.models import credits_from_units

if TYPE_CHECKING:
    from krea_dagster.drill.drill import Outcome
    from krea_dagster.drill.plan import Plan
    from krea_dagster.drill.runner import Progress

_EPILOG: Final = """
\b
  krea-dagster drill                                a minute or two
  krea-dagster drill --requests 1000 --kills 200    the full proof
  krea-dagster drill --on-unknown hold --requests 1000 --kills 200
                                                    a server that ignores the Idempotency-Key
  krea-dagster drill --storm --requests 2000        every fault at once, no kills
  krea-dagster drill --kills 0 --workers 2 --requests 500 --faults 0
                                                    two processes, the same rows
  krea-dagster drill --world backup --world clock --requests 60 --kills 16
                                                    two worlds, half a minute each
  krea-dagster drill --world all --requests 1000 --kills 200
                                                    every world, a quarter of an hour

\b
Worlds, each drilled for so many requests and kills:
{worlds}

\b
In most a worker between the others meets what the world is named for, and
others then finish what is open. Where it stops with a clear error before it
asked for a purchase, that is counted as refused, and right.

\b
Exit codes: 0 nothing was bought twice or lost (under replay, nothing is unknown
either), 1 otherwise, 2 wrong use.
""".format(worlds="\n".join(f"  {name:12} {world.says}" for name, world in WORLDS.items()))

_LINE_EVERY_S: Final = 5.0


@click.command("drill", epilog=_EPILOG)
@click.option(
    "--requests", default=200, show_default=True, type=click.IntRange(min=1), help="Images to buy."
)
@click.option(
    "--kills",
    type=click.IntRange(min=0),
    help="Worker processes to kill with SIGKILL.  [default: 60; 0 with --storm]",
)
@click.option(
    "--workers",
    default=1,
    show_default=True,
    type=click.IntRange(1, 8),
    help="Worker processes at the same time, on the same rows.",
)
@click.option(
    "--on-unknown",
    default="replay",
    show_default=True,
    type=click.Choice(["replay", "hold"]),
    help="What the workers do about unknown outcomes.",
)
@click.option(
    "--idempotency/--no-idempotency",
    default=None,
    help="Whether the server honours the Idempotency-Key.  [default: yes with replay, no with "
    "hold]",
)
@click.option(
    "--faults",
    type=click.FloatRange(0, 1),
    help="Share of requests that each kind of server fault strikes.  [default: 0.01; 0.05 with "
    "--storm]",
)
@click.option(
    "--world",
    "worlds",
    multiple=True,
    type=click.Choice([*WORLDS, "all"]),
    help="Where the drill is held, see below; may be repeated.  [default: plain]",
)
@click.option("--storm", is_flag=True, help="No kills, and every kind of server fault at once.")
@click.option("--seed", default=0, show_default=True, help="Seed of prompts, kills and faults.")
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder, new or empty, that keeps journal, images, books and logs.",
)
@click.option("--json", "as_json", is_flag=True, help="Print figures as JSON on stdout.")
def drill_command(
    *,
    requests: int,
    kills: int | None,
    workers: int,
    on_unknown: str,
    idempotency: bool | None,
    faults: float | None,
    worlds: Sequence[str],
    storm: bool,
    seed: int,
    keep: Path | None,
    as_json: bool,
) -> None:
    """Prove on this machine that nothing is bought twice or lost. No key, no cost.

    Buys images from an emulator with worker processes that are killed at every edge of the
    state machine and at random times, while connections break and answers get lost. A last
    worker finishes. Then the server's books are compared with the journal and the files.
    """
    if sys.platform == "win32":
        raise click.UsageError("the drill needs fork and SIGKILL, which Windows does not have")
    if storm and kills:
        raise click.UsageError("--storm kills nothing; leave out --kills")
    if storm and worlds:
        raise click.UsageError("--storm is a drill of its own; leave out --world")
    from krea_dagster.drill import plan as plans  # noqa: PLC0415 - keeps --help quick

    held = on_unknown == "hold"
    share = faults if faults is not None else (0.05 if storm else 0.01)
    names = plans.STORM_FAULTS if storm else plans.KILL_FAULTS
    plan = plans.Plan(
        requests=requests,
        kills=0 if storm else 60 if kills is None else kills,
        workers=workers,
        on_unknown="hold" if held else "replay",
        honours_key=not held if idempotency is None else idempotency,
        rates=dict.fromkeys(names, share) if share else {},
        seed=seed,
    )
    with ExitStack() as stack:
        if keep is None:
            keep = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="krea-drill-")))
        else:
            keep.mkdir(parents=True, exist_ok=True)
            if any(keep.iterdir()):
                raise click.UsageError(f"{keep} is not empty; give a folder that is new or empty")
        if worlds:
            passed = _drill_worlds(plan, worlds, keep.absolute(), as_json=as_json)
        else:
            passed = _drill_plain(plan, keep.absolute(), as_json=as_json)
    sys.exit(0 if passed else 1)


def _drill_plain(plan: Plan, folder: Path, *, as_json: bool) -> bool:
    """Hold one drill, print what came of it, and tell whether it was passed."""
    import anyio  # noqa: PLC0415 - keeps --help quick

    outcome = anyio.run(_drilled, plan, folder)
    figures = figures_of(plan, outcome)
    _write(figures, folder, as_json=as_json)
    if not as_json:
        _show(plan, outcome)
    return not outcome.faults


def _drill_worlds(plan: Plan, worlds: Sequence[str], folder: Path, *, as_json: bool) -> bool:
    """Hold the drill in each world, print what came of each, and tell whether all were passed."""
    import anyio  # noqa: PLC0415 - keeps --help quick

    wanted = list(WORLDS) if "all" in worlds else list(dict.fromkeys(worlds))
    lacking = {name: WORLDS[name].lacking() for name in wanted}
    parts = [(name, part) for name in wanted if not lacking[name] for part in WORLDS[name].parts]
    plans = [plan.of(part) for _, part in parts]
    outcomes: dict[int, Outcome] = {}

    async def hold(number: int, places: anyio.CapacityLimiter) -> None:
        name, part = parts[number]
        within = folder / f"{number + 1}-{name}"
        within.mkdir()
        async with places:
            outcome = await _drilled(plans[number], within, f"{name}: ")
        outcomes[number] = outcome
        if not as_json:
            said = f", {part.says}" if part.says else ""
            click.echo(f"{name}{said}: {WORLDS[name].says}.")
            _show(plans[number], outcome, edges=False)
            click.echo()

    async def hold_all() -> None:
        # Workers mostly wait, so that three drills take little longer than one.
        places = anyio.CapacityLimiter(_AT_ONCE)
        async with anyio.create_task_group() as group:
            for number in range(len(parts)):
                group.start_soon(hold, number, places)

    anyio.run(hold_all)
    told: list[dict[str, Any]] = [
        {"world": name, "part": part.says, **figures_of(plans[number], outcomes[number])}
        for number, (name, part) in enumerate(parts)
    ]
    skipped = {name: why for name, why in lacking.items() if why}
    passed = not any(outcome.faults for outcome in outcomes.values())
    _write({"passed": passed, "worlds": told, "skipped": skipped}, folder, as_json=as_json)
    if not as_json:
        lines = [_line(name, part, outcomes[at]) for at, (name, part) in enumerate(parts)]
        _columns([_HEADINGS, *lines])
        for name, why in skipped.items():
            click.echo(f"  {name}: skipped, it {why}")
    return passed


#: Drills of worlds that are held at the same time.
_AT_ONCE: Final = 3

_HEADINGS: Final = (
    "world", "requests", "kills", "created", "twice", "lost", "unknown", "refused", ""
)  # fmt: skip


def _line(name: str, part: Part, outcome: Outcome) -> tuple[str, ...]:
    """A drill in one line."""
    found = outcome.reckoning
    counts = (
        found.requests,
        sum(outcome.kills.values()) + outcome.random_kills,
        found.created,
        len(found.bought_twice),
        len(found.of(Fate.LOST)),
        len(found.unknown),
    )
    refused = f"{outcome.refused} of {outcome.episodes}" if outcome.episodes else ""
    verdict = f"FAILED: {'; '.join(outcome.faults)}" if outcome.faults else "passed"
    said = f"{name}, {part.says}" if part.says else name
    return said, *map(str, counts), refused, verdict


async def _drilled(plan: Plan, folder: Path, where: str = "") -> Outcome:
    """Hold one drill, and tell of its progress."""
    from krea_dagster.drill.drill import drill  # noqa: PLC0415 - keeps --help quick

    lines = _Lines(plan, where)
    try:
        outcome = await drill(plan, folder, lines)
    finally:
        lines.end()
    if outcome.crashed:
        said = (folder / "workers.log").read_text(encoding="utf-8")
        click.echo(said[-4000:], err=True)
    return outcome


def _write(figures: dict[str, Any], folder: Path, *, as_json: bool) -> None:
    text = json.dumps(figures, indent=1)
    (folder / "drill.json").write_text(text, encoding="utf-8")
    if as_json:
        click.echo(text)


class _Lines:
    """Progress, a line every few seconds; on a terminal one line that is written over.

    ``where`` tells the lines of several drills apart, which are not written over.
    """

    def __init__(self, plan: Plan, where: str) -> None:
        self._plan = plan
        self._where = where
        self._terminal = sys.stderr.isatty() and not where
        self._next_s = 0.0

    def __call__(self, progress: Progress) -> None:
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + (0.2 if self._terminal else _LINE_EVERY_S)
        kills = f"{progress.kills} of {self._plan.kills} kills, " if self._plan.kills else ""
        images = f"{progress.stored} of {self._plan.requests} images"
        if self._plan.part.wishes:
            kills, images = "", f"{progress.kills} kills, {progress.stored} images"
        text = f"{self._where}{progress.doing}: {kills}{images}"
        click.echo(f"\r\x1b[K{text}" if self._terminal else text, err=True, nl=not self._terminal)

    def end(self) -> None:
        """Leave the line clean for what follows."""
        if self._terminal:
            click.echo("\r\x1b[K", err=True, nl=False)


def figures_of(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """The drill's figures, as plain JSON values. Money in credits."""
    found = outcome.reckoning
    return {
        "passed": not outcome.faults,
        "faults": outcome.faults,
        "policy": plan.on_unknown,
        "server_honours_idempotency_key": plan.honours_key,
        "fault_rates": dict(plan.rates),
        "workers": plan.workers,
        "seed": plan.seed,
        "requests": found.requests,
        "submitted": found.submitted,
        "created": found.created,
        "billed": found.billed,
        "credits_billed": credits_from_units(found.billed_units),
        "credits_in_journal": credits_from_units(found.journal_units),
        "credits_unexplained": credits_from_units(found.unexplained_units),
        "delivered": len(found.of(Fate.DELIVERED)),
        "lost": list(found.of(Fate.LOST)),
        "bought_twice": list(found.bought_twice),
        "charged_and_not_in_journal": list(found.unrecorded),
        "disowned": list(found.disowned),
        "overwritten": list(outcome.overwritten),
        "undelivered": list(found.of(Fate.UNDELIVERED)),
        "rejected": list(found.of(Fate.REJECTED)),
        "unknown": [
            {
                "request_key": one.request_key,
                "prompt": one.prompt,
                "credits_at_most": credits_from_units(one.credits_units),
                "since": None if one.since is None else one.since.isoformat(),
                "charged_at_server": one.charged,
            }
            for one in found.unknown
        ],
        "credits_unknown_at_most": credits_from_units(found.unknown_units),
        "forgotten_by_server": list(found.of(Fate.FORGOTTEN)),
        "credits_forgotten": credits_from_units(found.forgotten_units),
        "never_ending": len(found.of(Fate.ENDLESS)),
        "failed": len(found.of(Fate.FAILED)),
        "refused": len(found.of(Fate.REFUSED)),
        "never_bought": list(found.of(Fate.NEVER_BOUGHT)),
        "kills": {"edges": dict(outcome.kills), "random": outcome.random_kills},
        "kills_missed": outcome.kills_missed,
        "edges_never_reached": list(outcome.never_reached),
        "edges_not_planned": list(outcome.not_planned),
        "episodes": outcome.episodes,
        "episodes_refused": outcome.refused,
        "episodes_stopped": outcome.stopped,
        "workers_started": outcome.launches,
        "workers_crashed": list(outcome.crashed),
        "workers_hung": list(outcome.hung),
        "last_passes": outcome.passes,
        "seconds": round(outcome.seconds, 1),
    }


def _show(plan: Plan, outcome: Outcome, *, edges: bool = True) -> None:
    """Print the figures for people."""
    honours = "honours" if plan.honours_key else "ignores"
    click.echo(f"Policy {plan.on_unknown}; a server that {honours} the Idempotency-Key.")
    if plan.rates:
        share = max(plan.rates.values())
        click.echo(f"Each of {len(plan.rates)} kinds of server fault strikes {share:.1%}.")
    _columns(_totals(outcome, figures_of(plan, outcome)))
    if edges:
        _show_edges(plan, outcome)
    if outcome.reckoning.unknown:
        click.echo("\nUnknown outcomes:")
        _columns(
            [
                (
                    one.request_key[:16],
                    f"at most {credits_from_units(one.credits_units):g} credits",
                    "" if one.since is None else f"since {one.since:%Y-%m-%d %H:%M:%S} UTC",
                    f"at the server: {'charged' if one.charged else 'nothing'}",
                )
                for one in outcome.reckoning.unknown
            ]
        )
    verdict = "; ".join(outcome.faults)
    click.echo(f"\nFAILED: {verdict}" if verdict else "\nPASSED: nothing bought twice or lost")


def _totals(outcome: Outcome, figures: dict[str, Any]) -> list[tuple[str, ...]]:
    found = outcome.reckoning
    at_most = f"at most {figures['credits_unknown_at_most']:g} credits" if found.unknown else ""
    forgotten = f"charged, and the server denies the task: {figures['credits_forgotten']:g} credits"
    unexplained = f"{figures['credits_unexplained']:g} of them not explained by the journal"
    always = [
        ("requests", found.requests, ""),
        ("submitted", found.submitted, "POSTs"),
        ("created", found.created, "tasks"),
        ("billed", found.billed, f"tasks, {figures['credits_billed']:g} credits, {unexplained}"),
        ("delivered", len(found.of(Fate.DELIVERED)), "files whose sha256 is the server's"),
        ("lost", len(found.of(Fate.LOST)), "charged, not stored, not at stake in the journal"),
        ("bought twice", len(found.bought_twice), "request bodies with more than one charged task"),
        ("unknown", len(found.unknown), at_most),
    ]
    sometimes = [
        ("unrecorded", len(found.unrecorded), "charged tasks that the journal does not know"),
        ("disowned", len(found.disowned), "stored, and the journal says that they are not"),
        ("overwritten", len(outcome.overwritten), "stored, and written again in an episode"),
        ("undelivered", len(found.of(Fate.UNDELIVERED)), "charged, could be had, not stored"),
        ("rejected", len(found.of(Fate.REJECTED)), "charged, and another image came: kept"),
        ("forgotten", len(found.of(Fate.FORGOTTEN)), f"{forgotten}, expired in the journal"),
        ("failed", len(found.of(Fate.FAILED)), "tasks failed, not charged"),
        ("refused", len(found.of(Fate.REFUSED)), "not charged"),
        ("never ending", len(found.of(Fate.ENDLESS)), "tasks that the server never ends"),
        ("never bought", len(found.of(Fate.NEVER_BOUGHT)), ""),
        ("crashed", len(outcome.crashed), "workers that ended with an error"),
        ("hung", len(outcome.hung), "workers that did not end"),
        ("episodes", outcome.episodes, _episodes(outcome)),
    ]
    at_edges = sum(outcome.kills.values())
    kills = f"{at_edges} at {len(outcome.kills)} edges, {outcome.random_kills} at random times"
    if outcome.kills_missed:
        kills += f"; {outcome.kills_missed} planned and not made, the worker had ended"
    rows = [*always, *(row for row in sometimes if row[1])]
    rows.append(("kills", at_edges + outcome.random_kills, kills))
    rounds = "1 round" if outcome.passes == 1 else f"{outcome.passes} rounds"
    rows.append(
        ("workers", outcome.launches, f"started, with {rounds} of them unharmed at the end")
    )
    shown = [(name, f"{count:>7}", words) for name, count, words in rows]
    return [*shown, ("seconds", f"{outcome.seconds:>7.1f}", "")]


def _episodes(outcome: Outcome) -> str:
    on = outcome.episodes - outcome.refused - outcome.stopped
    refused, stopped = outcome.refused, outcome.stopped
    return f"of which the odd worker refused {refused}, stopped in {stopped}, worked in {on}"


def _show_edges(plan: Plan, outcome: Outcome) -> None:
    from krea_dagster.drill.edges import EDGES, NOT_UNDER  # noqa: PLC0415 - keeps --help quick

    if not plan.kills:
        return
    click.echo("\nKills by edge:")
    names = [edge.name for edge in EDGES if edge.name in outcome.kills]
    _columns([(name, f"{outcome.kills[name]:>3}") for name in names])
    if outcome.never_reached:
        click.echo(f"Planned and never reached: {'; '.join(outcome.never_reached)}")
    if outcome.not_planned:
        click.echo(f"Not planned, too few kills: {'; '.join(outcome.not_planned)}")
    out = [edge.name for edge in EDGES if plan.on_unknown not in edge.policies]
    click.echo(f"Not planned, because {NOT_UNDER[plan.on_unknown]}: {'; '.join(out)}")


def _columns(rows: Sequence[Sequence[str]]) -> None:
    """Print rows as a table: as wide as its cells, whatever the terminal's width."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(f"  {'  '.join(cells)}".rstrip())
