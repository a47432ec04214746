"""Detection of damaged JPEG files: decoders silently fill missing parts with grey."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, cast

import numpy as np
import numpy.typing as npt
import simplejpeg

from krea_dagster.errors import NoUsableBody

#: The decoder's names of Pillow's modes.
_COLOUR_SPACES: Final = {"L": "GRAY", "RGB": "RGB"}

_START, _END, _SCAN = 0xD8, 0xD9, 0xDA

#: Markers of frames whose scans name coefficients: all but the lossless ones.
_FRAMES: Final = frozenset({0xC0, 0xC1, 0xC2, 0xC9, 0xCA})

#: A marker with its padding, and the next one in coded data, where FF 00 is an escaped byte and
#: restart markers are data. The second begins with a single byte, so that the search is 20 times
#: faster.
_MARK: Final = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])", re.DOTALL)
_NEXT_MARK: Final = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])", re.DOTALL)

#: The limit of libjpeg-turbo's fuzzers: ten bytes make a scan, and each costs a pass over the whole
#: image.
_MOST_SCANS: Final = 500


def decoded_jpeg(data: bytes, mode: str) -> npt.NDArray[np.uint8] | None:
    """Decode a JPEG of this mode, as Pillow names it; return the pixels that Pillow would.

    Raises NoUsableBody if the end mark is missing, or if the data does not fill the image: unlike
    Pillow, this decoder reports gaps, surplus data and invalid codes. Data after the end mark is
    ignored: a newline, a gain map. Returns None where Pillow has to decode the file: for other
    modes than grey and RGB, whose data is checked all the same, and unusual subsampling.
    """
    image = memoryview(data)[: end_of_jpeg(data)]
    try:
        if mode in _COLOUR_SPACES:
            pixels = simplejpeg.decode_jpeg(image, _COLOUR_SPACES[mode])
            return cast("npt.NDArray[np.uint8]", pixels)
        # This reads all data; an eighth of the size and grey save the other work.
        simplejpeg.decode_jpeg(image, "GRAY", min_height=1, min_width=1, min_factor=8)
    except KeyError:
        return None  # a subsampling that it has no name for
    except ValueError as error:
        if "Could not determine subsampling" in str(error):
            return None  # not every allowed subsampling is supported
        raise NoUsableBody(f"the image is damaged: {error}") from None
    return None


def end_of_jpeg(data: bytes) -> int:
    """Return the offset after the end mark. End marks inside segments belong to previews.

    Raises NoUsableBody if there is none.
    """
    mark, behind, scans = 0, 0, 0
    missing: set[tuple[int, int]] = set()
    for mark, behind in _marks(data):
        if mark in _FRAMES:
            missing = _of_frame(data[behind : behind + 1024])
        elif mark == _SCAN:
            scans += 1
            missing -= _of_scan(data[behind : behind + 16])
            if scans > _MOST_SCANS:
                raise NoUsableBody(f"the image is damaged: more than {_MOST_SCANS} scans")
        elif mark in {_START, _END}:
            break
    else:
        raise NoUsableBody("the JPEG file is cut short, or a segment of it is damaged")
    if mark != _END or not scans:
        raise NoUsableBody("the image is damaged: the JPEG file does not contain exactly one image")
    if missing:
        raise NoUsableBody("the image is damaged: scans of the JPEG file are missing")
    return behind


def _of_frame(segment: bytes) -> set[tuple[int, int]]:
    """Return the coefficients of each channel that make up an image."""
    return {(segment[8 + 3 * n], k) for n in range(segment[7]) for k in range(64)}


def _of_scan(segment: bytes) -> set[tuple[int, int]]:
    """Return the coefficients that are complete after a scan; progressive images need several."""
    channels = segment[2]
    first, last, precision = segment[3 + 2 * channels : 6 + 2 * channels]
    if precision & 15:
        return set()
    return {(segment[3 + 2 * n], k) for n in range(channels) for k in range(first, last + 1)}


def _marks(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield each marker and the offset after it; segments and coded data are skipped."""
    found = _MARK.match(data, 2)
    while found is not None:
        mark, behind = found[1][0], found.end()
        yield mark, behind
        behind += int.from_bytes(data[behind : behind + 2], "big")
        found = _NEXT_MARK.search(data, behind) if mark == _SCAN else _MARK.match(data, behind)
