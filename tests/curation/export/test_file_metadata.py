"""Files that are marked as generated: read by Pillow, with the pixels as they were."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from krea_dagster.curation.export.file_metadata import (
    BY_ALGORITHM,
    BY_MODEL,
    with_png_text,
    with_source_type,
)

OTHER_XMP = (
    '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/" dc:format="ü"/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
).encode()

FILES: list[tuple[str, dict[str, Any]]] = [
    ("PNG", {}),
    ("JPEG", {"quality": 80}),
    ("JPEG", {"progressive": True}),
    ("WEBP", {"quality": 80}),
    ("WEBP", {"lossless": True}),
]


def drawn(
    image_format: str, mode: str = "RGB", size: tuple[int, int] = (33, 20), **options: Any
) -> bytes:
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    shape = (size[1], size[0], channels) if channels > 1 else (size[1], size[0])
    pixels = np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(file, image_format, **options)
    return file.getvalue()


def opened(data: bytes) -> tuple[bytes, bytes, dict[str, Any]]:
    """The pixels, the XMP and everything else that Pillow finds."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        info = dict(image.info)
        xmp = info.pop("xmp", b"")
        info.pop("XML:com.adobe.xmp", None)
        return image.tobytes(), xmp if isinstance(xmp, bytes) else xmp.encode(), info


@pytest.mark.parametrize(("image_format", "options"), FILES, ids=str)
@pytest.mark.parametrize("source_type", [BY_MODEL, BY_ALGORITHM])
def test_a_marked_file_says_how_its_image_came_about_and_has_the_same_pixels(
    image_format: str, options: dict[str, Any], source_type: str
) -> None:
    data = drawn(image_format, **options)
    marked = with_source_type(data, source_type)
    before, after = opened(data), opened(marked)
    assert before[0] == after[0]
    assert before[2] == after[2]
    assert f'Iptc4xmpExt:DigitalSourceType="{source_type}"'.encode() in after[1]
    assert with_source_type(marked, BY_MODEL) == marked, "it is marked once"


@pytest.mark.parametrize("mode", ["RGBA", "L"])
@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_transparency_and_grey_stay(image_format: str, mode: str) -> None:
    data = drawn(image_format, mode, lossless=True, exact=True)
    with Image.open(io.BytesIO(with_source_type(data, BY_MODEL))) as after:
        assert after.tobytes() == opened(data)[0]


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_other_metadata_stays(image_format: str) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a description"
    options: dict[str, Any] = {"exif": exif, "icc_profile": b"a profile" * 9}
    if image_format == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", OTHER_XMP.decode(), zip=True)
        options["pnginfo"] = info
    else:
        options["xmp"] = OTHER_XMP
    data = drawn(image_format, **options)
    before, after = opened(data), opened(with_source_type(data, BY_MODEL))
    assert (before[0], before[2]) == (after[0], after[2])
    assert BY_MODEL.encode() in after[1]
    assert 'dc:format="ü"'.encode() in after[1], "the XMP that was there is kept"


def test_a_file_with_content_credentials_or_of_another_format_is_left_alone() -> None:
    """A change would make the credentials invalid."""
    box = b"JP\x00\x01\x00\x00\x00\x01" + b"jumb"
    jpeg = drawn("JPEG")
    signed = jpeg[:2] + b"\xff\xeb" + (len(box) + 2).to_bytes(2, "big") + box + jpeg[2:]
    webp = drawn("WEBP", lossless=True)
    signed_webp = (
        b"RIFF" + (len(webp) - 8 + 12).to_bytes(4, "little") + webp[8:] + b"C2PA\x04\0\0\0jumb"
    )
    png = drawn("PNG")
    signed_png = png[:33] + b"\0\0\0\4caBXjumb\0\0\0\0" + png[33:]
    for data in (signed, signed_webp, signed_png, drawn("AVIF"), b"no image"):
        assert with_source_type(data, BY_MODEL) == data


def test_a_text_in_a_png_is_read_back() -> None:
    data = with_png_text(drawn("PNG"), "parameters", '{"prompt": "ü"}')
    assert opened(data)[2]["parameters"] == '{"prompt": "ü"}'
    assert opened(data)[0] == opened(drawn("PNG"))[0]
