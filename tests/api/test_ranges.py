"""When a download is resumed: only if both parts are of the same file."""

from __future__ import annotations

import pytest

from krea_dagster.api.ranges import ResumableFile, resumable_file

DATE = "Tue, 01 Jul 2025 12:00:00 GMT"
OLDER = "Tue, 01 Jul 2025 11:00:00 GMT"
TAGGED = ResumableFile(100, "etag", '"a"')
DATED = ResumableFile(100, "last-modified", OLDER)


@pytest.mark.parametrize(
    ("headers", "whole"),
    [
        ({"etag": '"a"', "content-length": "100"}, TAGGED),
        ({"etag": '"a"', "content-length": "100", "accept-ranges": "bytes"}, TAGGED),
        ({"etag": '"a"'}, ResumableFile(None, "etag", '"a"')),
        ({"last-modified": OLDER, "date": DATE, "content-length": "100"}, DATED),
        ({"etag": 'W/"a"', "last-modified": OLDER, "date": DATE, "content-length": "100"}, DATED),
    ],
)
def test_a_download_with_a_strong_validator_can_be_resumed(
    headers: dict[str, str], whole: ResumableFile
) -> None:
    assert resumable_file(headers) == whole


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"accept-ranges": "bytes"},
        {"etag": '"a"', "accept-ranges": "none"},
        {"etag": '"a"', "content-encoding": "gzip"},
        {"etag": 'W/"a"'},
        {"etag": "a"},
        {"etag": '"a\r\nX: 1"'},
        {"last-modified": OLDER},
        {"last-modified": DATE, "date": DATE},
        {"last-modified": "lately", "date": DATE},
    ],
)
def test_without_a_strong_validator_a_download_is_not_resumed(headers: dict[str, str]) -> None:
    assert resumable_file(headers) is None


def test_the_rest_is_requested_with_the_validator() -> None:
    assert TAGGED.range_headers(40) == {"Range": "bytes=40-", "If-Range": '"a"'}


PART = {"etag": '"a"', "content-range": "bytes 40-99/100"}


def test_a_part_of_the_same_file_from_the_right_byte_is_used() -> None:
    assert TAGGED.resumed_size(206, PART, 40) == 100
    assert ResumableFile(None, "etag", '"a"').resumed_size(206, PART, 40) == 100
    shorter = {**PART, "content-range": "bytes 40-59/100"}
    assert TAGGED.resumed_size(206, shorter, 40) == 100


def test_a_date_validator_may_be_left_out_of_the_answer() -> None:
    part = {"content-range": "bytes 40-99/100"}
    assert DATED.resumed_size(206, part, 40) == 100
    assert DATED.resumed_size(206, {**part, "last-modified": OLDER}, 40) == 100
    assert DATED.resumed_size(206, {**part, "last-modified": DATE}, 40) is None


@pytest.mark.parametrize(
    ("status", "changed"),
    [
        (200, {}),
        (416, {}),
        (206, {"etag": '"b"'}),
        (206, {"etag": 'W/"a"'}),
        (206, {"etag": ""}),
        (206, {"content-range": ""}),
        (206, {"content-range": "bytes 0-99/100"}),
        (206, {"content-range": "bytes 41-99/100"}),
        (206, {"content-range": "bytes 40-99/101"}),
        (206, {"content-range": "bytes 40-99/*"}),
        (206, {"content-range": "bytes 40-100/100"}),
        (206, {"content-range": "bytes 40-39/100"}),
        (206, {"content-range": "bytes */100"}),
        (206, {"content-encoding": "gzip"}),
    ],
)
def test_any_other_answer_is_not_used(status: int, changed: dict[str, str]) -> None:
    assert TAGGED.resumed_size(status, {**PART, **changed}, 40) is None
