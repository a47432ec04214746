"""Bulk reads of the journal in columns: which images are intact, and what the views show.

The database joins a column of many rows into one text, so that no object is made for a row. For
many requests, the journal is scanned once and the image folders are listed; a few are looked up. An
object store is asked for the wanted images only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

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
    digests_from_hex,
    digests_from_joined_hex,
)
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.record import FORMATS, PRUNED, PRUNED_MESSAGE
from krea_dagster.engine.states import State
from krea_dagster.engine.storage.listed_sizes import Listing, look_up
from krea_dagster.engine.storage.storage import Storage

#: The columns of a request and of its present submission that the views read. Times are in
#: microseconds since 1970, UTC.
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
#: What a request is made of, as ``PLAN_SCHEMA`` has it, and the partition that it was made for.
REQUEST_SCHEMA: Final = pa.schema(
    [
        ("prompt", pa.string()),
        ("size", pa.string()),
        ("quality", pa.string()),
        ("seed", pa.int32()),
        ("nsfw_check", pa.bool_()),
        ("attempt", pa.int32()),
        ("partition_key", pa.string()),
    ]
)
_FIELDS: Final = {field.name: field for field in (*RECORD_SCHEMA, *REQUEST_SCHEMA)}
_SUBMISSION: Final = frozenset(RECORD_SCHEMA.names[RECORD_SCHEMA.get_field_index("task_id") :])

#: Columns that describe the file. They are kept if it is gone, but shown only while it is stored.
_FILE: Final = frozenset({"image_path", "image_sha256", "image_bytes", "stored_at"})

#: What is shown instead of the columns of an image whose file was pruned.
_WHERE_PRUNED: Final = {
    "image_path": "NULL",
    "error_code": f"'{PRUNED}'",
    "error_message": f"'{PRUNED_MESSAGE}'",
}

#: Rows of the journal that are joined into one text.
_ROWS: Final = 10_000

#: The cost of looking up one request and its file, in rows of a scan.
_LOOKUP_COST: Final = 5

#: Threads that list folders. The operating system does the work.
_THREADS: Final = min(4, os.cpu_count() or 1)

_ENDINGS: Final = pa.array([f".{ending}" for ending in FORMATS.values()], pa.string())

#: A name is ``images/``, the first two digits of the request key, ``/``, the key, and an ending.
_HOME: Final = len("images/00/")
_STEM: Final = _HOME + 64

_NO_DIGESTS: Final = np.empty((0, 32), np.uint8)
_Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class KnownRequests:
    """Some requests of a journal, and which of them are intact.

    An image is intact if its file exists under its own name with its size, or if it was pruned:
    nothing is left to do for it. ``intact`` has the order of ``requests``.
    """

    requests: DigestSet
    intact: Mask

    def of(self, digests: Digests) -> tuple[Mask, Mask]:
        """Return which of these requests it has, and which are intact."""
        places = self.requests.find(digests)
        seen = places >= 0
        if not len(self.intact):
            return seen, seen.copy()
        return seen, seen & self.intact[places]


NO_KNOWN_REQUESTS: Final = KnownRequests(DigestSet(_NO_DIGESTS), np.zeros(0, np.bool_))


def known_requests(journal: Journal, storage: Storage, digests: Digests) -> KnownRequests:
    """Return which of these requests, and perhaps others, the journal knows.

    ``digests`` are request keys as bytes, 32 per row. Raises JournalError.
    """
    found = all_known_requests(journal, storage, len(digests))
    if found is not None:
        return found
    with journal.database.read() as connection:
        requests, known = _look_up(connection, digests), request_count(connection)
    return _known(journal, requests, _intact_by_lookup(storage, requests, known))


def all_known_requests(journal: Journal, storage: Storage, number: int) -> KnownRequests | None:
    """Return all requests of the journal, or None if ``number`` look-ups cost less.

    Raises JournalError.
    """
    with journal.database.read() as connection:
        if number * _LOOKUP_COST < request_count(connection):
            return None
        requests = _scan(connection)
    return _known(journal, requests, _intact_by_listing(storage, requests))


def _known(journal: Journal, requests: DigestSet, intact: Mask) -> KnownRequests:
    pruned = journal.pruned.keys()
    places = requests.find(digests_from_hex(pruned)) if len(pruned) else np.empty(0, np.int64)
    intact[places[places >= 0]] = True
    return KnownRequests(requests, intact)


def record_columns(
    journal: Journal, keys: pa.Array, names: Sequence[str] = RECORD_SCHEMA.names
) -> pa.Table:
    """Return these columns of ``RECORD_SCHEMA`` and ``REQUEST_SCHEMA``, in the order of the keys.

    Rows of unknown requests are null. Raises JournalError.
    """
    schema = pa.schema([("request_key", pa.string()), *(_FIELDS[name] for name in names)])
    tables = [schema.empty_table()]
    with journal.database.read() as connection:
        for at in range(0, len(keys), _ROWS):
            wanted = json.dumps(keys.slice(at, _ROWS).to_pylist())
            columns = _lists(connection, schema.names, wanted)
            tables.append(
                pa.table(
                    [
                        # SQLite's truth values are numbers.
                        pa.array(column, pa.int8()).cast(kind)
                        if kind == pa.bool_() and _is_sqlite(connection)
                        else pa.array(column, kind)
                        for column, kind in zip(columns, schema.types, strict=True)
                    ],
                    schema=schema,
                )
            )
    found = pa.concat_tables(tables).combine_chunks()
    places = pc.index_in(keys, value_set=found["request_key"].combine_chunks())
    return found.select(list(names)).take(places)


#: What is read of all files of a root.
FILE_SCHEMA: Final = pa.schema(
    [
        ("request_key", pa.string()),
        ("table_id", pa.string()),
        ("image_path", pa.string()),
        ("image_sha256", pa.string()),
        ("image_bytes", pa.int64()),
    ]
)


def files_in_root(journal: Journal, root_id: str, *, elsewhere: bool = False) -> pa.Table:
    """Return the stored images whose file is in a root, as the journal knows it.

    Or in other roots, which are perhaps its original: ``elsewhere``. Raises JournalError.
    """
    names = ", ".join(f"requests.{name}" for name in FILE_SCHEMA.names)
    query = (
        f"SELECT {names} FROM requests JOIN files ON files.request_key = requests.request_key "
        f"WHERE state = :stored AND root_id {'<>' if elsewhere else '='} :root "
        "AND missing_since IS NULL"
    )
    tables = [FILE_SCHEMA.empty_table()]
    with journal.database.read() as connection:
        rows = connection.execute(text(query), {"stored": State.STORED.value, "root": root_id})
        for part in rows.partitions(_ROWS):
            columns = zip(zip(*part, strict=True), FILE_SCHEMA.types, strict=True)
            tables.append(pa.table([pa.array(*one) for one in columns], schema=FILE_SCHEMA))
    return pa.concat_tables(tables)


# -- the journal ----------------------------------------------------------------------------------


def _is_sqlite(connection: Connection) -> bool:
    return connection.dialect.name == "sqlite"


def request_count(connection: Connection) -> int:
    """Return the approximate number of requests, without counting them."""
    if _is_sqlite(connection):
        return connection.execute(text("SELECT max(rowid) FROM requests")).scalar() or 0
    # As PostgreSQL's planner: the rows per page of the last analysis, for the pages of now.
    estimate = connection.execute(
        text(
            "SELECT reltuples / greatest(relpages, 1) "
            "* greatest(pg_relation_size(oid) / current_setting('block_size')::int, 1) "
            "FROM pg_class WHERE oid = 'requests'::regclass AND relpages > 0"
        )
    ).scalar()
    if estimate is None or estimate < 0:  # not analysed yet
        return connection.execute(text("SELECT count(*) FROM requests")).scalar() or 0
    return int(estimate)


def _lists(connection: Connection, names: Sequence[str], keys: str) -> list[list[Any]]:
    """Return columns of the requests whose keys are in a JSON list."""
    table = {name: "submissions" if name in _SUBMISSION else "requests" for name in names}
    if _is_sqlite(connection):
        # CROSS JOIN makes SQLite start with the keys.
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
    """Return the expression of a column; the file is shown only if it is stored."""
    if name in _WHERE_PRUNED:
        pruned = "EXISTS (SELECT 1 FROM pruned_files WHERE request_key = requests.request_key)"
        there = f"CASE WHEN requests.state = '{State.STORED.value}' THEN requests.image_path END"
        value = there if name == "image_path" else f"requests.{name}"
        return f"CASE WHEN {pruned} THEN {_WHERE_PRUNED[name]} ELSE {value} END"
    if name not in _FILE:
        return f"{table}.{name}"
    return f"CASE WHEN requests.state = '{State.STORED.value}' THEN requests.{name} END"


# Each request has a number: the size and ending of its file (``_file_numbers``), or -1 if it is not
# stored under its own name.


def _file_numbers(sizes: _Numbers, endings: _Numbers | int) -> _Numbers:
    """Return sizes in bytes and endings (indices of ``_ENDINGS``) as one number each."""
    return sizes * len(_ENDINGS) + endings


def _scan(connection: Connection) -> DigestSet:
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
    return _digest_set(every, files)


def _ranges(connection: Connection) -> Iterator[tuple[int, int] | tuple[str, str]]:
    rows = request_count(connection)
    if _is_sqlite(connection):
        for low in range(1, rows + 1, _ROWS):
            yield low, low + _ROWS - 1
        return
    # Keys are hashes, so all prefixes are equally frequent.
    digits = 0 if rows <= _ROWS else 1 if rows <= 16 * _ROWS else 2
    for number in range(16**digits):
        low_digits = f"{number:0{digits}x}" if digits else ""
        yield low_digits, f"{low_digits}g"


def _look_up(connection: Connection, digests: Digests) -> DigestSet:
    """Return which of these requests exist."""
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
    return _digest_set(every, files)


def _split(joined: str) -> pa.Array:
    return pc.split_pattern(pa.array([joined]), ",").flatten()


def _files(keys: str, sizes: str, paths: str) -> _Numbers:
    """Return the files as numbers, from joined texts, with "" if not stored."""
    endings = _common_ending(keys, paths)
    if endings is None:
        endings = _endings_of(keys, _split(paths))
    wanted = pc.if_else(pa.array(endings >= 0), _split(sizes), "0").cast(pa.int64()).to_numpy()
    return np.where(endings >= 0, _file_numbers(wanted, endings), -1)


def _common_ending(keys: str, paths: str) -> _Numbers | None:
    """Return the ending of each path if all have their own names and the same ending.

    This is the case in most journals, and takes a third of the time of checking each path.
    """
    named = np.frombuffer(keys.encode(), np.uint8).reshape(-1, 64)
    found = np.frombuffer(f"{paths},".encode(), np.uint8)
    for number, ending in enumerate(_ENDINGS.to_pylist()):
        tail = np.frombuffer(f"{ending},".encode(), np.uint8)
        if len(found) == len(named) * (_STEM + len(tail)):
            rows = found.reshape(len(named), -1)
            home, digits = rows[:, :_HOME], named[:, :2]
            same = (
                bool((home[:, :-3] == np.frombuffer(b"images/", np.uint8)).all())
                and bool((home[:, -3:-1] == digits).all())
                and bool((home[:, -1] == ord("/")).all())
                and bool((rows[:, _HOME:_STEM] == named).all())
                and bool((rows[:, _STEM:] == tail).all())
            )
            if same:
                return np.full(len(named), number)
    return None


def _endings_of(keys: str, paths: pa.Array) -> _Numbers:
    """Return the ending of each path, -1 if it is not the request's own name."""
    ends = pa.array(np.arange(0, len(keys) + 64, 64, dtype=np.int32)).buffers()[1]
    named = pa.Array.from_buffers(
        pa.string(), len(paths), [None, ends, pa.py_buffer(keys.encode())]
    )
    cut = pc.utf8_slice_codeunits
    home = pc.binary_join_element_wise("images/", cut(named, 0, 2), "/", "")
    plain = pc.and_(pc.equal(cut(paths, 0, _HOME), home), pc.equal(cut(paths, _HOME, _STEM), named))
    endings = pc.if_else(plain, pc.index_in(cut(paths, _STEM), value_set=_ENDINGS), None)
    return np.asarray(endings.fill_null(-1).to_numpy(), np.int64)


def _digest_set(every: list[Digests], files: list[_Numbers]) -> DigestSet:
    return DigestSet(every, np.concatenate([np.empty(0, np.int64), *files]))


# -- the files ------------------------------------------------------------------------------------


def _intact_by_lookup(storage: Storage, requests: DigestSet, known: int) -> Mask:
    """Check the file of each. ``known`` is about how many requests the journal has."""
    if storage.folder is None:
        return _intact_in_store(storage, requests, known)
    intact = np.zeros(len(requests), np.bool_)
    for place in np.flatnonzero(requests.values >= 0).tolist():
        intact[place] = _is_intact(storage, requests, place)
    return intact


def _is_intact(storage: Storage, requests: DigestSet, place: int) -> bool:
    key = requests.words[place].tobytes().hex()
    size, ending = divmod(int(requests.values[place]), len(_ENDINGS))
    return storage.size_bytes(f"images/{key[:2]}/{key}{_ENDINGS[ending].as_py()}") == size


def _intact_by_listing(storage: Storage, requests: DigestSet) -> Mask:
    """Check whether the file of each is listed in its folder with its size."""
    if storage.folder is None:
        return _intact_in_store(storage, requests, len(requests))
    intact = np.zeros(len(requests), np.bool_)
    if not len(requests):
        return intact
    for digests, files in _listed(storage.folder / "images"):
        places = requests.find(digests)
        same = (places >= 0) & (requests.values[places] == files)
        intact[places[same]] = True
    return intact


def _intact_in_store(storage: Storage, requests: DigestSet, known: int) -> Mask:
    """Check the file of each in an object store."""
    intact = np.zeros(len(requests), np.bool_)
    stored = np.flatnonzero(requests.values >= 0)
    wanted = requests.words[stored].view(np.uint8).reshape(len(stored), 32)

    def ask(places: _Numbers) -> None:
        for place in stored[places].tolist():
            intact[place] = _is_intact(storage, requests, place)

    def take(listed: Listing, _: _Numbers) -> None:
        digests, files = _in_place(listed)
        places = requests.find(digests)
        same = (places >= 0) & (requests.values[places] == files)
        intact[places[same]] = True

    look_up(storage, wanted, known, ask=ask, take=take)
    return intact


def _in_place(listed: Sequence[tuple[str, int]]) -> tuple[Digests, _Numbers]:
    """Return the keys and files of a listing, as ``_named``; those in their own folders."""
    own = []
    for path, size in listed:
        folder, _, name = path.removeprefix("images/").partition("/")
        if name[:2] == folder:
            own.append((name, size))
    return _named([name for name, _ in own], [size for _, size in own])


def _listed(root: Path) -> Iterator[tuple[Digests, _Numbers]]:
    """Yield the files of each image folder: their keys, and their sizes and endings as numbers.

    A file counts only in the folder that its key begins with.
    """
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
    in_place = digests[:, 0] == int(folder.name, 16)
    return digests[in_place], files[in_place]


def _named(names: Sequence[str], sizes: Sequence[int]) -> tuple[Digests, _Numbers]:
    """Return the keys of file names, and the files as numbers. Other names are left out."""
    sized, lengths = np.array(sizes, np.int64), np.fromiter(map(len, names), np.int64, len(names))
    digests, files = [_NO_DIGESTS], [sized[:0]]
    for number, ending in enumerate(_ENDINGS.to_pylist()):
        chosen = np.flatnonzero(lengths == 64 + len(ending))
        if len(chosen):
            same = names if len(chosen) == len(names) else [names[at] for at in chosen.tolist()]
            data = "".join(same).encode("ascii", "replace")
            characters = np.frombuffer(data, np.uint8).reshape(-1, 64 + len(ending))
            ends = (characters[:, 64:] == np.frombuffer(ending.encode(), np.uint8)).all(axis=1)
            if ends.any():
                characters = characters[:, :64]
                right = ends & _are_digits(characters)
                digests.append(digests_from_ascii(characters[right]))
                files.append(_file_numbers(sized[chosen], number)[right])
    return np.concatenate(digests), np.concatenate(files)


def _are_digits(characters: Digests) -> Mask:
    numbers = (characters >= ord("0")) & (characters <= ord("9"))
    letters = (characters >= ord("a")) & (characters <= ord("f"))
    return np.asarray((numbers | letters).all(axis=1))
