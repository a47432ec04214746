"""Redaction of credentials in errors, logs, metadata, dataset cards and the terminal. Pure.

``location`` redacts one path or URL (``address`` one that must be a URL), ``text`` a sentence that
may contain URLs, and ``SecretFilter`` a known secret, such as the API key. All are idempotent.

A password that is not percent-encoded may contain any of the characters that end an address. So the
part of a URL that is shown is not a credential in any reading of the URL; if that leaves nothing,
only the scheme is shown.
"""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Iterator
from typing import Final
from urllib.parse import unquote

HIDDEN: Final = "***"

_SCHEME: Final = r"(?:[A-Za-z][A-Za-z0-9+.-]*:/{2,}|https?:/)"
#: The start of a URL in a sentence, and of the next one in a chain such as zip://a::https://b.
_IN_SENTENCE: Final = re.compile(rf"(?<![A-Za-z0-9+.-]){_SCHEME}", re.ASCII | re.IGNORECASE)
_IN_CHAIN: Final = re.compile(rf"(?:\A|(?<=::)){_SCHEME}", re.ASCII | re.IGNORECASE)
_NEXT_IN_LIST: Final = re.compile(rf"(?<=[,;|\"'<>()]){_SCHEME}", re.ASCII | re.IGNORECASE)

_END_OF_HOST: Final = re.compile(r"[/?#\\]")
_BEFORE_HOST: Final = re.compile(r"@(?=[^@/?#\\]*(?:[/?#\\]|\Z))")
_SECRET_PART: Final = re.compile(r"[?#]")
_IPV6: Final = re.compile(r"\[[0-9A-Fa-f:.%]*\](?::[0-9]{0,5})?", re.ASCII)
_HOST_AND_PORT: Final = re.compile(r"[^:@\[\]]*:[0-9]{0,5}", re.ASCII)
#: Punctuation after a URL in a sentence.
_CLOSING: Final = re.compile(r"[]'\"`)}>,;:.!]*\Z")

#: Settings as drivers write them, outside of URLs too.
_SETTING: Final = re.compile(
    r"((?:password|passwd|passphrase|pwd|secret|signature|credential|auth_?token|api_?key)\w*"
    r"\s*=\s*)(?:'[^']*'|\"[^\"]*\"|[^\s&;,'\")]+)",
    re.IGNORECASE,
)

#: Shorter parts of a URL may occur in a sentence by chance, and reveal nothing on their own.
_LEAST_PART: Final = 3
#: A shorter key may occur in a word, a link or an id by chance, and is not treated as a secret.
LEAST_SECRET: Final = 12
_LEAST_BASE64: Final = 8


def location(place: str) -> str:
    """Return a path, a URL or a chain of them without user, password, query and fragment."""
    before, url = _parted(place)
    return before + _chain(url)


def address(given: str) -> str:
    """Return the same for a setting that must be a URL, and may lack its scheme."""
    return location(given) if "://" in given else location(f"https://{given.lstrip('/')}")[8:]


def text(sentence: str, *known: str) -> str:
    """Return a sentence without the secrets in its URLs and in settings such as ``password=``.

    ``known`` are paths or URLs whose secrets are also removed outside of them.
    """
    for place in known:
        if (shown := location(place)) != place:
            sentence = sentence.replace(place, shown)
            for secret in sorted(_secrets(place), key=len, reverse=True):
                sentence = sentence.replace(secret, HIDDEN)
    return _SETTING.sub(rf"\1{HIDDEN}", _urls(sentence) if ":/" in sentence else sentence)


def safe_cause(error: BaseException, *known: str) -> BaseException | None:
    """Return an error that may be the cause of another, None if it or a cause shows a secret.

    Dagster and Python print the causes of an error.
    """
    found: BaseException | None = error
    while found is not None:
        said = f"{found} {found!r}"
        if text(said, *known) != said:
            return None
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return error


class SecretFilter:
    """Removes a secret from texts, also if it is escaped, percent-encoded, in hex or in base64."""

    __slots__ = ("_found", "_long", "_plain")

    def __init__(self, secret: str) -> None:
        self._long = len(secret) >= LEAST_SECRET
        self._plain = [secret.lower()]
        whole = "".join(map(_character, secret))
        forms = [whole if self._long else rf"(?<![A-Za-z0-9]){whole}(?![A-Za-z0-9])"]
        if self._long:
            self._plain += [secret.encode().hex(), *(core.lower() for core in _in_base64(secret))]
            forms += [secret.encode().hex(), *map(_in_base64_text, _in_base64(secret))]
        self._found = re.compile("|".join(forms), re.IGNORECASE)

    def hide(self, said: str) -> str:
        """Return the text without the secret."""
        return self._found.sub(HIDDEN, said) if self._may_be_in(said) else said

    def is_in(self, said: str) -> bool:
        """Return whether a text contains the secret. Short secrets are not reported."""
        return self._long and self._may_be_in(said) and self._found.search(said) is not None

    def _may_be_in(self, said: str) -> bool:
        """Check quickly, because every answer is searched and almost none contains a secret."""
        if "%" in said or "\\" in said or "&#" in said:
            return True
        small = said.lower()
        return any(form in small for form in self._plain)

    def __repr__(self) -> str:
        return HIDDEN


# -- URLs -------------------------------------------------------------------------------------


def _urls(sentence: str) -> str:
    parts: list[str] = []
    at = 0
    while (begin := _IN_SENTENCE.search(sentence, at)) is not None:
        parts.append(sentence[at : begin.start()])
        at = _end_of_url(sentence, begin.end())
        url = sentence[begin.start() : at]
        closing = _CLOSING.search(url, begin.end() - begin.start())
        ends = closing.start() if closing else len(url)
        parts += [_chain(url[:ends]), url[ends:]]
    return "".join([*parts, sentence[at:]])


def _end_of_url(sentence: str, start: int) -> int:
    """Return where a URL in a sentence ends: at white space, or at the next URL of a list."""
    space = re.search(r"\s", sentence[start:])
    end = len(sentence) if space is None else start + space.start()
    following = _NEXT_IN_LIST.search(sentence, start, end)
    if following is not None:
        return following.start()
    if space is not None and _lacks_host(sentence[start:end]):
        # Probably a password with a space in it.
        line = re.compile(r"[^\n@]{0,200}?@\S*").match(sentence, end)
        if line is not None and "://" not in line.group():
            return line.end()
    return end


def _chain(url: str) -> str:
    return "".join(map(_one, _links(url)))


def _links(url: str) -> Iterator[str]:
    """Yield the parts of a chain, each with the :: after it."""
    begins = [found.start() for found in _IN_CHAIN.finditer(url)]
    return (url[a:b] for a, b in itertools.pairwise([*begins, len(url)]))


def _parted(place: str) -> tuple[str, str]:
    """Return the text before the first URL, such as ``simplecache::``, and the rest."""
    begin = _IN_SENTENCE.search(place)
    at = len(place) if begin is None else begin.start()
    return place[:at], place[at:]


def _one(url: str) -> str:
    """Redact one URL, or one part of a chain with the :: after it."""
    scheme, slashes, rest = _split(url)
    rest, link = (rest[:-2], "::") if rest.endswith("::") else (rest, "")
    return f"{scheme}{slashes}{_shown(rest)}{link}"


def _split(url: str) -> tuple[str, str, str]:
    scheme, _, rest = url.partition(":")
    path = rest.lstrip("/")
    # sqlite:////data: after two slashes, the others belong to the path.
    slashes = min(2, len(rest) - len(path))
    return f"{scheme}:", rest[:slashes], rest[slashes:]


def _shown(rest: str) -> str:
    """Redact the part of a URL after its scheme."""
    end = _user_end(rest)
    shown = HIDDEN if end is None else _SECRET_PART.split(rest[end:], maxsplit=1)[0]
    # The rest may look like another user, such as a host with a wrong port.
    return shown if _user_end(shown) == 0 else HIDDEN


def _user_end(rest: str) -> int | None:
    """Return where user and password end, 0 if there are none, None if that is ambiguous."""
    head = _END_OF_HOST.split(rest, maxsplit=1)[0]
    if _IPV6.fullmatch(head) or not (":" in head or "@" in head):
        return 0  # an @ belongs to the path
    last = rest.rfind("@")
    if _HOST_AND_PORT.fullmatch(head):
        # Before an @, host and port may be a user and a password of digits.
        return 0 if last < 0 else None
    if last < 0:
        return None
    # Each @ before a host may be the end.
    return last + 1 if len(_BEFORE_HOST.findall(rest)) == 1 else None


def _lacks_host(rest: str) -> bool:
    return "@" not in rest and _user_end(rest) is None


def _secrets(place: str) -> Iterator[str]:
    """Yield the hidden parts of a URL, as they are and decoded."""
    for url in _links(_parted(place)[1]):
        rest = _split(url.removesuffix("::"))[2]
        end = _user_end(rest)
        found = [
            part.partition("=")[2] or part for part in re.split("[?#&;]", rest[end or 0 :])[1:]
        ]
        if end != 0:
            user, _, password = (rest.rpartition("@")[0] or rest).partition(":")
            found.append(password or user)
        for secret in found:
            yield from (one for one in (secret, unquote(secret)) if len(one) >= _LEAST_PART)


# -- the forms of a secret --------------------------------------------------------------------


def _character(one: str) -> str:
    """Return a pattern for one character, as JSON, URLs and HTML may write it."""
    code = ord(one)
    return (
        rf"(?:\\{{0,4}}{re.escape(one)}|%(?:25){{0,3}}{code:02x}|\\{{1,4}}u{code:04x}"
        rf"|&#(?:0{{0,4}}{code}|x0{{0,4}}{code:x});)"
    )


def _in_base64(secret: str) -> Iterator[str]:
    """Yield the secret in base64, in both alphabets, at any offset in the encoded data."""
    data = secret.encode()
    for offset in range(3):
        encoded = base64.b64encode(bytes(offset) + data).decode()
        # Without the digits that depend on the bytes before and after.
        skipped, over = (0, 2, 3)[offset], (0, 3, 2)[(offset + len(data)) % 3]
        core = encoded[skipped : len(encoded) - over]
        if len(core) >= _LEAST_BASE64:
            yield from dict.fromkeys((core, core.replace("+", "-").replace("/", "_")))


def _in_base64_text(core: str) -> str:
    """Return a pattern for base64, with the digits around it that contain parts of the secret."""
    return rf"[A-Za-z0-9+/_-]{{0,4}}{re.escape(core)}[A-Za-z0-9+/_=-]{{0,4}}"
