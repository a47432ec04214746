"""Prepares a release: ``make release VERSION=0.2.0``.

Writes the version into pyproject.toml and CHANGELOG.md, builds the wheel and the sdist,
and installs each into an environment of its own, where the demo must work in an empty folder. It
commits, tags and uploads nothing, and says how. ``--build FOLDER --tag v0.2.0`` is for the workflow
that publishes a tag: it builds and checks what is committed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Final

from packaging.version import InvalidVersion, Version

ROOT: Final = Path(__file__).parents[1]
UV: Final = ROOT / ".uv" / "bin" / "uv"
#: The parts of a release in CHANGELOG.md, in this order; each may be left out.
PARTS: Final = ("Added", "Changed", "Fixed")
_UNRELEASED: Final = "## Unreleased\n"


class ReleaseError(Exception):
    """The release cannot be made; the text says why."""


def main() -> int:
    """Return 0 if the release is ready."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("version", nargs="?", help="the new version")
    parser.add_argument("--build", type=Path, default=ROOT / "dist", help="folder for the files")
    parser.add_argument("--tag", help="check that this tag is the version that is committed")
    asked = parser.parse_args()
    try:
        if asked.tag:
            check_tag(asked.tag, *texts())
            version = asked.tag.removeprefix("v")
        elif asked.version:
            version = asked.version
            write_version(version)
        else:
            parser.error("give a version, or --tag")
        for file in build(asked.build, version):
            check_installed(file, version)
    except (ReleaseError, subprocess.CalledProcessError) as error:
        print(f"Not released: {error}", file=sys.stderr)
        print(
            "`git checkout pyproject.toml CHANGELOG.md` undoes what was written.", file=sys.stderr
        )
        return 1
    if asked.version:
        tag = f"git tag -a v{version} -m v{version}"
        print(f"git commit -am 'Version {version}' && {tag} && git push --follow-tags")
    return 0


def texts() -> tuple[str, str]:
    """Return pyproject.toml and CHANGELOG.md."""
    project, changelog = (ROOT / name for name in ("pyproject.toml", "CHANGELOG.md"))
    return project.read_text(encoding="utf-8"), changelog.read_text(encoding="utf-8")


def write_version(version: str) -> None:
    """Write the version and its date. Raises ReleaseError if something is not committed."""
    changed = _run("git", "status", "--porcelain", "--untracked-files=no")
    if changed:
        raise ReleaseError(f"commit this first:\n{changed}")
    project, changelog = texts()
    today = datetime.now(timezone.utc).date()
    released = changelog_of(changelog, version, today)
    (ROOT / "pyproject.toml").write_text(project_of(project, version), encoding="utf-8")
    (ROOT / "CHANGELOG.md").write_text(released, encoding="utf-8")


def project_of(project: str, version: str) -> str:
    """Return pyproject.toml with the new version. Raises ReleaseError if it is no new one."""
    before = version_in(project)
    try:
        if Version(version) < Version(before):
            raise ReleaseError(f"{version} is older than {before}, the version in pyproject.toml")
    except InvalidVersion:
        raise ReleaseError(f"{version!r} is no version, as 0.2.0 is one") from None
    return project.replace(f'\nversion = "{before}"\n', f'\nversion = "{version}"\n', 1)


def changelog_of(changelog: str, version: str, day: date) -> str:
    """Return CHANGELOG.md with its unreleased part under the new version.

    Raises ReleaseError if nothing is unreleased, a part has another name than ``PARTS``, or the
    version is in it already.
    """
    if f"\n## {version} " in changelog:
        raise ReleaseError(f"CHANGELOG.md has {version} already")
    if _UNRELEASED not in changelog:
        raise ReleaseError(f"CHANGELOG.md has no line {_UNRELEASED.strip()!r}")
    before, _, after = changelog.partition(_UNRELEASED)
    unreleased = re.split(r"^## ", after, flags=re.MULTILINE)[0]
    found = re.findall(r"^### (.*)$", unreleased, flags=re.MULTILINE)
    if not re.search(r"^- ", unreleased, flags=re.MULTILINE) or not found:
        raise ReleaseError("CHANGELOG.md says of nothing that it was added, changed or fixed")
    if found != [part for part in PARTS if part in found]:
        raise ReleaseError(f"the parts in CHANGELOG.md are {found}; use {', '.join(PARTS)}")
    return f"{before}{_UNRELEASED}\n## {version} ({day.isoformat()})\n{after}"


def check_tag(tag: str, project: str, changelog: str) -> None:
    """Raise ReleaseError if a tag is not the version of both files."""
    version = version_in(project)
    if tag != f"v{version}":
        raise ReleaseError(f"the tag is {tag}, and pyproject.toml has {version}")
    if f"\n## {version} (" not in changelog:
        raise ReleaseError(f"CHANGELOG.md has no part for {version}; use make release")


def version_in(project: str) -> str:
    """Return the version in pyproject.toml."""
    (version,) = re.findall(r'^version = "([^"]+)"$', project, flags=re.MULTILINE)
    return str(version)


def build(folder: Path, version: str) -> list[Path]:
    """Build the sdist, and the wheel from it, into a folder; return both."""
    _run(
        UV, "build", "--quiet", "--no-build-isolation", "--python", sys.executable,
        "--out-dir", folder.absolute(), ROOT,
    )  # fmt: skip
    files = [
        folder.absolute() / f"krea_dagster-{version}{end}"
        for end in (".tar.gz", "-py3-none-any.whl")
    ]
    if missing := [file.name for file in files if not file.exists()]:
        raise ReleaseError(f"the build made no {', '.join(missing)}")
    return files


def check_installed(file: Path, version: str) -> None:
    """Install a file into a new environment, and run the demo in an empty folder."""
    with tempfile.TemporaryDirectory(prefix="krea-release-") as name:
        empty, environment = Path(name, "empty"), Path(name, "environment")
        empty.mkdir()
        _run(UV, "venv", "--quiet", "--python", sys.executable, environment)
        _run(UV, "pip", "install", "--quiet", "--python", environment / "bin" / "python", file)
        command = environment / "bin" / "krea-dagster"
        said = _run(command, "--version", folder=empty)
        if not said.endswith(f" {version}"):
            raise ReleaseError(f"{file.name}: its version is {said!r}")
        shown = _run(command, "demo", folder=empty)
        figures = re.findall(r"^delivered +(\d+) *$", shown, flags=re.MULTILINE)
        if figures != ["66"]:
            raise ReleaseError(f"{file.name}: the demo delivered {figures}, and not 66 images")
        print(f"{file.name}: installed, {said}; the demo delivered 66 images in an empty folder")


def _run(*command: str | Path, folder: Path = ROOT) -> str:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV", "DAGSTER_HOME")
        and not name.startswith(("KREA_", "EVOLINK_"))
    }
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=kept,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
