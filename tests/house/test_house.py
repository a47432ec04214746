"""The package's structure: its imports, its names and its words. ``measure.py`` has the figures."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.house.measure import (
    circles_of,
    class_names,
    find_tests_without_assert,
    import_graph,
    imports_of,
    measure,
    module_of,
    private_words_of,
    prose_of,
    python_files,
)

ROOT = Path(__file__).parents[2]


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Also inside functions, which import-linter reads in the same way."""
    assert circles_of(import_graph(ROOT)) == []


def test_no_class_name_has_two_meanings() -> None:
    twice = {name: modules for name, modules in class_names(ROOT).items() if len(modules) > 1}
    assert twice == {}


def test_comments_and_strings_use_the_words_of_the_field() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {word}"
        for path in python_files(ROOT / "krea_dagster")
        for line, word in private_words_of(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_every_test_asserts_something() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in python_files(ROOT / "tests")
        for name in find_tests_without_assert(path.read_text(encoding="utf-8"))
    ]
    assert found == []


# -- measure.py -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("graph", "circles"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"a"}, "c": {"a"}}, [["a", "b"]]),
        (
            {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"e"}, "e": {"d"}},
            [["a", "b", "c"], ["d", "e"]],
        ),
    ],
)
def test_circles_are_found(graph: dict[str, set[str]], circles: list[list[str]]) -> None:
    assert sorted(circles_of(graph)) == circles


def test_imports_are_those_of_the_package_also_inside_functions() -> None:
    source = """
import os
from krea_dagster import errors
from krea_dagster.models import ImageRequest

def later():
    import krea_dagster.redact
"""
    known = {f"krea_dagster.{name}" for name in ("errors", "models", "redact", "own", "cli")}
    found = imports_of(ast.parse(source), "krea_dagster.own", known)
    assert found == {f"krea_dagster.{name}" for name in ("errors", "models", "redact")}


def test_a_module_is_named_by_its_path(tmp_path: Path) -> None:
    package = tmp_path / "krea_dagster" / "api"
    (package / "__pycache__").mkdir(parents=True)
    for name in ("__init__.py", "wire.py", "__pycache__/wire.py"):
        (package / name).touch()
    modules = [module_of(path, tmp_path) for path in python_files(tmp_path)]
    assert modules == ["krea_dagster.api", "krea_dagster.api.wire"]


def test_prose_is_comments_and_strings_with_their_lines() -> None:
    source = '"""A module."""\nvalue = 1  # a comment\ntext = f"some {value} text"\n'
    lines = [line for line, _ in prose_of(source)]
    texts = " ".join(text for _, text in prose_of(source))
    assert set(lines) == {1, 2, 3}
    assert all(word in texts for word in ("A module.", "a comment", "some"))


def test_private_words_are_found_in_prose_and_not_in_names_or_fixed_texts() -> None:
    source = 'pictures = 1\n#: Whatever is at hand.\nroute = "/emulator/books"\n#: whatever\n'
    assert private_words_of(source) == [(2, "at hand"), (2, "Whatever"), (4, "whatever")]


@pytest.mark.parametrize(
    "body",
    [
        "assert True",
        "with pytest.raises(ValueError): int('')",
        "expect(page).to_be_visible()",
        "engine.assert_accounts_agree()",
        "dg.Definitions.validate_loadable(defs)",
        "helper()",
    ],
)
def test_a_test_asserts_by_any_of_the_conventions(body: str) -> None:
    source = f"def helper():\n    assert True\n\ndef test_a():\n    {body}\n"
    assert find_tests_without_assert(source) == []


def test_a_test_that_only_calls_asserts_nothing() -> None:
    assert find_tests_without_assert("async def test_a():\n    call()\n") == ["test_a"]


def test_every_figure_has_a_value() -> None:
    figures = dict(measure(ROOT))
    assert int(figures["files"]) > 100
    assert all(figures.values())
