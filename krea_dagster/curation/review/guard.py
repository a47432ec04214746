"""Who may speak to a review: only the page that was opened with the token, from this machine.

The server listens on loopback alone, but every page in the same browser can reach that, and so can
every user of the machine. So the token is the first part of every path, and no cookie is used,
because a cookie is sent to every port of an address. The Host header is looked at, because a name
may be pointed at 127.0.0.1 by its owner, and what changes something needs the page's own Origin.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Scripts, styles and pictures come from this server, and nothing else is fetched or framed. What
#: is written into the page as markup would be refused even if the page had a mistake.
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
    """The application behind it, for those who know the token.

    ``hosts`` are what the Host header may be, such as ``127.0.0.1:8770``.
    """

    def __init__(self, app: ASGIApp, token: str, hosts: Iterable[str]) -> None:
        self._app = app
        self._token = token.encode()
        self._hosts = frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":  # no websockets, no lifespan
            return

        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
                MutableHeaders(scope=message).setdefault("Cache-Control", "no-store")
            await send(message)

        refused = self._trouble(scope)
        if refused is not None:
            await PlainTextResponse(refused[1], refused[0])(scope, receive, headed)
            return
        rest = scope["path"].split("/", 2)[2]
        await self._app({**scope, "path": f"/{rest}", "raw_path": None}, receive, headed)

    def _trouble(self, scope: Scope) -> tuple[int, str] | None:
        """What is wrong with a request: a status and a text; None where nothing is."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if host not in self._hosts:
            return 421, "This address is not the review's.\n"
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{host}":
            return 403, "Another page may not speak to the review.\n"
        if scope["method"] not in _SAFE and origin is None:
            return 403, "Only the review's own page may give verdicts.\n"
        site = headers.get("sec-fetch-site", "none")
        parts = scope["path"].split("/", 2)
        given = parts[1].encode("utf-8", "replace") if len(parts) == 3 else b""
        if not hmac.compare_digest(given, self._token):
            return 404, (
                "No such page. The review's link is the one that `krea-dagster review` has "
                "printed last: each start makes a new one.\n"
            )
        if site not in ("none", "same-origin") and parts[2]:
            return 403, "Another page may not speak to the review.\n"
        return None
