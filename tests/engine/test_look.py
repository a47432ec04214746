"""A verified file is whole: nothing is missing that a decoder would forgive."""

from __future__ import annotations

import pytest

from krea_dagster.engine.look import look_at
from krea_dagster.errors import NoUsableBody
from tests.engine.bodies import SMALL, detailed, encoded

# -- whole to the last row --------------------------------------------------------------------


TRAILERS = [
    pytest.param(b"\n", id="newline"),
    pytest.param(b"\r\n", id="CRLF"),
    pytest.param(b"SEFT" * 125, id="500 bytes"),
    pytest.param(b"\xff\xd8" + b"\x00" * 900, id="like another picture"),
    pytest.param(detailed("JPEG"), id="a gain map"),
]


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "AVIF"])
@pytest.mark.parametrize("trailer", TRAILERS)
def test_a_whole_picture_is_taken_with_whatever_follows_its_end(
    file_format: str, trailer: bytes
) -> None:
    assert look_at(encoded(file_format, SMALL) + trailer, SMALL) == file_format


@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_jpeg_with_a_cut_picture_and_an_end_mark_is_damaged(
    share: float, progressive: bool
) -> None:
    """A decoder fills the rest with grey, or leaves it coarse, and says nothing."""
    whole = detailed("JPEG", progressive=progressive)
    with pytest.raises(NoUsableBody):
        look_at(whole[: int(len(whole) * share)] + b"\xff\xd9", SMALL)


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_jpeg_without_its_end_mark_is_cut_short(missing: int) -> None:
    with pytest.raises(NoUsableBody):
        look_at(encoded("JPEG", SMALL)[:-missing], SMALL)


def test_the_end_mark_of_a_preview_is_not_the_picture_s() -> None:
    """A preview in the header is a JPEG with an end of its own."""
    preview = encoded("JPEG", (160, 120))
    segment = b"\xff\xe1" + (len(preview) + 2).to_bytes(2, "big") + preview
    whole = encoded("JPEG", SMALL)
    body = whole[:2] + segment + whole[2:]
    assert look_at(body, SMALL) == "JPEG"
    with pytest.raises(NoUsableBody):
        look_at(body[:-2], SMALL)


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
def test_a_jpeg_of_any_kind_is_whole(mode: str, options: dict[str, object]) -> None:
    if mode != "RGB":
        options = {k: v for k, v in options.items() if k not in {"subsampling", "keep_rgb"}}
    assert look_at(detailed("JPEG", mode, **options), SMALL) == "JPEG"


def of_grey_scans() -> bytes:
    """A JPEG whose second channel alone is half as wide, which few decoders have a name for.

    Each of its channels is a scan of its own, taken from a grey JPEG of that width.
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


def test_a_jpeg_of_a_subsampling_without_a_name_is_taken() -> None:
    """The strict decoder refuses to read it, which is no fault of the file."""
    assert look_at(of_grey_scans(), SMALL) == "JPEG"
    with pytest.raises(NoUsableBody):
        look_at(of_grey_scans()[:-2], SMALL)


def test_a_jpeg_of_thousands_of_scans_is_not_begun() -> None:
    """Ten bytes make a scan, and each costs a pass over the whole picture."""
    whole = detailed("JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    with pytest.raises(NoUsableBody, match="scans"):
        look_at(whole[:-2] + whole[last:-2] * 600 + whole[-2:], SMALL)
