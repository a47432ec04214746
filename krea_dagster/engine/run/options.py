"""What a run is given."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from krea_dagster.engine.budget import Caps
from krea_dagster.engine.clock import Clock, SystemClock
from krea_dagster.engine.journal.journal import NO_CAPS, Journal
from krea_dagster.engine.policy import Policy
from krea_dagster.engine.record import Record
from krea_dagster.engine.resolution import Resolution
from krea_dagster.engine.run.latency import Latencies
from krea_dagster.engine.run.poller import TaskReader
from krea_dagster.engine.run.report import Progress
from krea_dagster.engine.storage.images import Downloader, ImageStore
from krea_dagster.engine.threads import InThread, in_thread
from krea_dagster.models import AccountCredits, ImageRequest, Submission


class Client(TaskReader, Downloader, Protocol):
    """What the engine needs of KreaClient."""

    async def submit(
        self, request: ImageRequest, *, idempotency_key: str, callback_url: str | None = None
    ) -> Submission:
        """POST one request. Raises SubmitError."""

    async def credits(self) -> AccountCredits:
        """Read the account's credits. Raises ApiError."""


@dataclass(frozen=True)
class RunRoot:
    """The storage root of a run, as its journal knows it.

    ``root_id`` is empty if the journal does not keep which files are there. ``adopts``: also look
    behind a URL for files that the journal did not enter. ``elsewhere`` returns the other roots
    that hold these images.
    """

    root_id: str = ""
    adopts: bool = False
    elsewhere: Callable[[Sequence[str]], Mapping[str, Sequence[str]]] = lambda _: {}


@dataclass(frozen=True)
class RunOptions:
    """What a run is given.

    Attributes:
        connect: Opens a client. Not called if there is nothing to do.
        journal: Where every event is written.
        images: Where images are stored.
        run_id: Written with every purchase.
        policy: What is done about failures.
        max_in_flight: The most tasks at the server.
        max_per_s: The most submissions a second, where the account's limit is known.
        caps: The most that may be committed.
        launch: The runs that stop together if the account stops one; by default this run alone.
        root: The storage root, as the journal knows it.
        table_id: The prompt table of the requests.
        api_key: The fingerprint of the key that buys.
        buying: If false, tasks are only read and images fetched.
        resolutions: A person's decisions about unknown outcomes, by request key.
        callback_url_of: Returns, for a request key, the address of a receiver that writes into this
            journal. Without it, tasks are polled.
        randomness: Jitters the pauses.
        latencies: What is known before the run.
        on_progress: Called on the event loop when something has changed.
        in_thread: Makes the calls that block.
    """

    connect: Callable[[], AbstractAsyncContextManager[Client]]
    journal: Journal
    images: ImageStore
    run_id: str
    policy: Policy = field(default_factory=Policy)
    max_in_flight: int = 64
    max_per_s: float | None = None
    caps: Caps = NO_CAPS
    launch: str = ""
    root: RunRoot = field(default_factory=RunRoot)
    table_id: str = ""
    api_key: str | None = None
    buying: bool = True
    resolutions: Mapping[str, Resolution] = field(default_factory=dict)
    callback_url_of: Callable[[str], str] | None = None
    clock: Clock = field(default_factory=SystemClock)
    randomness: random.Random = field(default_factory=random.Random)
    latencies: Latencies = field(default_factory=Latencies)
    on_progress: Callable[[Progress], None] = lambda _: None
    in_thread: InThread = in_thread

    def file_is_missing(self, record: Record) -> bool:
        """Whether a stored request's file is gone or has another size. Blocks."""
        return record.image is None or not self.images.holds(record.image)
