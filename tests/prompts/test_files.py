"""Where a prompt table may be, and what is said of files that cannot be used."""

from __future__ import annotations

import base64
import os
import random
import re
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest
from pyarrow import fs

from krea_dagster.errors import ConfigError, PromptTableError
from krea_dagster.prompts import PromptTable, parse_partition_by
from krea_dagster.prompts.files import BATCH_ROWS, filesystem_of, open_files
from tests.prompts.reference import read_rows

Write = Callable[..., str]


def opened(source: object, by: str = "hash:4") -> PromptTable:
    return PromptTable(str(source), parse_partition_by(by))


def refused(source: object) -> str:
    """What reading says; every use of the table says the same."""
    said = set()
    table = opened(source)
    for use in (table.plan, table.versions, opened(source, "column:part").partition_keys):
        with pytest.raises(ConfigError) as caught:
            use()
        said.add(str(caught.value))
    (text,) = said
    return text


# -- where it may be ----------------------------------------------------------------------------


def test_a_folder_is_read_in_the_order_of_its_names_and_below(write: Write, tmp_path: Path) -> None:
    for name, prompt in (("b.parquet", "2"), ("a/z.parquet", "1"), ("c.PQ", "3")):
        write({"prompt": [prompt, prompt], "prompt_id": [prompt, f"{prompt}b"]}, f"table/{name}")
    for name in ("_metadata.parquet", ".hidden.parquet", "_old/x.parquet", "readme.txt"):
        other = tmp_path / "table" / name
        other.parent.mkdir(exist_ok=True)
        other.write_text("not a table")
    rows = read_rows(opened(tmp_path / "table")).rows
    assert [row.prompt for row in rows] == ["1", "1", "2", "2", "3", "3"]
    assert [row.row for row in rows] == [1, 2, 3, 4, 5, 6]
    assert read_rows(opened(f"{tmp_path}/table/")).rows == rows


def test_a_relative_path_and_a_file_without_the_usual_ending_will_do(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write({"prompt": ["a"]}, "wishes")
    monkeypatch.chdir(tmp_path)
    assert len(read_rows(opened("wishes")).rows) == 1
    assert len(read_rows(opened("./wishes")).rows) == 1


def test_a_url_is_read_through_fsspec(write: Write, memory: Any) -> None:
    path = write({"prompt": ["a", "b"], "part": ["p", "q"]})
    memory.pipe_file("/wishes/one.parquet", Path(path).read_bytes())
    for url in ("memory://wishes/one.parquet", "memory://wishes", "memory://wishes/"):
        table = opened(url, "column:part")
        assert table.partition_keys() == ["p", "q"]
        assert [row.prompt for row in read_rows(table, ["q"]).rows] == ["b"]
    assert len(read_rows(opened(f"file://{path}")).rows) == 2


def test_a_table_is_read_afresh_each_time(write: Write) -> None:
    table = opened(write({"prompt": ["a"]}))
    assert len(read_rows(table).rows) == 1
    write({"prompt": ["a", "b"]})
    assert len(read_rows(table).rows) == 2


def test_a_url_that_is_not_there_says_so(memory: Any) -> None:
    assert "memory://no/such.parquet does not exist" in refused("memory://no/such.parquet")


def test_an_unknown_kind_of_url_says_so() -> None:
    assert "nosuch://a/b cannot be opened" in refused("nosuch://a/b")


def test_a_url_whose_package_is_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "adlfs", None)
    said = refused("abfs://container/prompts.parquet")
    assert "abfs://container/prompts.parquet cannot be opened" in said
    assert "pip install 'krea-dagster[azure]'" in said


def test_a_bucket_that_arrow_opens_itself_is_given_up_after_half_a_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Arrow's own limit is a quarter of an hour."""
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for url in ("gs://anonymous@bucket/a.parquet", "gs://anonymous@bucket/a?scheme=http"):
        opened_by_arrow, _ = filesystem_of(url, {})
        assert isinstance(opened_by_arrow, fs.GcsFileSystem)
        _, (options,) = opened_by_arrow.__reduce__()
        assert options["retry_time_limit"] == timedelta(seconds=30)


# -- files that cannot be used ------------------------------------------------------------------


def test_a_missing_path_says_what_it_must_be(tmp_path: Path) -> None:
    said = refused(tmp_path / "none.parquet")
    assert f"{tmp_path}/none.parquet does not exist" in said
    assert "KREA_PROMPTS" in said


@pytest.mark.parametrize("nothing", ["", "  "])
def test_no_name_at_all_is_an_error(nothing: str) -> None:
    assert "no name" in refused(nothing)


def test_an_empty_folder_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("x")
    assert "a folder without a Parquet file" in refused(tmp_path)


def test_something_that_is_neither_file_nor_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "pipe is neither a file nor a folder" in refused(tmp_path / "pipe")


def test_a_pipe_in_a_folder_is_refused_and_not_waited_for(write: Write, tmp_path: Path) -> None:
    write({"prompt": ["a"]}, "table/a.parquet")
    os.mkfifo(tmp_path / "table/b.parquet")
    assert "table/b.parquet is neither a file nor a folder" in refused(tmp_path / "table")


def test_a_dangling_link_in_a_folder_is_not_passed_over(write: Write, tmp_path: Path) -> None:
    write({"prompt": ["a"]}, "table/a.parquet")
    (tmp_path / "table/b.parquet").symlink_to(tmp_path / "gone.parquet")
    assert "table/b.parquet cannot be read" in refused(tmp_path / "table")


NOT_PARQUET = [b"", b"PAR1", b"prompt,size\na,1:1\n", b"PAR1" + b"\xff" * 100 + b"PAR1"]


@pytest.mark.parametrize("content", NOT_PARQUET, ids=["empty", "magic only", "csv", "bad footer"])
def test_a_file_that_is_not_parquet_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "prompts.parquet"
    path.write_bytes(content)
    said = refused(path)
    assert f"{path} cannot be read" in said
    assert "write it again" in said
    assert said.isprintable()


def test_a_file_that_is_cut_short_is_named(write: Write) -> None:
    path = Path(write({"prompt": ["a cat"] * 100}))
    whole = path.read_bytes()
    for kept in (len(whole) - 1, len(whole) // 2, 20):
        path.write_bytes(whole[:kept])
        assert f"{path} cannot be read" in refused(path)


def test_a_bad_file_among_good_ones_is_the_one_that_is_named(write: Write, tmp_path: Path) -> None:
    write({"prompt": ["a"]}, "table/a.parquet")
    (tmp_path / "table/b.parquet").write_bytes(b"PAR1")
    assert "table/b.parquet cannot be read" in refused(tmp_path / "table")


class _PlainKeys(pe.KmsClient):  # type: ignore[misc]  # pyarrow has no types
    """Wraps keys in base64: enough to make a file that is encrypted."""

    def __init__(self, _config: object) -> None:
        pe.KmsClient.__init__(self)

    def wrap_key(self, key_bytes: bytes, _master: str) -> bytes:
        return base64.b64encode(key_bytes)


@pytest.mark.parametrize("plain_footer", [False, True])
def test_an_encrypted_file_is_said_to_be_one(tmp_path: Path, plain_footer: bool) -> None:
    settings = pe.EncryptionConfiguration(
        footer_key="footer", column_keys={"column": ["prompt"]}, plaintext_footer=plain_footer
    )
    properties = pe.CryptoFactory(_PlainKeys).file_encryption_properties(
        pe.KmsConnectionConfig(), settings
    )
    table = pa.table({"prompt": ["secret"], "prompt_id": ["x"]})
    path = tmp_path / "prompts.parquet"
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    with pytest.raises(ConfigError, match="is encrypted; write it without encryption"):
        read_rows(opened(path))


# -- files that do not fit together -------------------------------------------------------------


def disagreement(write: Write, tmp_path: Path, first: Any, second: Any) -> str:
    write(first, "table/a.parquet")
    write(second, "table/b.parquet")
    with pytest.raises(PromptTableError) as caught:
        read_rows(opened(tmp_path / "table"))
    return str(caught.value)


def test_a_column_that_a_file_lacks_is_empty_in_its_rows_and_said(
    write: Write, tmp_path: Path
) -> None:
    write({"prompt": ["a"], "seed": [1]}, "table/a.parquet")
    write({"tag": ["x"], "prompt": ["b"]}, "table/b.parquet")
    write({"prompt": ["c"]}, "table/c.parquet")
    table = opened(tmp_path / "table")
    rows = read_rows(table)
    assert [(row.row, row.prompt, row.seed) for row in rows.rows] == [
        (1, "a", 1),
        (2, "b", None),
        (3, "c", None),
    ]
    assert rows.passthrough.to_pylist() == [{"tag": None}, {"tag": "x"}, {"tag": None}]
    with table.plan() as plan:
        assert plan.notes == (
            (
                "seed is not a column of 2 of 3 files, and is empty in their rows (the first is "
                f"{tmp_path}/table/b.parquet)"
            ),
            (
                "tag is not a column of 2 of 3 files, and is empty in their rows (the first is "
                f"{tmp_path}/table/a.parquet)"
            ),
        )


def test_a_united_table_is_bought_as_its_rows_in_one_file(write: Write, tmp_path: Path) -> None:
    write({"prompt": ["a"], "prompt_id": ["1"], "day": ["2026-11-01"]}, "table/a.parquet")
    write(
        {"day": ["2026-11-02"], "size": ["16:9"], "prompt_id": ["2"], "prompt": ["b"]},
        "table/b.parquet",
    )
    whole = write(
        {
            "prompt": ["a", "b"],
            "prompt_id": ["1", "2"],
            "day": ["2026-11-01", "2026-11-02"],
            "size": [None, "16:9"],
        }
    )
    for keys in (None, ["2026-11-02"]):
        found = opened(tmp_path / "table", "day:day").versions(keys)
        assert found == opened(whole, "day:day").versions(keys)


@pytest.mark.parametrize("name", ["prompt", "prompt_id", "part"])
def test_a_column_that_every_row_needs_is_missing_in_a_file_by_its_name(
    name: str, write: Write, tmp_path: Path
) -> None:
    columns = {"prompt": ["a"], "prompt_id": ["1"], "part": ["x"]}
    write(columns, "table/a.parquet")
    write({key: value for key, value in columns.items() if key != name}, "table/b.parquet")
    with pytest.raises(PromptTableError) as caught:
        opened(tmp_path / "table", "column:part").plan()
    assert f"{name} is missing in {tmp_path}/table/b.parquet" in str(caught.value)
    assert "every file of the table needs this column" in str(caught.value)


def test_types_that_widen_are_widened(write: Write, tmp_path: Path) -> None:
    write(
        {
            "prompt": ["a"],
            "at": pa.array([1], pa.timestamp("us")),
            "tags": pa.array([[1]], pa.list_(pa.int32())),
            "meta": [{"a": 1}],
        },
        "table/a.parquet",
    )
    write(
        {
            "prompt": ["b"],
            "at": pa.array([1], pa.timestamp("ns")),
            "tags": pa.array([[2**40]], pa.list_(pa.int64())),
            "meta": [{"a": 2, "b": "x"}],
        },
        "table/b.parquet",
    )
    rows = read_rows(opened(tmp_path / "table")).passthrough
    assert rows.schema.field("at").type == pa.timestamp("ns")
    assert rows["tags"].to_pylist() == [[1], [2**40]]
    assert rows["meta"].to_pylist() == [{"a": 1, "b": None}, {"a": 2, "b": "x"}]


def test_a_further_column_of_two_types_is_named_with_both_files(
    write: Write, tmp_path: Path
) -> None:
    said = disagreement(
        write, tmp_path, {"prompt": ["a"], "tag": ["x"]}, {"prompt": ["b"], "tag": [1]}
    )
    assert "tag is of the types string in" in said
    assert "int64 in" in said


def test_what_writers_make_of_the_same_column_fits_together(write: Write, tmp_path: Path) -> None:
    first: dict[str, Any] = {
        "prompt": ["a"],
        "seed": [1],
        "text": pa.array(["x"], pa.large_string()),
        "number": pa.array([1], pa.int16()),
        "gap": [1],
        "void": pa.nulls(1),
    }
    second: dict[str, Any] = {
        "void": [date_like := {"a": 1}],
        "gap": [None],
        "number": pa.array([2], pa.int64()),
        "text": ["y"],
        "seed": pa.array([float("nan")]),
        "prompt": pa.array(["b"], pa.large_string()),
    }
    second["gap"] = pa.array([None], pa.float64())
    write(first, "table/a.parquet")
    write(second, "table/b.parquet")
    rows = read_rows(opened(tmp_path / "table"))
    assert [(row.prompt, row.seed) for row in rows.rows] == [("a", 1), ("b", None)]
    assert rows.passthrough.to_pylist() == [
        {"text": "x", "number": 1, "gap": 1.0, "void": None},
        {"text": "y", "number": 2, "gap": None, "void": date_like},
    ]


def test_a_number_that_the_common_type_cannot_hold_is_refused_not_rounded(
    write: Write, tmp_path: Path
) -> None:
    write({"prompt": ["a"], "n": [2**53 + 1]}, "table/a.parquet")
    write({"prompt": ["b"], "n": [0.5]}, "table/b.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet has a column that cannot be copied"):
        read_rows(opened(tmp_path / "table"))


# -- streaming ----------------------------------------------------------------------------------


def test_batches_are_small_numbered_and_in_order(write: Write, tmp_path: Path) -> None:
    columns = {"prompt": ["a"] * 20_000, "n": range(20_000)}
    write(columns, "table/a.parquet", row_group_size=20_000)
    write(columns, "table/b.parquet", row_group_size=3_000)
    files = open_files(str(tmp_path / "table"))
    assert [(file.first_row, file.row_count) for file in files] == [(1, 20_000), (20_001, 20_000)]
    expected = 1
    for file in files:
        for first, batch in file.batches(["n"]):
            assert first == expected
            assert 0 < batch.num_rows <= BATCH_ROWS
            assert batch.column(0)[0].as_py() == first - file.first_row
            assert batch.schema.names == ["n"]
            expected += batch.num_rows
    assert expected == 40_001


def test_few_texts_in_many_rows_are_the_same_in_every_row_group(write: Write) -> None:
    """From the second row group on they are read as a dictionary, as they are in the file."""
    rows = 4_000
    styles = ["ink", None, "oil"] * rows
    styles[2 * rows :] = [f"style {number}" for number in range(rows)]
    columns: dict[str, list[Any]] = {
        "prompt": [f"a fox {number}" for number in range(3 * rows)],
        "size": ["1:1", None, "16:9", "2:1"] * (3 * rows // 4),
        "style": styles,
        "a.b": ["x"] * (3 * rows),
    }
    (file,) = open_files(write(columns, row_group_size=rows))
    batches = [batch for _, batch in file.batches(list(columns))]
    kinds = [[str(batch.schema.field(name).type)[:10] for name in columns] for batch in batches]
    assert kinds[0] == ["string"] * 4
    assert kinds[-1] == ["string", "dictionary", "dictionary", "string"]
    found = read_rows(PromptTable(file.name, parse_partition_by("hash:1")))
    assert [row.size for row in found.rows] == [size or "1:1" for size in columns["size"]]
    assert found.passthrough.to_pydict() == {name: columns[name] for name in ("style", "a.b")}
    assert found.passthrough.schema.types == [pa.string(), pa.string()]


def test_a_reader_that_stops_early_leaves_no_file_open(write: Write) -> None:
    path = write({"prompt": ["a"] * 20_000})
    before = len(list(Path("/proc/self/fd").iterdir()))
    batches = open_files(path)[0].batches(["prompt"])
    next(batches)
    batches.close()  # type: ignore[attr-defined]  # it is a generator
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# -- damage -------------------------------------------------------------------------------------


def _tables(folder: Path) -> list[bytes]:
    """A table as several writers would write it."""
    count = 40
    table = pa.table(
        {
            "prompt": [f"a prompt, number {number}" for number in range(count)],
            "prompt_id": [f"row-{number}" for number in range(count)],
            "size": ["1:1"] * count,
            "seed": list(range(1, count + 1)),
            "part": ["a", "b"] * (count // 2),
            "tags": [["x", "y"]] * count,
            "about": [{"name": "n", "weight": 1}] * count,
            "kind": pa.array(["q", "w"] * (count // 2)).dictionary_encode(),
            "day": pa.array(range(count), pa.timestamp("us", "UTC")),
        }
    )
    written = []
    for options in (
        {"compression": "none"},
        {"compression": "snappy", "row_group_size": 7},
        {"compression": "none", "use_dictionary": False, "version": "1.0"},
    ):
        pq.write_table(table, folder / "whole.parquet", **options)
        written.append((folder / "whole.parquet").read_bytes())
    return written


def test_of_200_damaged_files_each_is_read_or_is_a_clear_error(tmp_path: Path) -> None:
    drawn = random.Random(20261130)
    whole, path = _tables(tmp_path), tmp_path / "damaged.parquet"
    said: list[str] = []
    for _ in range(200):
        data = bytearray(drawn.choice(whole))
        footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        for _ in range(drawn.choice([1, 1, 2, 8, 64])):
            begin = 0 if drawn.random() < 0.3 else footer
            data[drawn.randrange(begin, len(data))] = drawn.randrange(256)
        path.write_bytes(data)
        by = drawn.choice(["hash:4", "column:part", "day:day"])
        uses: list[Callable[[PromptTable], object]] = [
            PromptTable.partition_keys,
            read_rows,
            PromptTable.versions,
        ]
        try:
            drawn.choice(uses)(opened(path, by))
        except (ConfigError, PromptTableError) as error:
            said.append(str(error))
    assert len(said) > 100
    assert all("damaged.parquet" in text for text in said)


@pytest.mark.parametrize("name", ["prompt", "part", "weight", "about", "tags", "element"])
def test_a_name_that_is_not_utf_8_is_damage(tmp_path: Path, name: str) -> None:
    path = tmp_path / "damaged.parquet"
    data = _tables(tmp_path)[0].replace(b"ARROW:schema", b"XRROW:schema")
    assert name.encode() in data
    path.write_bytes(data.replace(name.encode(), b"\xff" * len(name)))
    assert "damaged.parquet cannot be read: it may be cut short, damaged" in refused(path)


# -- credentials --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "secret",
    [
        "http://me:s3cr3t@127.0.0.1:9/table.parquet",
        "http://me:s3cr/3t@127.0.0.1:9/table.parquet",
        "http://me:p@s3cr3t@127.0.0.1:9/table.parquet?s3cr3t",
        "http://127.0.0.1:9/table.parquet?X-Amz-Signature=s3cr3t",
        "http://me:s3cr3t@[::1/table.parquet",
        "http://me:s3cr3t@127.0.0.1:port/table.parquet",
        "simplecache::http://me:s3cr3t@127.0.0.1:9/table.parquet",
        "zip://table.parquet::http://me:s3cr3t@127.0.0.1:9/table.zip?s3cr3t",
        "ftp://me:s3cr3t@127.0.0.1:9/table.parquet",
        "nosuch://me:s3cr3t@host/table.parquet",
        "s3://me:s3cr3t@bucket/table.parquet?s3cr3t=1",
        "memory://me:s3cr3t@folder/table.parquet",
        "file://me:s3cr3t@/table.parquet",
        "hdfs://me:s3cr3t@nowhere.invalid:1/table.parquet",
    ],
)
def test_a_table_that_cannot_be_reached_is_told_without_its_credentials(secret: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_rows(opened(secret))
    said = "".join(traceback.format_exception(caught.value))
    assert re.search("s3cr|3t@", said) is None
    assert "table" in said or "***" in said
