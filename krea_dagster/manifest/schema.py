"""The manifest's own columns: names, types and what they mean. The table's further ones follow."""

from __future__ import annotations

from typing import Final

import pyarrow as pa

_TIME: Final = pa.timestamp("us", tz="UTC")

_COLUMNS: Final[tuple[tuple[str, pa.DataType, str], ...]] = (
    ("prompt_id", pa.string(), "Identity of the prompt: the table's own, or drawn from its row"),
    ("sample", pa.int32(), "Which of the row's num_images this is, from 0"),
    ("prompt", pa.string(), "Text that was sent"),
    ("model", pa.string(), "Model that was asked"),
    ("size", pa.string(), "Aspect ratio that was asked for"),
    ("quality", pa.string(), "1K or 2K"),
    ("seed", pa.int32(), "Seed that was sent, 1 to 1048576"),
    ("nsfw_check", pa.bool_(), "Whether the stricter content check was asked for"),
    ("attempt", pa.int32(), "How often a person has asked for another picture of this row"),
    ("request_key", pa.string(), "Hash of all that decides the picture; images are bought by it"),
    ("partition_key", pa.string(), "Dagster partition of the row"),
    ("status", pa.string(), "State of the request: stored is the end that is hoped for"),
    ("task_id", pa.string(), "EvoLink's task"),
    ("image_path", pa.string(), "Path or URL of the verified file"),
    ("image_sha256", pa.string(), "Hash of the file's bytes"),
    ("image_bytes", pa.int64(), "Size of the file, bytes"),
    ("image_format", pa.string(), "Format, read from the file's bytes"),
    ("width", pa.int32(), "Width, pixels"),
    ("height", pa.int32(), "Height, pixels"),
    ("credits_reserved", pa.float64(), "What EvoLink reserved when it took the request, credits"),
    (
        "credits_charged",
        pa.float64(),
        "What it cost, credits: 0 where it failed or was refused, null while not known",
    ),
    ("billing_rule", pa.string(), "EvoLink's billing rule"),
    ("user_group", pa.string(), "EvoLink's user group, which may decide the price"),
    ("submitted_at", _TIME, "When EvoLink took the request, UTC"),
    ("completed_at", _TIME, "When the task was first seen completed, UTC"),
    ("stored_at", _TIME, "When the verified file was in place, UTC"),
    ("reused", pa.bool_(), "Whether it was bought by an earlier run"),
    ("run_id", pa.string(), "Dagster run that bought it"),
    ("error_code", pa.string(), "Why there is no image, as a code"),
    ("error_message", pa.string(), "Why there is no image, in words"),
)

MANIFEST_SCHEMA: Final = pa.schema([pa.field(name, kind) for name, kind, _ in _COLUMNS])

#: What each column means, by name.
DESCRIPTIONS: Final = {name: text for name, _, text in _COLUMNS}
