"""Verification of image files: complete, of the right format and size, and not one flat colour.

The format is read from the content; a link's ending and an answer's header are not trusted.
Decoders ignore a truncated end and damage in a JPEG, which ``verify_jpeg``, ``verify_png`` and
``_check_webp`` detect.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Final, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from krea_dagster.engine.record import FORMATS
from krea_dagster.engine.storage.other_formats import (
    OTHERS,
    decode_other_format,
    open_other_format,
    undecodable_format,
)
from krea_dagster.engine.storage.verify_jpeg import decoded_jpeg
from krea_dagster.engine.storage.verify_png import whole_png
from krea_dagster.errors import DownloadError, ImageRejected, NoUsableBody

#: An image is flat if each channel stays within this range. EvoLink's hosts have answered an
#: overlong prompt with a black image.
_FLAT_RANGE: Final = 2

#: The side, in pixels, of the squares that are examined before the whole image.
_SAMPLE: Final = 32

#: What Pillow's decoders raise for damaged files, found with its fuzzing corpus. RuntimeError is
#: raised for AVIF.
DECODE_ERRORS: Final = (
    OSError,
    RuntimeError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    struct.error,
    zlib.error,
)

#: Chunks that contain pixels.
_PIXEL_CHUNKS: Final = frozenset({b"VP8 ", b"VP8L"})


def verify_image(
    data: bytes,
    pixels: tuple[int, int],
    *,
    decode: bool = True,
    on_decoded: Callable[[Image.Image], object] = lambda _: None,
) -> str:
    """Verify a file's content, and return its format: ``PNG``, ``JPEG``, ``WEBP`` or ``AVIF``.

    Raises NoUsableBody if it is not a complete image, and ImageRejected if it has another format,
    other dimensions or several frames, or is one flat colour. Dimensions are checked before
    decoding, so that a small file cannot claim much memory. Without ``decode`` only the header is
    checked: format, dimensions and frames.

    ``on_decoded`` is called with the decoded image of a complete file, even if it is flat. Its
    pixels stay valid after the return.
    """
    try:
        with _open(data) as image:
            if image.size != pixels:
                raise _wrong_size(image.size, pixels)
            image_format = image.format or ""
            if image_format in OTHERS:
                if decode:
                    decode_other_format(image)
                raise _wrong_format(image_format)
            if getattr(image, "n_frames", 1) != 1:
                raise ImageRejected("animated", "the image has several frames")
            if not decode:
                return image_format
            decoded = _decoded(image, data)
            on_decoded(decoded)
            flat = is_flat(decoded)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageRejected(
            "wrong_size", f"the image declares far more than {pixels[0]}×{pixels[1]} pixels"
        ) from None
    except DownloadError:
        raise
    except (*DECODE_ERRORS, Warning) as error:  # a warning, where those are errors
        raise NoUsableBody(f"the image is damaged: {error}") from None
    if flat:
        raise ImageRejected("flat_image", "the image is one flat colour, or fully transparent")
    return image_format


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=tuple(FORMATS))
    except UnidentifiedImageError:
        other = open_other_format(data)
    if other is not None:
        return other
    if kind := undecodable_format(data):
        raise _wrong_format(kind)
    raise NoUsableBody(f"not an image: it begins with {data[:24]!r}")


def decoded_bytes(pixels: tuple[int, int]) -> int:
    """Estimate the memory for verifying an image, without the file itself.

    Pillow uses four bytes per pixel, as do the rows of a PNG, which are held twice.
    """
    return 12 * pixels[0] * pixels[1]


def _wrong_size(found: tuple[int, int], wanted: tuple[int, int]) -> ImageRejected:
    return ImageRejected(
        "wrong_size",
        f"the image has {found[0]}×{found[1]} pixels instead of {wanted[0]}×{wanted[1]}",
    )


def _wrong_format(found: str) -> ImageRejected:
    return ImageRejected(
        "wrong_format", f"the image is a {found} file; accepted are {', '.join(FORMATS)}"
    )


def is_flat(image: Image.Image) -> bool:
    """Return whether a decoded image is one flat colour, nearly flat, or fully transparent.

    Two small squares decide for nearly every image: an image with a part that is not flat is not
    flat. The whole image is examined only if both are flat.
    """
    width, height = image.size
    for left, top in ((width // 2, height // 2), (width // 4, height // 3)):
        box = (left, top, min(left + _SAMPLE, width), min(top + _SAMPLE, height))
        if not _is_blank(image.crop(box)):
            return False
    return _is_blank(image)


def _is_blank(image: Image.Image) -> bool:
    return _is_one_colour(image) or _is_transparent(image)


def _is_one_colour(image: Image.Image) -> bool:
    if image.mode.startswith("I"):  # grey in 16 bits
        low, high = cast("tuple[int, int]", image.getextrema())
        return high - low <= _FLAT_RANGE * 257
    # Through RGBA, because a palette's transparency may have no equivalent in RGB.
    colours = image if image.mode == "RGB" else image.convert("RGBA").convert("RGB")
    extrema = cast("tuple[tuple[int, int], ...]", colours.getextrema())
    return all(high - low <= _FLAT_RANGE for low, high in extrema)


def _is_transparent(image: Image.Image) -> bool:
    if not {"A", "P"} & {*image.getbands()}:
        return False
    _, most = cast("tuple[int, int]", image.convert("RGBA").getchannel("A").getextrema())
    return most <= _FLAT_RANGE


def _decoded(image: Image.Image, data: bytes) -> Image.Image:
    """Return the opened image with its pixels.

    Raises NoUsableBody if something is missing that Pillow's decoder ignores. AVIF needs no check:
    its decoder compares each extent with the file.
    """
    match image.format:
        case "PNG":
            image = Image.open(io.BytesIO(whole_png(data)), formats=("PNG",))
        case "JPEG":
            pixels = decoded_jpeg(data, image.mode)
            if pixels is not None:
                return _of_pixels(image, pixels)
        case "WEBP":
            _check_webp(data)
    image.load()
    return image


def _of_pixels(opened: Image.Image, pixels: npt.NDArray[np.uint8]) -> Image.Image:
    """Return the opened image with these pixels, without another copy where Pillow allows it."""
    image = Image.frombuffer(opened.mode, opened.size, pixels, "raw", opened.mode, 0, 1)
    image.info = opened.info
    return image


def _check_webp(data: bytes) -> None:
    """Raise NoUsableBody if a chunk, or the file, is longer than its container.

    Data after the end is ignored. Chunks have no checksum, so only decoding can find more damage.
    """
    end = 8 + _number(data, 4)
    if end > len(data):
        raise NoUsableBody("the WEBP file is cut short")
    place, kinds = 12, set[bytes]()
    while place + 8 <= end:
        kinds.add(data[place : place + 4])
        length = _number(data, place + 4)
        if place + 8 + length > end:
            raise NoUsableBody("the image is damaged: a part of the WEBP file is cut short")
        place += 8 + length + length % 2
    if not kinds & _PIXEL_CHUNKS:
        raise NoUsableBody("the image is damaged: the WEBP file does not contain an image")


def _number(data: bytes, place: int) -> int:
    return int.from_bytes(data[place : place + 4], "little")
