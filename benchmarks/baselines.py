"""What users write today, and the least that is correct: neither keeps a journal.

Each buys images 0 to n - 1, writes each to a file, and knows how many the account takes at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

PATH: Final = "/v1/images/generations"
TASKS: Final = "/v1/tasks/"

#: What EvoLink's own clients wait between two reads of an image task.
POLL_S: Final = 3.0
#: After a 429 that does not say how long.
PAUSE_S: Final = 1.0
#: The bare loop's wait between two reads.
QUICK_POLL_S: Final = 0.5


def body_of(number: int) -> dict[str, Any]:
    """What is sent to buy an image."""
    return {
        "model": "krea-2-turbo",
        "prompt": f"picture number {number} of a benchmark",
        "size": "1:1",
        "quality": "1K",
        "seed": 1 + number % 1_000_000,
        "nsfw_check": False,
    }


def thread_pool(url: str, key: str, images: int, folder: Path, threads: int = 64) -> None:
    """Requests in a thread pool: POST, then sleep 3 s and read until done, then download."""
    import threading  # noqa: PLC0415 - the other baseline has none

    import requests  # noqa: PLC0415 - imported where it is measured

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


def bare_aiohttp(
    url: str,
    key: str,
    images: int,
    folder: Path,
    at_once: int = 64,
    *,
    poll_s: float = QUICK_POLL_S,
) -> None:
    """The simplest correct loop on aiohttp: the same calls, and the file is written."""
    import aiohttp  # noqa: PLC0415 - imported where it is measured

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
            await asyncio.sleep(poll_s)
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
            await _with_hands(range(images), at_once, lambda number: buy(session, number))

    asyncio.run(main())


def bare_httpx(
    url: str,
    key: str,
    images: int,
    folder: Path,
    at_once: int = 64,
    *,
    poll_s: float = QUICK_POLL_S,
) -> None:
    """The same on plain httpx, with its own limits."""
    import httpx  # noqa: PLC0415 - imported where it is measured

    headers = {"Authorization": f"Bearer {key}"}

    async def buy(client: httpx.AsyncClient, number: int) -> None:
        while True:
            answer = await client.post(url + PATH, json=body_of(number), headers=headers)
            if answer.status_code != 429:
                break
            await asyncio.sleep(float(answer.headers.get("Retry-After", PAUSE_S)))
        task_id = answer.raise_for_status().json()["id"]
        while True:
            await asyncio.sleep(poll_s)
            answer = await client.get(url + TASKS + task_id, headers=headers)
            task = answer.raise_for_status().json()
            if task["status"] == "completed":
                break
        file = (await client.get(task["results"][0])).raise_for_status()
        (folder / f"{number}.jpg").write_bytes(file.content)

    async def main() -> None:
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            await _with_hands(range(images), at_once, lambda number: buy(client, number))

    asyncio.run(main())


async def _with_hands(numbers: range, at_once: int, buy: Callable[[int], Awaitable[None]]) -> None:
    """So many at once, until all are done."""
    waiting: Iterator[int] = iter(numbers)

    async def hand() -> None:
        for number in waiting:
            await buy(number)

    await asyncio.gather(*(hand() for _ in range(at_once)))
