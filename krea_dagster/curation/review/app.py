"""The HTTP application of a review: the page, its rows, its images, and the verdicts it posts.

The response to a verdict is sent after the commit that makes it durable. Work that reads the
journal or all rows runs in a thread, so that images are served meanwhile.
"""

from __future__ import annotations

import json
import logging
import mimetypes
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import anyio.to_thread
import numpy as np
from sqlalchemy import select
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from krea_dagster import redact
from krea_dagster.curation.review.images import ReviewImages
from krea_dagster.curation.review.index import ReviewIndex, build_index, files_version
from krea_dagster.curation.review.measured_rows import words_on_similar
from krea_dagster.curation.review.posted_verdicts import (
    PostedVerdicts,
    Said,
    ranges_of,
    verdict_of,
)
from krea_dagster.curation.review.responses import (
    as_json,
    http_error,
    journal_error,
    parse_whole_number,
)
from krea_dagster.curation.review.selection import ReviewSelection, Rows, empty_code, rows_of
from krea_dagster.curation.review.verdict_cache import VerdictView, verdict_json
from krea_dagster.curation.review.verdict_columns import (
    VERDICT_COLUMNS,
    describe_verdict_columns,
    with_verdict_columns,
)
from krea_dagster.engine.journal import schema
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.verdict_log import Verdict
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import InputError, JournalError

_log = logging.getLogger(__name__)

PAGE: Final = Path(__file__).with_name("page")

#: The most rows per response, and verdicts per post.
_MOST_ROWS: Final = 500
_MOST_VERDICTS: Final = 200
#: The most verdicts that a page is told of one by one; of more it reads its rows again.
_MOST_HEARD: Final = 2000
#: The longest body that is read, bytes.
_LONGEST_BODY: Final = 1_000_000
#: Lists of rows that are cached, one per filter in use.
_LISTS: Final = 16
#: How often the files are checked for changes, seconds.
RELOAD_EVERY_S: Final = 5.0

_CHANGED: Final = "the files have changed: there are new rows"
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
    """What a review shows; ``reasons`` are the rejection reasons on the keys 1 to 9."""

    storage: Storage
    journal: Journal
    reviewer: str
    title: str
    reasons: Sequence[str] = REASONS


class Review:
    """One review: its index, its verdicts, and the requests of its page."""

    def __init__(self, settings: ReviewSettings) -> None:
        self._settings = settings
        with settings.journal.database.read() as connection:
            self._journal_id = connection.execute(select(schema.about.c.journal_id)).scalar()
        self._verdicts = VerdictView(settings.journal.verdicts)
        self._writer = PostedVerdicts(settings.journal, self._verdicts)
        self._index = self._build()
        self._images = ReviewImages(settings.storage, self._file_of)
        self._lists: OrderedDict[tuple[str, int, str], Rows] = OrderedDict()
        self._page = {
            path.name: path.read_bytes() for path in PAGE.iterdir() if path.suffix != ".py"
        }

    def __len__(self) -> int:
        return len(self._index)

    @property
    def generation(self) -> str:
        """Return the version of the files that are shown."""
        return self._index.generation

    def application(self) -> Starlette:
        """Return the ASGI application, which must be wrapped in a ``RequestGuard``."""
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
                Route("/api/tags", self._answer(self._tags), methods=get),
                Route("/api/since", self._answer(self._since), methods=get),
                Route("/api/verdicts", self._post, methods=post),
                Route("/api/batch", self._post_batch, methods=post),
                Route("/small/{sha256}", self._images.small, methods=get),
                Route("/full/{sha256}", self._images.full, methods=get),
            ],
            exception_handlers={HTTPException: http_error, JournalError: journal_error},
        )

    async def keep_up(self, every_s: float = RELOAD_EVERY_S) -> None:
        """Rebuild the index when its files change, until cancelled."""
        while True:
            await anyio.sleep(every_s)
            try:
                await anyio.to_thread.run_sync(self._reload)
            except Exception as error:  # noqa: BLE001 - a bad file must not stop the review
                message = redact.text(str(error))
                _log.warning("the review keeps showing the rows read before: %s", message)

    def _reload(self) -> None:
        if files_version(self._settings.storage) != self._index.generation:
            self._index = self._build()

    def _file_of(self, sha256: str) -> tuple[str, str, int | None] | None:
        return self._index.file_of(sha256)

    def _build(self) -> ReviewIndex:
        settings = self._settings
        return build_index(settings.storage, settings.journal)

    # -- the page ---------------------------------------------------------------------------------

    async def _file(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        data = self._page.get(name)
        if data is None:
            raise HTTPException(404)
        kind = "text/javascript" if name.endswith(".js") else mimetypes.guess_type(name)[0]
        return Response(data, media_type=kind, headers={"Cache-Control": "no-cache"})

    def _answer(self, ask: Callable[[Request], Any]) -> Callable[[Request], Awaitable[Response]]:
        """Return a handler that responds with the result of ``ask``, run in a thread, as JSON."""

        async def answer(request: Request) -> Response:
            try:
                found = await anyio.to_thread.run_sync(ask, request)
            except InputError as error:
                raise HTTPException(400, str(error)) from None
            return as_json(found)

        return answer

    def _start(self, _request: Request) -> dict[str, Any]:
        settings = self._settings
        return {
            "title": settings.title,
            "reviewer": settings.reviewer,
            "reasons": list(settings.reasons)[:9],
            "journal": self._journal_id,
            "number": self._verdicts.catch_up(),
            "generation": self._index.generation,
        }

    def _columns(self, _request: Request) -> dict[str, Any]:
        index = self._index
        said = self._verdicts.all_at(self._verdicts.catch_up())
        columns = index.columns() + describe_verdict_columns(index, said)
        return {"generation": index.generation, "columns": columns}

    def _tags(self, _request: Request) -> dict[str, Any]:
        """Return the tags in use, the most frequent first, with their numbers of images."""
        said = self._verdicts.all_at(self._verdicts.catch_up()).values()
        counts = Counter(tag for one in said for tag in one.tags or ())
        return {"tags": counts.most_common()}

    # -- rows -------------------------------------------------------------------------------------

    def _view(self, request: Request) -> dict[str, Any]:
        index, number = self._index, self._verdicts.catch_up()
        rows = self._list(index, request.query_params.get("selection", ""), number)
        return {"generation": index.generation, "number": number, "count": len(rows)}

    def _list(self, index: ReviewIndex, selection: str, number: int) -> Rows:
        """Return the rows of a selection with the verdicts up to a number."""
        key = (selection, number, index.generation)
        found = self._lists.get(key)
        if found is None:
            wanted = ReviewSelection.parse(selection)
            if number < self._verdicts.number:
                codes = self._verdicts.codes(index, number)
            else:
                codes = self._verdicts.codes(index)
            table = index.table
            if wanted.columns().intersection(VERDICT_COLUMNS):
                table = with_verdict_columns(index, self._verdicts.all_at(number))
            found = rows_of(table, wanted, codes)
            self._lists[key] = found
            while len(self._lists) > _LISTS:
                self._lists.popitem(last=False)
        return found

    def _asked(self, request: Request) -> tuple[ReviewIndex, Rows]:
        """Return the list of a request. Raises 409 where the files have changed since."""
        index = self._index_of(request)
        number = parse_whole_number(request, "number", 0)
        return index, self._list(index, request.query_params.get("selection", ""), number)

    def _index_of(self, request: Request) -> ReviewIndex:
        index = self._index
        if request.query_params.get("generation") != index.generation:
            raise HTTPException(409, _CHANGED)
        return index

    def _rows(self, request: Request) -> dict[str, Any]:
        index, rows = self._asked(request)
        offset = parse_whole_number(request, "offset", 0)
        limit = min(parse_whole_number(request, "limit", 200), _MOST_ROWS)
        return {"rows": self._shown(index, rows[offset : offset + limit])}

    def _shown(self, index: ReviewIndex, rows: Rows) -> list[dict[str, Any]]:
        found = index.grid_rows(rows)
        for one in found:
            one["verdict"] = verdict_json(self._verdicts.last_of(one["image_sha256"]))
        return found

    def _next(self, request: Request) -> dict[str, Any]:
        """Return the next place without a verdict after ``after``, wrapping around."""
        index, rows = self._asked(request)
        self._verdicts.catch_up()
        after = parse_whole_number(request, "after", -1)
        unreviewed = self._verdicts.codes(index)[rows] == empty_code()
        places = np.flatnonzero(unreviewed & (index.sha_codes[rows] >= 0))
        if not len(places):
            return {"place": None}
        at = int(np.searchsorted(places, after, side="right"))
        return {"place": int(places[at % len(places)])}

    def _row(self, request: Request) -> dict[str, Any]:
        index = self._index_of(request)
        row = _row_number(request, index)
        values = index.whole_row(row)
        sha256 = values["image_sha256"]
        history: list[Verdict] = []
        if sha256 is not None:
            history = self._settings.journal.verdicts.history(image_sha256=sha256)
        return {"row": values, "history": [verdict_json(one) for one in history]}

    def _siblings(self, request: Request) -> dict[str, Any]:
        """Return the rows of the same prompt, or the similar ones, and words on them."""
        index = self._index_of(request)
        row = _row_number(request, index)
        if request.query_params.get("by") == "cluster":
            rows = index.of_cluster(row)
            words = words_on_similar(index.whole_row(row), len(rows))
        else:
            rows, words = index.of_prompt(row), "Samples and attempts"
        shown = self._shown(index, np.asarray(rows[:_MOST_ROWS], np.int64))
        if request.query_params.get("by") == "cluster" and len(shown) > 1:
            self._images.mark_other_colours(index.whole_row(row), shown)
        return {"rows": shown, "words": words}

    def _progress(self, _request: Request) -> dict[str, Any]:
        self._verdicts.catch_up()
        return {"partitions": self._verdicts.progress(self._index)}

    # -- verdicts ---------------------------------------------------------------------------------

    def _check_journal(self, named: object) -> None:
        """Refuse a page that was opened at this address for another journal's review."""
        if named is not None and named != self._journal_id:
            raise HTTPException(
                409,
                "Another storage root is now reviewed at this address, with another journal than "
                f"this page's. Restart the first review on this port; {_KEPT}",
            )

    def _since(self, request: Request) -> dict[str, Any]:
        self._check_journal(request.query_params.get("journal"))
        number = self._verdicts.catch_up()
        after = parse_whole_number(request, "number", number)
        # Those that came since are told with the next poll, which begins at this number.
        said = [one for one in self._verdicts.since(after) if one.number <= number]
        many = len(said) > _MOST_HEARD
        return {
            "number": number,
            "generation": self._index.generation,
            "verdicts": [] if many else [verdict_json(one) for one in said],
            "many": many,
        }

    async def _posted(self, request: Request) -> dict[str, Any]:
        """Return the JSON object of a post of this journal's page. Raises HTTPException."""
        if request.headers.get("content-type", "").split(";")[0] != "application/json":
            raise HTTPException(415, "verdicts must be posted as JSON")
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > _LONGEST_BODY:
                raise HTTPException(413, "too many verdicts in one post")
        try:
            posted = dict(json.loads(bytes(body)))
        except (ValueError, TypeError, RecursionError):
            raise HTTPException(400, "the post is not a JSON object") from None
        self._check_journal(posted.get("journal"))
        return posted

    async def _post(self, request: Request) -> Response:
        posted = await self._posted(request)
        try:
            entries = [dict(one) for one in posted["verdicts"][:_MOST_VERDICTS]]
        except (ValueError, TypeError, KeyError):
            raise HTTPException(400, "the verdicts are not of the expected form") from None
        good: list[Verdict] = []
        refused: list[dict[str, Any]] = []
        for entry in entries:
            try:
                good.append(verdict_of(entry))
            except InputError as error:
                refused.append({"verdict_id": str(entry.get("verdict_id")), "why": str(error)})
        kept, further = await anyio.to_thread.run_sync(self._remember, good)
        refused += further
        return as_json({"verdicts": [verdict_json(one) for one in kept], "refused": refused})

    def _remember(self, given: list[Verdict]) -> tuple[list[Verdict], list[dict[str, Any]]]:
        """Write verdicts; return them, and those that are refused with the reason."""
        try:
            return self._writer.add(given), []
        except InputError as error:  # such as too many tags of one image
            if len(given) == 1:
                return [], [{"verdict_id": given[0].verdict_id, "why": str(error)}]
        parts = [self._remember([one]) for one in given]
        return [one for kept, _ in parts for one in kept], [one for _, no in parts for one in no]

    async def _post_batch(self, request: Request) -> Response:
        """Say the same of many images, or undo that."""
        posted = await self._posted(request)
        work = self._undo_batch if "undo" in posted else self._add_batch
        try:
            return as_json(await anyio.to_thread.run_sync(work, posted))
        except InputError as error:
            raise HTTPException(400, str(error)) from None

    def _add_batch(self, posted: dict[str, Any]) -> dict[str, Any]:
        index = self._index
        if posted.get("generation") != index.generation:
            raise HTTPException(409, _CHANGED)
        number, ranges = posted.get("number"), posted.get("ranges")
        if type(number) is not int or not isinstance(ranges, list):
            raise InputError("a batch needs the list's number, and ranges of places")
        listed = self._list(index, str(posted.get("selection", "")), number)
        rows = ranges_of(ranges, listed)
        batch_id, reviewer = str(posted.get("batch_id")), str(posted.get("reviewer"))
        images = self._writer.add_batch(index, rows, batch_id, reviewer, Said.of(posted))
        return {"images": images, "number": self._verdicts.number}

    def _undo_batch(self, posted: dict[str, Any]) -> dict[str, Any]:
        ids = (str(posted.get("undo")), str(posted.get("batch_id")))
        undone, since = self._writer.undo_batch(*ids, str(posted.get("reviewer")))
        return {"images": undone, "since": since, "number": self._verdicts.number}


def _row_number(request: Request, index: ReviewIndex) -> int:
    row = parse_whole_number(request, "row", -1)
    if not 0 <= row < len(index):
        raise HTTPException(404, f"unknown row {row}")
    return row
