"""Looks at a file that should be a picture: is it whole, of the right size, and not one colour.

What a file is, is read from its bytes; neither a link's ending nor an answer's header is
believed. Decoding alone forgives what is missing at the end, and damage in a JPEG; what
``verify_jpeg``, ``verify_png`` and ``verify_webp`` compare finds that. Both are asked here.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Final, cast

from PIL import Image, UnidentifiedImageError

from krea_dagster.engine.storage.other_formats import (
    OTHERS,
    decode_other_format,
    open_other_format,
    undecodable_format,
)
from krea_dagster.engine.storage.verify_jpeg import check_jpeg
from krea_dagster.engine.storage.verify_png import check_png
from krea_dagster.engine.storage.verify_webp import check_webp
from krea_dagster.errors import DownloadError, ImageRejected, NoUsableBody

#: Formats that are looked at, and the ending of their files.
FORMATS: Final = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "AVIF": "avif"}

#: A picture whose every channel stays within this range is one flat colour: hosts were seen to
#: answer an overlong prompt with a black one.
_FLAT_RANGE: Final = 2

#: Pixels of a side of the squares that are looked at before the whole picture.
_SAMPLE: Final = 32

#: What Pillow's decoders raise for damaged files, found by its own fuzzing corpus; RuntimeError is
#: AVIF's.
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


def verify_image(
    data: bytes,
    pixels: tuple[int, int],
    *,
    decode: bool = True,
    seen: Callable[[Image.Image], object] = lambda _: None,
) -> str:
    """Look at a file's content and return its format: ``PNG``, ``JPEG``, ``WEBP`` or ``AVIF``.

    Raises NoUsableBody where it is no whole picture, and ImageRejected where it is one of
    another format or of other dimensions, has several frames, or is of one flat colour.
    Dimensions are compared before anything is decoded, so that a small file cannot ask for much
    memory. Without ``decode`` only the file's header is looked at: its format, dimensions and
    frames.

    ``seen`` is given the decoded picture of a whole file, also of one flat colour, so that nobody
    need decode it again. The pixels stay readable when this has returned.
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
            _check_whole(data, image_format)
            image.load()
            seen(image)
            flat = is_flat(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageRejected(
            "wrong_size", f"the image declares far more than {pixels[0]}×{pixels[1]} pixels"
        ) from None
    except DownloadError:
        raise
    except (*DECODE_ERRORS, Warning) as error:  # a warning, where those are errors
        raise NoUsableBody(f"the image is damaged: {error}") from None
    if flat:
        raise ImageRejected("flat_image", "the image is one flat colour, or nothing of it shows")
    return image_format


def _open(data: bytes) -> Image.Image:
    """The picture, its pixels not yet decoded."""
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
    """About what looking at a picture takes in memory, beside the file itself.

    Pillow keeps four bytes a pixel, and the look converts some kinds of pictures twice.
    """
    return 10 * pixels[0] * pixels[1]


def _wrong_size(found: tuple[int, int], wanted: tuple[int, int]) -> ImageRejected:
    return ImageRejected(
        "wrong_size",
        f"the image has {found[0]}×{found[1]} pixels instead of {wanted[0]}×{wanted[1]}",
    )


def _wrong_format(found: str) -> ImageRejected:
    return ImageRejected(
        "wrong_format", f"the image is a {found} file, and none of {', '.join(FORMATS)}"
    )


def is_flat(image: Image.Image) -> bool:
    """Whether a decoded picture is one flat colour, or nearly so, or nothing of it shows.

    Two small squares settle it for nearly every picture: what is not flat in a part is not
    flat. Only where both are, the whole is looked at.
    """
    width, height = image.size
    for left, top in ((width // 2, height // 2), (width // 4, height // 3)):
        box = (left, top, min(left + _SAMPLE, width), min(top + _SAMPLE, height))
        if not _shows_nothing(image.crop(box)):
            return False
    return _shows_nothing(image)


def _shows_nothing(image: Image.Image) -> bool:
    return _all_alike(image) or _all_transparent(image)


def _all_alike(image: Image.Image) -> bool:
    if image.mode.startswith("I"):  # grey in 16 bits
        low, high = cast("tuple[int, int]", image.getextrema())
        return high - low <= _FLAT_RANGE * 257
    # By way of RGBA, because a palette may hold its transparency in a form that RGB cannot.
    colours = image if image.mode == "RGB" else image.convert("RGBA").convert("RGB")
    extrema = cast("tuple[tuple[int, int], ...]", colours.getextrema())
    return all(high - low <= _FLAT_RANGE for low, high in extrema)


def _all_transparent(image: Image.Image) -> bool:
    """Whatever colours lie beneath. Where one colour is transparent, all alike says as much."""
    if not {"A", "P"} & {*image.getbands()}:
        return False
    _, most = cast("tuple[int, int]", image.convert("RGBA").getchannel("A").getextrema())
    return most <= _FLAT_RANGE


def _check_whole(data: bytes, image_format: str) -> None:
    """Raise NoUsableBody where something is missing that Pillow's decoder forgives.

    For AVIF nothing is: its decoder compares each extent with the file.
    """
    match image_format:
        case "PNG":
            check_png(data)
        case "JPEG":
            check_jpeg(data)
        case "WEBP":
            check_webp(data)
