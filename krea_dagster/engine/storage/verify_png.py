"""Detection of damaged PNG files: decoders ignore checksums, and leave missing rows black."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Final

import deflate

from krea_dagster.errors import NoUsableBody

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"

#: Samples per pixel, by colour type.
_SAMPLES: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}

#: The start and step of each pass of an interlaced image: x, y, dx, dy.
_PASSES: Final = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)

#: Bytes that are decompressed at once: pixels are counted, not kept.
_PIECE_BYTES: Final = 256 * 1024

#: Bytes of a chunk's length, kind and checksum.
_AROUND_BYTES: Final = 12
#: The start of data in zlib's format, and the most bytes of a block without compression.
_FASTEST: Final = b"\x78\x01"
_BLOCK_BYTES: Final = 65_535
#: Many times the chunks of a file of 64 MiB, in which each usually has 8 KiB or more.
_MOST_PIXEL_CHUNKS: Final = 100_000


def whole_png(data: bytes) -> bytes:
    """Return the file for Pillow to decode, if possible without compression.

    Decompression is most of the work, and takes Pillow's zlib twice the time of libdeflate.

    Raises NoUsableBody if a checksum is wrong, or if the end or rows are missing, zlib.error if the
    pixels cannot be decompressed, and struct.error or KeyError for an invalid header. Data after
    the end mark is ignored.
    """
    with suppress(NoUsableBody, deflate.DeflateError, struct.error, KeyError):
        if (uncompressed := _uncompressed(data)) is not None:
            return uncompressed
    check_png(data)  # says what is wrong; if nothing is, Pillow decodes the file as it is
    return data


def _uncompressed(data: bytes) -> bytes | None:
    """Return the same image without compression; None for a file of another layout than usual."""
    header, pixels = memoryview(b""), list[memoryview]()
    start = end = place = len(_SIGNATURE)
    for kind, content in _chunks(data):
        begun, place = place, place + _AROUND_BYTES + len(content)
        if begun == len(_SIGNATURE):
            if kind != b"IHDR":
                return None
            header = content
        elif kind == b"IDAT":
            start = begun if not pixels else start
            if (pixels and begun != end) or len(pixels) == _MOST_PIXEL_CHUNKS:
                return None
            pixels.append(content)
            end = place
    wanted = _unpacked_bytes(header)
    if not pixels or not wanted:
        return None
    rows = deflate.zlib_decompress(pixels[0] if len(pixels) == 1 else b"".join(pixels), wanted)
    if len(rows) != wanted:
        return None
    view = memoryview(data)
    return b"".join([view[:start], *_stored(rows), view[end:]])


def _stored(rows: bytearray) -> list[bytes | memoryview]:
    """Return the pieces of an IDAT chunk that holds the rows without compression."""
    view = memoryview(rows)
    blocks = [view[at : at + _BLOCK_BYTES] for at in range(0, len(view), _BLOCK_BYTES)]
    pieces: list[bytes | memoryview] = [b"IDAT", _FASTEST]
    for number, block in enumerate(blocks, start=1):
        size = len(block)
        pieces += [struct.pack("<BHH", number == len(blocks), size, size ^ _BLOCK_BYTES), block]
    pieces.append(struct.pack(">I", deflate.adler32(view)))
    checksum = 0
    for piece in pieces:
        checksum = deflate.crc32(piece, checksum)
    length = sum(map(len, pieces[1:]))
    return [struct.pack(">I", length), *pieces, struct.pack(">I", checksum)]


def check_png(data: bytes) -> None:
    """Raise what ``whole_png`` raises."""
    chunks = _chunks(data)
    kind, header = next(chunks, (b"", memoryview(b"")))
    if kind != b"IHDR":
        raise NoUsableBody("the image is damaged: the PNG file does not begin with its header")
    wanted = _unpacked_bytes(header)
    found = _count((content for kind, content in chunks if kind == b"IDAT"), wanted)
    if found != wanted:
        how = "lacks rows" if found < wanted else "holds more than its rows"
        raise NoUsableBody(f"the image is damaged: the PNG file {how}")


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the kind and content of every chunk up to the end mark.

    Raises NoUsableBody if a checksum is wrong or the end mark is missing.
    """
    view = memoryview(data)
    place = len(_SIGNATURE)
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        end = place + 8 + length
        if end + 4 > len(data):
            break
        if deflate.crc32(view[place + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise NoUsableBody("the image is damaged: a checksum of the PNG file is wrong")
        kind = data[place + 4 : place + 8]
        if kind == b"IEND":
            return
        yield kind, view[place + 8 : end]
        place = end + 4
    raise NoUsableBody("the PNG file is cut short")


def _unpacked_bytes(header: memoryview) -> int:
    """Return the bytes of all rows, each with its filter byte."""
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", header)
    bits = depth * _SAMPLES[colour]
    total = 0
    for left, top, across, down in _PASSES if interlaced else ((0, 0, 1, 1),):
        columns = -((left - width) // across)
        rows = -((top - height) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total


def _count(pixels: Iterable[memoryview], most: int) -> int:
    """Return the number of decompressed bytes; stop counting above ``most``."""
    unpacking, total = zlib.decompressobj(), 0
    for content in pixels:
        for start in range(0, len(content), _PIECE_BYTES):
            rest: bytes | memoryview = content[start : start + _PIECE_BYTES]
            while rest and total <= most and not unpacking.eof:
                total += len(unpacking.decompress(rest, _PIECE_BYTES))
                rest = unpacking.unconsumed_tail
    return total if total > most else total + len(unpacking.flush())
