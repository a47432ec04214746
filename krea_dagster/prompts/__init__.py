"""From a table of prompts to image requests, each with its identity and its seed.

``sources`` makes Parquet of what a table is given as: ``values``, ``text_files``,
``table_formats`` and ``sql`` read the others, as ``kinds`` tells. ``table`` is the entry: it reads,
checks and plans with ``files``, ``table_schema``, ``columns``, ``cells``, ``duplicates`` and
``scan``. ``requests`` (pure) has the formulas for one image;
``identity`` and ``plan`` apply them to whole columns. ``partitioning`` (pure) defines the
partition keys; ``tokens`` counts.
"""

from krea_dagster.prompts.identity import EMPTY_PARTITION_VERSION
from krea_dagster.prompts.partitioning import (
    ColumnPartitions,
    HashPartitions,
    MultiPartitions,
    PartitionBy,
    TimePartitions,
    parse_partition_by,
    safe_name,
)
from krea_dagster.prompts.plan import PLAN_SCHEMA, Plan, image_requests
from krea_dagster.prompts.requests import Defaults, PlannedImage, drawn_seed, request_key
from krea_dagster.prompts.sql import SqlTable
from krea_dagster.prompts.table import PromptTable
from krea_dagster.prompts.table_schema import RECOGNISED_COLUMNS, RESERVED_COLUMNS
from krea_dagster.prompts.tokens import MAX_TOKENS, WARN_TOKENS, estimate_tokens

__all__ = [
    "EMPTY_PARTITION_VERSION",
    "MAX_TOKENS",
    "PLAN_SCHEMA",
    "RECOGNISED_COLUMNS",
    "RESERVED_COLUMNS",
    "WARN_TOKENS",
    "ColumnPartitions",
    "Defaults",
    "HashPartitions",
    "MultiPartitions",
    "PartitionBy",
    "Plan",
    "PlannedImage",
    "PromptTable",
    "SqlTable",
    "TimePartitions",
    "drawn_seed",
    "estimate_tokens",
    "image_requests",
    "parse_partition_by",
    "request_key",
    "safe_name",
]
