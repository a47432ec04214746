"""The formulas of ``requests`` for whole Arrow columns: keys, seeds, prompt_ids and versions.

Property tests compare them with the formulas for one row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.digests import Digests, hex_from_digests
from krea_dagster.models import MODEL, SEED_MAX, SEED_MIN
from krea_dagster.prompts.murmur import Hashes
from krea_dagster.prompts.partitioning import HashPartitions
from krea_dagster.prompts.requests import SEPARATOR

#: Request keys that are hashed at once for a version.
_AT_ONCE: Final = 10_000


def sha256(texts: pa.Array) -> Digests:
    """Return the SHA-256 of each text's UTF-8 form as bytes: shape (rows, 32)."""
    hashed = [hashlib.sha256(text).digest() for text in texts.cast(pa.binary()).to_pylist()]
    return np.frombuffer(b"".join(hashed), np.uint8).reshape(-1, 32)


def request_digests(rows: Mapping[str, pa.Array]) -> Digests:
    """Return ``requests.request_key`` of each row, as bytes.

    ``rows`` holds ``prompt``, ``size``, ``quality``, ``seed``, ``nsfw_check`` and ``attempt``.
    """
    return sha256(
        _joined(
            f"krea-dagster/1{SEPARATOR}{MODEL}",
            rows["size"],
            rows["quality"],
            _text(rows["seed"]),
            _flags(rows["nsfw_check"]),
            _text(rows["attempt"]),
            rows["prompt"],
        )
    )


def image_seeds(rows: Mapping[str, pa.Array]) -> pa.Array:
    """Return the seed of each image, as int32.

    ``rows`` holds ``prompt_id``, ``sample``, ``attempt`` and ``seed``. A null seed is drawn
    (``requests.drawn_seed``). A given seed is that of sample 0; samples 1, 2 … take the next seeds,
    with 1 after 1048576, because the same seed would give the same image. A raised attempt keeps a
    given seed: the attempt is part of the request key, and the user chose this seed.
    """
    seeds, samples = rows["seed"], rows["sample"]
    drawn = np.asarray(seeds.is_null())
    chosen = np.asarray(seeds.fill_null(SEED_MIN).to_numpy(zero_copy_only=False), np.int64)
    span = SEED_MAX - SEED_MIN + 1
    values = SEED_MIN + (chosen - SEED_MIN + samples.to_numpy()) % span
    if drawn.any():
        mask = pa.array(drawn)
        texts = _joined(
            "krea-dagster/1/seed",
            _text(samples.filter(mask)),
            _text(rows["attempt"].filter(mask)),
            rows["prompt_id"].filter(mask),
        )
        values[drawn] = SEED_MIN + _first_20_bits(sha256(texts))
    return pa.array(values, pa.int32())


def derived_prompt_ids(rows: Mapping[str, pa.Array]) -> pa.Array:
    """Return the prompt_id of each row of a table that has no such column.

    It is derived from the content (``prompt``, ``size``, ``quality``, ``seed``, ``nsfw_check``), so
    that the order of the rows does not matter. Rows with the same content share it.
    """
    texts = _joined(
        "krea-dagster/1/id",
        rows["size"],
        rows["quality"],
        _text(rows["seed"].fill_null(0)),
        _flags(rows["nsfw_check"]),
        rows["prompt"],
    )
    digits = pc.utf8_slice_codeunits(hex_from_digests(sha256(texts)), 0, 16)
    return pc.binary_join_element_wise("p", digits, "-")


def buckets(by: HashPartitions, hashes: Hashes) -> npt.NDArray[np.uint32]:
    """Return which of ``by.keys()`` each prompt_id belongs to, from its ``murmur.hashes``."""
    numbers: npt.NDArray[np.uint32] = (hashes >> np.uint64(32)).astype(np.uint32)
    numbers %= np.uint32(by.count)
    return numbers


def partition_version(digests: Digests) -> str:
    """Return the data version of a partition: 16 hexadecimal digits.

    ``digests`` are the request keys of its images as bytes. Their order does not matter, their
    number does.
    """
    firsts = np.ascontiguousarray(digests).view(">u8")[:, 0].astype(np.uint64)
    order = np.argsort(firsts)
    ordered = firsts[order]
    if (ordered[1:] == ordered[:-1]).any():
        order = np.lexsort(digests.T[::-1])
    hashed = hashlib.sha256(b"krea-dagster/1/partition")
    for start in range(0, len(order), _AT_ONCE):
        part = digests[order[start : start + _AT_ONCE]]
        hashed.update(SEPARATOR.encode() + part.tobytes().hex(SEPARATOR, 32).encode())
    return hashed.hexdigest()[:16]


#: The data version of a partition without images.
EMPTY_PARTITION_VERSION: Final = partition_version(np.empty((0, 32), np.uint8))


def _joined(first: str, *parts: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(pa.scalar(first), *parts, SEPARATOR)


def _text(numbers: pa.Array) -> pa.Array | pa.Scalar:
    """Return numbers as text; one text where all are the same, as samples and attempts are."""
    least, most = pc.min_max(numbers).values()
    return (least if least.equals(most) else numbers).cast(pa.string())


def _flags(values: pa.Array) -> pa.Array:
    return pc.if_else(values, "1", "0")


def _first_20_bits(digests: Digests) -> npt.NDArray[np.int64]:
    first, second, third = digests[:, :3].astype(np.int64).T
    return np.asarray((first << 12) | (second << 4) | (third >> 4), np.int64)
