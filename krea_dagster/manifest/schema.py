"""The manifest's columns: names, types, descriptions. The passthrough columns follow them."""

from __future__ import annotations

from typing import Final

import pyarrow as pa

_TIME: Final = pa.timestamp("us", tz="UTC")

_COLUMNS: Final[tuple[tuple[str, pa.DataType, str], ...]] = (
    ("prompt_id", pa.string(), "Identity of the prompt: from the table, or derived from its row"),
    ("sample", pa.int32(), "Which of the row's num_images this is, from 0"),
    ("prompt", pa.string(), "Text that was sent"),
    ("model", pa.string(), "Model"),
    ("size", pa.string(), "Requested aspect ratio"),
    ("quality", pa.string(), "1K or 2K"),
    ("seed", pa.int32(), "Seed that was sent, 1 to 1048576"),
    ("nsfw_check", pa.bool_(), "Whether the stricter content check was requested"),
    ("attempt", pa.int32(), "How often another image of this row was requested"),
    ("request_key", pa.string(), "Hash of everything that decides the image; each is bought once"),
    ("partition_key", pa.string(), "Dagster partition of the row"),
    ("status", pa.string(), "State of the request; stored is success"),
    ("task_id", pa.string(), "EvoLink's task"),
    ("image_path", pa.string(), "Path or URL of the verified file"),
    ("image_sha256", pa.string(), "Hash of the file's bytes"),
    ("image_bytes", pa.int64(), "Size of the file, bytes"),
    ("image_format", pa.string(), "Format, from the file's bytes"),
    ("width", pa.int32(), "Width, pixels"),
    ("height", pa.int32(), "Height, pixels"),
    ("credits_reserved", pa.float64(), "Credits that EvoLink reserved for the request"),
    (
        "credits_charged",
        pa.float64(),
        "Its cost, credits: 0 where it failed or was refused, null while not known",
    ),
    ("billing_rule", pa.string(), "EvoLink's billing rule"),
    ("user_group", pa.string(), "EvoLink's user group, which may decide the price"),
    ("submitted_at", _TIME, "When EvoLink accepted the request, UTC"),
    ("completed_at", _TIME, "When the task was first seen completed, UTC"),
    ("stored_at", _TIME, "When the verified file was in place, UTC"),
    ("reused", pa.bool_(), "Whether it was bought by an earlier run"),
    ("run_id", pa.string(), "Dagster run that bought it"),
    ("error_code", pa.string(), "Error code of a request without an image"),
    ("error_message", pa.string(), "Error message of a request without an image"),
)

MANIFEST_SCHEMA: Final = pa.schema([pa.field(name, kind) for name, kind, _ in _COLUMNS])

#: Descriptions of the columns, by name.
DESCRIPTIONS: Final = {name: text for name, _, text in _COLUMNS}
