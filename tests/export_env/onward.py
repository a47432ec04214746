"""Runs the code of docs/how-to/onward.md: the manifest read by other tools, and written onward.

Two programs in one: it makes an environment with the packages that the page names, and runs itself
in it (``--inside``), in a folder with a prompt table. ``ONWARD_PYTHON`` names a Python that
has the packages already.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from PIL import Image

ROOT = Path(__file__).parents[2]
UV = ROOT / ".uv" / "bin" / "uv"
PAGE = ROOT / "docs" / "how-to" / "onward.md"
PACKAGES = ("dagster-deltalake", "dagster-iceberg", "pyiceberg[sql-sqlite]", "pylance", "datasets")
IMAGES = 6


def main() -> int:
    """Return 0 if all code of the page does what the page says."""
    if sys.argv[1:] == ["--inside"]:
        inside()
        return 0
    with tempfile.TemporaryDirectory(prefix="krea-onward-") as folder:
        python = os.environ.get("ONWARD_PYTHON") or make_environment(Path(folder))
        kept = {name: value for name, value in os.environ.items() if not name.startswith("KREA_")}
        variables = {**kept, "PYTHONPATH": str(ROOT), "HF_HOME": folder, "HF_HUB_OFFLINE": "1"}
        command = [python, str(Path(__file__)), "--inside"]
        return subprocess.run(command, cwd=folder, env=variables, check=False).returncode


def inside() -> None:
    Path("data").mkdir()
    pq.write_table(
        pa.table({"prompt": [f"lighthouse {number}" for number in range(IMAGES)]}),
        "data/prompts.parquet",
    )
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    readers = [block for block in blocks if "data/krea/manifest" in block]
    warnings.simplefilter("ignore")  # of packages that are not ours
    names: dict[str, Any] = {}
    for block in blocks:
        if block not in readers:
            run(block, names)
    with dg.instance_for_test() as instance:
        for _ in range(2):
            materialize_all(names, instance)
    for block in readers:
        run(block, names)
    stored = {row["request_key"] for row in names["frame"].to_dict("records")}
    assert len(stored) == IMAGES, stored
    counts = counts_of(names)
    assert set(counts.values()) == {IMAGES}, counts
    print(", ".join(f"{name}: {count}" for name, count in counts.items()))


def materialize_all(names: dict[str, Any], instance: Any) -> None:
    """Each partition, as a backfill does, and then what has no partitions."""
    defs = names["defs"]
    apart = dg.AssetKey("images_in_lance")
    keys = [asset.key for asset in defs.assets if isinstance(asset, dg.AssetsDefinition)]
    runs: list[dict[str, Any]] = [
        {"selection": [key for key in keys if key != apart], "partition_key": partition}
        for partition in ("bucket-000", "bucket-001")
    ]
    for run_of in (*runs, {"selection": [apart]}):
        done = dg.materialize(defs.assets, resources=defs.resources, instance=instance, **run_of)
        assert done.success


def counts_of(names: dict[str, Any]) -> dict[str, int]:
    """How many images each tool finds."""
    with_pictures = names["dataset"]
    assert isinstance(with_pictures[0]["image"], Image.Image)
    iceberg = names["load_catalog"]("krea", **names["catalogue"])
    in_lance = names["lance"].dataset("data/images.lance")
    assert in_lance.to_table(columns=["image"])["image"][0].as_py()
    return {
        "pandas": len(names["frame"]),
        "Polars": names["lazy"].collect().height,
        "DuckDB": sum(count for _, count in names["rows"].fetchall()),
        "datasets": len(with_pictures),
        "Delta": DeltaTable("data/delta/public/images_in_delta").to_pyarrow_table().num_rows,
        "Iceberg": iceberg.load_table("krea.images_in_iceberg").scan().to_arrow().num_rows,
        "Lance": in_lance.count_rows(),
    }


def run(block: str, names: dict[str, Any]) -> None:
    # Not with this file's own __future__: Dagster cannot read annotations that are text.
    exec(compile(block, PAGE.name, "exec", dont_inherit=True), names)  # noqa: S102 - our own page


def make_environment(folder: Path) -> str:
    """The package's own requirements as locked, and the newest of the others that they allow."""
    python = folder / "environment" / "bin" / "python"
    bare = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    for command in (
        ["venv", "--quiet", "--python", sys.executable, str(folder / "environment")],
        [
            *("pip", "install", "--quiet", "--python", str(python)),
            *("--requirements", str(ROOT / "pyproject.toml"), "--extra", "polars"),
            *("--constraints", str(ROOT / "requirements.lock"), *PACKAGES),
        ],
        # Dagster's library registry asks for its version.
        ["pip", "install", "--quiet", "--python", str(python), "--no-deps", str(ROOT)],
    ):
        subprocess.run([str(UV), *command], check=True, env=bare)
    return str(python)


if __name__ == "__main__":
    sys.exit(main())
