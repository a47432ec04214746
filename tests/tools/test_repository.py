"""The files that a host of repositories and its robots read: they name what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
YAML = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml")
)


def test_each_file_is_yaml_and_calls_targets_of_the_makefile() -> None:
    assert len(YAML) >= 5
    called = set()
    for name in YAML:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert isinstance(yaml.safe_load(text), dict), name
        called |= set(re.findall(r"(?:run: |&& |entry: )make ([a-z-]+)", text))
    (servers,) = re.findall(r"target: \[(.*)\]", (ROOT / ".github/workflows/test.yml").read_text())
    called |= set(servers.split(", "))
    assert {"lint", "test", "matrix-test", "services-test"} <= called <= TARGETS


def test_the_matrix_and_the_readme_have_the_versions_of_the_classifiers() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    assert workflow["jobs"]["matrix"]["strategy"]["matrix"]["python"] == declared
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"python3 ({declared[0]} to {declared[-1]})" in readme


@pytest.mark.parametrize("name", ["ci", "makefile"])
def test_nothing_that_tests_is_left_out(name: str) -> None:
    """By CI, and by `make test-all`."""
    tests = {target for target in TARGETS if target.endswith("-test")}
    if name == "ci":
        # Only commands: titles of steps and comments name targets too.
        text = (ROOT / ".ci" / "run").read_text()
        called = set(re.findall(r"^ *make ([a-z-]+)", text, re.MULTILINE))
    else:
        (line,) = re.findall(r"^test-all: (.*?)  ##", (ROOT / "Makefile").read_text(), re.MULTILINE)
        called = set(line.split())
    assert tests <= called
