"""The package's public names, and what importing it costs."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest

import krea_dagster
import krea_dagster.emulator


def loaded_after(statement: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_the_public_names_are_sorted_and_listed_by_dir() -> None:
    assert krea_dagster.__all__ == sorted(krea_dagster.__all__)
    assert set(krea_dagster.__all__) <= set(dir(krea_dagster))


@pytest.mark.parametrize("name", krea_dagster.__all__)
def test_every_public_name_can_be_imported_and_has_a_docstring_of_its_own(name: str) -> None:
    value = getattr(krea_dagster, name)
    assert inspect.getdoc(value)
    if inspect.isclass(value):
        assert value.__doc__, "the docstring is its own, not one that it inherits"
    assert value.__name__ == name
    assert value.__module__.startswith("krea_dagster.")


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'KreaClinet'"):
        _ = krea_dagster.KreaClinet
    with pytest.raises(ImportError, match="KreaClinet"):
        exec("from krea_dagster import KreaClinet")  # noqa: S102 - mypy would refuse it in clear


def test_importing_the_package_is_trivial() -> None:
    loaded = loaded_after("import krea_dagster")
    heavy = {"dagster", "pandas", "pyarrow", "httpx", "sqlalchemy", "PIL", "rich", "anyio"}
    assert not loaded & heavy
    assert {name for name in loaded if name.startswith("krea_dagster")} == {"krea_dagster"}


def test_the_emulator_imports_nothing_else_of_ours_and_no_dagster() -> None:
    every = ", ".join(krea_dagster.emulator.__all__)
    loaded = loaded_after(f"from krea_dagster.emulator import {every}")
    ours = {name for name in loaded if name.startswith("krea_dagster.")}
    assert {name for name in ours if not name.startswith("krea_dagster.emulator")} == set()
    assert "krea_dagster.emulator.server" in ours
    assert "dagster" not in loaded


def test_the_help_of_the_command_needs_no_dagster() -> None:
    assert "dagster" not in loaded_after("import krea_dagster.cli")


def test_the_library_is_registered_with_dagster() -> None:
    from dagster_shared.libraries import DagsterLibraryRegistry  # noqa: PLC0415 - two seconds

    import krea_dagster.plugin  # noqa: PLC0415 - what registers it

    assert DagsterLibraryRegistry.get()["krea-dagster"] == krea_dagster.__version__
