"""The review's HTTP: the page, its rows, its pictures, and the verdicts that it posts.

An answer to a verdict comes after the commit that makes it durable. Whatever reads the journal or
passes over all rows does so in a thread, so that pictures go on meanwhile.
"""

from __future__ import annotations

import json
import logging
import mimetypes
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final

import anyio.to_thread
import numpy as np
from sqlalchemy import select
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

from krea_dagster import redact
from krea_dagster.curation.review.index import ReviewIndex, Stamp, build_index
from krea_dagster.curation.review.responses import as_json, parse_whole_number, said, unavailable
from krea_dagster.curation.review.selection import Rows, Selection, empty_code, rows_of
from krea_dagster.curation.review.thumbnails import NoThumbnail, Thumbnails
from krea_dagster.curation.review.verdict_view import VerdictView, shown
from krea_dagster.engine.journal import schema
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.verdict_log import Verdict
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import InputError, JournalError

_log = logging.getLogger(__name__)

PAGE: Final = Path(__file__).with_name("page")

#: A picture is known by its hash, so what was fetched once is good for ever.
_FOR_EVER: Final = {"Cache-Control": "private, max-age=31536000, immutable"}

#: Rows in one answer, and verdicts in one post.
_MOST_ROWS: Final = 500
_MOST_VERDICTS: Final = 200
#: The longest body that is read, bytes.
_LONGEST_BODY: Final = 1_000_000
#: Lists of rows that are kept, one for each filter that somebody looks through.
_LISTS: Final = 16
#: How often the files are looked at for changes, seconds.
LOOK_EVERY_S: Final = 5.0

#: The types of pictures, as Pillow calls them: nothing else is handed to a browser.
_TYPES: Final = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "WEBP": "image/webp",
    "AVIF": "image/avif",
}

_KEPT: Final = "until then your verdicts wait in this browser."

REASONS: Final = (
    "Not what the prompt says",
    "Anatomy",
    "Text or watermark",
    "Blurred",
    "Artefacts",
    "Composition",
    "Duplicate",
    "Style",
    "Unsafe",
)


@dataclass(frozen=True)
class ReviewSettings:
    """What a review is of, and how it is called: ``title``, and the reasons on the keys 1 to 9."""

    storage: Storage
    journal: Journal
    reviewer: str
    title: str
    reasons: Sequence[str] = REASONS
    thumbnails: Path | None = None


class Review:
    """One review: its index, its verdicts, and what the page asks of them."""

    def __init__(self, setting: ReviewSettings) -> None:
        self._setting = setting
        with setting.journal.reading() as connection:
            self._journal_id = connection.execute(select(schema.about.c.journal_id)).scalar()
        self._judged = VerdictView(setting.journal.verdicts)
        self._index = self._build()
        self._thumbnails = Thumbnails(setting.storage, setting.thumbnails)
        self._lists: OrderedDict[tuple[str, int, str], Rows] = OrderedDict()
        self._page = {
            path.name: path.read_bytes() for path in PAGE.iterdir() if path.suffix != ".py"
        }

    def __len__(self) -> int:
        return len(self._index)

    @property
    def generation(self) -> str:
        """The state of the files that are shown."""
        return self._index.generation

    def application(self) -> Starlette:
        """The ASGI application, to be put behind a ``RequestGuard``."""
        get, post = ["GET"], ["POST"]
        return Starlette(
            routes=[
                Route("/", self._file, methods=get),
                Route("/page/{name}", self._file, methods=get),
                Route("/api/start", self._answer(self._start), methods=get),
                Route("/api/columns", self._answer(self._columns), methods=get),
                Route("/api/view", self._answer(self._view), methods=get),
                Route("/api/rows", self._answer(self._rows), methods=get),
                Route("/api/next", self._answer(self._next), methods=get),
                Route("/api/row", self._answer(self._row), methods=get),
                Route("/api/siblings", self._answer(self._siblings), methods=get),
                Route("/api/progress", self._answer(self._progress), methods=get),
                Route("/api/since", self._answer(self._since), methods=get),
                Route("/api/verdicts", self._post, methods=post),
                Route("/small/{sha256}", self._small, methods=get),
                Route("/full/{sha256}", self._full, methods=get),
            ],
            exception_handlers={HTTPException: said, JournalError: unavailable},
        )

    async def keep_up(self, every_s: float = LOOK_EVERY_S) -> None:
        """Make the index anew whenever its files have changed, until cancelled."""
        while True:
            await anyio.sleep(every_s)
            try:
                await anyio.to_thread.run_sync(self._look)
            except Exception as error:  # noqa: BLE001 - whatever a file holds, verdicts go on
                said = redact.text(str(error))
                _log.warning("the review goes on with what it has read before: %s", said)

    def _look(self) -> None:
        if Stamp.of(self._setting.storage).text != self._index.generation:
            self._index = self._build()

    def _build(self) -> ReviewIndex:
        setting = self._setting
        return build_index(setting.storage, setting.journal, self._judged.every())

    # -- the page ---------------------------------------------------------------------------------

    async def _file(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        data = self._page.get(name)
        if data is None:
            raise HTTPException(404)
        kind = "text/javascript" if name.endswith(".js") else mimetypes.guess_type(name)[0]
        return Response(data, media_type=kind, headers={"Cache-Control": "no-cache"})

    def _answer(self, ask: Callable[[Request], Any]) -> Callable[[Request], Awaitable[Response]]:
        """Answer with what ``ask`` returns, as JSON; it runs in a thread."""

        async def answer(request: Request) -> Response:
            try:
                found = await anyio.to_thread.run_sync(ask, request)
            except InputError as error:
                raise HTTPException(400, str(error)) from None
            return as_json(found)

        return answer

    def _start(self, _request: Request) -> dict[str, Any]:
        setting = self._setting
        return {
            "title": setting.title,
            "reviewer": setting.reviewer,
            "reasons": list(setting.reasons)[:9],
            "journal": self._journal_id,
            "number": self._judged.catch_up(),
            "generation": self._index.generation,
        }

    def _columns(self, _request: Request) -> dict[str, Any]:
        index = self._index
        return {"generation": index.generation, "columns": index.columns()}

    # -- rows -------------------------------------------------------------------------------------

    def _view(self, request: Request) -> dict[str, Any]:
        index, number = self._index, self._judged.catch_up()
        rows = self._list(index, request.query_params.get("selection", ""), number)
        return {"generation": index.generation, "number": number, "count": len(rows)}

    def _list(self, index: ReviewIndex, selection: str, number: int) -> Rows:
        """The rows of a selection as they were at a verdict's number."""
        key = (selection, number, index.generation)
        found = self._lists.get(key)
        if found is None:
            wanted = Selection.parse(selection)
            if number < self._judged.number:
                codes = self._judged.codes(index, number)
            else:
                codes = self._judged.codes(index)
            found = rows_of(index.table, wanted, codes)
            self._lists[key] = found
            while len(self._lists) > _LISTS:
                self._lists.popitem(last=False)
        return found

    def _asked(self, request: Request) -> tuple[ReviewIndex, Rows]:
        """The list that a request is about. Raises 409 where the files have changed since."""
        index = self._of_generation(request)
        number = parse_whole_number(request, "number", 0)
        return index, self._list(index, request.query_params.get("selection", ""), number)

    def _of_generation(self, request: Request) -> ReviewIndex:
        index = self._index
        if request.query_params.get("generation") != index.generation:
            raise HTTPException(409, "the files have changed: there are new rows")
        return index

    def _rows(self, request: Request) -> dict[str, Any]:
        index, rows = self._asked(request)
        offset = parse_whole_number(request, "offset", 0)
        limit = min(parse_whole_number(request, "limit", 200), _MOST_ROWS)
        return {"rows": self._shown(index, rows[offset : offset + limit])}

    def _shown(self, index: ReviewIndex, rows: Rows) -> list[dict[str, Any]]:
        found = index.grid_rows(rows)
        for one in found:
            one["verdict"] = shown(self._judged.of(one["image_sha256"]))
        return found

    def _next(self, request: Request) -> dict[str, Any]:
        """The next place in a list, from ``after`` on and around, that has no verdict now."""
        index, rows = self._asked(request)
        self._judged.catch_up()
        after = parse_whole_number(request, "after", -1)
        open_ = (self._judged.codes(index)[rows] == empty_code()) & (index.sha_codes[rows] >= 0)
        places = np.flatnonzero(open_)
        if not len(places):
            return {"place": None}
        at = int(np.searchsorted(places, after, side="right"))
        return {"place": int(places[at % len(places)])}

    def _row(self, request: Request) -> dict[str, Any]:
        index = self._of_generation(request)
        row = _row_number(request, index)
        whole = index.whole_row(row)
        sha256 = whole["image_sha256"]
        history: list[Verdict] = []
        if sha256 is not None:
            history = self._setting.journal.verdicts.history(image_sha256=sha256)
        return {"row": whole, "history": [shown(one) for one in history]}

    def _siblings(self, request: Request) -> dict[str, Any]:
        index = self._of_generation(request)
        row = _row_number(request, index)
        by_cluster = request.query_params.get("by") == "cluster"
        rows = index.of_cluster(row) if by_cluster else index.of_prompt(row)
        return {"rows": self._shown(index, np.asarray(rows[:_MOST_ROWS], np.int64))}

    def _progress(self, _request: Request) -> dict[str, Any]:
        self._judged.catch_up()
        return {"partitions": self._judged.progress(self._index)}

    # -- verdicts ---------------------------------------------------------------------------------

    def _check_journal(self, named: object) -> None:
        """Refuse a page that was opened on another journal's review, at the same address."""
        if named is not None and named != self._journal_id:
            raise HTTPException(
                409,
                "Another storage root is reviewed at this address now: its journal is not this "
                f"page's. Start the review of the first again on this port; {_KEPT}",
            )

    def _since(self, request: Request) -> dict[str, Any]:
        self._check_journal(request.query_params.get("journal"))
        number = self._judged.catch_up()
        after = parse_whole_number(request, "number", number)
        return {
            "number": number,
            "generation": self._index.generation,
            "verdicts": [shown(one) for one in self._judged.since(after)],
        }

    async def _post(self, request: Request) -> Response:
        if request.headers.get("content-type", "").split(";")[0] != "application/json":
            raise HTTPException(415, "verdicts are posted as JSON")
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > _LONGEST_BODY:
                raise HTTPException(413, "too many verdicts in one post")
        try:
            posted = json.loads(bytes(body))
            journal = posted.get("journal")
            entries = [dict(one) for one in posted["verdicts"][:_MOST_VERDICTS]]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise HTTPException(400, "the verdicts cannot be read") from None
        self._check_journal(journal)
        good: list[Verdict] = []
        refused: list[dict[str, Any]] = []
        for entry in entries:
            try:
                good.append(_verdict_of(entry))
            except InputError as error:
                refused.append({"verdict_id": str(entry.get("verdict_id")), "why": str(error)})
        kept = await anyio.to_thread.run_sync(self._remember, good)
        return as_json({"verdicts": [shown(one) for one in kept], "refused": refused})

    def _remember(self, given: list[Verdict]) -> list[Verdict]:
        """Write verdicts to the journal, each with the prompt table that its image is of."""
        journal = self._setting.journal
        known = journal.records({one.request_key for one in given})
        return journal.verdicts.add(
            [
                replace(one, table_id=known[one.request_key].table_id)
                if one.request_key in known
                else one
                for one in given
            ]
        )

    # -- pictures ---------------------------------------------------------------------------------

    async def _small(self, request: Request) -> Response:
        name, _ = await anyio.to_thread.run_sync(self._name_of, request)
        if await request.is_disconnected():
            return Response(status_code=499)  # scrolled on: nobody waits for it
        try:
            data = await self._thumbnails.get(request.path_params["sha256"], name)
        except NoThumbnail as error:
            raise HTTPException(415, str(error)) from None
        return Response(data, media_type="image/jpeg", headers=_FOR_EVER)

    async def _full(self, request: Request) -> Response:
        name, kind = await anyio.to_thread.run_sync(self._name_of, request)
        storage = self._setting.storage
        if storage.folder is not None:
            return FileResponse(storage.folder / name, media_type=kind, headers=_FOR_EVER)
        try:
            file = await anyio.to_thread.run_sync(storage.open, name)
        except FileNotFoundError:
            raise HTTPException(404, "the file is not there any more") from None
        except OSError as error:
            raise HTTPException(502, f"the file cannot be read: {error}") from None

        async def parts() -> Any:
            try:
                while part := await anyio.to_thread.run_sync(file.read, 1 << 18):
                    yield part
            finally:
                await anyio.to_thread.run_sync(file.close)

        return StreamingResponse(parts(), media_type=kind, headers=_FOR_EVER)

    def _name_of(self, request: Request) -> tuple[str, str]:
        """The name under the storage root and the type of the picture that a request names.

        Only the hash is taken from the address; the path is the index's own.
        """
        found = self._index.file_of(request.path_params["sha256"])
        if found is None:
            raise HTTPException(404, "no row has this picture")
        name = name_in(self._setting.storage, found[0])
        kind = _TYPES.get(found[1].upper())
        if name is None or kind is None:
            raise HTTPException(415, "the row's file is no picture of this storage root")
        try:
            size = self._setting.storage.size_bytes(name)
        except OSError as error:
            raise HTTPException(502, f"the file cannot be read: {error}") from None
        if size is None:
            raise HTTPException(404, "the file is not there any more")
        if found[2] is not None and size != found[2]:
            # Nobody shall judge another picture under this one's hash.
            raise HTTPException(415, "the file is not the one that was verified")
        return name, kind


def name_in(storage: Storage, location: str) -> str | None:
    """The name of a picture under the root, or None where it can be no picture of it."""
    name = storage.name_of(location)
    allowed = name.startswith("images/") and ".." not in PurePosixPath(name).parts
    return name if allowed else None


def _verdict_of(entry: dict[str, Any]) -> Verdict:
    """A verdict as the page posts it. Raises InputError."""
    texts = ("verdict_id", "image_sha256", "verdict", "reviewer", "request_key", "prompt_id")
    wrong = [one for one in (*texts, "partition_key") if not isinstance(entry.get(one), str)]
    numbers = [entry.get(one) for one in ("sample", "attempt")]
    reason = entry.get("reason") or None
    if wrong or not all(type(one) is int and 0 <= one < 2**31 for one in numbers):
        raise InputError(f"the verdict lacks {', '.join(wrong) or 'a sample or attempt'}")
    if reason is not None and not isinstance(reason, str):
        raise InputError("a reason is a text")
    return Verdict(
        **{one: entry[one] for one in texts},
        partition_key=entry["partition_key"],
        sample=entry["sample"],
        attempt=entry["attempt"],
        reason=reason,
    )


def _row_number(request: Request, index: ReviewIndex) -> int:
    row = parse_whole_number(request, "row", -1)
    if not 0 <= row < len(index):
        raise HTTPException(404, "there is no such row")
    return row
