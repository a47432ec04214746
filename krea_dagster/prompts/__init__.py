"""From a Parquet table of prompts to image requests, each with its identity and its seed.

``table`` reads, checks and plans. ``requests`` (pure) defines what a row asks for; ``identity`` and
``plan`` do it for whole columns. ``partitioning`` (pure) decides which row belongs to which
partition; ``tokens`` counts. ``scan``, ``exact``, ``columns``, ``cells`` and ``source`` are what
``table`` reads with.
"""

from krea_dagster.prompts.partitioning import (
    ColumnPartitions,
    HashPartitions,
    MultiPartitions,
    PartitionBy,
    TimePartitions,
    key_from_name,
    parse_partition_by,
    safe_name,
)
from krea_dagster.prompts.plan import PLAN_SCHEMA, Plan, image_requests
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
    "PLAN_SCHEMA",
    "RECOGNISED_COLUMNS",
    "RESERVED_COLUMNS",
    "WARN_TOKENS",
    "Attempts",
    "ColumnPartitions",
    "Defaults",
    "HashPartitions",
    "MultiPartitions",
    "PartitionBy",
    "Plan",
    "PlannedImage",
    "PromptRow",
    "PromptRows",
    "PromptTable",
    "TimePartitions",
    "derived_prompt_id",
    "drawn_seed",
    "estimate_tokens",
    "image_requests",
    "key_from_name",
    "parse_partition_by",
    "partition_version",
    "plan_images",
    "request_key",
    "safe_name",
    "seed_for",
]
