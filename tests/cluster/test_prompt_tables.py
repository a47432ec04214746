"""Prompt tables of each kind in a real object store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from pyiceberg.catalog.sql import SqlCatalog

from krea_dagster.errors import ConfigError
from krea_dagster.prompts import PromptTable, parse_partition_by
from tests.cluster.servers import SeaweedFS, Store

pytestmark = pytest.mark.cluster

ROWS: Final = pa.table({"prompt_id": ["a", "b"], "prompt": ["a boat", "a gull"]})


def opened(source: str, **options: Any) -> PromptTable:
    return PromptTable(source, parse_partition_by("hash:2"), storage_options=options)


def options_of(s3: SeaweedFS) -> dict[str, Any]:
    """The store as fsspec is given it."""
    given = s3.environment()
    return {
        "key": given["AWS_ACCESS_KEY_ID"],
        "secret": given["AWS_SECRET_ACCESS_KEY"],
        "client_kwargs": {
            "endpoint_url": given["AWS_ENDPOINT_URL"],
            "region_name": given["AWS_DEFAULT_REGION"],
        },
    }


def test_text_and_folders_of_parquet_are_read_in_each_store(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in store.environment().items():
        monkeypatch.setenv(name, value)
    with store.client() as client:
        client.pipe_file(f"{store.url}/kinds/ideas.csv", b"prompt,seed\na boat,7\n")
        line = json.dumps({"prompt": "a boat", "seed": 7}).encode()
        client.pipe_file(f"{store.url}/kinds/ideas.jsonl", line)
        for theme in ("sea", "coast"):
            with client.open(f"{store.url}/kinds/hive/theme={theme}/a.parquet", "wb") as file:
                pq.write_table(pa.table({"prompt": [theme]}), file)
    csv, jsonl = (opened(f"{store.url}/kinds/ideas.{name}") for name in ("csv", "jsonl"))
    assert csv.versions() == jsonl.versions()
    by_theme = parse_partition_by("column:theme")
    assert PromptTable(f"{store.url}/kinds/hive", by_theme).partition_keys() == ["coast", "sea"]


def test_a_delta_table_is_read_with_the_options_of_fsspec(s3: SeaweedFS) -> None:
    url, options = f"{s3.url}/delta", options_of(s3)
    own = {
        "aws_access_key_id": options["key"],
        "aws_secret_access_key": options["secret"],
        "aws_endpoint_url": options["client_kwargs"]["endpoint_url"],
        "aws_region": "us-east-1",
        "aws_allow_http": "true",
    }
    write_deltalake(url, ROWS, storage_options=own)
    table = opened(url, **options)
    assert table.row_count() == 2
    mark = table.mark()
    DeltaTable(url, storage_options=own).delete("prompt_id = 'b'")
    assert table.row_count() == 1
    assert table.mark() != mark
    (file,) = DeltaTable(url, storage_options=own).file_uris()
    with pytest.raises(ConfigError, match=r"is a part of .*delta, a Delta table"):
        opened(file, **options).plan()
    with pytest.raises(ConfigError, match="access is refused"):
        opened(url, **{**options, "secret": "another-secret"}).plan()


def test_an_iceberg_table_is_read_with_the_options_of_fsspec(s3: SeaweedFS, tmp_path: Path) -> None:
    options = options_of(s3)
    catalog = SqlCatalog(
        "test",
        **{
            "uri": f"sqlite:///{tmp_path}/catalog.db",
            "warehouse": f"{s3.url}/lake",
            "s3.endpoint": options["client_kwargs"]["endpoint_url"],
            "s3.access-key-id": options["key"],
            "s3.secret-access-key": options["secret"],
            "s3.region": "us-east-1",
        },
    )
    catalog.create_namespace("shop")
    table = catalog.create_table("shop.prompts", schema=ROWS.schema)
    table.append(ROWS)
    table.delete("prompt_id = 'b'")
    catalog.close()
    assert opened(table.metadata_location, **options).row_count() == 1
    with pytest.raises(ConfigError, match="only its catalog knows"):
        opened(table.location(), **options).plan()
    with pytest.raises(ConfigError, match="an Iceberg table: name the table"):
        opened(f"{table.location()}/data", **options).plan()
