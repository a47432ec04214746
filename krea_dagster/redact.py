"""Hides credentials in what leaves: errors, logs, metadata, cards, the terminal. Pure.

Three things do it, and nothing else in the package does: ``location`` for one path or URL (and
``address`` for what must be a URL), ``text`` for a sentence in which URLs may stand, and ``Hidden``
for a secret that is known, such as the API key. Each may be applied again to what it gave.

A password that nobody has encoded may hold any of the characters that end an address. So what is
shown of a URL is no part of a credential in whatever way the URL is read; where that leaves
nothing, only its scheme is shown.
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
#: Where a URL begins in a sentence, and where the next one of a chain such as zip://a::https://b.
_IN_SENTENCE: Final = re.compile(rf"(?<![A-Za-z0-9+.-]){_SCHEME}", re.ASCII | re.IGNORECASE)
_IN_CHAIN: Final = re.compile(rf"(?:\A|(?<=::)){_SCHEME}", re.ASCII | re.IGNORECASE)
_NEXT_IN_LIST: Final = re.compile(rf"(?<=[,;|\"'<>()]){_SCHEME}", re.ASCII | re.IGNORECASE)

_END_OF_HOST: Final = re.compile(r"[/?#\\]")
_BEFORE_HOST: Final = re.compile(r"@(?=[^@/?#\\]*(?:[/?#\\]|\Z))")
_SECRET_PART: Final = re.compile(r"[?#]")
_IPV6: Final = re.compile(r"\[[0-9A-Fa-f:.%]*\](?::[0-9]{0,5})?", re.ASCII)
_HOST_AND_PORT: Final = re.compile(r"[^:@\[\]]*:[0-9]{0,5}", re.ASCII)
#: What closes a URL in a sentence, and is no part of it.
_CLOSING: Final = re.compile(r"[]'\"`)}>,;:.!]*\Z")

#: Settings as drivers write them, outside of URLs too.
_SETTING: Final = re.compile(
    r"((?:password|passwd|passphrase|pwd|secret|signature|credential|auth_?token|api_?key)\w*"
    r"\s*=\s*)(?:'[^']*'|\"[^\"]*\"|[^\s&;,'\")]+)",
    re.IGNORECASE,
)

#: A shorter part of a URL may be in a sentence by chance, and is in none that can be read alone.
_LEAST_PART: Final = 3
#: A shorter key may be a part of a word, a link or an id by chance: it is no secret.
LEAST_SECRET: Final = 12
_LEAST_BASE64: Final = 8


def location(place: str) -> str:
    """A path or URL, also a chain of them, without user, password, query and fragment."""
    before, url = _parted(place)
    return before + _chain(url)


def address(given: str) -> str:
    """The same for a setting that must be a URL, and may lack its scheme."""
    return location(given) if "://" in given else location(f"https://{given.lstrip('/')}")[8:]


def text(sentence: str, *known: str) -> str:
    """A sentence whose URLs, and whose settings such as ``password=``, are without secrets.

    ``known`` are paths or URLs that it is about: what they hide is hidden outside of them too.
    """
    for place in known:
        if (shown := location(place)) != place:
            sentence = sentence.replace(place, shown)
            for secret in sorted(_secrets(place), key=len, reverse=True):
                sentence = sentence.replace(secret, HIDDEN)
    return _SETTING.sub(rf"\1{HIDDEN}", _urls(sentence) if ":/" in sentence else sentence)


def safe_cause(error: BaseException, *known: str) -> BaseException | None:
    """The error as the cause of another, None where its text or a cause of it shows a secret.

    Dagster and Python print the causes of an error along with it.
    """
    found: BaseException | None = error
    while found is not None:
        said = f"{found} {found!r}"
        if text(said, *known) != said:
            return None
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return error


class Hidden:
    """Hides one secret in texts: in either case, escaped, percent-encoded, in hex and in base64."""

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
        """The text without the secret."""
        return self._found.sub(HIDDEN, said) if self._may_be_in(said) else said

    def is_in(self, said: str) -> bool:
        """Whether a text holds the secret, and not by chance, as it may hold a short one."""
        return self._long and self._may_be_in(said) and self._found.search(said) is not None

    def _may_be_in(self, said: str) -> bool:
        """A quick look, because every answer is looked through, and hardly any holds a secret."""
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
    """Where a URL in a sentence ends: at white space, or where another one of a list begins."""
    space = re.search(r"\s", sentence[start:])
    end = len(sentence) if space is None else start + space.start()
    following = _NEXT_IN_LIST.search(sentence, start, end)
    if following is not None:
        return following.start()
    if space is not None and _lacks_host(sentence[start:end]):
        # A password with a space in it, as far as that can be told.
        line = re.compile(r"[^\n@]{0,200}?@\S*").match(sentence, end)
        if line is not None and "://" not in line.group():
            return line.end()
    return end


def _chain(url: str) -> str:
    return "".join(map(_one, _links(url)))


def _links(url: str) -> Iterator[str]:
    """The parts of a chain, each with the :: behind it."""
    begins = [found.start() for found in _IN_CHAIN.finditer(url)]
    return (url[a:b] for a, b in itertools.pairwise([*begins, len(url)]))


def _parted(place: str) -> tuple[str, str]:
    """What stands before the first URL, such as ``simplecache::``, and the rest."""
    begin = _IN_SENTENCE.search(place)
    at = len(place) if begin is None else begin.start()
    return place[:at], place[at:]


def _one(url: str) -> str:
    """One URL, or the part of a chain up to the next one, with the :: between them."""
    scheme, slashes, rest = _split(url)
    rest, link = (rest[:-2], "::") if rest.endswith("::") else (rest, "")
    return f"{scheme}{slashes}{_shown(rest)}{link}"


def _split(url: str) -> tuple[str, str, str]:
    scheme, _, rest = url.partition(":")
    path = rest.lstrip("/")
    # sqlite:////data: of more than two slashes, the others are the path's.
    slashes = min(2, len(rest) - len(path))
    return f"{scheme}:", rest[:slashes], rest[slashes:]


def _shown(rest: str) -> str:
    """What may be shown of the part of a URL that follows its scheme."""
    end = _user_end(rest)
    shown = HIDDEN if end is None else _SECRET_PART.split(rest[end:], maxsplit=1)[0]
    # What follows the user may look like another one, such as a host with a wrong port.
    return shown if _user_end(shown) == 0 else HIDDEN


def _user_end(rest: str) -> int | None:
    """Where user and password end, 0 where there are none; None where that cannot be told."""
    head = _END_OF_HOST.split(rest, maxsplit=1)[0]
    if _IPV6.fullmatch(head) or not (":" in head or "@" in head):
        return 0  # whatever @ there is belongs to the path
    last = rest.rfind("@")
    if _HOST_AND_PORT.fullmatch(head):
        # With an @ behind it, host and port may be a user and the digits of a password.
        return 0 if last < 0 else None
    if last < 0:
        return None
    # Each @ that a host follows may be the one.
    return last + 1 if len(_BEFORE_HOST.findall(rest)) == 1 else None


def _lacks_host(rest: str) -> bool:
    return "@" not in rest and _user_end(rest) is None


def _secrets(place: str) -> Iterator[str]:
    """What is hidden of a URL, part by part, as it is and decoded."""
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
    """A pattern for one character, as JSON, URLs and HTML may write it."""
    code = ord(one)
    return (
        rf"(?:\\{{0,4}}{re.escape(one)}|%(?:25){{0,3}}{code:02x}|\\{{1,4}}u{code:04x}"
        rf"|&#(?:0{{0,4}}{code}|x0{{0,4}}{code:x});)"
    )


def _in_base64(secret: str) -> Iterator[str]:
    """The secret in base64, in both alphabets, wherever it stands in what was encoded."""
    data = secret.encode()
    for offset in range(3):
        encoded = base64.b64encode(bytes(offset) + data).decode()
        # Without the digits that hang on what stands before and behind it.
        skipped, over = (0, 2, 3)[offset], (0, 3, 2)[(offset + len(data)) % 3]
        core = encoded[skipped : len(encoded) - over]
        if len(core) >= _LEAST_BASE64:
            yield from dict.fromkeys((core, core.replace("+", "-").replace("/", "_")))


def _in_base64_text(core: str) -> str:
    """A pattern for base64, with the digits around it that hold a part of the secret as well."""
    return rf"[A-Za-z0-9+/_-]{{0,4}}{re.escape(core)}[A-Za-z0-9+/_=-]{{0,4}}"
