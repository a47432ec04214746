"""Bulk reads return the same as records and files that are read one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pytest

from krea_dagster.digests import Digests, digests_from_joined_hex
from krea_dagster.engine.journal import bulk_reads
from krea_dagster.engine.journal.bulk_reads import RECORD_SCHEMA, known_requests, record_columns
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.states import Event, State
from krea_dagster.engine.storage.images import ImageStore
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.models import ImageRequest
from tests.engine.harness import JournalWriter, make_request

ENDINGS = ("png", "jpg", "webp", "avif")


def digests(*requests: ImageRequest) -> Digests:
    return digests_from_joined_hex("".join(request.request_key for request in requests))


@pytest.fixture(params=["a pass over all", "looked up"])
def look(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Look up a few requests, or scan the whole journal, in chunks of three rows."""

    def use(number: int) -> None:
        monkeypatch.setattr(bulk_reads, "_ROWS", 3)
        monkeypatch.setattr(
            bulk_reads, "_LOOKUP_COST", 10**6 if request.param == "a pass over all" else 0
        )
        assert number

    return use


@pytest.fixture(params=["folder", "object store"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return Storage(str(tmp_path / "made"))
    return Storage(f"memory://{hashlib.sha256(str(tmp_path).encode()).hexdigest()}")


class ImageFiles:
    """Requests that were stored, and their files."""

    def __init__(self, journal: Journal, storage: Storage) -> None:
        self.journal = journal
        self.writer = JournalWriter(journal)
        self.storage = storage

    def store(self, number: int, *, name: str | None = None) -> ImageRequest:
        request = make_request(f"stored {number}")
        key = request.request_key
        ending = ENDINGS[number % len(ENDINGS)]
        path = name or f"images/{key[:2]}/{key}.{ending}"
        self.writer.bring_to(request, State.COMPLETED)
        self.writer.write(request, Event.STORED, image_path=path, image_bytes=10 + number)
        self.write(path, 10 + number)
        return request

    def write(self, name: str, size: int) -> None:
        def fill(file: BinaryIO) -> None:
            file.write(b"x" * size)

        self.storage.write(name, fill)

    def path_of(self, request: ImageRequest) -> str:
        image = self.journal.records([request.request_key])[request.request_key].image
        assert image is not None
        return image.path


def test_images_are_intact_if_the_store_has_them(
    journal: Journal, storage: Storage, look: Callable[..., None]
) -> None:
    files = ImageFiles(journal, storage)
    requests = [files.store(number) for number in range(12)]
    others = [
        make_request(f"in state {state.value}") for state in State if state is not State.STORED
    ]
    for request, state in zip(others, (s for s in State if s is not State.STORED), strict=True):
        files.writer.bring_to(request, state)
    gone, cut, grown = requests[:3]
    for request in (gone, cut, grown):
        remove(storage, files.path_of(request))
    files.write(files.path_of(cut), 5)
    files.write(files.path_of(grown), 5000)
    elsewhere = files.store(20, name="images/zz/some other name.png")
    key = requests[3].request_key
    files.write(f"images/{key[:2]}/{key}.bak", 13)
    files.write(f"images/{'00' if key[:2] != '00' else '01'}/{key}.png", 13)
    files.write("images/rejected/" + key, 13)
    unknown = make_request("never planned")
    look(1)

    every = [*requests, *others, elsewhere, unknown]
    found = known_requests(journal, storage, digests(*every))
    records = journal.records([request.request_key for request in every])
    store = ImageStore(storage)
    seen, whole = found.of(digests(*every))
    assert seen.tolist() == [request.request_key in records for request in every]
    expected = []
    for request in every:
        record = records.get(request.request_key)
        image = None if record is None or record.state is not State.STORED else record.image
        expected.append(image is not None and store.holds(image))
    # An image under another name does not count as intact: the run decides about it.
    assert expected[every.index(elsewhere)]
    expected[every.index(elsewhere)] = False
    assert whole.tolist() == expected
    assert sum(expected) == 9


def remove(storage: Storage, name: str) -> None:
    if storage.folder is not None:
        (storage.folder / name).unlink()
    else:
        storage._fs.rm(storage._full(name))


def test_files_without_a_key_as_name_are_ignored(journal: Journal, tmp_path: Path) -> None:
    files = ImageFiles(journal, Storage(str(tmp_path / "made")))
    request = files.store(0)
    key = request.request_key
    folder = tmp_path / "made" / "images" / key[:2]
    for name in (f"{key.upper()}.png", f"{key[:-1]}g.png", f"{key}0.png", "x.png", f"{key}.PNG"):
        (folder / name).write_bytes(b"x" * 10)
    (folder / f"{key}.jpg").mkdir()
    _, whole = known_requests(journal, files.storage, digests(request)).of(digests(request))
    assert whole.tolist() == [True]


@pytest.mark.parametrize("part", ["images", "00", "/", "key", "ending"])
def test_a_name_with_one_wrong_letter_is_noticed(
    journal: Journal, tmp_path: Path, look: Callable[..., None], part: str
) -> None:
    files = ImageFiles(journal, Storage(str(tmp_path / "made")))
    requests = [files.store(4 * number) for number in range(2)]
    key = make_request("stored 8").request_key
    other = "1" if key[0] == "0" else "0"
    names = {
        "images": f"imagez/{key[:2]}/{key}.png",
        "00": f"images/{other}{key[1]}/{key}.png",
        "/": f"images/{key[:2]}_{key}.png",
        "key": f"images/{key[:2]}/{key[:-1]}{'1' if key[-1] == '0' else '0'}.png",
        "ending": f"images/{key[:2]}/{key}.pnG",
    }
    requests.append(files.store(8, name=names[part]))
    files.write(f"images/{key[:2]}/{key}.png", 18)
    look(1)
    _, whole = known_requests(journal, files.storage, digests(*requests)).of(digests(*requests))
    assert whole.tolist() == [True, True, False]


def test_an_empty_journal_without_a_folder_has_no_requests(
    journal: Journal, tmp_path: Path
) -> None:
    found = known_requests(journal, Storage(str(tmp_path / "none")), digests(make_request()))
    assert [mask.tolist() for mask in found.of(digests(make_request()))] == [[False], [False]]


def test_record_columns_equal_the_records(journal: Journal, look: Callable[..., None]) -> None:
    writer = JournalWriter(journal)
    requests = [make_request(f"in state {state.value} 'ä\n\" 🦊") for state in State]
    for request, state in zip(requests, State, strict=True):
        writer.bring_to(request, state)
    look(1)
    keys = [request.request_key for request in requests]
    asked_for = [keys[3], "0" * 64, *keys, keys[3]]
    table = record_columns(journal, pa.array(asked_for, pa.string()))
    assert table.schema == RECORD_SCHEMA
    records = journal.records(keys)
    for key, row in zip(asked_for, table.to_pylist(), strict=True):
        record = records.get(key)
        if record is None:
            assert set(row.values()) == {None}
            continue
        image = record.image
        assert row == {
            "state": record.state.value,
            "image_path": image and image.path,
            "image_sha256": image and image.sha256,
            "image_bytes": image and image.bytes,
            "image_format": image and image.format,
            "width": image and image.width,
            "height": image and image.height,
            "completed_at": microseconds(record.completed_at),
            "stored_at": microseconds(record.stored_at),
            "error_code": record.error_code,
            "error_message": record.error_message,
            "task_id": record.task_id,
            "reserved_units": record.reserved_units,
            "charged_units": record.charged_units,
            "billing_rule": record.billing_rule,
            "user_group": record.user_group,
            "submitted_at": microseconds(record.submitted_at),
            "run_id": record.run_id,
        }


def microseconds(at: datetime | None) -> int | None:
    if at is None:
        return None
    return round((at - datetime(1970, 1, 1, tzinfo=timezone.utc)).total_seconds() * 1_000_000)
