"""The engine's runner and its client of the API, made from the settings."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from PIL import Image

from krea_dagster.application.backend import Backend
from krea_dagster.curation.measures.cache import measured_while_verified
from krea_dagster.curation.thumbnails import Thumbnails
from krea_dagster.engine.run.latency import Latencies
from krea_dagster.engine.run.options import RunRoot
from krea_dagster.engine.run.report import Progress
from krea_dagster.engine.run.runner import Runner
from krea_dagster.engine.storage.images import ImageStore
from krea_dagster.errors import ConfigError
from krea_dagster.prompts import PromptTable

if TYPE_CHECKING:
    from krea_dagster.api import KreaClient


@contextmanager
def open_runner(
    backend: Backend,
    run_id: str,
    on_progress: Callable[[Progress], None] = lambda _: None,
    table: PromptTable | None = None,
) -> Iterator[Runner]:
    """Yield the engine's runner with these settings. Raises ConfigError or JournalError."""
    backend.check()
    settings, storage = backend.settings, backend.open_storage()
    storage.probe()
    with ExitStack() as stack:
        journal = stack.enter_context(backend.open_journal())
        root_id = journal.roots.begin(storage, journal.roots.check(storage))
        fingerprint = journal.api_keys.fingerprint(backend.key)
        account = journal.api_keys.enter(fingerprint)
        on_image: list[Callable[[str, Image.Image], object]] = [Thumbnails(storage).add]
        if settings.measure_images and settings.verify_images:
            on_image.append(stack.enter_context(measured_while_verified(storage)))
        urls = backend.callback_urls()
        runner = Runner(
            connect=partial(connect, backend),
            journal=journal,
            images=ImageStore(storage, verify=settings.verify_images, on_image=on_image),
            run_id=run_id,
            root=RunRoot(
                root_id,
                adopts=journal.roots.adopts(root_id),
                elsewhere=lambda keys: journal.roots.elsewhere(keys, root_id),
            ),
            table_id="" if table is None else backend.table_id(journal, table, enter=True),
            api_key=fingerprint,
            policy=replace(backend.policy(), account_keys=account),
            max_in_flight=settings.max_in_flight,
            max_per_s=settings.max_per_s,
            latencies=Latencies.expecting(settings.expected_latency_s),
            caps=backend.caps(),
            callback_url_of=None if urls is None else urls.url,
            on_progress=on_progress,
        )
        yield replace(runner, **backend.run_options())
        # A new token: a copy of the journal from the time of the run is then known to be old.
        journal.roots.begin(storage, root_id)


@asynccontextmanager
async def connect(backend: Backend) -> AsyncIterator[KreaClient]:
    """Yield a client of the API, or of the emulator, which is started if none runs."""
    if not backend.settings.emulator:
        async with backend.client(backend.settings.base_url) as client:
            yield client
        return
    folder = backend.open_storage().folder
    if folder is None:
        raise ConfigError("the emulator keeps its state in the storage root: use a folder")
    from krea_dagster.application.emulator_process import local_emulator

    with local_emulator(folder / "emulator") as url:
        async with backend.client(url) as client:
            yield client
