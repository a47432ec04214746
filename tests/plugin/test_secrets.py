"""The key stays where it was put: in no log, event, metadata, file, text, or page of the UI."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest
from dagster._core.remote_representation.external_data import RepositorySnap
from dagster_shared.serdes import serialize_value

from krea_dagster import KreaResource, build_krea_definitions, definitions_from_environment
from krea_dagster.application.settings import Settings
from krea_dagster.emulator import Emulator
from tests.dagster_bench import OpenAccount, run_job, write_table
from tests.plugin.bought_run import MARKER, BoughtRun

PASSWORD = "hunter2-of-the-journal"


def told_to_the_ui(defs: dg.Definitions) -> str:
    """What the code server sends to Dagster's webserver about a code location.

    The webserver asks for exactly this; there is no public name for it.
    """
    return serialize_value(RepositorySnap.from_def(defs.get_repository_def()))


def holding(folder: Path, text: str) -> list[Path]:
    """The files below a folder that contain a text."""
    wanted = text.encode()
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return [path for path in files if wanted in path.read_bytes()]


def test_the_key_is_in_no_file_of_dagster_and_in_none_of_what_was_made(
    bought_run: BoughtRun, dagster_home: Path, emulator: Emulator
) -> None:
    # The search finds what is there: the run in Dagster's files, the prompts in the journal.
    assert holding(dagster_home, bought_run.result.run_id)
    assert holding(bought_run.storage, MARKER)

    assert holding(dagster_home, bought_run.api_key) == []
    assert holding(bought_run.storage, bought_run.api_key) == []
    assert emulator.stats(tasks=False)["key_leaks"] == 0


def test_the_ui_is_told_the_name_of_the_variable_and_not_the_key(bought_run: BoughtRun) -> None:
    told = told_to_the_ui(bought_run.defs)
    assert "KEY_OF_THE_RUN" in told
    assert bought_run.api_key not in told


def test_printing_the_resource_inside_a_run_shows_no_key(
    tmp_path: Path,
    instance: dg.DagsterInstance,
    open_account: OpenAccount,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = open_account()
    monkeypatch.setenv("KEY_TO_BE_PRINTED", key)
    monkeypatch.setenv("JOURNAL_TO_BE_PRINTED", f"postgresql://me:{PASSWORD}@db/krea")
    seen: list[str] = []

    @dg.asset
    def printing(krea: dg.ResourceParam[KreaResource]) -> None:
        assert krea.api_key == key, "inside a run the resource holds the real key"
        seen.extend([repr(krea), str(krea), f"{krea}", f"{krea!r}"])

    krea = KreaResource(
        api_key=dg.EnvVar("KEY_TO_BE_PRINTED"),
        journal_url=dg.EnvVar("JOURNAL_TO_BE_PRINTED"),
        storage=str(tmp_path),
    )
    defs = dg.Definitions(
        assets=[printing],
        jobs=[dg.define_asset_job("printing_job", selection=[printing])],
        resources={"krea": krea},
    )
    job = defs.resolve_job_def("printing_job")
    assert job.execute_in_process(instance=instance).success
    assert len(seen) == 4
    assert key not in "".join(seen)
    assert PASSWORD not in "".join(seen)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """An environment with two secrets in it: the key, and a journal behind a password."""
    values = {
        "EVOLINK_API_KEY": "sk-in-the-environment-7741",
        "KREA_JOURNAL_URL": f"postgresql+psycopg://me:{PASSWORD}@db.internal/krea",
        "KREA_PROMPTS": str(tmp_path / "prompts.parquet"),
        "KREA_STORAGE": str(tmp_path / "krea"),
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return values


def test_neither_secret_of_the_environment_is_told_to_the_ui(environment: dict[str, str]) -> None:
    told = told_to_the_ui(definitions_from_environment())
    assert "EVOLINK_API_KEY" in told
    assert "KREA_JOURNAL_URL" in told
    assert environment["EVOLINK_API_KEY"] not in told
    assert PASSWORD not in told


def test_a_key_for_an_emulator_elsewhere_is_not_told_to_the_ui_either(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOLINK_BASE_URL", "http://127.0.0.1:9")
    told = told_to_the_ui(definitions_from_environment())
    assert "EVOLINK_API_KEY" in told
    assert environment["EVOLINK_API_KEY"] not in told


def test_no_password_of_a_place_is_told_to_the_ui(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KREA_PROMPTS", "KREA_STORAGE"):
        monkeypatch.setenv(name, f"ftp://me:{PASSWORD}/x@files.internal/krea?signature={PASSWORD}")
    told = told_to_the_ui(definitions_from_environment()) + repr(Settings.from_environment())
    assert environment["KREA_JOURNAL_URL"] not in told
    assert "ftp://files.internal/krea" in told
    assert PASSWORD not in told


@pytest.mark.usefixtures("environment")
def test_the_settings_can_be_printed() -> None:
    settings = Settings.from_environment()
    assert PASSWORD in settings.journal_url
    assert PASSWORD not in repr(settings)
    assert "sk-in-the-environment" not in repr(settings)


def test_an_env_var_is_read_outside_a_run_too(
    tmp_path: Path, emulator: Emulator, open_account: OpenAccount, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY_IN_A_NOTEBOOK", open_account())
    monkeypatch.setenv("STORAGE_IN_A_NOTEBOOK", str(tmp_path / "krea"))
    krea = KreaResource(
        api_key=dg.EnvVar("KEY_IN_A_NOTEBOOK"),
        storage=dg.EnvVar("STORAGE_IN_A_NOTEBOOK"),
        base_url=emulator.url,
    )
    krea.krea().check()
    assert (tmp_path / "krea" / "journal.db").exists()


def test_a_journal_that_cannot_be_reached_is_told_without_its_password(
    tmp_path: Path,
    instance_on_disk: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
    dagster_home: Path,
) -> None:
    url = f"postgresql+psycopg://me:{PASSWORD}@127.0.0.1:9/krea?connect_timeout=2"
    monkeypatch.setenv("JOURNAL_ELSEWHERE", url)
    defs = build_krea_definitions(
        prompts=write_table(tmp_path / "prompts.parquet", {"prompt": ["for a journal elsewhere"]}),
        partition_by="hash:1",
        krea=KreaResource(
            api_key="emulator",
            base_url="http://127.0.0.1:9",
            journal_url=dg.EnvVar("JOURNAL_ELSEWHERE"),
            storage=str(tmp_path / "krea"),
        ),
        key_prefix="elsewhere",
    )
    result = run_job(defs, instance_on_disk, "bucket-000", job="elsewhere_krea_images")
    assert not result.success
    assert holding(dagster_home, "could not open the journal postgresql+psycopg://127.0.0.1:9/krea")
    assert holding(dagster_home, PASSWORD) == []
