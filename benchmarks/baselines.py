"""The baselines: code that users write today, and the least that is correct.

Each buys images 0 to n - 1, writes each to a file, and knows how many the account takes at once.
Neither keeps a journal.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

PATH: Final = "/v1/images/generations"
TASKS: Final = "/v1/tasks/"

#: Seconds between two reads of an image task, as in EvoLink's own clients.
POLL_S: Final = 3.0
#: Seconds after a 429 without Retry-After.
PAUSE_S: Final = 1.0
#: Seconds between two reads of the bare loop.
QUICK_POLL_S: Final = 0.5


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
