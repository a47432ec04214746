"""Undoes a Content-Encoding piece by piece, so that a small body cannot fill the memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final

from krea_dagster.api.wire import safe_text

#: The most that is unpacked at a time.
CHUNK_BYTES: Final = 64 * 1024

_PACKED: Final = frozenset({"gzip", "x-gzip", "deflate"})


class Decompressor:
    """Understands none, gzip and deflate. ``ended`` is false for a packed body that is cut off.

    Raises:
        ValueError: the encoding is another one, or (from ``pieces``) the data is not in it.
    """

    def __init__(self, encoding: str) -> None:
        name = encoding.strip().lower()
        if name not in ("", "identity") and name not in _PACKED:
            raise ValueError(f"the body is packed with {safe_text(name, max_chars=40)}")
        # 32 + 15: the largest window, and the header tells gzip from zlib.
        self._inflate = zlib.decompressobj(47) if name in _PACKED else None

    @property
    def ended(self) -> bool:
        """Whether nothing is missing at the end of a packed body."""
        return self._inflate is None or self._inflate.eof

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """What the next data unpacks to, at most 64 KiB at a time where it was packed."""
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
            raise ValueError(f"the packed body is damaged: {error}") from None
