"""The shipped files of a cluster agree with each other and with the settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from krea_dagster import Settings
from krea_dagster.application.settings import variable_of

FOLDER: Final = Path(__file__).parents[2] / "examples" / "cluster"
FILES: Final = sorted(
    path for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".pyc"
)
KNOWN: Final = {variable_of(field) for field in Settings.model_fields.values()}


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_files_name_only_variables_that_there_are(path: Path) -> None:
    named = set(re.findall(r"\b(?:KREA|EVOLINK)_[A-Z_]+\b", path.read_text(encoding="utf-8")))
    of_the_workspace = {"KREA_CODE_HOST"}
    assert named - of_the_workspace <= KNOWN


def test_a_message_is_not_sent_again_before_its_run_is_ended() -> None:
    dagster, celery = read("dagster.yaml"), read("celery.yaml")
    launcher = dagster["run_launcher"]["config"]
    worker = celery["execution"]["config"]
    options = worker["config_source"]["broker_transport_options"]
    assert options["visibility_timeout"] > dagster["run_monitoring"]["max_runtime_seconds"]
    assert launcher["config_source"]["broker_transport_options"] == options
    assert (launcher["broker"], launcher["backend"]) == (worker["broker"], worker["backend"])


def test_as_many_runs_go_on_as_the_workers_have_places() -> None:
    workers = read("compose.yaml")["services"]["worker"]["deploy"]["replicas"]
    places = read("celery.yaml")["execution"]["config"]["config_source"]["worker_concurrency"]
    runs = read("dagster.yaml")["concurrency"]["runs"]["max_concurrent_runs"]
    assert runs == workers * places


def test_every_process_of_the_composition_has_the_variables_of_the_settings() -> None:
    services = read("compose.yaml")["services"]
    instance = (FOLDER / "dagster.yaml").read_text() + (FOLDER / "workspace.yaml").read_text()
    needed = set(re.findall(r"env: (\w+)", instance))
    for name in ("code", "webserver", "daemon", "worker"):
        assert needed <= set(services[name]["environment"]), name


def test_the_image_has_every_file_that_its_commands_name() -> None:
    dockerfile = (FOLDER / "Dockerfile").read_text()
    for service in read("compose.yaml")["services"].values():
        for name in re.findall(r"\S+\.(?:py|yaml)", str(service.get("command", ""))):
            assert f"examples/cluster/{name}" in dockerfile
