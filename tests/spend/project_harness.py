"""A small project on an emulated account: it buys, quotes and verifies, and can be manipulated."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from krea_dagster import KreaResource
from krea_dagster.application.batch import Batch
from krea_dagster.application.krea import Krea
from krea_dagster.application.proof import prove
from krea_dagster.application.quotes import quote_images, quote_partitions
from krea_dagster.application.runner import open_runner
from krea_dagster.emulator import Emulator
from krea_dagster.engine.record import Record
from krea_dagster.engine.run.latency import Latencies
from krea_dagster.engine.run.report import RunReport
from krea_dagster.engine.run.requested_image import RequestedImage
from krea_dagster.manifest import write_manifest_parts
from krea_dagster.prompts import PlannedImage, PromptTable, parse_partition_by
from krea_dagster.spend.proof.findings import Proof
from krea_dagster.spend.quote import Quote
from tests.cli.shell import Outcome
from tests.dagster_bench import write_table
from tests.prompts.reference import images_of

#: The emulator's latency is known, so that no run waits for its first look.
LEARNED: Final = Latencies.known({"1K": 0.02, "2K": 0.02})


@dataclass(frozen=True)
class ProjectHarness:
    """A table in two partitions, an account, and a storage root."""

    folder: Path
    emulator: Emulator
    api_key: str
    rows: Sequence[dict[str, Any]] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def with_rows(self, *names: str, **wishes: Any) -> ProjectHarness:
        """Return the project with more rows, one for each name, of the smallest size."""
        more = [
            {"prompt_id": name, "prompt": f"{name} of {self.folder.name}"}
            | {"size": "1:2", "quality": "1K", "seed": None, "num_images": 1}
            | wishes
            for name in names
        ]
        return replace(self, rows=[*self.rows, *more])

    def with_settings(self, **settings: Any) -> ProjectHarness:
        """Return the project with other settings of its resource."""
        return replace(self, settings=self.settings | settings)

    @property
    def krea(self) -> Krea:
        return self.resource.krea()

    @property
    def resource(self) -> KreaResource:
        given: dict[str, Any] = {
            "api_key": self.api_key,
            "base_url": self.emulator.url,
            "storage": str(self.folder / "krea"),
        }
        return KreaResource(**(given | self.settings))

    @property
    def table(self) -> PromptTable:
        source = write_table(self.folder / "prompts.parquet", pa.Table.from_pylist(self.rows))
        return PromptTable(source, parse_partition_by("hash:2"))

    def images(self) -> list[PlannedImage]:
        return images_of(self.table)

    def batch(self) -> Batch:
        return Batch.read(self.table, self.table.partition_keys(), self.krea)

    def buy(self, run_id: str = "run-1", *, ask_again: Iterable[str] = ()) -> RunReport:
        """Run all partitions, and write their manifests."""
        report = self.carry(run_id, ask_again=ask_again)
        self.write_manifests(run_id)
        return report

    def carry(self, run_id: str = "run-1", *, ask_again: Iterable[str] = ()) -> RunReport:
        """Run all partitions as KreaResource.generate does, without pauses and manifests."""
        krea = self.krea
        wanted = [RequestedImage(image.request, image.partition_key) for image in self.images()]
        with open_runner(krea, run_id, lambda _: None, self.table) as runner:
            again = frozenset(ask_again)
            policy = replace(runner.policy, retry_codes=again, wait_scale=0.01)
            return asyncio.run(replace(runner, policy=policy, latencies=LEARNED).run(wanted))

    def write_manifests(self, run_id: str = "run-1") -> None:
        krea = self.krea
        with self.batch() as batch, krea.open_journal() as journal:
            for key in batch.plan.keys:
                parts = batch.manifest_parts(key, krea, journal, run_id)
                write_manifest_parts(krea.open_storage(), key, batch.manifest_schema, parts)

    def quote(self, *, ask_again: Iterable[str] = ()) -> Quote:
        if ask_again:
            with self.batch() as batch:
                return quote_images(self.krea, batch.state(self.krea), retry_errors=ask_again)
        return quote_partitions(self.krea, self.table).quote

    def prove(self, **options: Any) -> Proof:
        return prove(self.krea, **options)

    def paid_units(self) -> int:
        """What the account was charged, by the emulator's own expected."""
        account = self.emulator.world.account(self.api_key)
        assert account is not None
        return account.charged

    def records(self) -> dict[str, Record]:
        """Return the journal's records by prompt_id."""
        images = self.images()
        found = self.krea.records(images)
        return {
            image.prompt_id: found[image.request.request_key]
            for image in images
            if image.request.request_key in found
        }

    def file_of(self, name: str) -> Path:
        image = self.records()[name].image
        assert image is not None
        return self.folder / "krea" / image.path

    def sql(self, statement: str, *values: object) -> None:
        """Change the journal's database directly."""
        with closing(sqlite3.connect(self.folder / "krea" / "journal.db")) as database, database:
            assert database.execute(statement, values).rowcount > 0, statement

    def forge_row(self, name: str, **values: object) -> None:
        """Change a row of a manifest file directly."""
        for path in sorted((self.folder / "krea" / "manifest").rglob("*.parquet")):
            table = pq.read_table(path)
            rows = table.to_pylist()
            for row in rows:
                if row["prompt_id"] == name:
                    row.update(values)
            pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def kinds(proof: Proof) -> list[str]:
    """Return the kind of each finding of a proof."""
    return [finding.kind.value for finding in proof.findings]


#: Gives the command krea-dagster on a project: it takes arguments, and returns how it ended.
CommandOn: TypeAlias = Callable[[ProjectHarness], Callable[..., Outcome]]
