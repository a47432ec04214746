"""A verified file is complete, also where a decoder would ignore a gap."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zlib

import pytest
from PIL import Image

from krea_dagster.engine.storage.verify import is_flat, verify_image
from krea_dagster.errors import ImageRejected, NoUsableBody
from tests.engine.storage.image_files import SMALL, chunk, detailed, encoded, png

# -- whole to the last row --------------------------------------------------------------------


TRAILERS = [
    pytest.param(b"\n", id="newline"),
    pytest.param(b"\r\n", id="CRLF"),
    pytest.param(b"SEFT" * 125, id="500 bytes"),
    pytest.param(b"\xff\xd8" + b"\x00" * 900, id="like another image"),
    pytest.param(detailed("JPEG"), id="a gain map"),
]


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "AVIF"])
@pytest.mark.parametrize("trailer", TRAILERS)
def test_a_complete_image_with_trailing_data_is_accepted(file_format: str, trailer: bytes) -> None:
    assert verify_image(encoded(file_format, SMALL) + trailer, SMALL) == file_format


@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_cut_jpeg_with_an_end_mark_is_damaged(share: float, progressive: bool) -> None:
    """A decoder silently fills the rest with grey, or leaves it coarse."""
    whole = detailed("JPEG", progressive=progressive)
    with pytest.raises(NoUsableBody):
        verify_image(whole[: int(len(whole) * share)] + b"\xff\xd9", SMALL)


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_jpeg_without_end_mark_is_truncated(missing: int) -> None:
    with pytest.raises(NoUsableBody):
        verify_image(encoded("JPEG", SMALL)[:-missing], SMALL)


def test_the_end_mark_of_a_preview_does_not_count() -> None:
    """A preview in the header is a JPEG with its own end mark."""
    preview = encoded("JPEG", (160, 120))
    segment = b"\xff\xe1" + (len(preview) + 2).to_bytes(2, "big") + preview
    whole = encoded("JPEG", SMALL)
    body = whole[:2] + segment + whole[2:]
    assert verify_image(body, SMALL) == "JPEG"
    with pytest.raises(NoUsableBody):
        verify_image(body[:-2], SMALL)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"subsampling": "4:4:4"}, id="4:4:4"),
        pytest.param({"subsampling": "4:2:2"}, id="4:2:2"),
        pytest.param({"restart_marker_blocks": 7}, id="restart marks"),
        pytest.param({"progressive": True, "optimize": True}, id="progressive"),
        pytest.param({"keep_rgb": True}, id="no other colour space"),
        pytest.param({"comment": b"\xff\xd9" * 500}, id="end marks in a comment"),
    ],
)
def test_all_kinds_of_jpeg_are_complete(mode: str, options: dict[str, object]) -> None:
    if mode != "RGB":
        options = {k: v for k, v in options.items() if k not in {"subsampling", "keep_rgb"}}
    assert verify_image(detailed("JPEG", mode, **options), SMALL) == "JPEG"


def of_grey_scans() -> bytes:
    """A JPEG in which only the second channel is half as wide, which few decoders support.

    Each channel is a separate scan, taken from a grey JPEG of that width.
    """
    width, height = SMALL
    greys = [encoded("JPEG", (wide, height), "L") for wide in (width, (width + 1) // 2, width)]
    frame, scan = greys[0].index(b"\xff\xc0"), greys[0].index(b"\xff\xda")
    channels = b"".join(bytes([n, wide, 0]) for n, wide in ((1, 0x21), (2, 0x11), (3, 0x21)))
    size = greys[0][frame + 4 : frame + 9]
    parts = [greys[0][:frame], b"\xff\xc0\x00\x11", size, b"\x03", channels]
    parts.append(greys[0][frame + 13 : scan])
    for n, grey in enumerate(greys, 1):
        data = grey[grey.index(b"\xff\xda") + 10 : -2]
        parts.append(b"\xff\xda\x00\x08\x01" + bytes([n, 0, 0, 63, 0]) + data)
    return b"".join(parts) + b"\xff\xd9"


def test_a_jpeg_with_unnamed_subsampling_is_accepted() -> None:
    """The strict decoder does not support it, but the file is right."""
    assert verify_image(of_grey_scans(), SMALL) == "JPEG"
    with pytest.raises(NoUsableBody):
        verify_image(of_grey_scans()[:-2], SMALL)


def test_padding_before_a_marker_is_accepted() -> None:
    whole = detailed("JPEG", restart_marker_blocks=7)
    for mark in (b"\xff\xdb", b"\xff\xda", b"\xff\xd9"):
        place = whole.rindex(mark)
        assert verify_image(whole[:place] + b"\xff" * 5 + whole[place:], SMALL) == "JPEG"


def scans_of(whole: bytes) -> list[int]:
    """Return where the scans begin, and the tables before them."""
    return [k for k in range(len(whole) - 1) if whole[k : k + 2] in {b"\xff\xda", b"\xff\xc4"}]


def test_a_progressive_jpeg_without_its_last_scans_is_damaged() -> None:
    """Each scan is complete, but the image is coarse."""
    whole = detailed("JPEG", progressive=True)
    places = scans_of(whole)[1:]
    assert len(places) > 8
    for place in places:
        with pytest.raises(NoUsableBody, match=r"missing|one image"):
            verify_image(whole[:place] + b"\xff\xd9", SMALL)


def test_a_jpeg_without_the_scan_of_a_channel_is_damaged() -> None:
    whole = of_grey_scans()
    for place in scans_of(whole)[-2:]:
        with pytest.raises(NoUsableBody, match="missing"):
            verify_image(whole[:place] + b"\xff\xd9", SMALL)


def test_a_jpeg_with_thousands_of_scans_is_not_decoded() -> None:
    """Ten bytes make a scan, and each costs a pass over the whole image."""
    whole = detailed("JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    with pytest.raises(NoUsableBody, match="more than 500 scans"):
        verify_image(whole[:-2] + whole[last:-2] * 600 + whole[-2:], SMALL)


# -- every row of a PNG -----------------------------------------------------------------------


COLOURS = [
    *(pytest.param(0, depth, id=f"grey {depth}") for depth in (1, 2, 4, 8, 16)),
    *(pytest.param(2, depth, id=f"RGB {depth}") for depth in (8, 16)),
    *(pytest.param(3, depth, id=f"palette {depth}") for depth in (1, 2, 4, 8)),
    *(pytest.param(4, depth, id=f"LA {depth}") for depth in (8, 16)),
    *(pytest.param(6, depth, id=f"RGBA {depth}") for depth in (8, 16)),
]
ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)


def rows_of(pixels: tuple[int, int], colour: int, depth: int, *, interlaced: bool) -> bytes:
    """Rows of noise, each with the byte that names its filter, as the specification counts them."""
    source = random.Random(3)
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    rows = b""
    for left, top, across, down in ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns = len(range(left, pixels[0], across))
        for _ in range(top, pixels[1], down) if columns else ():
            rows += b"\0" + source.randbytes((columns * samples * depth + 7) // 8)
    return rows


@pytest.mark.parametrize("interlaced", [False, True], ids=["row by row", "interlaced"])
@pytest.mark.parametrize(("colour", "depth"), COLOURS)
@pytest.mark.parametrize("pixels", [(33, 67), (64, 64), (3, 50)])
def test_a_png_has_the_rows_of_its_header(
    pixels: tuple[int, int], colour: int, depth: int, interlaced: bool
) -> None:
    header = struct.pack(">IIBBBBB", *pixels, depth, colour, 0, 0, interlaced)
    colours = bytes(k * 37 % 256 for k in range(3 << depth))
    palette = chunk(b"PLTE", colours) if colour == 3 else b""
    rows = rows_of(pixels, colour, depth, interlaced=interlaced)
    assert verify_image(png(header, rows, between=palette), pixels) == "PNG"
    for wrong in (rows[:-1], rows[: len(rows) // 2], rows + b"\0"):
        with pytest.raises(NoUsableBody):
            verify_image(png(header, wrong, between=palette), pixels)


def test_a_png_with_half_its_rows_is_damaged() -> None:
    """Its checksums are right; a decoder leaves the lower half black."""
    header = struct.pack(">IIBBBBB", *SMALL, 8, 2, 0, 0, 0)
    rows = rows_of(SMALL, 2, 8, interlaced=False)
    assert verify_image(png(header, rows), SMALL) == "PNG"
    with pytest.raises(NoUsableBody, match="lacks rows"):
        verify_image(png(header, rows[: len(rows) // 2]), SMALL)


@pytest.mark.parametrize("first", [b"", chunk(b"tEXt", b"a\0b")], ids=["nothing", "text"])
def test_a_png_that_does_not_begin_with_its_header_is_damaged(first: bytes) -> None:
    body = b"\x89PNG\r\n\x1a\n" + first + chunk(b"IEND", b"") + encoded("PNG", SMALL)[8:]
    with pytest.raises(NoUsableBody):
        verify_image(body, SMALL)


def test_the_rows_of_a_png_are_counted_in_little_memory() -> None:
    """A file of 100 KB that unpacks to 100 MB: counting stops at the limit."""
    header = struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0)
    body = png(header, rows_of((64, 64), 2, 8, interlaced=False) + bytes(100_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(NoUsableBody):
            verify_image(body, (64, 64))
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("pieces", [1, 7, 5000])
def test_png_pixels_may_be_in_any_number_of_chunks(pieces: int) -> None:
    header = struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0)
    packed = zlib.compress(rows_of((64, 64), 2, 8, interlaced=False))
    step = -(-len(packed) // pieces)
    parts = [chunk(b"IDAT", packed[k : k + step]) for k in range(0, len(packed), step)]
    parts.insert(1, chunk(b"IDAT", b""))
    body = b"".join([b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), *parts, chunk(b"IEND", b"")])
    assert verify_image(body, (64, 64)) == "PNG"
    torn = [*parts[:1], chunk(b"tEXt", b"a\0b"), *parts[1:]]
    body = b"".join([b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), *torn, chunk(b"IEND", b"")])
    if pieces > 1:
        with pytest.raises(NoUsableBody):
            verify_image(body, (64, 64))


# -- WebP and AVIF ----------------------------------------------------------------------------


def resized(webp: bytes) -> bytes:
    """A WebP whose header has its actual length."""
    return webp[:4] + struct.pack("<I", len(webp) - 8) + webp[8:]


def with_its_chunk_resized(webp: bytes) -> bytes:
    """The same for its only chunk."""
    return resized(webp[:16] + struct.pack("<I", len(webp) - 20) + webp[20:])


@pytest.mark.parametrize("options", [{}, {"lossless": True}], ids=["lossy", "lossless"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_cut_webp_is_damaged_for_any_lengths(
    share: float, mode: str, options: dict[str, object]
) -> None:
    whole = detailed("WEBP", mode, **options)
    cut = whole[: int(len(whole) * share) // 2 * 2]
    assert verify_image(whole, SMALL) == "WEBP"
    bodies = [cut, resized(cut)]
    if whole[12:15] == b"VP8" and whole[15:16] != b"X":
        bodies.append(with_its_chunk_resized(cut))
    for body in bodies:
        with pytest.raises(NoUsableBody):
            verify_image(body, SMALL)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("missing", [1, 2, 5, 500, 5000])
def test_an_avif_with_data_beyond_its_end_is_damaged(missing: int, mode: str) -> None:
    """Its decoder compares each extent with the file, those of the transparency too."""
    whole = detailed("AVIF", mode)
    assert verify_image(whole, SMALL) == "AVIF"
    with pytest.raises(NoUsableBody):
        verify_image(whole[:-missing], SMALL)


# -- flat by transparency ---------------------------------------------------------------------


def transparent(mode: str, alpha: int, seen_at: tuple[int, int] | None = None) -> bytes:
    """Noise with constant transparency, except for one opaque place."""
    image = Image.effect_noise(SMALL, 60).convert("L" if mode == "LA" else "RGB")
    cover = Image.new("L", SMALL, alpha)
    if seen_at:
        cover.putpixel(seen_at, 255)
    image.putalpha(cover)
    target = io.BytesIO()
    image.save(target, "PNG", compress_level=1)
    return target.getvalue()


def transparent_palette(*opaque: int) -> bytes:
    """Noise in a palette in which only these entries are visible."""
    image = Image.effect_noise(SMALL, 60).convert("P")
    target = io.BytesIO()
    shown = bytes(255 if k in opaque else 0 for k in range(256))
    image.save(target, "PNG", transparency=shown, compress_level=1)
    return target.getvalue()


def transparent_16_bit(colour: int, alpha: int) -> bytes:
    samples = {4: 1, 6: 3}[colour]
    rows, source = b"", random.Random(5)
    for _ in range(SMALL[1]):
        noise = source.randbytes(2 * samples * SMALL[0])
        pixel = 2 * samples
        rows += b"\0" + b"".join(
            noise[k : k + pixel] + struct.pack(">H", alpha) for k in range(0, len(noise), pixel)
        )
    return png(struct.pack(">IIBBBBB", *SMALL, 16, colour, 0, 0, 0), rows)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(transparent("RGBA", 0), id="RGBA"),
        pytest.param(transparent("RGBA", 2), id="RGBA, nearly"),
        pytest.param(transparent("LA", 0), id="LA"),
        pytest.param(transparent_palette(), id="palette"),
        pytest.param(transparent_16_bit(4, 0), id="LA 16"),
        pytest.param(transparent_16_bit(6, 0), id="RGBA 16"),
        pytest.param(transparent_16_bit(6, 500), id="RGBA 16, nearly"),
    ],
)
def test_an_invisible_image_is_flat(body: bytes) -> None:
    """The colours beneath do not matter."""
    with pytest.raises(ImageRejected) as caught:
        verify_image(body, SMALL)
    assert caught.value.code == "flat_image"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(transparent("RGBA", 3), id="RGBA, faint"),
        pytest.param(transparent("RGBA", 0, (1, SMALL[1] - 1)), id="RGBA, one pixel"),
        pytest.param(transparent("LA", 0, (0, 0)), id="LA, one pixel"),
        pytest.param(transparent_palette(*range(100, 140)), id="palette, some colours"),
        pytest.param(transparent_16_bit(4, 40_000), id="LA 16, half"),
    ],
)
def test_a_partly_visible_image_is_not_flat(body: bytes) -> None:
    assert verify_image(body, SMALL) == "PNG"


@pytest.mark.parametrize("mode", ["PA", "LA", "RGBA"])
def test_transparency_is_detected_in_every_mode(mode: str) -> None:
    image = Image.effect_noise((64, 64), 60).convert("RGB")
    image.putalpha(0)
    assert is_flat(image.convert(mode))
    image.putalpha(255)
    assert not is_flat(image.convert(mode))


def test_one_transparent_16_bit_colour_is_accepted() -> None:
    """The 16-bit colour in the file has no equivalent in the image's 8 bits."""
    header = struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0)
    clear = chunk(b"tRNS", struct.pack(">HHH", 65535, 65535, 65535))
    rows = rows_of((64, 64), 2, 16, interlaced=False)
    assert verify_image(png(header, rows, between=clear), (64, 64)) == "PNG"


# -- images of other formats ----------------------------------------------------------------

OTHERS = [
    pytest.param("GIF", {}, id="GIF"),
    pytest.param("BMP", {}, id="BMP"),
    pytest.param("TIFF", {}, id="TIFF"),
    pytest.param("TIFF", {"compression": "tiff_lzw"}, id="TIFF, LZW"),
    pytest.param("TIFF", {"compression": "tiff_deflate"}, id="TIFF, deflate"),
    pytest.param("JPEG2000", {}, id="JPEG 2000"),
    pytest.param("JPEG2000", {"no_jp2": True}, id="JPEG 2000, bare"),
    pytest.param("PPM", {}, id="PPM"),
]


def code_of(body: bytes, *, decode: bool = True) -> str:
    with pytest.raises(ImageRejected) as caught:
        verify_image(body, SMALL, decode=decode)
    return caught.value.code


@pytest.mark.parametrize(("file_format", "options"), OTHERS)
def test_a_complete_image_in_another_format_is_rejected(
    file_format: str, options: dict[str, object]
) -> None:
    """It was paid for, and would come in the same format again."""
    body = detailed(file_format, **options)
    assert code_of(body) == "wrong_format"
    assert code_of(body, decode=False) == "wrong_format"


@pytest.mark.parametrize(("file_format", "options"), OTHERS)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.99])
def test_a_damaged_image_in_another_format_is_fetched_again(
    file_format: str, options: dict[str, object], share: float
) -> None:
    body = detailed(file_format, **options)
    with pytest.raises(NoUsableBody):
        verify_image(body[: int(len(body) * share)], SMALL)


@pytest.mark.parametrize("file_format", ["GIF", "BMP", "TIFF", "JPEG2000", "PPM"])
def test_an_image_in_another_format_and_size_is_not_decoded(file_format: str) -> None:
    target = io.BytesIO()
    Image.new("RGB", (1200, 900)).save(target, file_format)
    assert code_of(target.getvalue()) == "wrong_size"


def test_an_animated_gif_has_the_wrong_format() -> None:
    target = io.BytesIO()
    first = Image.effect_noise(SMALL, 60)
    first.save(target, "GIF", save_all=True, append_images=[first.rotate(180)])
    assert code_of(target.getvalue()) == "wrong_format"


def icon() -> bytes:
    target = io.BytesIO()
    Image.effect_noise((64, 64), 60).save(target, "ICO")
    return target.getvalue()


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"\xff\x0a" + bytes(90), id="JPEG XL"),
        pytest.param(b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(90), id="JPEG XL in boxes"),
        pytest.param(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(90), id="HEIC"),
        pytest.param(
            b"\0\0\0\x18ftypmif1\0\0\0\0mif1heix" + bytes(90), id="HEIC, by its second name"
        ),
        pytest.param(b"8BPS\0\x01" + bytes(90), id="PSD"),
        pytest.param(b"qoif" + bytes(90), id="QOI"),
        pytest.param(icon(), id="ICO"),
    ],
)
def test_undecodable_formats_are_recognised_by_signature(body: bytes) -> None:
    assert code_of(body) == "wrong_format"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"\0\0\1\0" + bytes(90), id="four bytes of an ICO"),
        pytest.param(icon()[:-1], id="a cut ICO"),
        pytest.param(detailed("AVIF")[:200], id="a cut AVIF"),
        pytest.param(b"\0\0\0\x18ftypisom\0\0\0\0isomiso2" + bytes(90), id="a film"),
        pytest.param(b"%PDF-1.7\n" + bytes(90), id="PDF"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", id="EPS"),
        pytest.param(b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", id="XML"),
        pytest.param(b"P6 and other papers", id="text"),
        pytest.param(b"BM is not an image" + bytes(90), id="other text"),
    ],
)
def test_a_file_with_only_an_image_signature_is_fetched_again(body: bytes) -> None:
    with pytest.raises(NoUsableBody):
        verify_image(body, SMALL)


def test_a_tiff_with_an_oversized_tile_is_not_decompressed() -> None:
    """A tile is unpacked as a whole: this one would take 1.2 GB."""
    body = bytearray(detailed("TIFF", compression="tiff_deflate"))
    entries = int.from_bytes(body[4:8], "little")
    (count,) = struct.unpack_from("<H", body, entries)
    renamed = {0x0111: 0x0144, 0x0117: 0x0145}  # where strips are, and how long, as tiles
    tags = [bytearray(body[k : k + 12]) for k in range(entries + 2, entries + 2 + 12 * count, 12)]
    for tag in tags:
        (name,) = struct.unpack_from("<H", tag)
        tag[:2] = struct.pack("<H", renamed.get(name, name))
    tags = [tag for tag in tags if struct.unpack_from("<H", tag)[0] != 0x0116]
    tags += [bytearray(struct.pack("<HHII", name, 4, 1, 20_000)) for name in (322, 323)]
    tags.sort(key=lambda tag: struct.unpack_from("<H", tag)[0])
    start = len(body)
    body += struct.pack("<H", len(tags)) + b"".join(tags) + bytes(4)
    body[4:8] = struct.pack("<I", start)
    with pytest.raises(NoUsableBody, match="tile"):
        verify_image(bytes(body), SMALL)
