"""One client in a separate process: runs once, and prints its cost as one JSON line.

    python -m benchmarks.worker KIND --url URL --images 2000 --folder FOLDER

``engine`` is the engine without Dagster, with a SQLite journal and its images in the folder;
``krea`` is ``Krea.run``, which looks at each image and measures it, and ``krea-unseen`` the same
without ``verify_images``: both take a table that ``table`` writes, as does ``dagster``;
``dagster`` materializes all partitions of ``prompts.parquet`` in the folder, which ``table``
writes; ``threads``, ``aiohttp``, ``aiohttp-decode`` and ``aiohttp-journal`` are the baselines.

``wall_s`` and ``cpu_s`` leave out Python's start and imports; ``peak_bytes`` does not.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from benchmarks.baselines import (
    bare_aiohttp,
    body_of,
    decoding_aiohttp,
    journaled_aiohttp,
    thread_pool,
)
from benchmarks.harness import peak_bytes


def engine(options: Namespace) -> Callable[[], dict[str, Any]]:
    """Return the engine as a run of the plugin builds it."""
    from krea_dagster.api import KreaClient
    from krea_dagster.engine.journal.journal import Journal
    from krea_dagster.engine.run.report import RunReport
    from krea_dagster.engine.run.requested_image import RequestedImage
    from krea_dagster.engine.run.runner import Runner
    from krea_dagster.engine.storage.images import ImageStore
    from krea_dagster.engine.storage.storage import Storage
    from krea_dagster.models import ImageRequest
    from krea_dagster.prompts.requests import request_key

    def wanted(number: int) -> RequestedImage:
        body = {**body_of(number), "quality": options.quality}
        del body["model"]
        request = ImageRequest(request_key=request_key(**body), attempt=0, **body)
        return RequestedImage(request, "all")

    async def buy(journal: Journal) -> RunReport:
        runner = Runner(
            connect=lambda: KreaClient(options.key, base_url=options.url),
            journal=journal,
            images=ImageStore(Storage(str(options.folder))),
            run_id=f"benchmark-{options.key}",
            max_in_flight=options.most,
        )
        first = options.first
        return await runner.run(wanted(number) for number in range(first, first + options.images))

    journal_url = options.journal or f"sqlite:///{options.folder / 'journal.db'}"
    if options.journal:  # several workers open it, so it is made before any of them begins
        Journal(journal_url).close()

    def work() -> dict[str, Any]:
        with closing(Journal(journal_url)) as journal:
            report = asyncio.run(buy(journal))
        return {
            "delivered": report.progress.delivered,
            "left": len(report.left),
        }

    return work


def through_dagster(options: Namespace) -> Callable[[], dict[str, Any]]:
    """Return what ``krea-dagster materialize`` does: runs of the job, in a real instance."""
    os.environ.update(
        {
            "EVOLINK_API_KEY": options.key,
            "EVOLINK_BASE_URL": options.url,
            "KREA_PROMPTS": str(options.folder / "prompts.parquet"),
            "KREA_STORAGE": str(options.folder / "krea"),
            "KREA_PARTITION_BY": "hash:8",
            "KREA_MAX_IN_FLIGHT": str(options.most),
        }
    )
    from krea_dagster.application.settings import Settings
    from krea_dagster.plugin.materialize import materialize

    def work() -> dict[str, Any]:
        done = materialize(Settings.from_environment())
        return {
            "delivered": done.progress.delivered,
            "left": len(done.left),
            "rows": done.progress.total,
            "failures": list(done.failures),
        }

    return work


def krea(*, verify_images: bool) -> Callable[[Namespace], Callable[[], dict[str, Any]]]:
    """Return a run of all partitions of ``prompts.parquet`` in the folder, without Dagster."""

    def prepared(options: Namespace) -> Callable[[], dict[str, Any]]:
        from krea_dagster.application.krea import Krea
        from krea_dagster.application.settings import Settings

        settings = Settings(
            api_key=options.key,
            base_url=options.url,
            prompts=str(options.folder / "prompts.parquet"),
            storage=str(options.folder / "krea"),
            max_in_flight=options.most,
            verify_images=verify_images,
        )

        def work() -> dict[str, Any]:
            report = Krea(settings).run().report
            return {"delivered": report.progress.delivered, "left": len(report.left)}

        return work

    return prepared


def table(options: Namespace) -> Callable[[], dict[str, Any]]:
    """Write a prompt table with the same images as the engine alone."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def work() -> dict[str, Any]:
        first = options.first
        bodies = [body_of(number) for number in range(first, first + options.images)]
        columns = {
            "prompt_id": [f"p{number:07d}" for number in range(first, first + options.images)],
            "prompt": [body["prompt"] for body in bodies],
            "seed": [body["seed"] for body in bodies],
            "quality": [options.quality] * options.images,
        }
        pq.write_table(pa.table(columns), options.folder / "prompts.parquet")
        return {}

    return work


def baseline(buy: Callable[..., None]) -> Callable[[Namespace], Callable[[], dict[str, Any]]]:
    """Return one of the baselines."""

    def prepared(options: Namespace) -> Callable[[], dict[str, Any]]:
        def work() -> dict[str, Any]:
            buy(options.url, options.key, options.images, options.folder, options.most)
            return {"delivered": sum(1 for _ in options.folder.glob("*.[jp][pn]g"))}

        return work

    return prepared


KINDS: Final = {
    "engine": engine,
    "krea": krea(verify_images=True),
    "krea-unseen": krea(verify_images=False),
    "dagster": through_dagster,
    "table": table,
    "threads": baseline(thread_pool),
    "aiohttp": baseline(bare_aiohttp),
    "aiohttp-decode": baseline(decoding_aiohttp),
    "aiohttp-journal": baseline(journaled_aiohttp),
}


def main() -> None:
    """Run the command."""
    add = ArgumentParser(prog="python -m benchmarks.worker")
    add.add_argument("kind", choices=KINDS)
    add.add_argument("--url", default="")
    add.add_argument("--key", default="bench")
    add.add_argument("--images", type=int, required=True)
    add.add_argument("--first", type=int, default=0, help="number of the first image")
    add.add_argument("--folder", type=Path, required=True)
    add.add_argument("--quality", default="1K")
    add.add_argument("--most", type=int, default=256, help="most in flight, or threads")
    add.add_argument("--journal", help="a URL; default: a SQLite file in the folder")
    add.add_argument("--gate", type=Path, help="a folder; begins when the file `open` is there")
    options = add.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    work = KINDS[options.kind](options)
    if options.gate:
        (options.gate / f"{options.key}.ready").touch()
        while not (options.gate / "open").exists():
            time.sleep(0.01)
    began_s, cpu_s = time.monotonic(), time.process_time()
    output = work()
    output["wall_s"] = time.monotonic() - began_s
    output["cpu_s"] = time.process_time() - cpu_s
    output["peak_bytes"] = peak_bytes()
    print(json.dumps(output))


if __name__ == "__main__":
    main()
