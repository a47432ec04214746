"""Metadata inside image files: a text in a PNG, and how the image came about (IPTC), as XMP. Pure.

Both are inserted between the parts of a file, so the pixels stay as they are.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Final

#: IPTC's terms for an image made by a model, and for one drawn without a model.
BY_MODEL: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
BY_ALGORITHM: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/algorithmicMedia"

_PROPERTY: Final = "DigitalSourceType"
_DESCRIPTION: Final = (
    '<rdf:Description rdf:about="" '
    'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    'Iptc4xmpExt:DigitalSourceType="{source_type}"/>'
)
_PACKET: Final = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">{description}</rdf:RDF>'
    '</x:xmpmeta><?xpacket end="r"?>'
)
_END: Final = "</rdf:RDF>"

_PNG: Final = b"\x89PNG\r\n\x1a\n"
#: Where a PNG's header chunk ends: 8 bytes of signature, 25 of IHDR.
_HEADER: Final = 33
_PNG_KEYWORD: Final = b"XML:com.adobe.xmp"
_JPEG: Final = b"\xff\xd8"
_JPEG_NAME: Final = b"http://ns.adobe.com/xap/1.0/\0"
#: A JPEG segment has its length in 16 bits, which include themselves.
_SEGMENT: Final = 65_533
_APP0, _APP1, _APP11, _SCAN = 0xE0, 0xE1, 0xEB, 0xDA
_XMP_FLAG, _ALPHA_FLAG = 0x04, 0x10


def with_png_text(data: bytes, keyword: str, text: str) -> bytes:
    """Return a PNG file with a text chunk after its header."""
    return data[:_HEADER] + _text_chunk(keyword.encode(), text.encode()) + data[_HEADER:]


def with_source_type(data: bytes, source_type: str) -> bytes:
    """Return a file that says how its image came about, in the XMP that it has, or in new one.

    A file stays as it is if it says so already, if it has content credentials, which a change
    would make invalid, or if it is not a PNG, JPEG or WebP file.
    """
    if data.startswith(_PNG):
        return _marked_png(data, source_type)
    if data.startswith(_JPEG):
        return _marked_jpeg(data, source_type)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _marked_webp(data, source_type)
    return data


def _packet(old: bytes | None, source_type: str) -> bytes | None:
    """Return a packet with the source type; None if the old one has it."""
    description = _DESCRIPTION.format(source_type=source_type)
    text = "" if old is None else old.decode("utf-8", "replace")
    if _PROPERTY in text:
        return None
    before, end, after = text.rpartition(_END)
    if end:
        return f"{before}{description}{end}{after}".encode()
    return _PACKET.format(description=description).encode()


# -- PNG -------------------------------------------------------------------------------------


def _marked_png(data: bytes, source_type: str) -> bytes:
    old, begin, end = None, _HEADER, _HEADER
    for kind, start, stop in _png_chunks(data):
        body = data[start + 8 : stop - 4]
        if kind == b"caBX":
            return data
        if kind == b"iTXt" and body.startswith(_PNG_KEYWORD + b"\0"):
            old, begin, end = _text_of(body), start, stop
    packet = _packet(old, source_type)
    if packet is None:
        return data
    return data[:begin] + _text_chunk(_PNG_KEYWORD, packet) + data[end:]


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kind, the beginning and the end of each chunk."""
    place = len(_PNG)
    while place + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        end = place + 12 + length
        yield data[place + 4 : place + 8], place, end
        place = end


def _text_chunk(keyword: bytes, text: bytes) -> bytes:
    # Not compressed, and without a language.
    body = b"iTXt" + keyword + b"\0\0\0\0\0" + text
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


def _text_of(body: bytes) -> bytes:
    """Return the text of an iTXt chunk, empty if it cannot be read."""
    try:
        _, rest = body.split(b"\0", 1)
        _, _, text = rest[2:].split(b"\0", 2)
        return zlib.decompress(text) if rest[0] else text
    except (ValueError, zlib.error, IndexError):
        return b""


# -- JPEG ------------------------------------------------------------------------------------


def _marked_jpeg(data: bytes, source_type: str) -> bytes:
    old, begin, end = None, len(_JPEG), len(_JPEG)
    for marker, start, stop in _jpeg_segments(data):
        body = data[start + 4 : stop]
        if marker == _APP11 and body.startswith(b"JP"):
            return data
        if marker == _APP1 and body.startswith(_JPEG_NAME):
            old, begin, end = body[len(_JPEG_NAME) :], start, stop
        elif old is None and (marker == _APP0 or body.startswith(b"Exif\0")):
            begin = end = stop  # readers expect these two first
    packet = _packet(old, source_type)
    if packet is not None and len(_JPEG_NAME) + len(packet) > _SEGMENT:
        packet = _packet(None, source_type)
    if packet is None:
        return data
    body = _JPEG_NAME + packet
    segment = b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
    return data[:begin] + segment + data[end:]


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the marker, the beginning and the end of each segment before the pixels."""
    place = len(_JPEG)
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        if marker == _SCAN:
            return
        (length,) = struct.unpack_from(">H", data, place + 2)
        yield marker, place, place + 2 + length
        place += 2 + length


# -- WebP ------------------------------------------------------------------------------------


def _marked_webp(data: bytes, source_type: str) -> bytes:
    chunks = list(_webp_chunks(data))
    kinds = [kind for kind, _ in chunks]
    if b"C2PA" in kinds:
        return data
    packet = _packet(dict(chunks).get(b"XMP "), source_type)
    if packet is None:
        return data
    if kinds[0] == b"VP8X":
        header = bytes([chunks[0][1][0] | _XMP_FLAG]) + chunks[0][1][1:]
    else:
        header = _extended_header(*chunks[0])
    images = [one for one in chunks if one[0] not in {b"VP8X", b"XMP "}]
    parts = b"".join(
        kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
        for kind, body in [(b"VP8X", header), *images, (b"XMP ", packet)]
    )
    return b"RIFF" + struct.pack("<I", len(parts) + 4) + b"WEBP" + parts


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    (length,) = struct.unpack_from("<I", data, 4)
    place, end = 12, min(len(data), 8 + length)
    while place + 8 <= end:
        (length,) = struct.unpack_from("<I", data, place + 4)
        yield data[place : place + 4], data[place + 8 : place + 8 + length]
        place += 8 + length + length % 2


def _extended_header(kind: bytes, image: bytes) -> bytes:
    """Return the header of an extended file, which XMP needs, for an image of a simple one."""
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", image, 1)
        width, height, alpha = bits & 0x3FFF, bits >> 14 & 0x3FFF, bits >> 28 & 1
    else:
        width, height = (size - 1 & 0x3FFF for size in struct.unpack_from("<HH", image, 6))
        alpha = 0
    flags = _XMP_FLAG | (_ALPHA_FLAG if alpha else 0)
    return struct.pack("<I", flags) + struct.pack("<I", width)[:3] + struct.pack("<I", height)[:3]
