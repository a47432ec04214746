"""The callback address of a request: make it, and read the request from it. Pure.

``https://<base URL>/<deployment>/<request key>.<proof>``

``deployment`` and ``proof`` are HMAC-SHA256 with the secret, cut to 128 bits, for two purposes.
Neither can be made without the secret, and one does not reveal another. The request key, which is a
hash, is not hidden.

The rules for the address are EvoLink's (HTTPS, at most 2048 characters, no private address). They
are checked before anything is bought, because EvoLink refuses every purchase with a wrong address.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from typing import Final
from urllib.parse import SplitResult, urlsplit

from krea_dagster.errors import ConfigError

MAX_URL_CHARS: Final = 2048
MIN_SECRET_CHARS: Final = 32

#: The hexadecimal digits of 128 bits.
_DIGITS: Final = 32
_KEY_CHARS: Final = 64
_KEY: Final = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
#: The last two parts of a path, with or without a prefix of a proxy.
_PATH: Final = re.compile(
    r"(?:.*/)?(?P<deployment>[0-9a-f]{32})/(?P<key>[A-Za-z0-9_-]{1,64})\.(?P<proof>[0-9a-f]{32})",
    re.ASCII,
)
_HOST_NAME: Final = re.compile(r"(?:[A-Za-z0-9_-]{1,63}\.)+[A-Za-z][A-Za-z0-9-]{0,62}", re.ASCII)
#: Names that public DNS does not resolve.
_LOCAL_ENDINGS: Final = (".localhost", ".local", ".internal", ".home.arpa", ".invalid", ".test")

_SETTING: Final = "callback_base_url"


class CallbackUrls:
    """The addresses of one deployment: a public base URL and a secret, both checked once.

    Args:
        base_url: the public address of the receiver, for example
            ``https://hooks.example.com`` or ``https://example.com/krea``.
        secret: at least 32 characters, the same for the runs and the receiver. Never shown.
        private_allowed: whether the host may be a private address or a local name; only for an
            emulator on this machine.

    Raises:
        ConfigError: the setting is not usable. The message tells what to set.
    """

    def __init__(self, base_url: str, secret: str, *, private_allowed: bool = False) -> None:
        key = _key(secret)
        self._key = key
        self._root = f"{_checked(base_url, private_allowed)}/{_deployment(key)}"
        longest = len(self._root) + 1 + _KEY_CHARS + 1 + _DIGITS
        if longest > MAX_URL_CHARS:
            raise ConfigError(
                f"{_SETTING} has {len(base_url)} characters, and a callback URL made from it "
                f"{longest}; EvoLink accepts {MAX_URL_CHARS}. Set a shorter one. "
                "Nothing was bought."
            )

    def __repr__(self) -> str:
        return "CallbackUrls(***)"  # an address allows to send hints

    def url(self, request_key: str) -> str:
        """Return the address of a request, always the same. Raises ValueError for a wrong key."""
        if not _KEY.fullmatch(request_key):
            raise ValueError("a request key has 1 to 64 letters, digits, hyphens and underscores")
        return f"{self._root}/{request_key}.{_proof(self._key, request_key)}"


class PathReader:
    """Reads the request from a path of this deployment. Raises ConfigError for a bad secret."""

    def __init__(self, secret: str) -> None:
        self._key = _key(secret)
        self._deployment = _deployment(self._key)

    def __repr__(self) -> str:
        return "PathReader(***)"

    def request_key(self, path: str) -> str | None:
        """Return the request key of a path, None if it was not made with the secret.

        Parts before the last two do not matter, so a proxy may keep a prefix or remove it.
        """
        # Checked first, so that a very long path is not searched.
        found = _PATH.fullmatch(path) if len(path) <= MAX_URL_CHARS else None
        if found is None:
            return None
        request_key = found["key"]
        # Both are always compared, in a time that does not depend on the first difference.
        ours = hmac.compare_digest(found["deployment"], self._deployment)
        proven = hmac.compare_digest(found["proof"], _proof(self._key, request_key))
        return request_key if ours and proven else None


def check_secret(secret: str) -> str:
    """Return the secret. Raises ConfigError, which does not show it, if it is not usable."""
    if len(secret) < MIN_SECRET_CHARS or secret.strip() != secret or not secret.isprintable():
        raise ConfigError(
            f"callback_secret must be at least {MIN_SECRET_CHARS} printable characters without "
            "white space at either end. Set the environment variable KREA_CALLBACK_SECRET, the "
            "same for the runs and for the receiver; `openssl rand -hex 32` makes one. Nothing "
            "was bought."
        )
    return secret


# -- inside -----------------------------------------------------------------------------------


def _key(secret: str) -> bytes:
    return check_secret(secret).encode("utf-8")


def _deployment(key: bytes) -> str:
    return _digest(key, "deployment")


def _proof(key: bytes, request_key: str) -> str:
    return _digest(key, f"request {request_key}")


def _digest(key: bytes, text: str) -> str:
    """Return 128 bits in hex that do not reveal those of another text."""
    return hmac.digest(key, f"krea-dagster callback: {text}".encode(), "sha256").hex()[:_DIGITS]


def _checked(base_url: str, private_allowed: bool) -> str:
    """Return the base URL without a slash at its end. Raises ConfigError."""
    root = base_url.rstrip("/")
    trouble = url_trouble(root, private_allowed=private_allowed)
    if trouble is None and ("?" in root or "#" in root):
        trouble = "contains a query or a fragment, but the path is appended to it"
    if trouble is not None:
        raise ConfigError(
            f"{_SETTING} {trouble}. EvoLink calls public HTTPS addresses only; set the public "
            "address of the receiver, for example https://hooks.example.com. Nothing was bought."
        )
    return root


def url_trouble(url: str, *, private_allowed: bool = False) -> str | None:
    """Return what is wrong with a URL that EvoLink is to call, None if it is usable.

    Also for the addresses of a custom receiver. The text does not show the URL, which may contain
    a password.
    """
    if not url.isascii() or not url.isprintable() or " " in url:
        return "contains characters that a URL cannot (write a host name in its xn-- form)"
    if len(url) > MAX_URL_CHARS:
        return f"has {len(url)} characters; EvoLink accepts {MAX_URL_CHARS}"
    parts = url_parts(url)
    if parts.scheme.lower() != "https" or not parts.hostname:
        return "is not an https:// URL with a host"
    if "@" in parts.netloc:
        return "contains a user name or a password, which EvoLink would receive"
    if parts.port == 0:
        return "has the port 0"
    if not private_allowed and _is_private(parts.hostname):
        return "has a private address or a local name as its host"
    return None


def url_parts(url: str) -> SplitResult:
    """Return the parts of a URL; empty ones if it is malformed."""
    try:
        parts = urlsplit(url)
        _ = parts.port, parts.hostname  # parsed on access, and may raise
    except ValueError:
        return SplitResult("", "", "", "", "")
    return parts


def _is_private(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        name = host.lower().removesuffix(".")
        # A last label of digits is another way to write an address, such as 0x7f.1.
        return not _HOST_NAME.fullmatch(name) or name.endswith(_LOCAL_ENDINGS)
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    return not address.is_global or address.is_multicast
