"""Each fault of the emulator, and the outcome of the request.

One run per kind of fault, with one request for each fault, so that a fault is also shown to
harm no other row. The emulator's list of faults must be covered in full.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from krea_dagster.emulator import FAULTS
from krea_dagster.engine import policy
from krea_dagster.engine.run.latency import Latencies
from krea_dagster.engine.run.report import RunReport
from krea_dagster.engine.states import Event, State
from krea_dagster.models import ImageRequest
from tests.engine.harness import (
    EngineHarness,
    make_request,
    make_requests,
    open_harness,
    to_requested,
)

#: Arguments of faults, to be quick.
ARGUMENTS: Mapping[str, float | str] = {
    "delay_create": 0.2,
    "paid_outcome_unknown": 0.3,
    "429": 0,
    "429_date": 0,
    "read_429": 0,
    "read_429_date": 0,
    "read_delay": 0.1,
    "batch_429": 0,
    "batch_429_date": 0,
    "batch_delay": 0.1,
    "file_429": 0,
    "file_429_date": 0,
    "file_delay": 0.1,
    "slow_task": 0.3,
    "fail": "invalid_parameters",
    # Addresses to which no server may send a reader; nothing connects to them.
    "private_link": "http://169.254.169.254/file.png",
    "redirect_private": "http://169.254.169.254/file.png",
}

#: Faults that end all buying; each has a test in test_runner_stops.py.
STOPPING = frozenset({"unauthorized", "insufficient_quota", "model_denied"})

#: Faults that need a person; each has a test in test_runner_odd_answers.py.
APART = frozenset({"repeated_id"})

#: The outcome of a request whose first POST met the fault, if it is not bought.
CREATE_ENDS: Mapping[str, str] = {
    "upper_case_code": "refused",
    "content_refused": "refused",
    "too_large_413": "refused",
    "unsupported_415": "refused",
}
#: Answers after which it is certain that nothing was created, so that no outcome is unknown.
CERTAIN = frozenset(
    {
        "idempotency_conflict",
        "429",
        "429_date",
        "429_no_retry_after",
        "429_empty",
        "delay_create",
        "ignore_idempotency",
    }
) | frozenset(CREATE_ENDS)

#: The outcome of a task with the fault: its state and the error's code.
TASK_ENDS: Mapping[str, tuple[str, str | None]] = {
    "fail": ("failed", "invalid_parameters"),
    "fail_bare": ("failed", "content_policy_violation"),
    "unknown_error_code": ("failed", "engine_misaligned"),
    "cancelled": ("failed", "request_cancelled"),
    "stuck": ("submitted", None),
    "unknown_final_status": ("submitted", None),
    "vanished": ("expired", "task_not_found"),
    "private_link": ("completed", "link_refused"),
    "file_link": ("completed", "link_refused"),
}

#: Complete files that are wrong each time they are fetched.
REJECTED: Mapping[str, str] = {
    "black": "flat_image",
    "wrong_dimensions": "wrong_size",
    "bomb": "wrong_size",
}


@dataclass(frozen=True)
class Ended:
    """A run in which every fault has occurred once."""

    engine: EngineHarness
    report: RunReport
    stats: dict[str, Any]

    def state(self, name: str) -> str:
        return self.engine.record(about(name)).state.value

    def task(self, name: str) -> dict[str, Any]:
        (found,) = (task for task in self.stats["tasks"] if task["prompt"] == about(name).prompt)
        return dict(found)


def about(name: str) -> ImageRequest:
    """The request that meets a fault."""
    return make_request(f"a fox [{name}]")


def names(kind: str) -> list[str]:
    apart = STOPPING | APART
    return [name for name, fault in FAULTS.items() if fault.kind == kind and name not in apart]


def without_pictures(engine: EngineHarness) -> None:
    """Let every task fail at once and finally: rendering takes longer than all the rest."""
    engine.emulator.world.set_rate("fail", 1.0, arg="invalid_parameters")


def run_with_each(
    folder: Path,
    kind: str,
    *,
    pictures: bool = True,
    patience_s: float = 30.0,
    timeout_s: float = 2.0,
    **settings: Any,
) -> Iterator[Ended]:
    with open_harness(folder, **settings) as engine:
        if not pictures:
            without_pictures(engine)
        for name in names(kind):
            engine.emulator.world.script(name, match=f"[{name}]", arg=ARGUMENTS.get(name))
        requests = [about(name) for name in names(kind)]
        report = asyncio.run(engine.run(requests, patience_s=patience_s, timeout_s=timeout_s))
        yield Ended(engine, report, engine.assert_accounts_agree())


# -- POST -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def after_create(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ended]:
    yield from run_with_each(tmp_path_factory.mktemp("create"), "create", pictures=False)


def test_every_fault_of_a_purchase_has_occurred(after_create: Ended) -> None:
    assert after_create.stats["unconsumed_faults"] == []
    assert after_create.report.stopped is None


@pytest.mark.parametrize("name", names("create"))
def test_a_purchase_that_met_a_fault_ends(after_create: Ended, name: str) -> None:
    """Bought once, or refused; the tasks fail afterwards."""
    refused = name in CREATE_ENDS
    assert after_create.state(name) == CREATE_ENDS.get(name, "failed")
    tasks = [t for t in after_create.stats["tasks"] if t["prompt"] == about(name).prompt]
    assert len(tasks) == (0 if refused else 1)


@pytest.mark.parametrize("name", names("create"))
def test_an_answer_that_leaves_the_purchase_open_is_recorded_as_unknown(
    after_create: Ended, name: str
) -> None:
    """It is repeated only under the same key, and certain answers are not recorded as unknown."""
    events = after_create.engine.events(about(name))
    assert (Event.OUTCOME_UNKNOWN in events) == (name not in CERTAIN)
    assert (Event.REPLAYING in events) == (name not in CERTAIN)
    sent_again = name.startswith("429") or name == "idempotency_conflict"
    assert events.count(Event.SUBMITTING) == (2 if sent_again else 1)


@pytest.mark.parametrize("name", sorted(CREATE_ENDS))
def test_a_refused_purchase_costs_nothing_and_says_why(after_create: Ended, name: str) -> None:
    record = after_create.engine.record(about(name))
    assert record.charged_units == 0
    assert record.error_message


# -- task -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def after_task(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ended]:
    yield from run_with_each(tmp_path_factory.mktemp("task"), "task", patience_s=2.0)


def test_every_fault_of_a_task_has_occurred(after_task: Ended) -> None:
    assert after_task.stats["unconsumed_faults"] == []


@pytest.mark.parametrize("name", names("task"))
def test_a_task_with_a_fault_ends(after_task: Ended, name: str) -> None:
    record = after_task.engine.record(about(name))
    assert (record.state.value, record.error_code) == TASK_ENDS.get(name, ("stored", None))
    assert len([t for t in after_task.stats["tasks"] if t["prompt"] == about(name).prompt]) == 1


@pytest.mark.parametrize("name", ["stuck", "unknown_final_status"])
def test_a_task_that_never_ends_is_left_with_its_task_id(after_task: Ended, name: str) -> None:
    record = after_task.engine.record(about(name))
    assert record.task_id == after_task.task(name)["task_id"]
    assert after_task.report.left[record.request_key].startswith("detached: not finished")


@pytest.mark.parametrize("name", ["fail", "fail_bare", "unknown_error_code"])
def test_a_failed_task_costs_nothing(after_task: Ended, name: str) -> None:
    record = after_task.engine.record(about(name))
    assert (record.reserved_units, record.charged_units) == (4500, 0)


def test_the_charge_of_a_cancelled_task_is_not_known(after_task: Ended) -> None:
    assert after_task.engine.record(about("cancelled")).charged_units is None


def test_a_task_that_vanished_counts_as_paid_and_lost(after_task: Ended) -> None:
    assert after_task.task("vanished")["charged_units"] == 4500
    assert after_task.engine.record(about("vanished")).charged_units is None


@pytest.mark.parametrize("name", ["private_link", "file_link"])
def test_an_unsafe_link_is_not_followed_and_its_image_stays_paid(
    after_task: Ended, name: str
) -> None:
    record = after_task.engine.record(about(name))
    assert record.charged_units == 4500
    assert after_task.report.left[record.request_key].startswith("not stored after")


# -- reading ----------------------------------------------------------------------------------

#: Reads that a run does not repeat, because the key or the account must be fixed first.
DETACHING = frozenset({"read_401", "read_402", "read_403"})


@pytest.fixture(scope="module")
def after_read(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ended]:
    yield from run_with_each(tmp_path_factory.mktemp("read"), "read", pictures=False, batch=False)


def test_every_fault_of_a_read_has_occurred(after_read: Ended) -> None:
    assert after_read.stats["unconsumed_faults"] == []


@pytest.mark.parametrize("name", names("read"))
def test_a_read_that_met_a_fault_costs_nothing_and_loses_nothing(
    after_read: Ended, name: str
) -> None:
    assert after_read.state(name) == ("submitted" if name in DETACHING else "failed")
    assert after_read.engine.events(about(name)).count(Event.SUBMITTING) == 1


def test_a_task_that_could_not_be_read_is_collected_by_the_next_run(after_read: Ended) -> None:
    report = asyncio.run(after_read.engine.run([about(name) for name in DETACHING], "run-2"))
    assert (report.posts, report.progress.failed) == (0, len(DETACHING))
    after_read.engine.assert_accounts_agree()


@pytest.fixture(scope="module")
def quick_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineHarness]:
    with open_harness(tmp_path_factory.mktemp("quick")) as engine:
        without_pictures(engine)
        yield engine


@pytest.mark.parametrize("name", names("batch"))
def test_a_batch_read_that_met_a_fault_costs_nothing_and_loses_nothing(
    quick_home: EngineHarness, name: str
) -> None:
    quick_home.emulator.world.script(name, arg=ARGUMENTS.get(name))
    requests = [make_request(f"a fox [{name}]", seed=seed) for seed in (1, 2, 3)]
    # Read together, because they are read later than they take to be bought.
    runner = replace(quick_home.runner(f"run-{name}"), latencies=Latencies.known({"1K": 0.15}))
    report = asyncio.run(runner.run(to_requested(requests)))
    assert (report.posts, report.progress.failed) == (3, 3)
    assert quick_home.assert_accounts_agree()["unconsumed_faults"] == []


@pytest.mark.parametrize("name", names("credits"))
def test_a_run_whose_account_cannot_be_read_goes_on(quick_home: EngineHarness, name: str) -> None:
    arg = {"credits_429": 0, "credits_429_date": 0, "credits_delay": 0.1}.get(name)
    quick_home.emulator.world.script(name, arg=arg)
    report = asyncio.run(quick_home.run([make_request(f"a fox [{name}]")], f"run-{name}"))
    assert (report.posts, report.progress.failed) == (1, 1)
    assert (report.account_error is None) == (name == "credits_delay")
    assert quick_home.assert_accounts_agree()["unconsumed_faults"] == []


def test_a_server_without_the_batch_read_gets_single_reads(tmp_path: Path) -> None:
    with open_harness(tmp_path, batch=False) as engine:
        report = asyncio.run(engine.run(make_requests(4)))
        assert report.progress.delivered == 4
        assert engine.assert_accounts_agree()["batch_reads"] == 1


# -- fetching ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def after_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ended]:
    # Long enough that even on a busy machine no abandoned download uses up a fault.
    yield from run_with_each(tmp_path_factory.mktemp("file"), "file", timeout_s=6.0)


def test_every_fault_of_a_download_has_occurred(after_file: Ended) -> None:
    assert after_file.stats["unconsumed_faults"] == []


@pytest.mark.parametrize("name", sorted(set(names("file")) - set(REJECTED)))
def test_an_image_whose_first_download_met_a_fault_is_stored(after_file: Ended, name: str) -> None:
    """By another download, never by another purchase."""
    assert after_file.state(name) == "stored"
    assert after_file.engine.events(about(name)).count(Event.SUBMITTING) == 1
    image = after_file.engine.record(about(name)).image
    assert image is not None
    if name not in ("jpeg_as_png", "same_file"):
        assert image.sha256 == after_file.task(name)["file_sha256"]


@pytest.mark.parametrize("name", REJECTED)
def test_a_complete_file_that_is_not_the_image_is_kept_and_fetched_once(
    after_file: Ended, name: str
) -> None:
    record = after_file.engine.record(about(name))
    assert record.state is State.COMPLETED
    assert record.error_code in policy.REJECTED
    assert f"images/rejected/{about(name).request_key}" in after_file.engine.files()
    assert after_file.engine.events(about(name)).count(Event.NOT_STORED) == 1
    assert after_file.engine.events(about(name)).count(Event.SUBMITTING) == 1


def test_the_format_of_a_file_is_read_from_its_bytes(after_file: Ended) -> None:
    image = after_file.engine.record(about("jpeg_as_png")).image
    assert image is not None
    assert image.format == "JPEG"
    assert image.path.endswith(".jpg")


def test_no_partial_file_is_left(after_file: Ended) -> None:
    assert not [name for name in after_file.engine.files() if name.startswith(".partial")]


def test_an_image_that_is_always_wrong_is_left_with_its_reason(tmp_path: Path) -> None:
    with open_harness(tmp_path) as engine:
        requests = [about(name) for name in REJECTED]
        for name in REJECTED:
            engine.emulator.world.script(name, 100, match=f"[{name}]")
        report = asyncio.run(engine.run(requests))
        for request, code in zip(requests, REJECTED.values(), strict=True):
            record = engine.record(request)
            assert (record.state.value, record.error_code) == ("completed", code)
            assert record.charged_units == 4500
        assert (report.posts, report.progress.left) == (3, 3)
        again = asyncio.run(engine.run(requests, "run-2"))
        assert (again.posts, again.progress.left) == (0, 3)
        assert engine.assert_accounts_agree()["creates"] == 3


def test_every_fault_that_the_emulator_knows_is_tested() -> None:
    """Without ``list``: the engine reads tasks that it knows. And without ``callback``."""
    kinds = {fault.kind for fault in FAULTS.values()}
    assert kinds == {"create", "task", "read", "batch", "credits", "file", "list", "callback"}
