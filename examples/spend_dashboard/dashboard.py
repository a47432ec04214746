"""What images cost: DuckDB reads the manifests, by day, campaign and status.

``python examples/spend_dashboard/dashboard.py`` makes some images first, so that there is
something to read.
"""

import os
from pathlib import Path

import dagster as dg
import duckdb
import pandas as pd

from krea_dagster import KreaResource, build_krea_definitions

CAMPAIGNS = {"autumn": "a market in autumn, stall {}", "ski": "skiers on a lift, chair {}"}

#: A row is an image; twins share a request_key, and were charged once.
IMAGES = """
    create view images as
    select *, row_number() over (partition by request_key order by partition_key, prompt_id) = 1
        as first_of_twins
    from manifests
"""
BY_DAY = """
    select day, sum(credits_charged) filter (first_of_twins) as credits,
        count(*) filter (status = 'stored') as delivered
    from images group by day order by day
"""
BY_CAMPAIGN = """
    select campaign,
        sum(credits_charged) filter (first_of_twins) as credits,
        count(*) filter (status = 'stored') as delivered,
        round(credits / nullif(delivered, 0), 3) as credits_per_delivered
    from images group by campaign order by campaign
"""
BY_STATUS = """
    select status, coalesce(error_code, '') as error_code, count(*) as images,
        sum(credits_charged) filter (first_of_twins) as credits
    from images group by all order by all
"""


def make_images(folder: Path) -> None:
    """Buy the images of two campaigns on two days."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "prompt_id": f"{campaign}-{number}",
            "prompt": prompt.format(number),
            "campaign": campaign,
            "day": f"2025-03-0{3 + number % 2}",
            "quality": "2K" if (campaign, number) == ("ski", 0) else "1K",
        }
        for campaign, prompt in CAMPAIGNS.items()
        for number in range(4)
    ]
    rows[3]["prompt"] = "a prompt that is refused [emulator: refuse]"
    pd.DataFrame(rows).to_parquet(folder / "prompts.parquet")
    defs = build_krea_definitions(
        prompts=str(folder / "prompts.parquet"),
        partition_by="day:day",
        krea=KreaResource(emulator=True, storage=str(folder / "krea")),
        checks=(),
    )
    job = defs.resolve_job_def("krea_images")
    with dg.DagsterInstance.local_temp(str(folder)) as instance:
        for day in ("2025-03-03", "2025-03-04"):
            job.execute_in_process(
                instance=instance,
                partition_key=day,
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            )


def show(folder: Path) -> None:
    """Print the tables. The manifests are plain files: no code of the package is needed."""
    connection = duckdb.connect()
    files = str(folder / "krea" / "manifest" / "*.parquet")
    connection.read_parquet(files, union_by_name=True).create_view("manifests")
    connection.execute(IMAGES)
    for title, query in (("day", BY_DAY), ("campaign", BY_CAMPAIGN), ("status", BY_STATUS)):
        print(f"Spend by {title}")
        print(connection.sql(query).df().to_string(index=False), end="\n\n")


if __name__ == "__main__":
    here = Path(os.environ.get("EXAMPLE_FOLDER", "data/examples/spend_dashboard")).absolute()
    make_images(here)
    show(here)
