"""Workers with a defect, to show that the drill finds it. The argument names the defect."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable
from dataclasses import replace

from krea_dagster.api.download import Download, Sink
from krea_dagster.drill.instrumented import InstrumentedClient
from krea_dagster.drill.worker import main
from krea_dagster.models import ImageRequest, Submission


class NewKeyEachTime(InstrumentedClient):
    """Sends every POST under a new Idempotency-Key, so that no repeat is recognised."""

    async def submit(
        self, request: ImageRequest, *, idempotency_key: str, callback_url: str | None = None
    ) -> Submission:
        idempotency_key = uuid.uuid4().hex
        return await super().submit(
            request, idempotency_key=idempotency_key, callback_url=callback_url
        )


class AltersFiles(InstrumentedClient):
    """Adds a byte to each image, and reports the hash of the right one."""

    async def download(
        self, url: str, *, sink: Sink | Callable[[bytes], object], max_bytes: int
    ) -> Download:
        write = sink if callable(sink) else sink.write
        done = await super().download(url, sink=write, max_bytes=max_bytes)
        write(b"\n")
        return replace(done, size_bytes=done.size_bytes + 1)


class GrowsFiles(InstrumentedClient):
    """Adds a byte to each image, and reports the former size: the file is never right."""

    async def download(
        self, url: str, *, sink: Sink | Callable[[bytes], object], max_bytes: int
    ) -> Download:
        write = sink if callable(sink) else sink.write
        done = await super().download(url, sink=write, max_bytes=max_bytes)
        write(b"\n")
        return done


class Crashes(InstrumentedClient):
    """Ends with an error at the second download."""

    downloads = 0

    async def download(
        self, url: str, *, sink: Sink | Callable[[bytes], object], max_bytes: int
    ) -> Download:
        self.downloads += 1
        if self.downloads == 2:
            raise RuntimeError("a defect of the test")
        return await super().download(url, sink=sink, max_bytes=max_bytes)


KINDS = {
    "new-key": NewKeyEachTime,
    "altered-files": AltersFiles,
    "grown-files": GrowsFiles,
    "crash": Crashes,
}

if __name__ == "__main__":
    main(KINDS[sys.argv[1]])
