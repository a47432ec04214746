"""Exactly N accepted, with a reviewer who rejects at random: rounds of a run and a review.

Run it to print the rounds of 100 prompts::

    .venv/bin/python -m tests.curation.accepted.quota_harness
    .venv/bin/python -m tests.curation.accepted.quota_harness --most-images 3
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq

from krea_dagster import KreaManifestIOManager, KreaResource, PromptTable, build_krea_assets
from krea_dagster.application.batch import Batch
from krea_dagster.application.buy_options import BuyOptions
from krea_dagster.application.curation import Curation
from krea_dagster.application.krea import Krea
from krea_dagster.application.purchase import buy
from krea_dagster.application.quota import QuotaState, apply_quota
from krea_dagster.curation.accepted.accepted_table import AcceptedTableBuilder
from krea_dagster.curation.accepted.quota import GroupResult, WantedImages
from krea_dagster.curation.accepted.rules import Rules
from krea_dagster.emulator import Emulator
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.verdict_log import KEEP, REJECT, Verdict
from krea_dagster.manifest import write_manifest_parts
from krea_dagster.plugin.assets.accepted import build_accepted_assets
from krea_dagster.plugin.names import Names
from krea_dagster.prompts import parse_partition_by
from krea_dagster.prompts.trial import Trial
from tests.dagster_bench import bought, run_job, write_table

PRICE = 0.45


@dataclass(frozen=True)
class Round:
    """One run of ``images`` and the review after it; counts of images."""

    missing: int
    bought: int
    rejected: int


@dataclass
class QuotaProject:
    """A prompt table, its assets with a number of wanted images, and a reviewer."""

    folder: Path
    emulator: Emulator
    api_key: str
    prompts: Mapping[str, Any]
    wanted: WantedImages | None
    rules: Rules = field(default_factory=Rules)
    prefix: str = "studio"
    by: str = "hash:2"
    rejects: float = 0.3
    seed: int = 7

    def __post_init__(self) -> None:
        source = write_table(self.folder / "prompts.parquet", self.prompts)
        self.table = PromptTable(source, parse_partition_by(self.by))
        self.resource = KreaResource(
            api_key=self.api_key,
            base_url=self.emulator.url,
            expected_latency_s=0.02,
            storage=str(self.folder / "krea"),
            max_in_flight=32,
        )
        self._random = random.Random(self.seed)
        self._runs = itertools.count(1)

    @property
    def curation(self) -> Curation:
        """Return the curation with these rules and this quota, given as objects and not as text."""
        made = Curation()
        vars(made).update(rules=self.rules, wanted_images=self.wanted)
        return made

    @property
    def krea(self) -> Krea:
        return self.resource.krea()

    @property
    def defs(self) -> dg.Definitions:
        """Build the assets and the two jobs, as a reloaded code location does."""
        assets = build_krea_assets(self.table, key_prefix=self.prefix, curation=self.curation)
        accepted = build_accepted_assets(
            Names((self.prefix,)), assets.partitions_def, rules=self.rules, wanted=self.wanted
        )
        job = dg.define_asset_job(
            "krea_images", selection=dg.AssetSelection.assets(assets.images, assets.image_manifest)
        )
        images = dg.Definitions(
            assets=assets.all,
            jobs=[job],
            resources={
                "krea": self.resource,
                "krea_manifest": KreaManifestIOManager(storage=self.resource.storage),
            },
        )
        return dg.Definitions.merge(images, accepted)

    @property
    def partitions(self) -> Sequence[str]:
        return self.table.partition_keys()

    def buy(
        self, instance: dg.DagsterInstance, partitions: Sequence[str] | None = None
    ) -> dg.ExecuteInProcessResult:
        """Run ``images`` and ``image_manifest`` for these partitions, or all."""
        keys = partitions or self.partitions
        return run_job(self.defs, instance, keys[0], keys[-1])

    def carry(
        self, partitions: Sequence[str] | None = None, trial: Trial | None = None
    ) -> QuotaState:
        """Do the same without Dagster: decide, buy, write the manifests."""
        batch = Batch.read(self.table, partitions, self.krea, to_buy=True, trial=trial)
        run_id = f"run-{next(self._runs)}"
        batch, asked = apply_quota(
            batch,
            BuyOptions(),
            self.krea,
            self.wanted,
            self.rules,
            folders=[self.prefix],
            raised_by=run_id,
        )
        with batch, self.journal() as journal:
            buy(self.krea, batch.state(self.krea).wanted(), run_id=run_id)
            for key in batch.plan.keys:
                parts = batch.manifest_parts(key, self.krea, journal, run_id)
                storage, schema = self.krea.open_storage(), batch.manifest_schema
                write_manifest_parts(storage, key, schema, parts, [self.prefix])
        return asked

    def outcomes(self) -> Mapping[str, GroupResult]:
        """Build ``accepted_images`` without Dagster; return the result of each group."""
        with self.journal() as journal:
            storage, folders = self.krea.open_storage(), [self.prefix]
            accepting = AcceptedTableBuilder.read(
                storage, journal, self.rules, self.wanted, folders
            )
            _, outcomes = accepting.make(self.partitions)
        return {one.name: one for one in outcomes}

    def accept(
        self, instance: dg.DagsterInstance, partitions: Sequence[str] | None = None
    ) -> dg.ExecuteInProcessResult:
        """Run ``accepted_images``."""
        keys = partitions or self.partitions
        return run_job(self.defs, instance, keys[0], keys[-1], job=f"{self.prefix}_krea_accepted")

    def journal(self) -> Any:
        return closing(Journal(f"sqlite:///{self.folder / 'krea' / 'journal.db'}"))

    def manifest(self) -> list[dict[str, Any]]:
        return self._rows("manifest")

    def accepted(self) -> list[dict[str, Any]]:
        return self._rows("accepted")

    def _rows(self, kind: str) -> list[dict[str, Any]]:
        home = self.folder / "krea" / kind / self.prefix
        tables = [pq.read_table(path) for path in sorted(home.glob("*.parquet"))]
        rows: list[dict[str, Any]] = pa.concat_tables(tables, promote_options="default").to_pylist()
        return rows

    def judge(self, verdicts: Mapping[tuple[str, int], str], reviewer: str = "ann") -> None:
        """Give verdicts on the current images of these (prompt_id, sample)."""
        rows = [row for row in self.manifest() if (row["prompt_id"], row["sample"]) in verdicts]
        assert len(rows) == len(verdicts)
        with self.journal() as journal:
            journal.verdicts.add(
                [
                    Verdict(
                        f"{random.SystemRandom().getrandbits(64):016x}",
                        row["image_sha256"],
                        verdicts[row["prompt_id"], row["sample"]],
                        reviewer,
                        row["request_key"],
                        row["prompt_id"],
                        row["sample"],
                        row["attempt"],
                        row["partition_key"],
                    )
                    for row in rows
                ]
            )

    def review(self) -> int:
        """Review all images without a verdict; return how many were rejected."""
        with self.journal() as journal:
            seen = set(journal.verdicts.current())
        verdicts = {}
        for row in self.manifest():
            if row["status"] == "stored" and row["image_sha256"] not in seen:
                bad = self._random.random() < self.rejects
                verdicts[row["prompt_id"], row["sample"]] = REJECT if bad else KEEP
        self.judge(verdicts)
        return sum(verdict == REJECT for verdict in verdicts.values())

    def tasks(self) -> list[dict[str, Any]]:
        """Return the emulator's entries of this project's purchases."""
        return bought(self.emulator, f"[{self.prefix}]")

    def kept(self) -> dict[str, int]:
        """Return the number of kept images of each prompt."""
        with self.journal() as journal:
            present = journal.verdicts.current()
        counts = dict.fromkeys((row["prompt_id"] for row in self.manifest()), 0)
        for row in self.manifest():
            verdict = present.get(row["image_sha256"])
            counts[row["prompt_id"]] += verdict is not None and verdict.verdict == KEEP
        return counts

    def rounds(self, instance: dg.DagsterInstance | None = None, most: int = 40) -> list[Round]:
        """Run and review until a run buys nothing; through Dagster where an instance is given."""
        assert self.wanted is not None
        number, found = self.wanted.number or 0, []
        missing = number * len(self.prompts["prompt_id"])
        for _ in range(most):
            before = len(self.tasks())
            if instance is None:
                self.carry()
            else:
                assert self.buy(instance).success
            now = len(self.tasks()) - before
            found.append(Round(missing, now, self.review()))
            if now == 0:
                return found
            missing = sum(max(0, number - kept) for kept in self.kept().values())
        raise AssertionError(f"still buying after {most} rounds: {found}")


def prompts_of(count: int, prefix: str, *, num_images: int = 3, **further: Any) -> dict[str, Any]:
    names = [f"{prefix}-{number:03d}" for number in range(count)]
    return {
        "prompt_id": names,
        "prompt": [f"an image for {name} [{prefix}]" for name in names],
        "num_images": pa.array([num_images] * count, pa.int32()),
        **further,
    }


def main() -> None:
    """Print the rounds of 100 prompts, and the emulator's account."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--wanted", type=int, default=3)
    parser.add_argument("--rejects", type=float, default=0.3)
    parser.add_argument("--most-images", type=int, default=30)
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        Emulator(latency_s=0.02, latency_jitter=0.0) as emulator,
        dg.DagsterInstance.local_temp(folder) as instance,
    ):
        key = "sk-of-exactly-n-Zq81"
        emulator.world.add_account(key, 10_000_000)
        studio = QuotaProject(
            Path(folder) / "studio",
            emulator,
            key,
            prompts_of(given.prompts, "studio", num_images=given.wanted),
            WantedImages(given.wanted, most_images=given.most_images),
            Rules(require_keep=True),
            rejects=given.rejects,
            seed=given.seed,
        )
        began_s = time.perf_counter()
        rounds = studio.rounds(instance)
        for number, one in enumerate(rounds, 1):
            print(
                f"round {number}: {one.missing} missing, {one.bought} bought, "
                f"{one.rejected} rejected"
            )
        result = studio.accept(instance)
        check = next(iter(result.get_asset_check_evaluations()))
        total = len(studio.tasks())
        replaced = sum(one.bought for one in rounds[1:])
        account = emulator.world.account(key)
        assert account is not None
        print(check.description)
        print(
            f"{total} bought = {rounds[0].bought} + {replaced} replaced; "
            f"{sum(one.rejected for one in rounds)} rejected; {account.charged / 1e4:g} credits; "
            f"{len(studio.accepted())} accepted; {time.perf_counter() - began_s:.1f} s"
        )


if __name__ == "__main__":
    main()
