"""KreaClient: EvoLink's API, each call made once, each failure classified.

It does not retry, writes no file, and does not know Dagster. It reports truthfully what a purchase
cost: a purchase ends in a :class:`~krea_dagster.models.Submission`, in ``NotCharged``, or in
``OutcomeUnknown``.

Requests are sent by ``httpx`` over a transport on aiohttp. What an exception means depends on the
transport, and a wrong guess buys twice. So "not sent" is believed only of transports that are known
to report it truthfully: see :mod:`krea_dagster.api.transport`.

The API key is in no repr, no error, and no error's context. A failure leaves its ``except`` clause
as a value before it is raised, because the exceptions of a library hold the request.
"""

from __future__ import annotations

import importlib.metadata
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import lru_cache, partial
from types import TracebackType
from typing import Final, TypeVar

import anyio
import httpx

from krea_dagster import redact
from krea_dagster.api.batch_support import BatchSupport
from krea_dagster.api.download import Download, FileDownloader, Sink
from krea_dagster.api.exchange import NoAnswer, send_once
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
from krea_dagster.api.untrusted import safe_text
from krea_dagster.api.wire import (
    BATCH_MAX,
    BATCH_PATH,
    CREATE_PATH,
    CREDITS_PATH,
    READ_ERRORS,
    SUBMIT_ERRORS,
    TASKS_PATH,
    RawAnswer,
    encode_json,
    generation_body,
    read_credits,
    read_submission,
    read_task,
    read_tasks,
)
from krea_dagster.errors import (
    AccessDenied,
    ApiError,
    ConfigError,
    InputError,
    InsufficientCredits,
    KreaError,
    LinkExpired,
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

#: Single reads at a time that replace a batch, and the number of failures that ends them.
SINGLE_READS: Final = 8
SINGLE_FAILURES: Final = 3

_Value = TypeVar("_Value")

_IDEMPOTENCY_KEY = re.compile(r"[A-Za-z0-9._-]{16,96}", re.ASCII)
_API_KEY = re.compile(r"[\x21-\x7e]{1,512}", re.ASCII)

# After one of these, the next read would fail in the same way.
_STOPS_READING: Final = (RateLimited, Unauthorized, InsufficientCredits)


USER_AGENT: Final = f"krea-dagster/{importlib.metadata.version('krea-dagster')}"
_HEADERS: Final = {
    "User-Agent": USER_AGENT,
    "Accept": "application/json",
    "Accept-Encoding": "identity",
}
#: File hosts were seen to answer 403 to a User-Agent of an unknown form.
FILE_USER_AGENT: Final = f"Mozilla/5.0 (compatible; {USER_AGENT})"


# A task is read several times, and httpx takes 12 µs to parse a URL.
_parsed = lru_cache(maxsize=512)(httpx.URL)


def _utc_now() -> datetime:
    return datetime.now(timezone.utc)


class _Key:
    """The API key, which no repr shows."""

    __slots__ = ("header", "hide", "is_in")

    def __init__(self, text: str) -> None:
        hidden = redact.SecretFilter(text)
        self.hide, self.is_in = hidden.hide, hidden.is_in
        self.header = Secret(f"Bearer {text}")

    def describe(self, error: Exception) -> str:
        """Return one line about an exception, without the key."""
        detail = safe_text(str(error), self.hide, 300)
        return f"{type(error).__name__}: {detail}" if detail else type(error).__name__

    def shown(self, text: str) -> str:
        """Return a text without the key, safe to print."""
        return safe_text(text, self.hide)

    def __repr__(self) -> str:
        return "***"


class KreaClient:
    """EvoLink's API for ``krea-2-turbo``. Use it as an async context manager, in one event loop.

    Proxies and certificates of the environment are honoured. ``.netrc`` is not read, cookies are
    not kept, and redirects of the API are not followed.

    Args:
        api_key: the account's key. It is sent to the API's host only, never to a file host.
        base_url: the root of the API, without ``/v1``. https; http only if the host is an address
            of this machine or of a private network, or a name that public DNS does not resolve.
        timeout_s: the longest time in seconds without a byte while reading or writing, and the
            longest wait for a free connection.
        connect_timeout_s: the longest time in seconds for TCP and for TLS each.
        deadline_s: the longest time in seconds for one API call as a whole, so that a slow trickle
            ends. By default ``3 * timeout_s + 2 * connect_timeout_s``, the sum of the limits of
            the steps of a call, so that it does not end a call earlier than they do.
        download_timeout_s: the longest time in seconds without a byte from a file host. A download
            has no other deadline, but it ends if it brings fewer than 1024 bytes a second over
            this time.
        max_connections: the most open connections to the API's host and to file hosts, each. Keep
            it far below the number of tasks in flight.
        transport: sends all requests, to the API and to file hosts, instead of aiohttp; in tests
            for example ``httpx.MockTransport``. It then decides about connections, proxies and
            certificates. That a failed purchase was not sent is believed only of httpx's own
            transports, and of a class with the attribute ``reports_unsent = True``. Such a class
            raises ``httpx.ConnectError``, ``ConnectTimeout``, ``PoolTimeout`` and ``ProxyError``
            only if no byte of the request has left, and was tested for that on a real socket. With
            any other transport, each failure of a purchase is ``OutcomeUnknown``.
        resolve: resolves the name of a file host to IP addresses. By default the system's
            resolver; with ``httpx.MockTransport``, which does not connect, names are not resolved.
        now: returns the present time, with a time zone.
        monotonic: returns seconds of a clock that never goes back.

    Raises:
        ConfigError: an argument is not usable. The message never shows the key.
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
        if deadline_s is None:
            deadline_s = 3 * timeout_s + 2 * connect_timeout_s
        _check_positive(
            timeout_s=timeout_s,
            connect_timeout_s=connect_timeout_s,
            download_timeout_s=download_timeout_s,
            deadline_s=deadline_s,
        )
        if max_connections < 1:
            raise ConfigError(f"max_connections is {max_connections!r}; it must be at least 1")
        self._deadline_s = deadline_s
        self._single_reads = min(SINGLE_READS, max_connections)
        self._now = now
        self._monotonic = monotonic
        self._batch = BatchSupport()
        self._timeout = httpx.Timeout(timeout_s, connect=connect_timeout_s).as_dict()
        if resolve is None:
            mocked = isinstance(transport, httpx.MockTransport)
            resolve = refuse_lookup if mocked else resolve_host
        resolver = CheckedResolver(self._base_url, resolve=resolve, longest_s=connect_timeout_s)
        proxies: Proxies | None = None
        self._transport: httpx.AsyncBaseTransport
        self._files_transport: httpx.AsyncBaseTransport
        if transport is None:
            proxies = Proxies()
            open_transport = partial(
                AiohttpTransport,
                ssl_context=httpx.create_ssl_context(),
                proxies=proxies,
                max_connections=max_connections,
            )
            self._transport = self._wrap_transport(open_transport())
            self._files_transport = open_transport(connector=resolver.connector)
        else:
            self._transport = self._files_transport = transport
        self._is_closed = False
        self._files = FileDownloader(
            self._files_transport,
            resolver=resolver,
            checks_itself=lambda url: proxies is not None and proxies.for_url(url) is None,
            http_allowed=self._base_url.scheme == "http",
            user_agent=FILE_USER_AGENT,
            timeout={**self._timeout, "read": None},  # the downloader itself watches for silence
            silence_s=download_timeout_s,
            most=max_connections,
            monotonic=monotonic,
        )

    def _wrap_transport(self, transport: httpx.AsyncBaseTransport) -> httpx.AsyncBaseTransport:
        """Return the transport to the API's host. The drill wraps it."""
        return transport

    def __repr__(self) -> str:
        # A traceback may show a client whose __init__ failed before it had a base URL.
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
        """Close the connections. A closed client sends nothing."""
        self._is_closed = True
        with anyio.CancelScope(shield=True):  # close all of them also if the caller was cancelled
            await self._transport.aclose()
            if self._files_transport is not self._transport:
                await self._files_transport.aclose()

    @property
    def base_url(self) -> str:
        """The root of the API, without a slash at the end."""
        return self._root

    @property
    def batch_supported(self) -> bool | None:
        """Whether the server reads many tasks in one request; None if that was not tried yet.

        It may change at any time: an endpoint that does not answer is not used for 60 s to 10 min,
        and is then tried again.
        """
        return self._batch.supported(self._monotonic())

    # -- buying -------------------------------------------------------------------------------

    async def submit(
        self, request: ImageRequest, *, idempotency_key: str, callback_url: str | None = None
    ) -> Submission:
        """Buy one image with one POST, sent once.

        The same request, key and callback URL give the same bytes, so a server that honours
        ``Idempotency-Key`` recognises a repeat. EvoLink does not document this header; its own
        clients rely on it for 23 hours.

        Args:
            request: the image to buy.
            idempotency_key: 16 to 96 letters, digits, ``.``, ``_`` and ``-``; always sent.
            callback_url: an HTTPS address that EvoLink calls when the task ends.

        Returns:
            The created task with its status and reserved credits (in units of 1/10,000 credit).

        Raises:
            InputError: the request, key or URL cannot be sent, or the client is closed.
            NotCharged: certainly not charged; the class says why.
            OutcomeUnknown: possibly charged, also if the deadline has passed.
        """
        if not _IDEMPOTENCY_KEY.fullmatch(idempotency_key):
            raise InputError(
                "the Idempotency-Key must be 16 to 96 letters, digits, dots, underscores, hyphens"
            )
        content = encode_json(generation_body(request, callback_url))
        answer = await self._send("POST", CREATE_PATH, content, idempotency_key)
        if isinstance(answer, NoAnswer):
            kind = NotSent if answer.unsent else OutcomeUnknown
            raise kind(answer.trouble, cause=answer.cause)
        if not answer.whole and answer.status not in SUBMIT_ERRORS:
            raise OutcomeUnknown(answer.trouble, status=answer.status)
        return self._read(read_submission, answer)

    # -- reading ------------------------------------------------------------------------------

    async def task(self, task_id: str) -> Task:
        """Read one task. Free.

        Args:
            task_id: 1 to 128 letters, digits, ``.``, ``_``, ``:`` and ``-``.

        Returns:
            The task. Its ``results`` are links to the image, which EvoLink documents as valid for
            24 hours.

        Raises:
            InputError: not a task id, or the client is closed. Nothing was sent.
            TaskNotFound: EvoLink's error says that the task is not known.
            ApiError: any other failure; the read can be repeated.
        """
        if not is_task_id(task_id):
            shown = safe_text(task_id, self._key.hide, max_chars=200)
            raise InputError(f"{shown!r} is not a task id")
        answer = await self._get_answer("GET", f"{TASKS_PATH}/{task_id}")
        return self._read(read_task, answer, task_id=task_id)

    async def tasks(self, task_ids: Sequence[str]) -> dict[str, Task]:
        """Read many tasks, 50 in a request if the server can, else a few single reads at a time.

        EvoLink does not document the batch endpoint; its own clients use it.

        Args:
            task_ids: in any order; duplicates are read once.

        Returns:
            The tasks by id, in the order of ``task_ids``. An id that the server left out or could
            not answer, or that is not a task id, is missing: read it singly to learn why. Tasks
            that were read are returned also if a later read fails.

        Raises:
            InputError: the client is closed.
            ApiError: no task could be read. It is the first failure; a rate limit and failures of
                the key or the account come before others.
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
        """Read the credits of the account and the limit of the key. Free; it also checks a key.

        Returns:
            Remaining and used credits in units of 1/10,000 credit, and when they were read
            (EvoLink's documented ``GET /v1/credits``).

        Raises:
            InputError: the client is closed.
            ApiError: ``Unauthorized`` if the key is wrong, ``NotSupported`` if the server has no
                such endpoint.
        """
        answer = await self._get_answer("GET", CREDITS_PATH)
        return self._read(read_credits, answer)

    async def _read_batch(
        self, task_ids: Sequence[str]
    ) -> tuple[dict[str, Task] | None, ApiError | None]:
        """Return the tasks, or an error, or neither: then the tasks must be read singly."""
        # A single id is read at the documented endpoint.
        if self.batch_supported is False or len(task_ids) == 1:
            return None, None
        try:
            answer = await self._get_answer(
                "POST", BATCH_PATH, encode_json({"task_ids": list(task_ids)})
            )
            found = self._read(read_tasks, answer, task_ids=task_ids)
        except NotSupported:
            self._batch = self._batch.missing(self._monotonic())
            return None, None
        except NoUsableAnswer as error:
            # The endpoint is undocumented, so it alone may be broken.
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
        """Return the tasks that could be read, and the error that stopped the others, if any."""
        found: dict[str, Task] = {}
        errors: list[ApiError] = []
        limiter = anyio.CapacityLimiter(self._single_reads)

        async def read(task_id: str) -> None:
            async with limiter:
                stopped = any(isinstance(error, _STOPS_READING) for error in errors)
                if stopped or len(errors) >= SINGLE_FAILURES:
                    return
                try:
                    found[task_id] = await self.task(task_id)
                except (TaskNotFound, AccessDenied):
                    pass  # concerns this task only, which is then missing from the result
                except ApiError as error:
                    errors.append(error)

        async with anyio.create_task_group() as group:
            for task_id in task_ids:
                group.start_soon(read, task_id)
        stops = [error for error in errors if isinstance(error, _STOPS_READING)]
        ordered = {task_id: found[task_id] for task_id in task_ids if task_id in found}
        return ordered, next(iter(stops + errors), None)

    async def _get_answer(self, method: str, path: str, content: bytes | None = None) -> RawAnswer:
        answer = await self._send(method, path, content)
        if isinstance(answer, NoAnswer):
            raise NoUsableAnswer(answer.trouble, cause=answer.cause)
        if not answer.whole and answer.status not in READ_ERRORS:
            raise NoUsableAnswer(answer.trouble, status=answer.status)
        return answer

    def _read(self, read: Callable[..., _Value], answer: RawAnswer, **facts: object) -> _Value:
        """Parse an answer. Errors leave without the frames that hold the raw answer."""
        try:
            return self._read_without_key(read, answer, facts)
        except KreaError as caught:
            error = caught.with_traceback(None)
        raise error

    def _read_without_key(
        self, read: Callable[..., _Value], answer: RawAnswer, facts: Mapping[str, object]
    ) -> _Value:
        value = read(answer, now=self._now(), hide=self._key.hide, **facts)
        # An id or a link is useless with the key hidden in it, and both are written to the journal
        # before they are used. So such an answer is not used: the paid task is read again later,
        # and a purchase whose task id contains the key has an unknown outcome.
        match value:
            case Submission(task_id=task_id) if self._key.is_in(task_id):
                raise OutcomeUnknown("the task id contains the API key", status=answer.status)
            case Task() if self._links_contain_key(value):
                raise NoUsableAnswer(
                    "the result link contains the API key, so it is neither kept nor followed; "
                    "the task is read again later",
                    status=answer.status,
                )
            case dict():
                for task_id, task in list(value.items()):
                    if self._links_contain_key(task):
                        del value[task_id]
        return value

    def _links_contain_key(self, task: Task) -> bool:
        return any(map(self._key.is_in, task.results))

    # -- fetching -----------------------------------------------------------------------------

    async def download(
        self, url: str, *, sink: Sink | Callable[[bytes], object], max_bytes: int
    ) -> Download:
        """Download a result link to a sink. Neither the key nor a cookie is sent to the file host.

        Args:
            url: a link of the task's ``results``.
            sink: a function, or an object with ``write``. It gets pieces of 64 KiB or more, and a
                rest. If it returns an awaitable, that is awaited before the next piece is read.
            max_bytes: the longest body in bytes, decompressed.

        Returns:
            Size, SHA-256, media type and final URL of the body.

        Raises:
            InputError: the client is closed.
            LinkRefused: the link, or a redirect of it, is not safe to follow.
            LinkExpired: 403, 404 or 410: read the task again for a fresh link.
            NoUsableBody: any other failure. Discard what the sink has received.
        """
        self._refuse_if_closed()
        if self._key.is_in(url):  # from a journal of an earlier version
            del url  # out of the frame that a traceback may show with its variables
            raise LinkRefused("the link contains the API key")
        try:
            return await self._files.fetch(url, sink, max_bytes)
        except (LinkRefused, LinkExpired, NoUsableBody) as caught:
            # Without the frames that hold the texts of the host, such as a redirect.
            error = type(caught)(self._key.hide(str(caught)))
        raise error

    # -- sending ------------------------------------------------------------------------------

    async def _send(
        self,
        method: str,
        path: str,
        content: bytes | None = None,
        idempotency_key: str | None = None,
    ) -> RawAnswer | NoAnswer:
        """Send one request once. Return every failure; raise only a cancellation."""
        self._refuse_if_closed()
        headers: dict[str, str] = {**_HEADERS, "Authorization": self._key.header}
        if content is not None:
            headers["Content-Type"] = "application/json"
        if idempotency_key is not None:
            headers["Idempotency-Key"] = idempotency_key
        # An httpx.AsyncClient around the transport would add headers and cookies, read the wall
        # clock, log each request, and cost 0.1 ms.
        request = httpx.Request(
            method,
            _parsed(f"{self._root}{path}"),
            headers=headers,
            content=content,
            extensions={"timeout": self._timeout},
        )
        answer = await send_once(
            self._transport, request, deadline_s=self._deadline_s, describe=self._key.describe
        )
        return (
            replace(answer, trouble=self._key.shown(answer.trouble)) if answer.trouble else answer
        )

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise InputError("the client is closed; nothing was sent")


def _check_positive(**settings: float) -> None:
    for name, value in settings.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name} is {value!r}; it must be above 0 seconds, and finite")


def check_base_url(text: str) -> httpx.URL:
    """Return the root of the API as a URL, without a slash at the end.

    Raises ConfigError if it is not https (or http to a local host), contains a user name, a query,
    a fragment or ``/v1``, or is an address that an API cannot have.
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
            raise ConfigError(f"{wrong} an address that a server can have")
    if url.scheme == "http" and not local:
        raise ConfigError(
            f"{wrong} https: http would send the API key unencrypted (it is for hosts on this"
            " machine or in a private network)"
        )
    return url.copy_with(path=path or "/")
