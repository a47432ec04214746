"""Only the requested image is published; other bodies are classified."""

# ruff: noqa: ARG002 - doubles take all that their interface gives them

from __future__ import annotations

import asyncio
import io
import os
import random
import struct
import uuid
import zlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import fsspec
import pytest
from PIL import Image

from krea_dagster.engine.storage.images import MAX_IMAGE_BYTES, ImageStore
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.engine.storage.verify import is_flat, verify_image
from krea_dagster.errors import ConfigError, DownloadError, ImageRejected, NoUsableBody
from krea_dagster.models import ImageRequest
from krea_dagster.spend.tables.ledger import REJECTED_CODES
from tests.engine.harness import make_request, wait_until
from tests.engine.storage.image_files import chunk, draw_image, encoded

pytestmark = pytest.mark.anyio

REQUEST = make_request()
PIXELS = REQUEST.pixels


@dataclass(frozen=True)
class Body:
    size_bytes: int
    sha256: str


class Server:
    """A client that answers every download with the same bytes, in pieces, up to the limit."""

    def __init__(self, body: bytes) -> None:
        self.body = body

    async def download(self, url: str, *, sink: Callable[[bytes], object], max_bytes: int) -> Body:
        for start in range(0, len(self.body), 65536):
            if start + 65536 > max_bytes:
                raise NoUsableBody("longer than allowed")
            sink(self.body[start : start + 65536])
        return Body(len(self.body), sha256(self.body).hexdigest())


def flat(mode: str, colour: object) -> bytes:
    target = io.BytesIO()
    image = Image.new(mode, PIXELS, colour)  # type: ignore[arg-type]  # each mode has its own
    image.save(target, "PNG", compress_level=1)
    return target.getvalue()


def flat_palette_with_alpha() -> bytes:
    target = io.BytesIO()
    image = Image.new("P", PIXELS, 3)
    image.putpalette([0, 0, 0] * 3 + [9, 9, 9])
    image.save(target, "PNG", transparency=3, compress_level=1)
    return target.getvalue()


def unseen() -> bytes:
    """An image under an alpha of 0."""
    target = io.BytesIO()
    image = draw_image()
    image.putalpha(0)
    image.save(target, "PNG", compress_level=1)
    return target.getvalue()


def almost_black_jpeg() -> bytes:
    """Black after lossy encoding: not all pixels are equal."""
    image = Image.new("RGB", PIXELS, (0, 0, 0))
    image.putpixel((5, 5), (2, 1, 2))
    target = io.BytesIO()
    image.save(target, "PNG", compress_level=1)
    return target.getvalue()


def bomb() -> bytes:
    """A few hundred bytes that declare 60,000 × 60,000 pixels."""

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(b"\0" * 99)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def animated(file_format: str) -> bytes:
    target = io.BytesIO()
    first, second = draw_image(), draw_image().rotate(180)
    first.save(target, file_format, save_all=True, append_images=[second])
    return target.getvalue()


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(Storage(str(tmp_path)))


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


async def fetch(
    store: ImageStore, body: bytes, request: ImageRequest = REQUEST, url: str = "https://x/a.png"
) -> object:
    return await store.fetch(Server(body), url, request)


# -- what is taken ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file_format", "ending"), [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"), ("AVIF", "avif")]
)
async def test_an_image_is_published_by_request_key_and_actual_format(
    store: ImageStore, tmp_path: Path, file_format: str, ending: str
) -> None:
    """The ending of the link does not matter."""
    body = encoded(file_format)
    image = await store.fetch(Server(body), "https://files.test/x.gif", REQUEST)
    key = REQUEST.request_key
    assert image.path == f"images/{key[:2]}/{key}.{ending}"
    assert files(tmp_path) == [image.path]
    assert (tmp_path / image.path).read_bytes() == body
    assert (image.bytes, image.sha256) == (len(body), sha256(body).hexdigest())
    assert (image.format, image.width, image.height) == (file_format, *PIXELS)
    assert store.holds(image)


async def test_bytes_after_the_end_of_a_jpeg_are_kept(store: ImageStore, tmp_path: Path) -> None:
    body = encoded("JPEG") + b"\r\n" + b"SEFT" * 125
    image = await store.fetch(Server(body), "https://x/a", REQUEST)
    assert (tmp_path / image.path).read_bytes() == body


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1"])
async def test_images_in_other_colour_modes_are_accepted(store: ImageStore, mode: str) -> None:
    assert await fetch(store, encoded("PNG", PIXELS, mode))


async def test_an_image_in_16_bit_grey_is_accepted(store: ImageStore) -> None:
    target = io.BytesIO()
    draw_image(mode="L").convert("I").point(lambda v: v * 256).convert("I;16").save(target, "PNG")
    assert await fetch(store, target.getvalue())


async def test_a_file_can_be_read_by_others(store: ImageStore, tmp_path: Path) -> None:
    image = await store.fetch(Server(encoded("PNG")), "https://x/a", REQUEST)
    assert (tmp_path / image.path).stat().st_mode & 0o777 == 0o644


async def test_an_image_that_is_fetched_again_replaces_the_old_file(
    store: ImageStore, tmp_path: Path
) -> None:
    await fetch(store, encoded("PNG"))
    await fetch(store, encoded("PNG", PIXELS, "RGBA"))
    (name,) = files(tmp_path)
    assert (tmp_path / name).read_bytes() == encoded("PNG", PIXELS, "RGBA")


async def test_a_missing_or_shorter_file_does_not_count(store: ImageStore, tmp_path: Path) -> None:
    image = await store.fetch(Server(encoded("PNG")), "https://x/a", REQUEST)
    os.truncate(tmp_path / image.path, 100)
    assert not store.holds(image)
    (tmp_path / image.path).unlink()
    assert not store.holds(image)


# -- what is not ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"<!DOCTYPE html><html>Sign in</html>", id="HTML"),
        pytest.param(b'{"error": {"code": "x"}}', id="JSON"),
        pytest.param(os.urandom(50_000), id="random bytes"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x89PNG\r\n\x1a\n", id="only a signature"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + os.urandom(5000), id="a signature and noise"),
        pytest.param(b"GIF89a" + b"\0" * 100, id="the beginning of a GIF"),
        pytest.param(encoded("GIF")[:-900], id="a cut GIF"),
        pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg'/>", id="SVG"),
    ],
)
async def test_a_body_that_is_not_an_image_is_fetched_again(
    store: ImageStore, tmp_path: Path, body: bytes
) -> None:
    with pytest.raises(NoUsableBody):
        await fetch(store, body)
    assert files(tmp_path) == []


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "AVIF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.999])
async def test_a_truncated_image_is_fetched_again(
    store: ImageStore, tmp_path: Path, file_format: str, share: float
) -> None:
    whole = encoded(file_format)
    with pytest.raises(NoUsableBody):
        await fetch(store, whole[: int(len(whole) * share)])
    assert files(tmp_path) == []


async def test_a_jpeg_cut_before_an_end_mark_is_fetched_again(
    store: ImageStore, tmp_path: Path
) -> None:
    whole = encoded("JPEG")
    with pytest.raises(NoUsableBody):
        await fetch(store, whole[: len(whole) // 2] + b"\xff\xd9")
    assert files(tmp_path) == []


@pytest.mark.parametrize("missing", [1, 4, 12])
async def test_a_png_without_its_last_bytes_is_fetched_again(
    store: ImageStore, missing: int
) -> None:
    with pytest.raises(NoUsableBody):
        await fetch(store, encoded("PNG")[:-missing])


async def test_a_png_with_a_damaged_middle_is_fetched_again(store: ImageStore) -> None:
    body = bytearray(encoded("PNG"))
    body[len(body) // 2] ^= 0xFF
    with pytest.raises(NoUsableBody):
        await fetch(store, bytes(body))


@pytest.mark.parametrize(
    ("code", "body"),
    [
        pytest.param("wrong_size", encoded("PNG", (352, 736)), id="half the size"),
        pytest.param("wrong_size", encoded("PNG", (PIXELS[1], PIXELS[0])), id="turned"),
        pytest.param("wrong_size", encoded("JPEG", (PIXELS[0] + 1, PIXELS[1])), id="one too wide"),
        pytest.param("wrong_size", bomb(), id="bomb"),
        pytest.param("animated", animated("PNG"), id="animated PNG"),
        pytest.param("animated", animated("WEBP"), id="animated WebP"),
        pytest.param("animated", animated("MPO"), id="two images in one JPEG"),
        pytest.param("wrong_format", encoded("GIF"), id="GIF"),
        pytest.param("wrong_format", encoded("TIFF"), id="TIFF"),
        pytest.param("wrong_size", encoded("BMP", (352, 736)), id="BMP of half the size"),
        pytest.param("flat_image", flat("RGB", (0, 0, 0)), id="black"),
        pytest.param("flat_image", almost_black_jpeg(), id="almost black"),
        pytest.param("flat_image", flat("RGB", (255, 255, 255)), id="white"),
        pytest.param("flat_image", flat("L", 0), id="black in grey"),
        pytest.param("flat_image", flat("1", 0), id="black in one bit"),
        pytest.param("flat_image", flat("P", 0), id="one colour of a palette"),
        pytest.param("flat_image", flat_palette_with_alpha(), id="palette with transparency"),
        pytest.param("flat_image", flat("RGBA", (1, 2, 3, 128)), id="flat with alpha"),
        pytest.param("flat_image", flat("LA", (7, 0)), id="grey with alpha"),
        pytest.param("flat_image", unseen(), id="an image of which nothing shows"),
    ],
)
async def test_a_complete_file_that_is_not_the_image_is_rejected_and_kept(
    store: ImageStore, tmp_path: Path, code: str, body: bytes
) -> None:
    """It was paid for, and a person may look at it."""
    with pytest.raises(ImageRejected) as caught:
        await fetch(store, body)
    assert caught.value.code == code
    assert code in REJECTED_CODES, "the ledger knows it as paid and refused"
    name = f"images/rejected/{REQUEST.request_key}"
    assert files(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == body
    assert str(tmp_path / name) in str(caught.value)


def test_dimensions_are_checked_before_decoding() -> None:
    """Rows that would take 3 GB are not decoded: the data after the header is garbage."""
    body = bytearray(bomb())
    body[16:24] = struct.pack(">II", 30_000, 2_900)  # below the library's own limit
    body[29:33] = struct.pack(">I", zlib.crc32(bytes(body[12:29])))
    with pytest.raises(ImageRejected) as caught:
        verify_image(bytes(body), PIXELS)
    assert caught.value.code == "wrong_size"


async def test_an_endless_body_is_cut_off(store: ImageStore, tmp_path: Path) -> None:
    class Endless(Server):
        asked_for = 0

        async def download(
            self, url: str, *, sink: Callable[[bytes], object], max_bytes: int
        ) -> Body:
            self.asked_for = max_bytes
            return await super().download(url, sink=sink, max_bytes=2_000_000)

    server = Endless(b"\x89PNG\r\n\x1a\n" + b"\0" * 3_000_000)
    with pytest.raises(NoUsableBody):
        await store.fetch(server, "https://x/a", REQUEST)
    assert server.asked_for == MAX_IMAGE_BYTES
    assert files(tmp_path) == []


async def test_a_download_that_breaks_off_leaves_nothing(store: ImageStore, tmp_path: Path) -> None:
    class Broken(Server):
        async def download(
            self, url: str, *, sink: Callable[[bytes], object], max_bytes: int
        ) -> Body:
            sink(self.body)
            raise NoUsableBody("broke off")

    with pytest.raises(DownloadError):
        await store.fetch(Broken(encoded("PNG")), "https://x/a", REQUEST)
    assert files(tmp_path) == []


# -- where it goes ----------------------------------------------------------------------------


async def test_a_file_gets_its_name_when_it_is_complete(store: ImageStore, tmp_path: Path) -> None:
    """Until then it is in a folder that is not read."""
    seen: list[list[str]] = []

    class Watched(Server):
        async def download(
            self, url: str, *, sink: Callable[[bytes], object], max_bytes: int
        ) -> Body:
            body = await super().download(url, sink=sink, max_bytes=max_bytes)
            seen.append(files(tmp_path))
            return body

    await store.fetch(Watched(encoded("PNG")), "https://x/a", REQUEST)
    (during,) = seen
    assert all(name.startswith(".partial/") for name in during)
    assert [name.partition("/")[0] for name in files(tmp_path)] == ["images"]


@pytest.fixture
def memory() -> Iterator[str]:
    """A root in fsspec's memory file system, as an object store has it."""
    root = f"memory://{uuid.uuid4().hex}/krea"
    yield root
    fsspec.filesystem("memory").store.clear()


async def test_an_object_store_gets_the_same_names(memory: str) -> None:
    store = ImageStore(Storage(memory))
    body = encoded("PNG")
    image = await store.fetch(Server(body), "https://x/a", REQUEST)
    assert store.holds(image)
    with store.storage.open(image.path) as file:
        assert file.read() == body
    with fsspec.open(store.storage.locate(image.path)) as file:
        assert file.read() == body
    assert store.storage.name_of(store.storage.locate(image.path)) == image.path


async def test_an_object_store_keeps_rejected_files(memory: str) -> None:
    store = ImageStore(Storage(memory))
    with pytest.raises(ImageRejected, match="kept as memory://"):
        await fetch(store, flat("RGB", (0, 0, 0)))
    assert store.storage.size_bytes(f"images/rejected/{REQUEST.request_key}")


def test_a_missing_file_has_no_size(memory: str, tmp_path: Path) -> None:
    assert Storage(memory).size_bytes("images/a.png") is None
    assert Storage(str(tmp_path)).size_bytes("images/a.png") is None
    (tmp_path / "images").write_text("a file where a folder should be")
    assert Storage(str(tmp_path)).size_bytes("images/a.png") is None


def test_a_file_is_written_atomically(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))

    def write_old(file: BinaryIO) -> None:
        file.write(b"old")

    storage.write("manifest/a.parquet", write_old)

    def fails(file: BinaryIO) -> None:
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError):
        storage.write("manifest/a.parquet", fails)
    assert files(tmp_path) == ["manifest/a.parquet"]
    assert (tmp_path / "manifest/a.parquet").read_bytes() == b"old"


@pytest.mark.parametrize("root", ["", "nosuchprotocol://bucket/x"])
def test_an_unusable_root_is_a_config_error(root: str) -> None:
    with pytest.raises(ConfigError):
        Storage(root)


# -- what is shown of it ----------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "AVIF"])
async def test_on_image_gets_the_decoded_image_after_publication(
    tmp_path: Path, file_format: str
) -> None:
    """Once it has its name, by its hash, so that it need not be decoded again."""
    shown: list[tuple[str, bytes, list[str]]] = []

    def on_image(sha256: str, image: Image.Image) -> None:
        shown.append((sha256, image.convert("RGB").tobytes(), files(tmp_path)))

    body = encoded(file_format)
    store = ImageStore(Storage(str(tmp_path)), on_image=[on_image])
    image = await store.fetch(Server(body), "https://x/a", REQUEST)
    with Image.open(io.BytesIO(body)) as decoded:
        pixels = decoded.convert("RGB").tobytes()
    assert shown == [(image.sha256, pixels, [image.path])]


async def test_on_image_is_not_called_for_rejected_or_undecoded_images(tmp_path: Path) -> None:
    shown: list[str] = []
    storage = Storage(str(tmp_path))
    store = ImageStore(storage, on_image=[lambda sha256, _: shown.append(sha256)])
    for body in (flat("RGB", (0, 0, 0)), encoded("PNG", (352, 736)), encoded("PNG")[:-30]):
        with pytest.raises((ImageRejected, NoUsableBody)):
            await fetch(store, body)
    blind = ImageStore(storage, verify=False, on_image=[lambda sha256, _: shown.append(sha256)])
    assert await fetch(blind, encoded("PNG"))
    assert shown == []


async def test_a_paid_image_stays_stored_when_on_image_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(sha256: str, image: Image.Image) -> None:
        raise ValueError("no such figure")

    store = ImageStore(Storage(str(tmp_path)), on_image=[broken])
    image = await store.fetch(Server(encoded("PNG")), "https://x/a", REQUEST)
    assert store.holds(image)
    assert f"the image {image.sha256} is stored" in caplog.text
    assert "no such figure" in caplog.text


# -- what it takes ----------------------------------------------------------------------------


async def test_without_verification_only_the_header_is_checked(tmp_path: Path) -> None:
    """A flat image passes, and one that is cut; another size or no image does not."""
    store = ImageStore(Storage(str(tmp_path)), verify=False)
    black = flat("RGB", (0, 0, 0))
    image = await store.fetch(Server(black), "https://x/a", REQUEST)
    assert (image.format, image.width, image.height) == ("PNG", *PIXELS)
    assert (image.bytes, image.sha256) == (len(black), sha256(black).hexdigest())
    assert await fetch(store, encoded("JPEG")[:5000])
    for wrong in (encoded("PNG", (352, 736)), encoded("GIF"), animated("MPO")):
        with pytest.raises(ImageRejected):
            await fetch(store, wrong)
    with pytest.raises(NoUsableBody):
        await fetch(store, b"<html>")


class Waits(Server):
    """A client that awaits the results of the sink."""

    async def download(self, url: str, *, sink: Callable[[bytes], object], max_bytes: int) -> Body:
        for start in range(0, len(self.body), 65536):
            done = sink(self.body[start : start + 65536])
            if isinstance(done, Awaitable):
                await done
        return Body(len(self.body), sha256(self.body).hexdigest())


def noise(side: int = 0) -> bytes:
    """An image whose file is larger than what is kept in memory."""
    target = io.BytesIO()
    pixels = (side, side) if side else PIXELS
    image = Image.merge("RGB", [Image.effect_noise(pixels, 90) for _ in range(3)])
    image.save(target, "PNG", compress_level=1)
    return target.getvalue()


async def test_a_large_file_is_written_during_the_download(
    store: ImageStore, tmp_path: Path
) -> None:
    body, sizes = noise(), set[int]()

    class Watched(Waits):
        async def download(
            self, url: str, *, sink: Callable[[bytes], object], max_bytes: int
        ) -> Body:
            got = await super().download(url, sink=sink, max_bytes=max_bytes)
            sizes.update(len((tmp_path / name).read_bytes()) for name in files(tmp_path))
            return got

    assert len(body) > 3_000_000
    image = await store.fetch(Watched(body), "https://x/a", REQUEST)
    (written,) = sizes
    assert 2_000_000 < written < len(body)
    assert files(tmp_path) == [image.path]
    assert (tmp_path / image.path).read_bytes() == body


async def test_a_stop_waits_for_the_file_that_is_being_written(
    store: ImageStore, tmp_path: Path
) -> None:
    """The file is complete or missing, and no thread still works with it."""
    fetching = asyncio.ensure_future(store.fetch(Waits(noise()), "https://x/a", REQUEST))
    await wait_until(lambda: files(tmp_path) != [])
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert [name for name in files(tmp_path) if name.startswith(".partial")] == []


def test_an_image_with_a_flat_middle_is_not_flat() -> None:
    """The squares that are examined first can only show that an image is not flat."""
    image = Image.new("RGB", PIXELS, (7, 7, 7))
    assert is_flat(image)
    image.putpixel((PIXELS[0] - 1, PIXELS[1] - 1), (7, 10, 7))
    assert not is_flat(image)
    image.putpixel((PIXELS[0] - 1, PIXELS[1] - 1), (7, 9, 7))
    assert is_flat(image)


def test_any_damaged_byte_of_an_avif_fails_one_file() -> None:
    """Its decoder raises RuntimeError, unlike others, which would end a run."""
    body, troubled = encoded("AVIF"), 0
    source = random.Random(7)
    for _ in range(150):
        place, bit = source.randrange(len(body)), 1 << source.randrange(8)
        damaged = bytearray(body)
        damaged[place] ^= bit
        try:
            verify_image(bytes(damaged), PIXELS)
        except DownloadError:
            troubled += 1
    assert troubled > 0
