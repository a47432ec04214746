"""The sensor's cursor."""

from __future__ import annotations

import json
from dataclasses import asdict

from krea_dagster.plugin.sensors.change_marks import (
    Marks,
    hash_of_versions,
    read_cursor,
)
from tests.prompts.reference import partition_version


def test_the_cursor_stays_small_however_many_partitions_there_are() -> None:
    versions = {f"2026-11-{day:05d}": partition_version([str(day)]) for day in range(10_000)}
    marks = Marks("f" * 32, "10000/12345", "123456789/123456789", hash_of_versions(versions))
    cursor = json.dumps(asdict(marks))
    assert len(cursor) < 250
    assert read_cursor(Marks, cursor) == marks
    assert hash_of_versions({**versions, "2026-11-00001": ""}) != marks.versions


def test_a_cursor_of_another_version_is_no_cursor() -> None:
    for cursor in (None, "", "{", '{"bucket-000": "abc"}', "[1]"):
        assert read_cursor(Marks, cursor) is None
