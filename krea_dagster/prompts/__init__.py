"""From a Parquet table of prompts to image requests, each with its identity and its seed.

``table`` reads and checks; ``requests`` (pure) plans; ``partitioning`` (pure) decides which
row belongs to which partition; ``tokens`` (pure) counts; ``source`` and ``cells`` are what
``table`` reads files and columns with.
"""

from krea_dagster.prompts.partitioning import (
    ColumnPartitions,
    DayPartitions,
    HashPartitions,
    PartitionBy,
    key_from_name,
    parse_partition_by,
    safe_name,
)
from krea_dagster.prompts.requests import (
    Attempts,
    Defaults,
    PlannedImage,
    PromptRow,
    derived_prompt_id,
    drawn_seed,
    partition_version,
    plan_images,
    request_key,
    seed_for,
)
from krea_dagster.prompts.table import (
    RECOGNISED_COLUMNS,
    RESERVED_COLUMNS,
    PromptRows,
    PromptTable,
)
from krea_dagster.prompts.tokens import MAX_TOKENS, WARN_TOKENS, estimate_tokens

__all__ = [
    "MAX_TOKENS",
    "RECOGNISED_COLUMNS",
    "RESERVED_COLUMNS",
    "WARN_TOKENS",
    "Attempts",
    "ColumnPartitions",
    "DayPartitions",
    "Defaults",
    "HashPartitions",
    "PartitionBy",
    "PlannedImage",
    "PromptRow",
    "PromptRows",
    "PromptTable",
    "derived_prompt_id",
    "drawn_seed",
    "estimate_tokens",
    "key_from_name",
    "parse_partition_by",
    "partition_version",
    "plan_images",
    "request_key",
    "safe_name",
    "seed_for",
]
