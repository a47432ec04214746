"""The makespan, from the first POST to the last image, against the least that the limits allow.

python -m benchmarks.makespan [--quick] [--one-by-one] [--json]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from benchmarks.harness import WORKERS, BenchmarkServer, EndedProcess, RunningProcess, note_progress
from benchmarks.report import Report, finish, options_of
from benchmarks.run_figures import RunFigures, figures_of

IMAGES: Final = 2000
QUICK_IMAGES: Final = 300
#: Most tasks in flight of our client: far above the account's limit, which it must find.
MOST: Final = 256


@dataclass(frozen=True)
class Targets:
    """The most for our client: ratio to the bound, reads per image, refusals after 10 s."""

    ratio: float
    single_reads: float
    batch_reads: float
    turned_away_later: float | None = None


@dataclass(frozen=True)
class RaceAccount:
    """An account: the options of its server, and the targets of our client.

    ``places`` is how many tasks it takes at once; only the baselines are told.
    """

    name: str
    options: Sequence[object]
    places: int
    targets: Targets


LATENCY: Final = ("--latency", 2.0, "--spread", 0.3)
RATE: Final = ("--rate", 20, "--concurrent", 64)

A: Final = RaceAccount(
    "(a) 20/s, 64 at once", (*LATENCY, *RATE, "--burst", 20), 64, Targets(1.05, 1.3, 0.1, 0.02)
)
B: Final = RaceAccount(
    "(b) 32 at once", (*LATENCY, "--concurrent", 32), 32, Targets(1.10, 2.5, 0.3)
)


@dataclass(frozen=True)
class RaceClient:
    """A client: its worker, whether its server has batch reads, and whether it is ours."""

    name: str
    kind: str
    batch: bool = True
    ours: bool = False


#: Ours and the baselines.
CLIENTS: Final = (
    RaceClient("ours, single reads", "engine", batch=False, ours=True),
    RaceClient("ours, batch reads", "engine", ours=True),
    RaceClient("requests, thread pool, 3 s poll", "threads"),
    RaceClient("bare aiohttp loop, 0.5 s poll", "aiohttp"),
)


def main() -> None:
    """Run the command."""
    parser = options_of("makespan")
    parser.add_argument("--one-by-one", action="store_true", help="one client at a time")
    parser.add_argument("--images", type=int, help=f"default: {IMAGES}")
    options = parser.parse_args()
    images = options.images or (QUICK_IMAGES if options.quick else IMAGES)
    report = Report(
        "makespan",
        "Makespan against the schedule bound",
        setting=(
            f"{images:,} images of 300 KB, 2 s ± 30 %, cold start, n = 1, each client with a "
            "server of its own and the same latencies; "
            + ("one client after the other" if options.one_by_one else "two clients at a time")
        ),
        columns=[
            "account and client",
            "makespan, s",
            "bound, s",
            "ratio",
            "reads per image",
            "POSTs answered 429",
            "after 10 s",
            "CPU, ms per image",
        ],
    )
    alone = [(client,) for client in CLIENTS]
    # Each of ours with one baseline: all at once would need more than one core.
    groups = alone if options.one_by_one else [CLIENTS[::2], CLIENTS[1::2]]
    for account in (A, B):
        for group in groups:
            for client, figures, ended in race(account, group, images):
                _report(report, account, client, figures, ended)
    report.note(
        "The bound is the list schedule of these latencies under these limits: calls and downloads "
        "take no time, and the client knows the limits and the end of every task at once."
    )
    report.note(
        f"Our client may have {MOST} tasks in flight, and finds the account's limits during the "
        "run. The baselines are told how many tasks the account takes at once, and keep no journal."
    )
    finish(report, options)


def race(
    account: RaceAccount, clients: Sequence[RaceClient], images: int
) -> Iterator[tuple[RaceClient, RunFigures, EndedProcess]]:
    """Run clients at the same time, each on a server of its own."""
    note_progress(f"{account.name}: {', '.join(client.name for client in clients)}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        running = []
        for number, client in enumerate(clients):
            without = () if client.batch else ("--no-batch",)
            server = stack.enter_context(BenchmarkServer.start(*account.options, *without))
            most = MOST if client.ours else account.places
            command = ["benchmarks.worker", client.kind, "--url", server.url]
            command += ["--images", str(images), "--most", str(most)]
            command += ["--folder", str(folder / str(number))]
            started = RunningProcess(command, core=WORKERS)
            stack.callback(started.stop)
            running.append((client, server, started))
        for client, server, started in running:
            ended = started.wait()
            yield client, figures_of(server.stats(), images), ended


def _report(
    report: Report,
    account: RaceAccount,
    client: RaceClient,
    figures: RunFigures,
    ended: EndedProcess,
) -> None:
    reads = figures.single_reads + figures.batch_reads
    report.add(
        f"{account.name}: {client.name}",
        f"{figures.makespan_s:.1f}",
        f"{figures.bound_s:.1f}",
        f"{figures.ratio:.3f}",
        f"{reads:.2f}",
        f"{figures.turned_away:.1%}",
        f"{figures.turned_away_later:.1%}",
        f"{1000 * ended.output['cpu_s'] / figures.images:.1f}",
    )
    if not client.ours:
        return
    targets = account.targets
    name = f"{account.name}, {client.name}"
    report.claim(f"{name}: makespan to bound", figures.ratio, targets.ratio)
    most = targets.batch_reads if client.batch else targets.single_reads
    report.claim(f"{name}: reads per image", reads, most)
    if targets.turned_away_later is not None:
        report.claim(
            f"{name}: share of POSTs answered 429 after 10 s",
            figures.turned_away_later,
            targets.turned_away_later,
        )


if __name__ == "__main__":
    main()
