"""The formulas of ``requests`` for whole Arrow columns: hashes, seeds and keys without a loop.

``requests`` is the definition; a property test holds the two against each other. The texts are
joined by Arrow, and hashed by DuckDB.
"""

from __future__ import annotations

import hashlib
import threading
from typing import Final

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.digests import Digests, digits_from_hex
from krea_dagster.models import MODEL, SEED_MAX, SEED_MIN
from krea_dagster.prompts.murmur import Numbers
from krea_dagster.prompts.partitioning import HashPartitions

_SEPARATOR: Final = "\x1f"

#: Request keys that are hashed at once for a version.
_AT_ONCE: Final = 10_000


class Hasher:
    """Hashes columns of text. Reads no file and no network, and loads no extension.

    Each thread that uses it works for itself. Fewer than ``few`` texts take the standard library
    less time than DuckDB takes to begin.
    """

    def __init__(self, few: int = 1_000) -> None:
        self._few = few
        self._duck = duckdb.connect(
            ":memory:",
            config={
                "threads": "1",
                "autoinstall_known_extensions": "false",
                "autoload_known_extensions": "false",
            },
        )
        self._own = threading.local()

    def close(self) -> None:
        """Give back the memory."""
        self._duck.close()

    def sha256(self, texts: pa.Array) -> pa.Array:
        """Return the SHA-256 of each text's UTF-8 form, as 64 hexadecimal digits."""
        if len(texts) < self._few:
            digests = [
                hashlib.sha256(text).hexdigest() for text in texts.cast(pa.binary()).to_pylist()
            ]
            return pa.array(digests, pa.string())
        if not hasattr(self._own, "duck"):
            self._own.duck = self._duck.cursor()
        numbers = np.arange(len(texts))
        given = self._own.duck.from_arrow(pa.table({"number": numbers, "text": texts}))
        found = given.project("number, sha256(text) AS value").to_arrow_table()
        values = found["value"].combine_chunks()
        order = found["number"].to_numpy()
        return values if (order == numbers).all() else values.take(pa.array(np.argsort(order)))


def request_keys(
    hasher: Hasher,
    *,
    prompts: pa.Array,
    sizes: pa.Array,
    qualities: pa.Array,
    seeds: pa.Array,
    nsfw_checks: pa.Array,
    attempts: pa.Array,
) -> pa.Array:
    """Return ``requests.request_key`` of each row."""
    return hasher.sha256(
        _joined(
            f"krea-dagster/1{_SEPARATOR}{MODEL}",
            sizes,
            qualities,
            _text(seeds),
            _flags(nsfw_checks),
            _text(attempts),
            prompts,
        )
    )


def seeds_for(
    hasher: Hasher, *, seeds: pa.Array, prompt_ids: pa.Array, samples: pa.Array, attempts: pa.Array
) -> pa.Array:
    """Return ``requests.seed_for`` of each row, as int32. A null is drawn."""
    drawn = np.asarray(seeds.is_null())
    chosen = np.asarray(seeds.fill_null(SEED_MIN).to_numpy(zero_copy_only=False), np.int64)
    span = SEED_MAX - SEED_MIN + 1
    values = SEED_MIN + (chosen - SEED_MIN + samples.to_numpy()) % span
    if drawn.any():
        mask = pa.array(drawn)
        texts = _joined(
            "krea-dagster/1/seed",
            _text(samples.filter(mask)),
            _text(attempts.filter(mask)),
            prompt_ids.filter(mask),
        )
        values[drawn] = SEED_MIN + _number(digits_from_hex(hasher.sha256(texts), 5))
    return pa.array(values, pa.int32())


def derived_prompt_ids(
    hasher: Hasher,
    *,
    prompts: pa.Array,
    sizes: pa.Array,
    qualities: pa.Array,
    seeds: pa.Array,
    nsfw_checks: pa.Array,
) -> pa.Array:
    """Return ``requests.derived_prompt_id`` of each row."""
    texts = _joined(
        "krea-dagster/1/id",
        sizes,
        qualities,
        _text(seeds.fill_null(0)),
        _flags(nsfw_checks),
        prompts,
    )
    digests = pc.utf8_slice_codeunits(hasher.sha256(texts), 0, 16)
    return pc.binary_join_element_wise("p", digests, "-")


def buckets(by: HashPartitions, hashes: Numbers) -> npt.NDArray[np.uint32]:
    """Return the number of the partition, of ``by.keys()`` which one, of each prompt_id.

    ``hashes`` are those of ``hashes_of_texts``.
    """
    numbers: npt.NDArray[np.uint32] = (hashes >> np.uint64(32)).astype(np.uint32)
    numbers %= np.uint32(by.count)
    return numbers


def partition_version(digests: Digests) -> str:
    """Return ``requests.partition_version`` of request keys that are given as bytes."""
    words = np.ascontiguousarray(digests).view(">u8").reshape(-1, 4).astype(np.uint64)
    order = np.lexsort(words.T[::-1])
    hashed = hashlib.sha256(b"krea-dagster/1/partition")
    for start in range(0, len(order), _AT_ONCE):
        part = digests[order[start : start + _AT_ONCE]]
        hashed.update(_SEPARATOR.encode() + part.tobytes().hex(_SEPARATOR, 32).encode())
    return hashed.hexdigest()[:16]


def _joined(first: str, *parts: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(pa.scalar(first), *parts, _SEPARATOR)


def _text(numbers: pa.Array) -> pa.Array | pa.Scalar:
    """Return numbers as text; one text where all are the same, as samples and attempts are."""
    least, most = pc.min_max(numbers).values()
    return (least if least.equals(most) else numbers).cast(pa.string())


def _flags(values: pa.Array) -> pa.Array:
    return pc.if_else(values, "1", "0")


def _number(digits: Digests) -> npt.NDArray[np.int64]:
    number = np.zeros(len(digits), np.int64)
    for place in range(digits.shape[1]):
        number = number * 16 + digits[:, place]
    return number
