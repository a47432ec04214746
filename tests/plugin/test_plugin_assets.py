"""A run of the assets: one step for a range of partitions, and what each partition then shows."""

from __future__ import annotations

import base64
import io
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import OpenAccount
from dagster_bench import bought, latest, posts, run_job, values, write_table
from PIL import Image

from krea_dagster import KreaResource, build_krea_assets, build_krea_definitions
from krea_dagster.emulator import Emulator
from krea_dagster.engine.storage import Storage
from krea_dagster.manifest import MANIFEST_SCHEMA
from krea_dagster.plugin.metadata import images_metadata
from krea_dagster.prompts import PromptTable, parse_partition_by

from .conftest import BUCKETS, MARKER, PREFIX, Trip
