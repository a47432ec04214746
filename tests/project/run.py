"""Runs the commands of docs/how-to/dg-project.md, with the package installed as a wheel.

A new environment, a new project, and nothing of this checkout except the wheel that is built from
it. The versions are those of requirements.lock, which uv has in its cache.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).parents[2]
UV = ROOT / ".uv" / "bin" / "uv"
PAGE = ROOT / "docs" / "how-to" / "dg-project.md"
PACKAGES = ("create-dagster", "dagster-dg-cli")


def main() -> int:
    """Return 0 if everything is as the page says."""
    steps = commands(PAGE.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="krea-project-") as folder:
        home = Path(folder)
        environment = install(home)
        bash("\n".join(steps), home, environment)
        (project,) = {path.parent.parent for path in home.glob("*/data/krea")}

        first = manifest(project)
        assert len(first) == 4, first
        assert {row["status"] for row in first} == {"stored"}, first
        assert not any(row["reused"] for row in first), first
        for row in first:
            with Image.open(row["image_path"]) as image:
                image.load()
                assert image.size == (row["width"], row["height"]), row
        assert Path(first[0]["image_path"]).is_relative_to(project)

        # As on the page, in the same shell: the settings first, and the last command again.
        settings = [step for step in steps if step.startswith(("cd ", "export "))]
        bash("\n".join([*settings, steps[-1]]), home, environment)
        second = manifest(project)
        assert all(row["reused"] for row in second), second
        paid = [(row["task_id"], row["image_sha256"], row["credits_charged"]) for row in first]
        assert paid == [
            (row["task_id"], row["image_sha256"], row["credits_charged"]) for row in second
        ]
    print(f"{len(first)} images in a project of its own; launched again, nothing was bought.")
    return 0


def commands(page: str) -> list[str]:
    """The commands of the page, line by line."""
    (block,) = re.findall(r"```console\n(.*?)```", page, flags=re.DOTALL)
    lines = [line for line in block.splitlines() if line]
    for wanted in ("create-dagster project ", "dg scaffold defs ", "dg check yaml", "dg launch "):
        assert any(line.startswith(wanted) for line in lines), f"{wanted}is not on the page"
    assert lines[-1].startswith("dg launch "), lines
    return lines


def install(home: Path) -> dict[str, str]:
    """Build the wheel, install it with dg in a new environment, and return its variables."""
    wheels, venv = home / "wheels", home / "environment"
    uv(
        "build", "--wheel", "--no-build-isolation", "--python", sys.executable,
        "--out-dir", str(wheels), str(ROOT),
    )  # fmt: skip
    (wheel,) = wheels.glob("krea_dagster-*.whl")
    uv("venv", "--python", sys.executable, str(venv))
    uv(
        "pip", "install", "--python", str(venv / "bin" / "python"),
        "--constraints", str(ROOT / "requirements.lock"), str(wheel), *PACKAGES,
    )  # fmt: skip
    ours = ("PYTHONPATH", "DAGSTER_HOME", "EVOLINK_API_KEY")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ours and not name.startswith("KREA_")
    }
    path = f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "VIRTUAL_ENV": str(venv), "PATH": path}


def uv(*arguments: str) -> None:
    subprocess.run([str(UV), "--quiet", *arguments], check=True)


def bash(script: str, folder: Path, environment: dict[str, str]) -> None:
    """Run commands in one shell, each shown; the first failure ends it."""
    subprocess.run(
        ["/bin/bash", "-euxo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        check=True,
        timeout=600,
    )


def manifest(project: Path) -> list[dict[str, Any]]:
    """The rows of all partitions."""
    files = sorted((project / "data" / "krea" / "manifest").glob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    return sorted(rows, key=lambda row: str(row["prompt_id"]))


if __name__ == "__main__":
    sys.exit(main())
