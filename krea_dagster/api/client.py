"""KreaClient: EvoLink's API, each call made once, each failure classified.

It does not retry, writes no file, and knows nothing of Dagster. What it owes its caller is the
truth about money: a purchase ends in a :class:`~krea_dagster.models.Submission`, in
``NotCharged``, or in ``OutcomeUnknown``.

It sends by ``httpx``, over a transport of its own on aiohttp. What an exception means depends on
the transport, and a wrong guess buys twice. So only of transports that are known to be truthful is
it believed that a request has certainly not left: see :mod:`krea_dagster.api.transport`.

The API key is in no repr, no error, and no error's context: an answer's failure is carried out
of the ``except`` clause as a value, because a library's exceptions hold the request.
"""

from __future__ import annotations

import importlib.metadata
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import lru_cache
from types import TracebackType
from typing import Final, TypeVar

import anyio
import httpx

from krea_dagster import redact
from krea_dagster.api.batch_reads import BatchSupport
from krea_dagster.api.download import Download, FileDownloader, Sink
from krea_dagster.api.exchange import NoAnswer, RawAnswer, exchange
from krea_dagster.api.links import (
    AddressKind,
    address_kind,
    is_address,
    is_host_and_port,
    is_local_name,
)
from krea_dagster.api.proxies import Proxies, Secret
from krea_dagster.api.resolver import CheckedResolver, Resolve, refuse_lookup, resolve_host
from krea_dagster.api.transport import AiohttpTransport
from krea_dagster.api.wire import (
    BATCH_MAX,
    BATCH_PATH,
    CREATE_PATH,
    CREDITS_PATH,
    READ_ERRORS,
    SUBMIT_ERRORS,
    TASKS_PATH,
    batch_body,
    encode_json,
    generation_body,
    read_credits,
    read_submission,
    read_task,
    read_tasks,
    safe_text,
)
from krea_dagster.errors import (
    AccessDenied,
    ApiError,
    ConfigError,
    InputError,
    InsufficientCredits,
    KreaError,
    LinkDead,
    LinkRefused,
    NotSent,
    NotSupported,
    NoUsableAnswer,
    NoUsableBody,
    OutcomeUnknown,
    RateLimited,
    TaskNotFound,
    Unauthorized,
)
from krea_dagster.models import AccountCredits, ImageRequest, Submission, Task, is_task_id

DEFAULT_BASE_URL: Final = "https://api.evolink.ai"

#: Single reads at a time, where they stand in for a batch, and failures that end them.
SINGLE_READS: Final = 8
SINGLE_FAILURES: Final = 3

_Value = TypeVar("_Value")

_IDEMPOTENCY_KEY = re.compile(r"[A-Za-z0-9._-]{16,96}", re.ASCII)
_API_KEY = re.compile(r"[\x21-\x7e]{1,512}", re.ASCII)

# After one of these, the next read of this call would fail alike.
_STOPS_READING: Final = (RateLimited, Unauthorized, InsufficientCredits)


def _version() -> str:
    try:
        return importlib.metadata.version("krea-dagster")
    except importlib.metadata.PackageNotFoundError:
        return "0"


USER_AGENT: Final = f"krea-dagster/{_version()}"
_HEADERS: Final = {
    "User-Agent": USER_AGENT,
    "Accept": "application/json",
    "Accept-Encoding": "identity",
}
#: File hosts were seen to answer 403 to a User-Agent of a form that they do not know.
FILE_USER_AGENT: Final = f"Mozilla/5.0 (compatible; {USER_AGENT})"


# A task is asked about several times, and httpx takes 12 µs to read a URL.
_parsed = lru_cache(maxsize=512)(httpx.URL)


def _utc_now() -> datetime:
    return datetime.now(timezone.utc)


class _Key:
    """The key, in no variable that prints it."""

    __slots__ = ("header", "hide", "is_in")

    def __init__(self, text: str) -> None:
        hidden = redact.Hidden(text)
        self.hide, self.is_in = hidden.hide, hidden.is_in
        self.header = Secret(f"Bearer {text}")

    def describe(self, error: Exception) -> str:
        """One line on an exception, without the key."""
        detail = safe_text(str(error), self.hide, 300)
        return f"{type(error).__name__}: {detail}" if detail else type(error).__name__

    def shown(self, text: str) -> str:
        """A text without the key, safe to print."""
        return safe_text(text, self.hide)

    def __repr__(self) -> str:
        return "***"


class KreaClient:
    """EvoLink's API for ``krea-2-turbo``. Use it as an async context manager, in one event loop.

    Args:
        api_key: sent to the API's host only, never to a file host.
        base_url: the API's root, without ``/v1``. https; http only where the host is an address
            of this machine or of a private network, or a name that public DNS does not answer.
        timeout_s: the longest silence while reading or writing, and the longest wait for a
            free connection.
        connect_timeout_s: for TCP and for TLS each.
        deadline_s: for one whole API call, so that a trickle ends. By default, and so that a
            purchase whose deadline passes has always been sent or is unknown, the sum of the
            other limits.
        download_timeout_s: the longest silence of a file host. A download that goes on has no
            deadline, unless it brings fewer than 1024 bytes a second over as long as that.
        max_connections: open at a time, and kept alive, to the API's host and to file hosts
            each. Keep it far below the number of tasks in flight.
        transport: sends all requests, to the API and to file hosts, instead of aiohttp; also for
            tests, such as ``httpx.MockTransport``. What was said of connections, proxies and
            certificates is the transport's own then. A failure of a purchase is believed to have
            sent nothing only of httpx's own transports, and of one whose class has the attribute
            ``reports_unsent = True``: it raises ``httpx.ConnectError``, ``ConnectTimeout``,
            ``PoolTimeout`` and ``ProxyError`` only where no byte of the request has left, and was
            tested for that on a real socket. Of any other, each failure is OutcomeUnknown.
        resolve: turns the name of a file host into addresses. By default the system's resolver,
            and none with ``httpx.MockTransport``, which connects to nothing.
        now: the present, with a time zone.
        monotonic: seconds that never go back.

    Proxies and certificates of the environment are honoured. ``.netrc`` is not read, cookies
    are not kept, and redirects of the API are not followed.

    Raises:
        ConfigError: one of these is not usable. The message never shows the key.
    """

    def __init__(
        self,
        api_key: str,
        *,
        base_url: str = DEFAULT_BASE_URL,
        timeout_s: float = 60.0,
        connect_timeout_s: float = 10.0,
        deadline_s: float | None = None,
        download_timeout_s: float = 60.0,
        max_connections: int = 16,
        transport: httpx.AsyncBaseTransport | None = None,
        resolve: Resolve | None = None,
        now: Callable[[], datetime] = _utc_now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        usable = isinstance(api_key, str) and _API_KEY.fullmatch(api_key) is not None
        key = _Key(api_key) if usable else None
        del api_key  # out of the frame that a traceback may show with its variables
        if key is None:
            raise ConfigError(
                "the API key must be 1 to 512 printable ASCII characters without spaces or line"
                " breaks, and without the word Bearer"
            )
        self._key = key
        self._base_url = check_base_url(base_url)
        self._root = str(self._base_url).rstrip("/")
        for name, value in (
            ("timeout_s", timeout_s),
            ("connect_timeout_s", connect_timeout_s),
            ("download_timeout_s", download_timeout_s),
            ("deadline_s", 1.0 if deadline_s is None else deadline_s),
        ):
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {value!r}; it must be above 0 seconds, and finite")
        if max_connections < 1:
            raise ConfigError(f"max_connections is {max_connections!r}; it must be at least 1")
        if deadline_s is None:
            deadline_s = 3 * timeout_s + 2 * connect_timeout_s
        self._deadline_s = deadline_s
        self._single_reads = min(SINGLE_READS, max_connections)
        self._now = now
        self._monotonic = monotonic
        self._batch = BatchSupport()
        self._timeout = httpx.Timeout(timeout_s, connect=connect_timeout_s).as_dict()
        if resolve is None:
            mocked = isinstance(transport, httpx.MockTransport)
            resolve = refuse_lookup if mocked else resolve_host
        addresses = CheckedResolver(self._base_url, resolve=resolve, longest_s=connect_timeout_s)
        proxies: Proxies | None = None
        self._transport: httpx.AsyncBaseTransport
        self._files_transport: httpx.AsyncBaseTransport
        if transport is None:
            proxies = Proxies()
            ssl_context = httpx.create_ssl_context()

            def open_transport(connector: Mapping[str, object]) -> AiohttpTransport:
                return AiohttpTransport(
                    ssl_context=ssl_context,
                    proxies=proxies,
                    max_connections=max_connections,
                    connector=connector,
                )

            self._transport = self._wrap_transport(open_transport({}))
            self._files_transport = open_transport(addresses.connector)
        else:
            self._transport = self._files_transport = transport
        self._is_closed = False
        self._files = FileDownloader(
            self._files_transport,
            addresses=addresses,
            checks_itself=lambda url: proxies is not None and proxies.of(url) is None,
            http_allowed=self._base_url.scheme == "http",
            user_agent=FILE_USER_AGENT,
            timeout={**self._timeout, "read": None},  # silence is watched for, also with a mock
            silence_s=download_timeout_s,
            most=max_connections,
            monotonic=monotonic,
        )

    def _wrap_transport(self, transport: httpx.AsyncBaseTransport) -> httpx.AsyncBaseTransport:
        """The transport to the API's host: the one given. The drill puts another one around it."""
        return transport

    def __repr__(self) -> str:
        # A traceback may show a client whose making failed before it had a base URL.
        shown = str(getattr(self, "_base_url", "")).rstrip("/")
        return f"KreaClient(base_url={shown!r}, api_key=***)"

    async def __aenter__(self) -> KreaClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the connections. A closed client sends nothing any more."""
        self._is_closed = True
        with anyio.CancelScope(shield=True):  # all of them, also where the caller was cancelled
            await self._transport.aclose()
            if self._files_transport is not self._transport:
                await self._files_transport.aclose()

    @property
    def base_url(self) -> str:
        """The API's root, without a slash at the end."""
        return self._root

    @property
    def batch_supported(self) -> bool | None:
        """Whether the server reads many tasks at once; None where that is to be tried.

        It may change at any time: an endpoint that does not answer is not used for a while, from
        60 s to 10 min, and then it is tried again.
        """
        return self._batch.supported(self._monotonic())

    # -- buying -------------------------------------------------------------------------------

    async def submit(
        self, request: ImageRequest, *, idempotency_key: str, callback_url: str | None = None
    ) -> Submission:
        """Buys one image: one POST, sent once.

        The same request, key and callback URL make the very same bytes, so that a repeat is
        recognised by a server that honours ``Idempotency-Key``.

        Args:
            request: what is asked for.
            idempotency_key: 16 to 96 of letters, digits, ``.``, ``_`` and ``-``; always sent.
            callback_url: where EvoLink is to tell the end of the task.

        Raises:
            InputError: the request, key or URL cannot be sent, or the client is closed.
            NotCharged: certainly unspent; the class says why.
            OutcomeUnknown: may have been spent; also where the deadline passed.
        """
        if not _IDEMPOTENCY_KEY.fullmatch(idempotency_key):
            raise InputError(
                "the Idempotency-Key must be 16 to 96 letters, digits, dots, underscores, hyphens"
            )
        content = encode_json(generation_body(request, callback_url))
        answer = await self._exchange("POST", CREATE_PATH, content, idempotency_key)
        if isinstance(answer, NoAnswer):
            kind = NotSent if answer.unsent else OutcomeUnknown
            raise kind(answer.trouble, cause=answer.cause)
        if not answer.whole and answer.status not in SUBMIT_ERRORS:
            raise OutcomeUnknown(answer.trouble, status=answer.status)
        return self._read(read_submission, answer)

    # -- asking -------------------------------------------------------------------------------

    async def task(self, task_id: str) -> Task:
        """Reads one task.

        Raises:
            InputError: the id cannot be one, or the client is closed. Nothing was sent.
            TaskNotFound: EvoLink says in so many words that it does not know the task.
            ApiError: any other failure; asking again costs nothing.
        """
        if not is_task_id(task_id):
            shown = safe_text(task_id, self._key.hide, max_chars=200)
            raise InputError(f"{shown!r} is not a task id")
        answer = await self._ask("GET", f"{TASKS_PATH}/{task_id}")
        return self._read(read_task, answer, task_id=task_id)

    async def tasks(self, task_ids: Sequence[str]) -> dict[str, Task]:
        """Reads many tasks, 50 at a time where the server can, else one by one, a few at once.

        Ids that the server left out or could not answer, and texts that are no task id, are
        absent from the result, which is in the order asked: read those singly to learn why.
        What was read is never lost to a later failure. An error is raised only where nothing
        at all could be read because of it.

        Raises:
            InputError: the client is closed.
            ApiError: the first failure (a rate limit, the key or the account before others).
        """
        ids = [task_id for task_id in dict.fromkeys(task_ids) if is_task_id(task_id)]
        found: dict[str, Task] = {}
        for start in range(0, len(ids), BATCH_MAX):
            part = ids[start : start + BATCH_MAX]
            batch, error = await self._read_batch(part)
            if batch is None and error is None:
                batch, error = await self._read_singly(part)
            found.update(batch or {})
            if error is not None:
                if not found:
                    raise error
                break
        return found

    async def credits(self) -> AccountCredits:
        """Reads the account's credits and the key's own limit. Free, and the way to check a key.

        Raises:
            ApiError: ``Unauthorized`` where the key is wrong.
        """
        answer = await self._ask("GET", CREDITS_PATH)
        return self._read(read_credits, answer)

    async def _read_batch(
        self, task_ids: Sequence[str]
    ) -> tuple[dict[str, Task] | None, ApiError | None]:
        """The tasks, or an error, or neither: then the tasks are to be read singly."""
        # One id is asked for at the documented endpoint.
        if self.batch_supported is False or len(task_ids) == 1:
            return None, None
        try:
            answer = await self._ask("POST", BATCH_PATH, encode_json(batch_body(task_ids)))
            found = self._read(read_tasks, answer, task_ids=task_ids)
        except NotSupported:
            self._batch = self._batch.missing(self._monotonic())
            return None, None
        except NoUsableAnswer as error:
            # The endpoint is undocumented, so it may be what is broken, and not the server.
            now_s = self._monotonic()
            if error.cause is None:
                self._batch = self._batch.not_answered(now_s)
            return None, None if self._batch.supported(now_s) is False else error
        except ApiError as error:
            return None, error
        self._batch = self._batch.answered()
        return found, None

    async def _read_singly(
        self, task_ids: Sequence[str]
    ) -> tuple[dict[str, Task], ApiError | None]:
        """The tasks that could be read, and the error that kept the others back, if one did."""
        found: dict[str, Task] = {}
        errors: list[ApiError] = []
        limiter = anyio.CapacityLimiter(self._single_reads)

        async def read(task_id: str) -> None:
            async with limiter:
                if len(errors) >= SINGLE_FAILURES or any(
                    isinstance(e, _STOPS_READING) for e in errors
                ):
                    return
                try:
                    found[task_id] = await self.task(task_id)
                except (TaskNotFound, AccessDenied):
                    pass  # about this one task: it is absent from the answer
                except ApiError as error:
                    errors.append(error)

        async with anyio.create_task_group() as group:
            for task_id in task_ids:
                group.start_soon(read, task_id)
        stops = [error for error in errors if isinstance(error, _STOPS_READING)]
        ordered = {task_id: found[task_id] for task_id in task_ids if task_id in found}
        return ordered, next(iter(stops + errors), None)

    async def _ask(self, method: str, path: str, content: bytes | None = None) -> RawAnswer:
        answer = await self._exchange(method, path, content)
        if isinstance(answer, NoAnswer):
            raise NoUsableAnswer(answer.trouble, cause=answer.cause)
        if not answer.whole and answer.status not in READ_ERRORS:
            raise NoUsableAnswer(answer.trouble, status=answer.status)
        return answer

    def _read(self, read: Callable[..., _Value], answer: RawAnswer, **facts: object) -> _Value:
        """What the answer says. Errors leave without the frames that hold the raw answer."""
        try:
            return self._read_without_key(read, answer, facts)
        except KreaError as caught:
            error = caught.with_traceback(None)
        raise error

    def _read_without_key(
        self, read: Callable[..., _Value], answer: RawAnswer, facts: Mapping[str, object]
    ) -> _Value:
        value = read(
            answer.status,
            answer.headers,
            answer.body,
            now=self._now(),
            hide=self._key.hide,
            **facts,
        )
        # An id or a link is of no use with the key hidden in it, and both go to the journal before
        # they are used. So such an answer is none: the task, which is paid for, is asked about
        # later, or, where its id is what holds the key, the purchase is one of unknown outcome.
        match value:
            case Submission(task_id=task_id) if self._key.is_in(task_id):
                raise OutcomeUnknown("the task id holds the API key", status=answer.status)
            case Task() if self._names_key(value):
                raise NoUsableAnswer(
                    "the result link holds the API key, so it is neither kept nor followed; the "
                    "task is read again later",
                    status=answer.status,
                )
            case dict():
                for task_id in [task_id for task_id in value if self._names_key(value[task_id])]:
                    del value[task_id]
        return value

    def _names_key(self, task: Task) -> bool:
        return any(map(self._key.is_in, task.results))

    # -- fetching -----------------------------------------------------------------------------

    async def download(
        self, url: str, *, sink: Sink | Callable[[bytes], object], max_bytes: int
    ) -> Download:
        """Fetches a result link to a sink. Neither the key nor a cookie goes to the file host.

        Args:
            url: the link, as the task's ``results`` hold it.
            sink: a function, or an object with ``write``; gets pieces of 64 KiB or more, and a
                rest. What it returns is waited for, where that is possible.
            max_bytes: the longest body that is taken, unpacked.

        Raises:
            LinkRefused: the link, or what it redirects to, is not safe to follow.
            LinkDead: 403, 404 or 410: read the task again for a fresh link.
            NoUsableBody: anything else that is not a whole body. What the sink holds by then
                is worthless.
        """
        self._refuse_if_closed()
        if self._key.is_in(url):  # from a journal that an earlier version has written
            del url  # out of the frame that a traceback may show with its variables
            raise LinkRefused("the link holds the API key")
        try:
            return await self._files.fetch(url, sink, max_bytes)
        except (LinkRefused, LinkDead, NoUsableBody) as caught:
            # Without the frames that hold what the host said, such as where it redirected to.
            error = type(caught)(self._key.hide(str(caught)))
        raise error

    # -- the one exchange ---------------------------------------------------------------------

    async def _exchange(
        self,
        method: str,
        path: str,
        content: bytes | None = None,
        idempotency_key: str | None = None,
    ) -> RawAnswer | NoAnswer:
        """Sends one request once. Returns every failure, and raises only a cancellation."""
        self._refuse_if_closed()
        headers: dict[str, str] = {**_HEADERS, "Authorization": self._key.header}
        if content is not None:
            headers["Content-Type"] = "application/json"
        if idempotency_key is not None:
            headers["Idempotency-Key"] = idempotency_key
        # Given to the transport itself: an httpx.AsyncClient would add headers and cookies of its
        # own, look at the wall clock, write a line to the log for each request, and cost 0.1 ms.
        request = httpx.Request(
            method,
            _parsed(f"{self._root}{path}"),
            headers=headers,
            content=content,
            extensions={"timeout": self._timeout},
        )
        answer = await exchange(
            self._transport,
            request,
            deadline_s=self._deadline_s,
            describe=self._key.describe,
        )
        return (
            replace(answer, trouble=self._key.shown(answer.trouble)) if answer.trouble else answer
        )

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise InputError("the client is closed; nothing was sent")


def check_base_url(text: str) -> httpx.URL:
    """The API's root as a URL, without a slash at the end.

    Raises:
        ConfigError: it is not https (or http to a local host), or holds a user name, a query,
            a fragment or ``/v1``, or is an address where no API is.
    """
    shown = safe_text(redact.address(str(text)), max_chars=200)
    wrong = f"base_url is {shown!r}; it must be"
    try:
        url = httpx.URL(text)
        host = url.host
    except (httpx.InvalidURL, UnicodeError, ValueError, TypeError):
        raise ConfigError(f"{wrong} a URL such as {DEFAULT_BASE_URL}") from None
    if url.scheme not in ("http", "https") or not is_host_and_port(url):
        raise ConfigError(f"{wrong} a URL such as {DEFAULT_BASE_URL}")
    if url.userinfo or url.query or url.fragment or "?" in text or "#" in text:
        raise ConfigError(f"{wrong} without user name, password, query and fragment")
    path = url.path.rstrip("/")
    if path.endswith("/v1"):
        raise ConfigError(f"{wrong} without /v1 at the end: that is part of each call")
    local = is_local_name(host)
    if is_address(host):
        kind = address_kind(host)
        local = kind is AddressKind.LOCAL
        if kind is AddressKind.NEVER:
            raise ConfigError(f"{wrong} an address where an API can be")
    if url.scheme == "http" and not local:
        raise ConfigError(
            f"{wrong} https: the API key would travel in clear (http is for hosts on this machine"
            " or in a private network)"
        )
    return url.copy_with(path=path or "/")
