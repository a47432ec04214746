"""From the first POST to the last image, against the least that the account's limits allow.

python -m benchmarks.makespan [--quick] [--variants] [--one-by-one] [--json]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from benchmarks.books import Figures, figures_of
from benchmarks.harness import (
    WORKERS,
    Ran,
    Report,
    Server,
    Started,
    finish,
    note_progress,
    options_of,
)

IMAGES: Final = 2000
QUICK_IMAGES: Final = 300
#: Most in flight that ours is allowed: far above what the account takes, which it must find out.
MOST: Final = 256


@dataclass(frozen=True)
class Limits:
    """The most that ours may take: of the bound, of reads per image, of refusals after 10 s."""

    ratio: float
    single_reads: float
    batch_reads: float
    turned_away_later: float | None = None


@dataclass(frozen=True)
class Account:
    """An account: its server's options, and what ours must reach on it, where that is set.

    ``places`` is how many tasks it takes at once; only the baselines are told.
    """

    name: str
    options: Sequence[object]
    places: int
    limits: Limits | None = None


LATENCY: Final = ("--latency", 2.0, "--spread", 0.3)
RATE: Final = ("--rate", 20, "--concurrent", 64)

A: Final = Account(
    "(a) 20/s, 64 at once", (*LATENCY, *RATE, "--burst", 20), 64, Limits(1.05, 1.3, 0.1, 0.02)
)
B: Final = Account("(b) 32 at once", (*LATENCY, "--concurrent", 32), 32, Limits(1.10, 2.5, 0.3))


def _like_a(name: str, *options: object) -> Account:
    return Account(f"(a), {name}", (*LATENCY, *RATE, *options), 64)


VARIANTS: Final = (
    _like_a("burst of 1", "--burst", 1),
    _like_a("Retry-After: 1", "--burst", 20, "--retry-after", 1),
    _like_a("fixed windows of 1 s", "--limiter", "fixed"),
    _like_a("sliding window of 1 s", "--limiter", "sliding"),
    _like_a("long tail (lognormal)", "--burst", 20, "--shape", "lognormal"),
)


@dataclass(frozen=True)
class Client:
    """A client: its worker, whether the server reads in batches for it, and whether it is ours."""

    name: str
    kind: str
    batch: bool = True
    ours: bool = False


OURS: Final = (
    Client("ours, single reads", "engine", batch=False, ours=True),
    Client("ours, batch reads", "engine", ours=True),
)
BASELINES: Final = (
    Client("requests, thread pool, 3 s poll", "threads"),
    Client("bare aiohttp loop, 0.5 s poll", "aiohttp"),
)


def main() -> None:
    """Run the command."""
    parser = options_of("makespan")
    parser.add_argument("--variants", action="store_true", help="also other limiters, ours only")
    parser.add_argument("--one-by-one", action="store_true", help="no two clients at once")
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
    races: list[tuple[Account, tuple[Client, ...]]] = [
        (A, (*OURS, *BASELINES)),
        (B, (*OURS, *BASELINES)),
    ]
    if options.variants:
        races += [(variant, OURS) for variant in VARIANTS]
    for account, clients in races:
        alone = [(client,) for client in clients]
        # Ours beside a baseline each: all at once would be more than one core has.
        groups = alone if options.one_by_one else [clients[::2], clients[1::2]]
        for group in groups:
            for client, figures, ran in race(account, group, images):
                _report(report, account, client, figures, ran)
    report.note(
        "The bound is the list schedule of these latencies under these limits: calls and downloads "
        "take no time, and the client knows the limits and the end of every task at once."
    )
    report.note(
        f"Ours is allowed {MOST} in flight and finds the account's limits by itself. The baselines "
        "are told how many the account takes at once, and keep no journal."
    )
    finish(report, options)


def race(
    account: Account, clients: Sequence[Client], images: int
) -> Iterator[tuple[Client, Figures, Ran]]:
    """Run clients at the same time, each on a server of its own."""
    note_progress(f"{account.name}: {', '.join(client.name for client in clients)}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        running = []
        for number, client in enumerate(clients):
            without = () if client.batch else ("--no-batch",)
            server = stack.enter_context(Server.start(*account.options, *without))
            most = MOST if client.ours else account.places
            command = ["benchmarks.worker", client.kind, "--url", server.url]
            command += ["--images", str(images), "--most", str(most)]
            command += ["--folder", str(folder / str(number))]
            started = Started(command, core=WORKERS)
            stack.callback(started.stop)
            running.append((client, server, started))
        for client, server, started in running:
            ran = started.wait()
            yield client, figures_of(server.books(), images), ran


def _report(report: Report, account: Account, client: Client, figures: Figures, ran: Ran) -> None:
    reads = figures.single_reads + figures.batch_reads
    report.add(
        f"{account.name}: {client.name}",
        f"{figures.makespan_s:.1f}",
        f"{figures.bound_s:.1f}",
        f"{figures.ratio:.3f}",
        f"{reads:.2f}",
        f"{figures.turned_away:.1%}",
        f"{figures.turned_away_later:.1%}",
        f"{1000 * ran.said['cpu_s'] / figures.images:.1f}",
    )
    limits = account.limits
    if limits is None or not client.ours:
        return
    name = f"{account.name}, {client.name}"
    report.claim(f"{name}: makespan to bound", figures.ratio, limits.ratio)
    most = limits.batch_reads if client.batch else limits.single_reads
    report.claim(f"{name}: reads per image", reads, most)
    if limits.turned_away_later is not None:
        report.claim(
            f"{name}: share of POSTs answered 429 after 10 s",
            figures.turned_away_later,
            limits.turned_away_later,
        )


if __name__ == "__main__":
    main()
