"""What people think of the images that were bought, by request, for the tables of what was spent.

A verdict comes later than the purchase, often in another month. It is looked up anew each time, so
that the tables say the same whenever they are made.
"""

from __future__ import annotations

from typing import Final

import duckdb
import pyarrow as pa
from sqlalchemy import Connection, func, select

from krea_dagster.engine.schema import requests, verdicts
from krea_dagster.engine.states import State
from krea_dagster.engine.verdicts import FLAG, NONE, REJECT

#: A purchase whose image counts as accepted, as a condition of DuckDB on ``outcome`` and
#: ``verdict``: delivered, not replaced by a later attempt, and neither rejected nor flagged.
#: Where nobody has judged, that is all that was delivered and not replaced.
IS_ACCEPTED: Final = (
    f"outcome = 'delivered' AND coalesce(verdict, '') NOT IN ('{REJECT}', '{FLAG}')"
)

_ROWS: Final = 20_000
_SCHEMA: Final = pa.schema([("request_key", pa.string()), ("verdict", pa.string())])


def load_reviewed(duck: duckdb.DuckDBPyConnection, connection: Connection) -> None:
    """Make the relation ``reviewed``: the present verdict on the image of each stored request.

    Its columns are ``request_key`` and ``verdict``; requests whose image nobody has judged, or
    whose verdict was taken back, are left out.
    """
    last = select(func.max(verdicts.c.number)).group_by(verdicts.c.image_sha256)
    query = (
        select(requests.c.request_key, verdicts.c.verdict)
        .join(requests, requests.c.image_sha256 == verdicts.c.image_sha256)
        .where(
            verdicts.c.number.in_(last),
            verdicts.c.verdict != NONE,
            requests.c.state == State.STORED.value,
        )
    )
    duck.execute("CREATE TABLE reviewed (request_key VARCHAR, verdict VARCHAR)")
    found = connection.execute(query)
    while rows := found.fetchmany(_ROWS):
        columns = [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]
        duck.from_arrow(pa.table(columns, schema=_SCHEMA)).insert_into("reviewed")
