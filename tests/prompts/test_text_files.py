"""CSV and JSONL: read exactly, or refused with the line."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from krea_dagster.errors import ConfigError, PromptTableError
from krea_dagster.prompts import PromptTable, parse_partition_by
from krea_dagster.prompts.files import open_files
from krea_dagster.prompts.text_files import TextFile, csv_stream
from tests.prompts.conftest import Write
from tests.prompts.reference import read_rows

#: Long enough ago that a file of this time is not written to any more.
LONG_AGO_S = 1_700_000_000.0


def opened(path: Path | str, content: str | bytes, by: str = "hash:2") -> PromptTable:
    data = content.encode() if isinstance(content, str) else content
    Path(path).write_bytes(data)
    return PromptTable(str(path), parse_partition_by(by))


def refused(table: PromptTable) -> str:
    with pytest.raises(ConfigError) as caught:
        table.plan()
    return str(caught.value)


def columns_of(table: PromptTable) -> pa.Table:
    (file,) = table.scan()._layout.files
    names = [field.name for field in file.schema]
    return pa.Table.from_batches(batch for _, batch in file.batches(names))


# -- CSV ----------------------------------------------------------------------------------------


def test_a_csv_file_asks_for_the_same_images_as_its_parquet_file(
    write: Write, tmp_path: Path
) -> None:
    columns = {
        "prompt_id": ["007", "8", "x"],
        "prompt": ["a boat, at sea", 'a "gull"', "a\nlighthouse"],
        "seed": [7, None, 9],
        "nsfw_check": [True, False, None],
        "theme": ["01", None, "2"],
    }
    text = (
        "prompt_id,prompt,seed,nsfw_check,theme\r\n"
        '007,"a boat, at sea",7,true,01\r\n'
        '8,"a ""gull""",,False,\r\n'
        'x,"a\nlighthouse",9.0,"",2\r\n'
    )
    expected = PromptTable(write(columns), parse_partition_by("hash:2"))
    for name, data in {
        "a.csv": text.encode(),
        "bom.csv": b"\xef\xbb\xbf" + text.encode(),
        "packed.csv.gz": gzip.compress(text.encode()),
        "UPPER.CSV": text.encode(),
    }.items():
        table = opened(tmp_path / name, data)
        assert read_rows(table).rows == read_rows(expected).rows
        assert table.versions() == expected.versions()


def test_a_cell_is_what_is_written_and_only_an_empty_one_is_missing(tmp_path: Path) -> None:
    text = "prompt_id,prompt,score,day\n1,NA,0.10,2026-11-01\n2,null,,\n"
    found = columns_of(opened(tmp_path / "a.csv", text))
    assert found.schema.types == [pa.string()] * 4
    assert found.to_pydict() == {
        "prompt_id": ["1", "2"],
        "prompt": ["NA", "null"],
        "score": ["0.10", None],
        "day": ["2026-11-01", None],
    }


def test_partitions_are_read_from_text(tmp_path: Path) -> None:
    text = "prompt,day,theme\na,2026-11-01,007\nb,2026-11-02,7\n"
    assert opened(tmp_path / "a.csv", text, "day:day").partition_keys() == [
        "2026-11-01",
        "2026-11-02",
    ]
    assert opened(tmp_path / "b.csv", text, "column:theme").partition_keys() == ["007", "7"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,seed\na,1\nb,2,3\n", r"a.csv line 3: it has 3 cells, and the header has 2"),
        ('prompt,seed\n"a\nb",1\nc\n', r"a.csv line 4: it has 1 cells, and the header has 2"),
        ('prompt,seed\na,1\nb,"2\nc,3\n', r"a.csv line 3: unexpected end of data"),
        ('prompt,seed\n"a" b,1\n', r"a.csv line 2: ',' expected after '\"'"),
        ("prompt,\na,b\n", r"a.csv line 1: column 2 has no name"),
        ("prompt;seed\na;1\n", r"a.csv separates its columns by ';'"),
        ("", r"a.csv is empty; its first line must name the columns"),
    ],
)
def test_a_line_that_is_broken_is_named(tmp_path: Path, text: str, said: str) -> None:
    assert re.search(said, refused(opened(tmp_path / "a.csv", text)))


def test_text_of_another_encoding_is_refused(tmp_path: Path) -> None:
    latin = "prompt\na café\n".encode("latin-1")
    assert "a.csv is not UTF-8 text" in refused(opened(tmp_path / "a.csv", latin))
    utf16 = "prompt\na boat\n".encode("utf-16")
    assert "text in UTF-16" in refused(opened(tmp_path / "b.csv", utf16))


def test_a_cell_that_is_no_number_is_a_problem_of_its_row(tmp_path: Path) -> None:
    text = "prompt,seed,nsfw_check\na,1,true\nb,two,yes\nc,1.5,\n"
    with pytest.raises(PromptTableError) as caught:
        opened(tmp_path / "a.csv", text).plan()
    found = [(one.row, one.column, one.value) for one in caught.value.problems]
    assert found == [(2, "seed", "'two'"), (2, "nsfw_check", "'yes'"), (3, "seed", "'1.5'")]


def test_blank_lines_are_no_rows_and_a_name_that_occurs_twice_is_a_problem(tmp_path: Path) -> None:
    assert opened(tmp_path / "a.csv", "prompt,seed\n\na,1\n\n").row_count() == 1
    assert opened(tmp_path / "b.csv", "prompt,seed\n").row_count() == 0
    with pytest.raises(PromptTableError, match="there 2 times in"):
        opened(tmp_path / "c.csv", "prompt,theme,theme\na,b,c\n").plan()


def test_a_large_file_is_read_in_parts(tmp_path: Path) -> None:
    text = "prompt,seed\n" + "".join(f"prompt {number},{number}\n" for number in range(1, 20_001))
    table = opened(tmp_path / "a.csv", text)
    assert table.row_count() == 20_000
    assert [row.seed for row in read_rows(table).rows][-1] == 20_000
    with pytest.raises(ConfigError, match="line 20002: it has 1 cells"):
        opened(tmp_path / "b.csv", text + "short\n").plan()


def test_a_copy_is_kept_until_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    table = opened(path, "prompt\na\n")
    assert table.row_count() == 1
    path.write_text("prompt\na\nb\n")
    assert table.row_count() == 2
    pinned = table.pinned()
    assert pinned.row_count() == 2
    path.write_text("prompt\na\nb\nc\n")
    assert pinned.row_count() == 2
    assert table.row_count() == 3


#: Without what UTF-8 lacks, what Python 3.10 does not read, and the line break that its writer does
#: not quote.
TEXT = st.characters(exclude_categories=["Cs"], exclude_characters="\r\0")


@given(
    rows=st.lists(st.tuples(*[st.text(TEXT)] * 3), max_size=5),
    ending=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
@settings(max_examples=60, deadline=None)
def test_every_text_that_a_writer_puts_into_cells_is_read_from_them(
    rows: list[tuple[str, str, str]], ending: str, quoting: Literal[0, 1]
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "a.csv")
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator=ending, quoting=quoting)
            writer.writerows([("prompt_id", "prompt", "theme"), *rows])
        found = csv_stream(TextFile(fs.LocalFileSystem(), str(path), "a.csv")).read_all()
    cells = [tuple(cell or "" for cell in row.values()) for row in found.to_pylist()]
    assert cells == [tuple(row) for row in rows]


def test_a_file_that_may_still_grow_is_refused(tmp_path: Path) -> None:
    """The cut line is a whole row of another prompt, which would be bought."""
    path = tmp_path / "a.csv"
    table = opened(path, "prompt_id,prompt\na,a boat at night under the sta")
    assert "it may not be complete" in refused(table)
    os.utime(path, (LONG_AGO_S, LONG_AGO_S))
    assert table.row_count() == 1
    assert opened(path, "prompt_id,prompt\na,a boat at night under the stars\n").row_count() == 1


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt\n" + "a boat\n" * 20_000)
    rows = csv_stream(TextFile(fs.LocalFileSystem(), str(path), "a.csv"))
    rows.read_next_batch()
    path.write_text("prompt\n" + "a gull\n" * 30_000)
    with pytest.raises(ConfigError, match=r"a.csv changed while it was read"):
        rows.read_all()


# -- JSONL --------------------------------------------------------------------------------------


def lines(*objects: object) -> str:
    return "".join(json.dumps(one) + "\n" for one in objects)


def test_a_jsonl_file_has_the_types_of_json(write: Write, tmp_path: Path) -> None:
    text = lines(
        {"prompt_id": "007", "prompt": "a boat", "seed": 7, "score": 1, "tags": ["sea"]},
        {"prompt_id": "8", "prompt": 'a "gull"\n', "nsfw_check": False, "score": 0.5},
        {"prompt_id": "9", "prompt": "a buoy", "seed": None, "at": {"day": "2026-11-01"}},
    )
    for name, data in {
        "a.jsonl": text.encode(),
        "b.ndjson": b"\xef\xbb\xbf" + text.replace("\n", "\r\n\r\n").encode(),
        "c.jsonl.gz": gzip.compress(text.encode()),
    }.items():
        found = columns_of(opened(tmp_path / name, data))
        assert found.to_pydict() == {
            "prompt_id": ["007", "8", "9"],
            "prompt": ["a boat", 'a "gull"\n', "a buoy"],
            "seed": [7, None, None],
            "score": [1.0, 0.5, None],
            "tags": [["sea"], None, None],
            "nsfw_check": [None, False, None],
            "at": [None, None, {"day": "2026-11-01"}],
        }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a"}\n{"prompt": "b"\n', r"line 2: Expecting ',' delimiter in column 15"),
        ('{"prompt": "a"}\n["b"]\n', r"line 2: it is a list, not an object"),
        ('{"prompt": "a", "prompt": "b"}\n', r"line 1: a name occurs twice"),
        ('{"prompt": "a", "seed": NaN}\n', r"line 1: NaN is not JSON"),
        (lines({"seed": 1}, {"seed": "2"}), r"seed is a number in line 1 and text in line 2"),
        (lines({"seed": 1}, {"seed": True}), r"seed is a number in line 1 and a boolean in line 2"),
        ('[{"prompt": "a"}]', r"is a JSON array: write one object per line"),
    ],
)
def test_a_line_of_json_that_is_broken_is_named(tmp_path: Path, text: str, said: str) -> None:
    assert re.search(said, refused(opened(tmp_path / "a.jsonl", text)))


def test_a_number_that_fits_nowhere_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refused(opened(tmp_path / "a.jsonl", lines({"seed": 2**70})))


def test_a_file_without_a_line_is_an_empty_table(tmp_path: Path) -> None:
    assert opened(tmp_path / "a.jsonl", "").row_count() == 0


# -- what is neither ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("prompts.pkl", b"\x80\x05\x95", "a Python pickle: store the table as Parquet"),
        ("prompts", b"\x80\x04\x95", "a Python pickle"),
        ("prompts.csv", b"\x80\x04\x95", "a Python pickle"),
        ("prompts.xlsx", b"PK\x03\x04abc", "an Excel workbook or a zip archive"),
        ("prompts.json", b'[{"prompt": "a"}]', "a JSON array: write one object per line"),
        ("prompts.json", b'{"prompt": "a"}', "JSON: name it .jsonl if each line is an object"),
        ("prompts.txt", b"prompt\na boat\n", "text: its name must end in .csv or .jsonl"),
        ("prompts.csv", gzip.compress(b"prompt\na\n", mtime=0), "must end in .csv.gz"),
        ("prompts.feather", b"ARROW1\0\0", "an Arrow IPC"),
        ("prompts.db", b"SQLite format 3\0", "an SQLite database"),
        ("prompts.bin", b"\0\1\2", "not a file of a known kind"),
        ("prompts.parquet", b"prompt\na boat\n", "not a Parquet file but text"),
        ("prompts.parquet", b"\x80\x04\x95", "not a Parquet file but a Python pickle"),
    ],
)
def test_a_file_of_another_kind_is_named(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    found = refused(opened(tmp_path / name, content))
    assert str(tmp_path / name) in found
    assert said in found


def test_a_parquet_file_is_one_by_its_content(write: Write) -> None:
    for name in ("prompts", "prompts.csv", "prompts.data"):
        assert open_files(write({"prompt": ["a"]}, name))[0].row_count == 1
        table = PromptTable(write({"prompt": ["a"]}, name), parse_partition_by("hash:2"))
        assert table.row_count() == 1


@pytest.mark.parametrize(
    "url", ["postgresql://me:secret@host/shop", "postgresql+psycopg://me:secret@host/shop"]
)
def test_a_database_needs_a_query(url: str) -> None:
    said = refused(PromptTable(url, parse_partition_by("hash:2")))
    assert "SqlTable(uri, query)" in said
    assert "secret" not in said
