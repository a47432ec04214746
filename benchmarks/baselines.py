"""The baselines: code that users write today, and the least that is correct.

Each buys images 0 to n - 1, writes each to a file, and knows how many the account takes at once.
Only ``journaled_aiohttp`` keeps a journal.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import aiohttp

PATH: Final = "/v1/images/generations"
TASKS: Final = "/v1/tasks/"

#: Seconds between two reads of an image task, as in EvoLink's own clients.
POLL_S: Final = 3.0
#: Seconds after a 429 without Retry-After.
PAUSE_S: Final = 1.0
#: Seconds between two reads of the bare loop.
QUICK_POLL_S: Final = 0.5
#: Seconds between two reads of all tasks, and the tasks of one read.
BATCH_POLL_S: Final = 0.25
BATCH: Final = 50


def body_of(number: int) -> dict[str, Any]:
    """Return the body of the request for an image."""
    return {
        "model": "krea-2-turbo",
        "prompt": f"image number {number} of a benchmark",
        "size": "1:1",
        "quality": "1K",
        "seed": 1 + number % 1_000_000,
        "nsfw_check": False,
    }


def thread_pool(url: str, key: str, images: int, folder: Path, threads: int = 64) -> None:
    """Requests in a thread pool: POST, then sleep 3 s and read until done, then download."""
    import threading

    import requests

    own = threading.local()

    def buy(number: int) -> None:
        if not hasattr(own, "session"):
            own.session = requests.Session()
            own.session.trust_env = False
        session = own.session
        headers = {"Authorization": f"Bearer {key}"}
        while True:
            answer = session.post(url + PATH, json=body_of(number), headers=headers, timeout=60)
            if answer.status_code != 429:
                break
            time.sleep(float(answer.headers.get("Retry-After", PAUSE_S)))
        answer.raise_for_status()
        task_id = answer.json()["id"]
        while True:
            time.sleep(POLL_S)
            answer = session.get(url + TASKS + task_id, headers=headers, timeout=60)
            answer.raise_for_status()
            task = answer.json()
            if task["status"] == "completed":
                break
        file = session.get(task["results"][0], timeout=60)
        file.raise_for_status()
        (folder / f"{number}.jpg").write_bytes(file.content)

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(buy, range(images)):
            pass


def bare_aiohttp(url: str, key: str, images: int, folder: Path, at_once: int = 64) -> None:
    """The simplest correct loop on aiohttp."""
    import aiohttp

    headers = {"Authorization": f"Bearer {key}"}

    async def buy(session: aiohttp.ClientSession, number: int) -> None:
        while True:
            async with session.post(url + PATH, json=body_of(number), headers=headers) as answer:
                if answer.status != 429:
                    answer.raise_for_status()
                    task_id = (await answer.json())["id"]
                    break
                pause_s = float(answer.headers.get("Retry-After", PAUSE_S))
            await asyncio.sleep(pause_s)
        while True:
            await asyncio.sleep(QUICK_POLL_S)
            async with session.get(url + TASKS + task_id, headers=headers) as answer:
                answer.raise_for_status()
                task = await answer.json()
            if task["status"] == "completed":
                break
        async with session.get(task["results"][0]) as answer:
            answer.raise_for_status()
            file = await answer.read()
        (folder / f"{number}.jpg").write_bytes(file)

    async def main() -> None:
        connector = aiohttp.TCPConnector(limit=at_once)
        async with aiohttp.ClientSession(connector=connector) as session:
            waiting: Iterator[int] = iter(range(images))

            async def buy_all() -> None:
                for number in waiting:
                    await buy(session, number)

            await asyncio.gather(*(buy_all() for _ in range(at_once)))

    asyncio.run(main())


def decoding_aiohttp(url: str, key: str, images: int, folder: Path, at_once: int = 64) -> None:
    """A loop on aiohttp with batch reads, which decodes each image with Pillow in threads."""
    from PIL import Image

    def keep(number: int, file: bytes) -> None:
        with Image.open(io.BytesIO(file)) as image:
            image.load()
        (folder / f"{number}.png").write_bytes(file)

    async def buy(loop: _Loop, number: int) -> None:
        file = await loop.download(await loop.link(await loop.submit(number)))
        await asyncio.to_thread(keep, number, file)

    asyncio.run(_Loop.buy_all(url, key, images, at_once, buy))


def journaled_aiohttp(url: str, key: str, images: int, folder: Path, at_once: int = 64) -> None:
    """A loop on aiohttp with batch reads, hashes, durable files, and a durable journal."""
    journal = sqlite3.connect(folder / "bought.db", isolation_level=None)
    journal.execute("PRAGMA journal_mode = WAL")
    journal.execute("PRAGMA synchronous = FULL")
    journal.execute("CREATE TABLE bought (number INTEGER PRIMARY KEY, task_id TEXT, sha256 TEXT)")

    def keep(number: int, file: bytes) -> str:
        new = folder / f"{number}.new"
        with new.open("wb") as opened:
            opened.write(file)
            opened.flush()
            os.fsync(opened.fileno())
        new.rename(folder / f"{number}.png")
        return hashlib.sha256(file).hexdigest()

    async def buy(loop: _Loop, number: int) -> None:
        journal.execute("INSERT INTO bought (number) VALUES (?)", (number,))
        task_id = await loop.submit(number)
        journal.execute("UPDATE bought SET task_id = ? WHERE number = ?", (task_id, number))
        file = await loop.download(await loop.link(task_id))
        sha256 = await asyncio.to_thread(keep, number, file)
        journal.execute("UPDATE bought SET sha256 = ? WHERE number = ?", (sha256, number))

    with closing(journal):
        asyncio.run(_Loop.buy_all(url, key, images, at_once, buy))


class _Loop:
    """The calls of a loop on aiohttp whose tasks are read together. It knows no refusals."""

    def __init__(self, session: aiohttp.ClientSession, url: str, key: str) -> None:
        self._session = session
        self._url = url
        self._headers = {"Authorization": f"Bearer {key}"}
        self._links: dict[str, asyncio.Future[str]] = {}

    @classmethod
    async def buy_all(
        cls,
        url: str,
        key: str,
        images: int,
        at_once: int,
        buy: Callable[[_Loop, int], Awaitable[None]],
    ) -> None:
        """Buy images 0 to n - 1, ``at_once`` of them at a time."""
        import aiohttp

        waiting = iter(range(images))
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=at_once)) as session:
            loop = cls(session, url, key)

            async def buy_each() -> None:
                for number in waiting:
                    await buy(loop, number)

            reading = asyncio.create_task(loop._read_tasks())
            await asyncio.gather(*(buy_each() for _ in range(at_once)))
            reading.cancel()

    async def submit(self, number: int) -> str:
        """Buy an image; return its task."""
        task_id: str = (await self._post(PATH, body_of(number)))["id"]
        return task_id

    async def link(self, task_id: str) -> str:
        """Wait until a task is completed; return the link to its image."""
        self._links[task_id] = asyncio.get_running_loop().create_future()
        return await self._links[task_id]

    async def download(self, link: str) -> bytes:
        """Return a file."""
        async with self._session.get(link) as answer:
            answer.raise_for_status()
            return await answer.read()

    async def _read_tasks(self) -> None:
        while True:
            await asyncio.sleep(BATCH_POLL_S)
            waiting = list(self._links)
            for first in range(0, len(waiting), BATCH):
                part = waiting[first : first + BATCH]
                for task in (await self._post(TASKS + "batch", {"task_ids": part}))["data"]:
                    if task["status"] == "completed":
                        self._links.pop(task["id"]).set_result(task["results"][0])

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        async with self._session.post(self._url + path, json=body, headers=self._headers) as answer:
            answer.raise_for_status()
            answered: dict[str, Any] = await answer.json()
            return answered
