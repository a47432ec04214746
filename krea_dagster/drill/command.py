"""The command that runs the drill and prints its results."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from krea_dagster.drill.reconcile import RequestOutcome
from krea_dagster.drill.worlds import WORLDS
from krea_dagster.models import credits_from_units

if TYPE_CHECKING:
    from krea_dagster.drill.drill import DrillResult
    from krea_dagster.drill.plan import DrillPlan
    from krea_dagster.drill.runner import DrillProgress

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
Worlds, each with the requests and kills given:
{worlds}

\b
In most worlds one worker between the others meets what the world is named for,
and the workers after it finish the open rows. If that worker stops with a clear
error before it requests a purchase, it counts as refused, which is right.

\b
Exit codes: 0 nothing was bought twice or lost (under replay, nothing is unknown
either), 1 otherwise, 2 wrong use.
""".format(worlds="\n".join(f"  {name:12} {world.description}" for name, world in WORLDS.items()))

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
    help="World to hold the drill in, see below; may be repeated.  [default: plain]",
)
@click.option("--storm", is_flag=True, help="No kills, and every kind of server fault at once.")
@click.option("--seed", default=0, show_default=True, help="Seed of prompts, kills and faults.")
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder, new or empty, in which to keep journal, images, server records and logs.",
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

    Buys images from an emulator with worker processes that are killed before and after every
    commit, call and file rename, and at random times, while connections break and responses get
    lost. A last worker finishes. Then the server's records are compared with the journal and the
    files.
    """
    if sys.platform == "win32":
        raise click.UsageError("the drill needs fork and SIGKILL, which Windows does not have")
    if storm and kills:
        raise click.UsageError("--storm kills nothing; leave out --kills")
    if storm and worlds:
        raise click.UsageError("--storm is a separate drill; leave out --world")
    from krea_dagster.drill.plan import KILL_FAULTS, STORM_FAULTS, DrillPlan

    held = on_unknown == "hold"
    share = faults if faults is not None else (0.05 if storm else 0.01)
    names = STORM_FAULTS if storm else KILL_FAULTS
    plan = DrillPlan(
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


def _drill_plain(plan: DrillPlan, folder: Path, *, as_json: bool) -> bool:
    """Hold one drill, print its figures, and return whether it passed."""
    import anyio

    figures = anyio.run(_drill, plan, folder)
    _write(figures, folder, as_json=as_json)
    if not as_json:
        _show(figures)
    return bool(figures["passed"])


def _drill_worlds(plan: DrillPlan, worlds: Sequence[str], folder: Path, *, as_json: bool) -> bool:
    """Hold the drill in each world, print the figures, and return whether all passed."""
    import anyio

    wanted = list(WORLDS) if "all" in worlds else list(dict.fromkeys(worlds))
    lacking = {name: WORLDS[name].lacking() for name in wanted}
    parts = [(name, part) for name in wanted if not lacking[name] for part in WORLDS[name].parts]
    found: dict[int, dict[str, Any]] = {}

    async def hold(number: int, limiter: anyio.CapacityLimiter) -> None:
        name, part = parts[number]
        within = folder / f"{number + 1}-{name}"
        within.mkdir()
        async with limiter:
            figures = await _drill(plan.of(part), within, f"{name}: ")
        found[number] = {"world": name, "part": part.description, **figures}
        if not as_json:
            click.echo(f"{_title(found[number])}: {WORLDS[name].description}.")
            _show(figures, edges=False)
            click.echo()

    async def hold_all() -> None:
        # Workers mostly wait, so three drills take little longer than one.
        limiter = anyio.CapacityLimiter(_AT_ONCE)
        async with anyio.create_task_group() as group:
            for number in range(len(parts)):
                group.start_soon(hold, number, limiter)

    anyio.run(hold_all)
    in_order = [found[number] for number in range(len(parts))]
    skipped = {name: why for name, why in lacking.items() if why}
    passed = all(figures["passed"] for figures in in_order)
    _write({"passed": passed, "worlds": in_order, "skipped": skipped}, folder, as_json=as_json)
    if not as_json:
        _print_table([_HEADINGS, *map(_world_row, in_order)])
        for name, why in skipped.items():
            click.echo(f"  {name}: skipped, it {why}")
    return passed


#: Drills of worlds that are held at the same time.
_AT_ONCE: Final = 3

_HEADINGS: Final = (
    "world", "requests", "kills", "created", "twice", "lost", "unknown", "refused", ""
)  # fmt: skip


def _title(figures: dict[str, Any]) -> str:
    return ", ".join(filter(None, (figures["world"], figures["part"])))


def _world_row(figures: dict[str, Any]) -> tuple[str, ...]:
    """Return the figures of a drill in a world as one row of the table of worlds."""
    counts = (
        figures["requests"],
        _kills(figures),
        figures["created"],
        len(figures["bought_twice"]),
        len(figures["lost"]),
        len(figures["unknown"]),
    )
    episodes = figures["episodes"]
    refused = f"{figures['episodes_refused']} of {episodes}" if episodes else ""
    verdict = "passed" if figures["passed"] else f"FAILED: {'; '.join(figures['faults'])}"
    return _title(figures), *map(str, counts), refused, verdict


async def _drill(plan: DrillPlan, folder: Path, prefix: str = "") -> dict[str, Any]:
    """Hold one drill, print its progress, and return its figures."""
    from krea_dagster.drill.drill import drill

    printer = _ProgressPrinter(plan, prefix)
    try:
        result = await drill(plan, folder, printer)
    finally:
        printer.end()
    if result.counts.crashed:
        log = (folder / "workers.log").read_text(encoding="utf-8")
        click.echo(log[-4000:], err=True)
    return figures_of(result)


def _write(figures: dict[str, Any], folder: Path, *, as_json: bool) -> None:
    text = json.dumps(figures, indent=1)
    (folder / "drill.json").write_text(text, encoding="utf-8")
    if as_json:
        click.echo(text)


class _ProgressPrinter:
    """Prints progress every few seconds, on a terminal in one line that is overwritten.

    ``prefix`` tells the lines of several drills apart, which are not overwritten.
    """

    def __init__(self, plan: DrillPlan, prefix: str) -> None:
        self._plan = plan
        self._prefix = prefix
        self._terminal = sys.stderr.isatty() and not prefix
        self._next_s = 0.0

    def __call__(self, progress: DrillProgress) -> None:
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + (0.2 if self._terminal else _LINE_EVERY_S)
        kills = f"{progress.kills} of {self._plan.kills} kills, " if self._plan.kills else ""
        images = f"{progress.stored} of {self._plan.requests} images"
        if self._plan.part.regenerates:
            kills, images = "", f"{progress.kills} kills, {progress.stored} images"
        text = f"{self._prefix}{progress.doing}: {kills}{images}"
        click.echo(f"\r\x1b[K{text}" if self._terminal else text, err=True, nl=not self._terminal)

    def end(self) -> None:
        """Clear the line for the output that follows."""
        if self._terminal:
            click.echo("\r\x1b[K", err=True, nl=False)


def figures_of(result: DrillResult) -> dict[str, Any]:
    """Return the drill's figures as JSON values. Money in credits."""
    plan, counts, found = result.plan, result.counts, result.reconciliation
    of = {outcome: list(found.of(outcome)) for outcome in RequestOutcome}
    return {
        "passed": not result.violations,
        "faults": result.violations,
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
        "delivered": len(of[RequestOutcome.DELIVERED]),
        "lost": of[RequestOutcome.LOST],
        "bought_twice": list(found.bought_twice),
        "charged_and_not_in_journal": list(found.unrecorded),
        "disowned": list(found.disowned),
        "overwritten": list(counts.overwritten),
        "undelivered": of[RequestOutcome.UNDELIVERED],
        "rejected": of[RequestOutcome.REJECTED],
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
        "forgotten_by_server": of[RequestOutcome.FORGOTTEN],
        "credits_forgotten": credits_from_units(found.forgotten_units),
        "never_ending": len(of[RequestOutcome.ENDLESS]),
        "failed": len(of[RequestOutcome.FAILED]),
        "refused": len(of[RequestOutcome.REFUSED]),
        "never_bought": of[RequestOutcome.NEVER_BOUGHT],
        "kills": {"edges": dict(counts.kills), "random": counts.random_kills},
        "kills_missed": result.kills_missed,
        "edges_never_reached": list(result.never_reached),
        "edges_not_planned": list(result.not_planned),
        "episodes": counts.episodes,
        "episodes_refused": counts.refused,
        "episodes_stopped": counts.stopped,
        "workers_started": counts.launches,
        "workers_crashed": list(counts.crashed),
        "workers_hung": list(counts.hung),
        "last_passes": result.passes,
        "seconds": round(result.seconds, 1),
    }


def _show(figures: dict[str, Any], *, edges: bool = True) -> None:
    """Print the figures for people."""
    honours = "honours" if figures["server_honours_idempotency_key"] else "ignores"
    click.echo(f"Policy {figures['policy']}; a server that {honours} the Idempotency-Key.")
    if rates := figures["fault_rates"]:
        share = max(rates.values())
        click.echo(f"Each of {len(rates)} kinds of server fault strikes {share:.1%}.")
    _print_table(_totals(figures))
    if edges:
        _show_edges(figures)
    if figures["unknown"]:
        click.echo("\nUnknown outcomes:")
        _print_table([_unknown_row(one) for one in figures["unknown"]])
    verdict = "; ".join(figures["faults"])
    click.echo(f"\nFAILED: {verdict}" if verdict else "\nPASSED: nothing bought twice or lost")


def _unknown_row(unknown: dict[str, Any]) -> tuple[str, ...]:
    since = unknown["since"]
    return (
        unknown["request_key"][:16],
        f"at most {unknown['credits_at_most']:g} credits",
        f"since {datetime.fromisoformat(since):%Y-%m-%d %H:%M:%S} UTC" if since else "",
        f"at the server: {'charged' if unknown['charged_at_server'] else 'nothing'}",
    )


_BILLED: Final = (
    "tasks, {credits_billed:g} credits, "
    "{credits_unexplained:g} of them not explained by the journal"
)
_FORGOTTEN: Final = (
    "charged, and the server denies the task: {credits_forgotten:g} credits, expired in the journal"
)
_EPISODES: Final = (
    "of which the odd worker refused {episodes_refused}, stopped in {episodes_stopped}, "
    "worked in {episodes_worked}"
)
#: The lines of the totals: name, key in the figures, explanation. The second kind only if not 0.
_ALWAYS: Final = (
    ("requests", "requests", ""),
    ("submitted", "submitted", "POSTs"),
    ("created", "created", "tasks"),
    ("billed", "billed", _BILLED),
    ("delivered", "delivered", "files whose sha256 is the server's"),
    ("lost", "lost", "charged, not stored, not at stake in the journal"),
    ("bought twice", "bought_twice", "request bodies with more than one charged task"),
)  # fmt: skip
_IF_ANY: Final = (
    ("unrecorded", "charged_and_not_in_journal", "charged tasks that the journal does not know"),
    ("disowned", "disowned", "stored, and the journal says that they are not"),
    ("overwritten", "overwritten", "stored, and written again in an episode"),
    ("undelivered", "undelivered", "charged, could be had, not stored"),
    ("rejected", "rejected", "charged, and another image came: kept"),
    ("forgotten", "forgotten_by_server", _FORGOTTEN),
    ("failed", "failed", "tasks failed, not charged"),
    ("refused", "refused", "not charged"),
    ("never ending", "never_ending", "tasks that the server never ends"),
    ("never bought", "never_bought", ""),
    ("crashed", "workers_crashed", "workers that ended with an error"),
    ("hung", "workers_hung", "workers that did not end"),
    ("episodes", "episodes", _EPISODES),
)  # fmt: skip


def _totals(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    stopped = figures["episodes_refused"] + figures["episodes_stopped"]
    values = {**figures, "episodes_worked": figures["episodes"] - stopped}

    def row(name: str, key: str, text: str) -> tuple[str, int, str]:
        value = figures[key]
        return name, value if isinstance(value, int) else len(value), text.format_map(values)

    at_most = "at most {credits_unknown_at_most:g} credits" if figures["unknown"] else ""
    rows = [row(*line) for line in (*_ALWAYS, ("unknown", "unknown", at_most))]
    rows += [found for found in (row(*line) for line in _IF_ANY) if found[1]]
    at_edges = figures["kills"]["edges"]
    kills = f"{sum(at_edges.values())} at {len(at_edges)} edges, "
    kills += f"{figures['kills']['random']} at random times"
    if figures["kills_missed"]:
        kills += f"; {figures['kills_missed']} planned and not made, the worker had ended"
    passes = figures["last_passes"]
    rounds = "1 round" if passes == 1 else f"{passes} rounds"
    workers = f"started, with {rounds} of them unharmed at the end"
    rows += [("kills", _kills(figures), kills), ("workers", figures["workers_started"], workers)]
    shown = [(name, f"{count:>7}", text) for name, count, text in rows]
    return [*shown, ("seconds", f"{figures['seconds']:>7.1f}", "")]


def _kills(figures: dict[str, Any]) -> int:
    return int(sum(figures["kills"]["edges"].values()) + figures["kills"]["random"])


def _show_edges(figures: dict[str, Any]) -> None:
    from krea_dagster.drill.edges import EDGES, NOT_UNDER

    if not _kills(figures) + figures["kills_missed"]:
        return
    click.echo("\nKills by edge:")
    kills = figures["kills"]["edges"]
    _print_table([(edge.name, f"{kills[edge.name]:>3}") for edge in EDGES if edge.name in kills])
    if missed := figures["edges_never_reached"]:
        click.echo(f"Planned and never reached: {'; '.join(missed)}")
    if left_out := figures["edges_not_planned"]:
        click.echo(f"Not planned, too few kills: {'; '.join(left_out)}")
    policy = figures["policy"]
    unreachable = [edge.name for edge in EDGES if policy not in edge.policies]
    click.echo(f"Not planned, because {NOT_UNDER[policy]}: {'; '.join(unreachable)}")


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows as a table that is as wide as its cells, on any terminal."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(f"  {'  '.join(cells)}".rstrip())
