"""The tables of accepted images: what is read for the rules."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from krea_dagster.curation.accepted.accepted_table import AcceptedTableBuilder
from krea_dagster.curation.accepted.rules import Rules
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.storage.storage import Storage
from tests.curation.accepted.test_rules import sha


def test_a_measure_may_be_integer_in_one_partition_and_float_in_another(tmp_path: Path) -> None:
    """As custom functions return them: Parquet then has a different type in each file."""
    storage = Storage(str(tmp_path))
    for name, scores in (("a", [1, 3]), ("b", [2.5, 0.5])):
        table = pa.table({"image_sha256": [sha(f"{name}{one}") for one in scores], "score": scores})
        storage.write(f"measures/{name}.parquet", partial(pq.write_table, table))
    with closing(Journal(f"sqlite:///{tmp_path / 'journal.db'}")) as journal:
        evidence = AcceptedTableBuilder.read(storage, journal, Rules.parse(["score>=2"])).evidence()
    assert evidence.measures is not None
    assert evidence.measures["score"].to_pylist() == [1.0, 3.0, 2.5, 0.5]
