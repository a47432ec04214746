"""Finds a JPEG that is not whole: a decoder fills what is missing with grey, and says nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import simplejpeg

from krea_dagster.errors import NoUsableBody

_START, _END, _SCAN = 0xD8, 0xD9, 0xDA

#: The next mark in coded data: FF 00 is a byte of the data, and restarts belong to it.
_MARK: Final = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])", re.DOTALL)

#: libjpeg-turbo's own fuzzers take no more: each scan costs a pass over the whole picture, and
#: ten bytes make one.
_MOST_SCANS: Final = 500


def check_jpeg(data: bytes) -> None:
    """Raise NoUsableBody where a JPEG lacks its end mark, or its data do not fill the picture.

    What follows the end mark is not looked at: a newline, a gain map.
    """
    picture = memoryview(data)[: _end(data)]
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


def _end(data: bytes) -> int:
    """The place behind the end mark. An end mark within a segment is that of a preview."""
    scans = 0
    for mark, behind in _marks(data):
        if mark == _SCAN:
            scans += 1
            if scans > _MOST_SCANS:
                raise NoUsableBody(f"the image is damaged: more than {_MOST_SCANS} scans")
        elif mark == _END and scans:
            return behind
        elif mark in {_START, _END}:
            raise NoUsableBody("the image is damaged: the JPEG file holds no picture")
    raise NoUsableBody("the JPEG file is cut short, or a segment of it is damaged")


def _marks(data: bytes) -> Iterator[tuple[int, int]]:
    """Each mark, and the place behind it; segments and coded data are stepped over."""
    found = _MARK.match(data, 2)
    while found is not None:
        mark, behind = found[1][0], found.end()
        yield mark, behind
        behind += int.from_bytes(data[behind : behind + 2], "big")
        found = (_MARK.search if mark == _SCAN else _MARK.match)(data, behind)
