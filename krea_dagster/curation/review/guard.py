"""Access control of a review: only the page opened with the token, on this machine, may use it.

The server listens on loopback only, but every page in the same browser and every user of the
machine can reach it. So the token is the first part of every path. A cookie would be sent to every
port of the address. The Host header is checked, because anyone can point a domain at 127.0.0.1, and
requests that change something need the page's own Origin.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Scripts, styles and images come from this server only; nothing else is loaded or framed. Injected
#: markup is refused even if the page has a bug.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}
#: Methods that change nothing.
_SAFE: Final = frozenset({"GET", "HEAD"})


class RequestGuard:
    """ASGI middleware that lets requests with the token through.

    ``hosts`` are the valid Host headers, such as ``127.0.0.1:8770``.
    """

    def __init__(self, app: ASGIApp, token: str, hosts: Iterable[str]) -> None:
        self._app = app
        self._token = token.encode()
        self._hosts = frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":  # no websockets, no lifespan
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
                MutableHeaders(scope=message).setdefault("Cache-Control", "no-store")
            await send(message)

        refused = self._refusal(scope)
        if refused is not None:
            await PlainTextResponse(refused[1], refused[0])(scope, receive, send_with_headers)
            return
        rest = scope["path"].split("/", 2)[2]
        await self._app({**scope, "path": f"/{rest}", "raw_path": None}, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Return the status and text for a request to refuse; None for a valid one."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if host not in self._hosts:
            return 421, "This is not an address of the review.\n"
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{host}":
            return 403, "Other pages may not use the review.\n"
        if scope["method"] not in _SAFE and origin is None:
            return 403, "Only the review's own page may give verdicts.\n"
        site = headers.get("sec-fetch-site", "none")
        parts = scope["path"].split("/", 2)
        given = parts[1].encode("utf-8", "replace") if len(parts) == 3 else b""
        if not hmac.compare_digest(given, self._token):
            return 404, (
                "Not found. Use the address that `krea-dagster review` printed last: each start "
                "creates a new one.\n"
            )
        if site not in ("none", "same-origin") and parts[2]:
            return 403, "Other pages may not use the review.\n"
        return None
