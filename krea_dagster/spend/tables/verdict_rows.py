"""The reviewers' verdict on the image of each request, for the spend tables.

A verdict comes later than the purchase, often in another month. All are read each time, so that the
tables are the same whenever they are made.
"""

from __future__ import annotations

from typing import Final

import duckdb
import pyarrow as pa
from sqlalchemy import Connection, select

from krea_dagster.engine.journal.schema import requests, verdicts
from krea_dagster.engine.verdict import NONE

_ROWS: Final = 20_000
_SCHEMA: Final = pa.schema(
    [
        ("number", pa.int64()),
        ("request_key", pa.string()),
        ("image_sha256", pa.string()),
        ("verdict", pa.string()),
        ("holds", pa.bool_()),
    ]
)

#: Each verdict with its request, joined by the request key: image hashes have no index.
_QUERY: Final = select(
    verdicts.c.number,
    verdicts.c.request_key,
    verdicts.c.image_sha256,
    verdicts.c.verdict,
    requests.c.image_sha256 == verdicts.c.image_sha256,
).select_from(verdicts.outerjoin(requests, requests.c.request_key == verdicts.c.request_key))


def load_reviewed(duck: duckdb.DuckDBPyConnection, connection: Connection) -> None:
    """Create the table ``reviewed``: the present verdict on the image of each request.

    Its columns are ``request_key`` and ``verdict``. Requests without a verdict, with a withdrawn
    one or with a new file since are missing.
    """
    duck.execute(
        "CREATE TABLE judged (number BIGINT, request_key VARCHAR, image_sha256 VARCHAR, "
        "verdict VARCHAR, holds BOOLEAN)"
    )
    found = connection.execute(_QUERY)
    while rows := found.fetchmany(_ROWS):
        columns = [
            pa.array(column, field.type)
            for column, field in zip(zip(*rows, strict=True), _SCHEMA, strict=True)
        ]
        duck.from_arrow(pa.table(columns, schema=_SCHEMA)).insert_into("judged")
    duck.execute(
        f"""
        CREATE TABLE reviewed AS
            SELECT request_key, verdict
            FROM (SELECT DISTINCT request_key, image_sha256 FROM judged WHERE holds)
            JOIN (
                SELECT image_sha256, arg_max(verdict, number) AS verdict
                FROM judged GROUP BY image_sha256
            ) USING (image_sha256)
            WHERE verdict <> '{NONE}'
        """
    )
