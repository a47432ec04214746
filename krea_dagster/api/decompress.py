"""Undo a Content-Encoding piece by piece, so that a small body cannot fill the memory. Pure."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final

from krea_dagster.api.untrusted import safe_text

#: The most bytes that are decompressed at a time.
CHUNK_BYTES: Final = 64 * 1024

_ENCODINGS: Final = frozenset({"gzip", "x-gzip", "deflate"})


class Decompressor:
    """Decompresses gzip and deflate, and passes an unencoded body through.

    Raises ValueError for another encoding, and from ``feed`` for damaged data.
    """

    def __init__(self, encoding: str) -> None:
        name = encoding.strip().lower()
        if name not in ("", "identity") and name not in _ENCODINGS:
            raise ValueError(f"the body has the unknown encoding {safe_text(name, max_chars=40)}")
        # 32 + 15: the largest window, and gzip or zlib by the header.
        self._inflate = zlib.decompressobj(47) if name in _ENCODINGS else None

    @property
    def finished(self) -> bool:
        """Whether the body is complete; false for a compressed body that is cut off."""
        return self._inflate is None or self._inflate.eof

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the next data decompressed, at most 64 KiB at a time."""
        if self._inflate is None:
            yield data
            return
        try:
            while not self._inflate.eof:
                piece = self._inflate.decompress(data, CHUNK_BYTES)
                data = self._inflate.unconsumed_tail
                if piece:
                    yield piece
                if not data and len(piece) < CHUNK_BYTES:
                    return
        except zlib.error as error:
            raise ValueError(f"the compressed body is damaged: {error}") from None
