"""Three prompt tables on one journal, and a run of one of them as a process that can be killed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import dagster as dg

from krea_dagster import KreaResource, build_krea_definitions, build_krea_tables
from tests.dagster_bench import QUIET, write_table

#: The tables' prefixes. Their rows have the same prompt_ids, and their partition the same key.
TABLES: Final = ("ads", "shelf/books", "cards")
ROWS: Final = ("ash", "birch", "cedar")
#: The job of each table.
JOBS: Final = {prefix: f"{prefix.replace('/', '_')}_krea_images" for prefix in TABLES}


def options_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The arguments of each table; ``write`` makes their files."""
    return {
        prefix: {
            "prompts": str(folder / f"{prefix.replace('/', '-')}.parquet"),
            "partition_by": "hash:1",
            "curation": False,
        }
        for prefix in TABLES
    }


def write(folder: Path) -> None:
    """Write the three prompt tables."""
    for prefix, options in options_of(folder).items():
        table = {"prompt_id": ROWS, "prompt": [f"{name} of {prefix}" for name in ROWS]}
        write_table(
            Path(options["prompts"]),
            {**table, "size": ["1:2"] * len(ROWS), "campaign": [f"{prefix} {n}" for n in ROWS]},
        )


def resource(folder: Path, url: str, **settings: Any) -> KreaResource:
    return KreaResource(
        api_key="emulator",
        base_url=url,
        expected_latency_s=0.02,
        storage=str(folder / "krea"),
        **settings,
    )


def together(
    folder: Path,
    url: str,
    *,
    by: Sequence[str] = (),
    soft_budgets: Sequence[str] = (),
    **settings: Any,
) -> dg.Definitions:
    """The three tables in one call: one spend, and one salvage."""
    return build_krea_tables(
        options_of(folder),
        krea=resource(folder, url, **settings),
        spend_by=by,
        soft_budgets=soft_budgets,
    )


def separately(folder: Path, url: str, *, spend: Sequence[str] = ()) -> dg.Definitions:
    """The three tables as merged definitions: each has a salvage of its own, these have a spend."""
    krea = resource(folder, url)
    return dg.Definitions.merge(
        *(
            build_krea_definitions(**options, krea=krea, key_prefix=prefix, spend=prefix in spend)
            for prefix, options in options_of(folder).items()
        )
    )


def main() -> None:
    """Run the job of a table, until the end or a kill: FOLDER URL JOB."""
    folder, url, job = sys.argv[1:]
    with dg.DagsterInstance.ephemeral() as instance:
        together(Path(folder), url).resolve_job_def(job).execute_in_process(
            instance=instance, partition_key="bucket-000", run_config=QUIET
        )


if __name__ == "__main__":
    main()
