"""Decide whether a broken-off download may be resumed (RFC 9110, 13.1.5 and 14). Pure.

Both parts must be of the same file. So the host must have sent a strong validator with the first
part. It gets that back as ``If-Range``, and its answer must repeat it or leave it out, and must
agree on the size and on the first byte of the part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from krea_dagster.api.wire import http_date

PARTIAL_CONTENT: Final = 206

_ETAG = re.compile(r'"[\x21\x23-\x7e]{0,1000}"', re.ASCII)
_LENGTH = re.compile(r"[0-9]{1,18}", re.ASCII)
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", re.ASCII)


@dataclass(frozen=True)
class ResumableFile:
    """The size and validator that a host has sent of a whole file.

    ``size_bytes`` is None if it was not sent. ``validator`` is the value of the header
    ``validated_by``, which is lower-case.
    """

    size_bytes: int | None
    validated_by: str
    validator: str

    def range_headers(self, at_byte: int) -> dict[str, str]:
        """Return the headers that request the rest from a byte on."""
        return {"Range": f"bytes={at_byte}-", "If-Range": self.validator}

    def resumed_size(self, status: int, headers: Mapping[str, str], at_byte: int) -> int | None:
        """Return the size of the whole file if an answer continues at this byte, else None."""
        found = _CONTENT_RANGE.fullmatch(headers.get("content-range", "").strip())
        if status != PARTIAL_CONTENT or found is None or is_encoded(headers):
            return None
        first, last, size = map(int, found.groups())
        if first != at_byte or not first <= last < size or self.size_bytes not in (None, size):
            return None
        validator = headers.get(self.validated_by)
        # With If-Range, a host may leave out Last-Modified, but not ETag.
        if validator is None and self.validated_by == "last-modified":
            return size
        return size if validator == self.validator else None


def resumable_file(headers: Mapping[str, str]) -> ResumableFile | None:
    """Return the size and validator of a 200 (lower-case headers), None if it cannot be resumed."""
    if is_encoded(headers) or headers.get("accept-ranges", "").strip().lower() == "none":
        return None
    size_bytes = content_length(headers)
    etag = headers.get("etag", "")
    if _ETAG.fullmatch(etag):
        return ResumableFile(size_bytes, "etag", etag)
    modified = headers.get("last-modified", "")
    modified_at, answered_at = http_date(modified), http_date(headers.get("date", ""))
    # A date is a strong validator only if the file cannot have changed twice within its second.
    if modified_at and answered_at and (answered_at - modified_at).total_seconds() >= 1:
        return ResumableFile(size_bytes, "last-modified", modified)
    return None


def content_length(headers: Mapping[str, str]) -> int | None:
    """Return ``Content-Length``, None if it is absent or unreadable."""
    text = headers.get("content-length", "")
    return int(text) if _LENGTH.fullmatch(text) else None


def is_encoded(headers: Mapping[str, str]) -> bool:
    """Return whether the body has a Content-Encoding."""
    return headers.get("content-encoding", "").strip().lower() not in ("", "identity")
