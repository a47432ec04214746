"""One of two hosts that buy the same rows, with a wall clock that may be ahead."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from krea_dagster.api import KreaClient
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.policy import OnUnknown, Policy
from krea_dagster.engine.run.runner import Runner
from krea_dagster.engine.storage.images import ImageStore
from krea_dagster.engine.storage.storage import Storage
from tests.engine.harness import KNOWN_LATENCIES, ClockAhead, make_requests, to_requested


@dataclass(frozen=True)
class Work:
    """The task of a worker: buy ``rows`` rows, which the other one buys too."""

    journal_url: str
    server_url: str
    root: str
    run_id: str
    rows: int
    ahead_s: float = 0.0
    on_unknown: OnUnknown = "replay"

    def as_text(self) -> str:
        """Return it for the command line."""
        return json.dumps(asdict(self))


async def run(work: Work, journal: Journal) -> dict[str, object]:
    runner = Runner(
        connect=lambda: KreaClient("emulator", base_url=work.server_url, timeout_s=20.0),
        journal=journal,
        images=ImageStore(Storage(work.root), verify=False),
        run_id=work.run_id,
        policy=Policy(on_unknown=work.on_unknown, wait_scale=0.05),
        max_in_flight=16,
        clock=ClockAhead(timedelta(seconds=work.ahead_s)),
        randomness=random.Random(work.run_id),
        latencies=KNOWN_LATENCIES,
    )
    report = await runner.run(to_requested(make_requests(work.rows)))
    return {"posts": report.posts, "left": sorted(set(report.left.values()))}


def main() -> None:
    work = Work(**json.loads(sys.argv[1]))
    Path(work.root).mkdir(exist_ok=True)
    with closing(Journal(work.journal_url)) as journal:
        print(json.dumps(asyncio.run(run(work, journal))))


if __name__ == "__main__":
    main()
