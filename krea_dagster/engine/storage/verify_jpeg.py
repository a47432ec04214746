"""Finds a JPEG that is not whole: a decoder fills what is missing with grey, and says nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import simplejpeg

from krea_dagster.errors import NoUsableBody

_START, _END, _SCAN = 0xD8, 0xD9, 0xDA

#: Begins of frames whose scans name coefficients: all but the lossless ones.
_FRAMES: Final = frozenset({0xC0, 0xC1, 0xC2, 0xC9, 0xCA})

#: A mark, with its padding; and the next one in coded data, where FF 00 is a byte of them and
#: restarts belong to them. That one begins with a single byte, which is looked for 20 times faster.
_MARK: Final = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])", re.DOTALL)
_NEXT_MARK: Final = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])", re.DOTALL)

#: libjpeg-turbo's own fuzzers take no more: each scan costs a pass over the whole picture, and
#: ten bytes make one.
_MOST_SCANS: Final = 500


def check_jpeg(data: bytes) -> None:
    """Raise NoUsableBody where a JPEG lacks its end mark, or its data do not fill the picture.

    What follows the end mark is not looked at: a newline, a gain map.
    """
    picture = memoryview(data)[: end_of_jpeg(data)]
    try:
        # The data are read in full; an eighth of the size, and grey, leave out the rest of the
        # work. Gaps, surplus and impossible codes are errors here, and no decoder else says so.
        simplejpeg.decode_jpeg(picture, "GRAY", min_height=1, min_width=1, min_factor=8)
    except KeyError:
        return  # a subsampling whose name it does not know
    except ValueError as error:
        if "Could not determine subsampling" in str(error):
            return  # neither does it read all that is allowed
        raise NoUsableBody(f"the image is damaged: {error}") from None


def end_of_jpeg(data: bytes) -> int:
    """The place behind the end mark. An end mark within a segment is that of a preview.

    Raises NoUsableBody where there is none.
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
        raise NoUsableBody("the image is damaged: the JPEG file does not hold one picture")
    if missing:
        raise NoUsableBody("the image is damaged: scans of the JPEG file are missing")
    return behind


def _of_frame(segment: bytes) -> set[tuple[int, int]]:
    """All that a picture consists of: channels, and the coefficients of each."""
    return {(segment[8 + 3 * n], k) for n in range(segment[7]) for k in range(64)}


def _of_scan(segment: bytes) -> set[tuple[int, int]]:
    """What is known to its last bit after a scan: a progressive picture is refined by many."""
    channels = segment[2]
    first, last, precision = segment[3 + 2 * channels : 6 + 2 * channels]
    if precision & 15:
        return set()
    return {(segment[3 + 2 * n], k) for n in range(channels) for k in range(first, last + 1)}


def _marks(data: bytes) -> Iterator[tuple[int, int]]:
    """Each mark, and the place behind it; segments and coded data are stepped over."""
    found = _MARK.match(data, 2)
    while found is not None:
        mark, behind = found[1][0], found.end()
        yield mark, behind
        behind += int.from_bytes(data[behind : behind + 2], "big")
        found = _NEXT_MARK.search(data, behind) if mark == _SCAN else _MARK.match(data, behind)
