"""Bulk reads of the journal in columns: what is stored and whole, and what the views show.

The database puts a column of many rows into one text, so that no object is made for a row. Where
many requests are asked about, the journal is passed over once and the image folders are listed;
where few are, they are looked up.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import fsspec.core
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs
from sqlalchemy import Connection, text

from krea_dagster.digests import (
    Digests,
    DigestSet,
    Mask,
    digests_from_ascii,
    digests_from_joined_hex,
)
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.states import State
from krea_dagster.engine.storage.images import FORMATS
from krea_dagster.engine.storage.storage import Storage

#: What the views read of a request and of its present submission. Times are in microseconds
#: since 1970, UTC.
RECORD_SCHEMA: Final = pa.schema(
    [
        ("state", pa.string()),
        ("image_path", pa.string()),
        ("image_sha256", pa.string()),
        ("image_bytes", pa.int64()),
        ("image_format", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("completed_at", pa.int64()),
        ("stored_at", pa.int64()),
        ("error_code", pa.string()),
        ("error_message", pa.string()),
        ("task_id", pa.string()),
        ("reserved_units", pa.int64()),
        ("charged_units", pa.int64()),
        ("billing_rule", pa.string()),
        ("user_group", pa.string()),
        ("submitted_at", pa.int64()),
        ("run_id", pa.string()),
    ]
)
_SUBMISSION: Final = frozenset(RECORD_SCHEMA.names[RECORD_SCHEMA.get_field_index("task_id") :])

#: What is kept of a file that is gone, and shown only while it is there.
_FILE: Final = frozenset({"image_path", "image_sha256", "image_bytes", "stored_at"})

#: Rows of the journal that are put into one text.
_ROWS: Final = 10_000

#: To look up one request and its file costs so many times what a row costs in a pass over all.
_DEAR: Final = 5

#: Threads that list folders: the system does the work.
_THREADS: Final = min(4, os.cpu_count() or 1)

_ENDINGS: Final = pa.array([f".{ending}" for ending in FORMATS.values()], pa.string())

#: A name is ``images/``, the first two digits of the request key, ``/``, the key, and an ending.
_HOME: Final = len("images/00/")
_STEM: Final = _HOME + 64

_NO_DIGESTS: Final = np.empty((0, 32), np.uint8)
_Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class KnownRequests:
    """What a journal knows of some requests: which it has, and which are stored and whole.

    Whole is an image whose file is there, under its own name and with its size. ``whole`` is
    beside the requests, in their order.
    """

    requests: DigestSet
    whole: Mask

    def of(self, digests: Digests) -> tuple[Mask, Mask]:
        """Return which of these requests it has, and which are stored and whole."""
        places = self.requests.find(digests)
        seen = places >= 0
        if not len(self.whole):
            return seen, seen.copy()
        return seen, seen & self.whole[places]


NO_KNOWN_REQUESTS: Final = KnownRequests(DigestSet(_NO_DIGESTS), np.zeros(0, np.bool_))


def known_requests(journal: Journal, storage: Storage, digests: Digests) -> KnownRequests:
    """Return what the journal knows of these requests, and perhaps of others.

    ``digests`` are request keys as bytes, 32 a row. Raises JournalError.
    """
    found = all_known_requests(journal, storage, len(digests))
    if found is not None:
        return found
    with journal.database.read() as connection:
        requests = _look_up(connection, digests)
    return KnownRequests(requests, _those_at_hand(storage, requests))


def all_known_requests(journal: Journal, storage: Storage, number: int) -> KnownRequests | None:
    """Return what the journal knows of all its requests.

    None where it has so many that to look up this ``number`` of them costs less. Raises
    JournalError.
    """
    with journal.database.read() as connection:
        if number * _DEAR < _row_count(connection):
            return None
        requests = _pass_over(connection)
    return KnownRequests(requests, _those_listed(storage, requests))


def record_columns(
    journal: Journal, keys: pa.Array, names: Sequence[str] = RECORD_SCHEMA.names
) -> pa.Table:
    """Return these columns of ``RECORD_SCHEMA``, row by row beside the request keys.

    All are null where the journal does not know a request. Raises JournalError.
    """
    schema = pa.schema([("request_key", pa.string()), *map(RECORD_SCHEMA.field, names)])
    tables = [schema.empty_table()]
    with journal.database.read() as connection:
        for at in range(0, len(keys), _ROWS):
            wanted = json.dumps(keys.slice(at, _ROWS).to_pylist())
            columns = _lists(connection, schema.names, wanted)
            tables.append(
                pa.table(
                    [
                        pa.array(column, kind)
                        for column, kind in zip(columns, schema.types, strict=True)
                    ],
                    schema=schema,
                )
            )
    found = pa.concat_tables(tables).combine_chunks()
    places = pc.index_in(keys, value_set=found["request_key"].combine_chunks())
    return found.select(list(names)).take(places)


# -- the journal ----------------------------------------------------------------------------------


def _is_sqlite(connection: Connection) -> bool:
    return connection.dialect.name == "sqlite"


def _row_count(connection: Connection) -> int:
    """Return about how many requests there are."""
    count = "max(rowid)" if _is_sqlite(connection) else "count(*)"
    return connection.execute(text(f"SELECT {count} FROM requests")).scalar() or 0


def _lists(connection: Connection, names: Sequence[str], keys: str) -> list[list[Any]]:
    """Return columns of the requests whose keys are in a JSON list."""
    table = {name: "submissions" if name in _SUBMISSION else "requests" for name in names}
    if _is_sqlite(connection):
        # The keys first, whatever the planner thinks.
        source = "json_each(:keys) AS wanted CROSS JOIN requests"
        listed = [f"json_group_array({_value(table[name], name)})" for name in names]
    else:
        source = "json_array_elements_text(CAST(:keys AS json)) AS wanted(value) JOIN requests"
        listed = [f"CAST(json_agg({_value(table[name], name)}) AS text)" for name in names]
    row = connection.execute(
        text(
            f"SELECT {', '.join(listed)} FROM {source} ON requests.request_key = wanted.value "
            "LEFT JOIN submissions ON submissions.idempotency_key = requests.idempotency_key"
        ),
        {"keys": keys},
    ).one()
    return [json.loads(column or "[]") for column in row]


def _value(table: str, name: str) -> str:
    """Return a column as the views show it: a file only of a request that is stored."""
    if name not in _FILE:
        return f"{table}.{name}"
    return f"CASE WHEN requests.state = '{State.STORED.value}' THEN requests.{name} END"


# Requests are held with a number beside: what their file must be like (``_like``), or -1 where
# they are not stored, or not under their own names.


def _like(sizes: _Numbers, endings: _Numbers | int) -> _Numbers:
    """Return a file's size in bytes and its ending, a place in ``_ENDINGS``, as one number."""
    return sizes * len(_ENDINGS) + endings


def _pass_over(connection: Connection) -> DigestSet:
    """Return all requests."""
    sqlite = _is_sqlite(connection)
    join = "group_concat" if sqlite else "string_agg"
    condition = "rowid BETWEEN :low AND :high" if sqlite else "request_key BETWEEN :low AND :high"
    is_stored = f"state = '{State.STORED.value}'"
    query = text(
        f"SELECT {join}(request_key, ''), "
        f"{join}(CASE WHEN {is_stored} THEN CAST(image_bytes AS text) ELSE '' END, ','), "
        f"{join}(CASE WHEN {is_stored} THEN image_path ELSE '' END, ',') "
        f"FROM requests WHERE {condition}"
    )
    every: list[Digests] = []
    files: list[_Numbers] = []
    for low, high in _ranges(connection):
        keys, sizes, paths = connection.execute(query, {"low": low, "high": high}).one()
        if keys:
            every.append(digests_from_joined_hex(keys))
            files.append(_files(keys, sizes, paths))
    return _held(every, files)


def _ranges(connection: Connection) -> Iterator[tuple[int, int] | tuple[str, str]]:
    rows = _row_count(connection)
    if _is_sqlite(connection):
        for low in range(1, rows + 1, _ROWS):
            yield low, low + _ROWS - 1
        return
    # Keys are hashes, so that as many begin with any digits as with any others.
    digits = 0 if rows <= _ROWS else 1 if rows <= 16 * _ROWS else 2
    for number in range(16**digits):
        low_digits = f"{number:0{digits}x}" if digits else ""
        yield low_digits, f"{low_digits}g"


def _look_up(connection: Connection, digests: Digests) -> DigestSet:
    """Return those of these requests that there are."""
    names = ("request_key", "state", "image_bytes", "image_path")
    every: list[Digests] = []
    files: list[_Numbers] = []
    for at in range(0, len(digests), _ROWS):
        wanted = [row.tobytes().hex() for row in digests[at : at + _ROWS]]
        keys, states, sizes, paths = _lists(connection, names, json.dumps(wanted))
        if keys:
            stored = [state == State.STORED.value for state in states]
            shown = [
                (str(size), path) if here else ("", "")
                for here, size, path in zip(stored, sizes, paths, strict=True)
            ]
            every.append(digests_from_joined_hex("".join(keys)))
            files.append(_files("".join(keys), *map(",".join, zip(*shown, strict=True))))
    return _held(every, files)


def _split(joined: str) -> pa.Array:
    return pc.split_pattern(pa.array([joined]), ",").flatten()


def _files(keys: str, sizes: str, paths: str) -> _Numbers:
    """Return what the files must be like, from lists in text, with "" where not stored."""
    endings = _endings_if_alike(keys, paths)
    if endings is None:
        endings = _endings_of(keys, _split(paths))
    wanted = pc.if_else(pa.array(endings >= 0), _split(sizes), "0").cast(pa.int64()).to_numpy()
    return np.where(endings >= 0, _like(wanted, endings), -1)


def _endings_if_alike(keys: str, paths: str) -> _Numbers | None:
    """Return the ending of each path where all are under their own names and have the same.

    So it is in most journals, and is seen in a third of the time that it takes to look at each.
    """
    named = np.frombuffer(keys.encode(), np.uint8).reshape(-1, 64)
    found = np.frombuffer(f"{paths},".encode(), np.uint8)
    for number, ending in enumerate(_ENDINGS.to_pylist()):
        tail = np.frombuffer(f"{ending},".encode(), np.uint8)
        if len(found) == len(named) * (_STEM + len(tail)):
            rows = found.reshape(len(named), -1)
            home, digits = rows[:, :_HOME], named[:, :2]
            alike = (
                bool((home[:, :-3] == np.frombuffer(b"images/", np.uint8)).all())
                and bool((home[:, -3:-1] == digits).all())
                and bool((home[:, -1] == ord("/")).all())
                and bool((rows[:, _HOME:_STEM] == named).all())
                and bool((rows[:, _STEM:] == tail).all())
            )
            if alike:
                return np.full(len(named), number)
    return None


def _endings_of(keys: str, paths: pa.Array) -> _Numbers:
    """Return the ending of each path, -1 where it is not the request's own name."""
    ends = pa.array(np.arange(0, len(keys) + 64, 64, dtype=np.int32)).buffers()[1]
    named = pa.Array.from_buffers(
        pa.string(), len(paths), [None, ends, pa.py_buffer(keys.encode())]
    )
    cut = pc.utf8_slice_codeunits
    home = pc.binary_join_element_wise("images/", cut(named, 0, 2), "/", "")
    plain = pc.and_(pc.equal(cut(paths, 0, _HOME), home), pc.equal(cut(paths, _HOME, _STEM), named))
    endings = pc.if_else(plain, pc.index_in(cut(paths, _STEM), value_set=_ENDINGS), None)
    return np.asarray(endings.fill_null(-1).to_numpy(), np.int64)


def _held(every: list[Digests], files: list[_Numbers]) -> DigestSet:
    return DigestSet(
        np.concatenate([_NO_DIGESTS, *every]), np.concatenate([np.empty(0, np.int64), *files])
    )


# -- the files ------------------------------------------------------------------------------------


def _those_at_hand(storage: Storage, requests: DigestSet) -> Mask:
    """Look at the file of each. Behind a URL, list them all where they are more than a few."""
    (stored,) = np.nonzero(requests.values >= 0)
    if storage.folder is None and len(stored) > _THREADS:
        return _those_listed(storage, requests)
    whole = np.zeros(len(requests), np.bool_)
    endings = _ENDINGS.to_pylist()
    for place in stored.tolist():
        key = requests.words[place].tobytes().hex()
        size, ending = divmod(int(requests.values[place]), len(endings))
        whole[place] = storage.size_bytes(f"images/{key[:2]}/{key}{endings[ending]}") == size
    return whole


def _those_listed(storage: Storage, requests: DigestSet) -> Mask:
    """Return those whose file is in the listing of its folder, with its size."""
    whole = np.zeros(len(requests), np.bool_)
    if not len(requests):
        return whole
    for digests, files in _listed(storage):
        places = requests.find(digests)
        same = (places >= 0) & (requests.values[places] == files)
        whole[places[same]] = True
    return whole


def _listed(storage: Storage) -> Iterator[tuple[Digests, _Numbers]]:
    """Yield the files of each image folder: their keys, and what they are like as one number.

    A file counts in the folder that its key begins with, and in no other.
    """
    if storage.folder is None:
        remote, path = fsspec.core.url_to_fs(storage.locate("images"))
        remote.invalidate_cache()
        found: Mapping[str, Mapping[str, Any]] = remote.find(path, detail=True)
        files = {tuple(name.split("/")[-2:]): about["size"] for name, about in found.items()}
        at_home = {name[-1]: size for name, size in files.items() if name[-1][:2] == name[0]}
        yield _named(list(at_home), list(at_home.values()))
        return
    root = storage.folder / "images"
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(_in_folder, folders)


def _in_folder(folder: Path) -> tuple[Digests, _Numbers]:
    infos = fs.LocalFileSystem().get_file_info(fs.FileSelector(str(folder)))
    names = [info.base_name for info in infos]
    sizes = [info.size for info in infos]
    digests, files = _named(names, [-1 if size is None else size for size in sizes])
    if len(folder.name) != 2 or not set(folder.name) <= set("0123456789abcdef"):
        return _NO_DIGESTS, files[:0]
    at_home = digests[:, 0] == int(folder.name, 16)
    return digests[at_home], files[at_home]


def _named(names: Sequence[str], sizes: Sequence[int]) -> tuple[Digests, _Numbers]:
    """Read names of a request key and an ending; others are left out."""
    sized, lengths = np.array(sizes, np.int64), np.fromiter(map(len, names), np.int64, len(names))
    digests, files = [_NO_DIGESTS], [sized[:0]]
    for number, ending in enumerate(_ENDINGS.to_pylist()):
        chosen = np.flatnonzero(lengths == 64 + len(ending))
        if len(chosen):
            alike = names if len(chosen) == len(names) else [names[at] for at in chosen.tolist()]
            data = "".join(alike).encode("ascii", "replace")
            characters = np.frombuffer(data, np.uint8).reshape(-1, 64 + len(ending))
            ends = (characters[:, 64:] == np.frombuffer(ending.encode(), np.uint8)).all(axis=1)
            if ends.any():
                characters = characters[:, :64]
                right = ends & _are_digits(characters)
                digests.append(digests_from_ascii(characters[right]))
                files.append(_like(sized[chosen], number)[right])
    return np.concatenate(digests), np.concatenate(files)


def _are_digits(characters: Digests) -> Mask:
    numbers = (characters >= ord("0")) & (characters <= ord("9"))
    letters = (characters >= ord("a")) & (characters <= ord("f"))
    return np.asarray((numbers | letters).all(axis=1))
