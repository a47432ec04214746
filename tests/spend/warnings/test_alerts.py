"""Alerts: each warning is posted once, by the daemon that looks first, and none is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from krea_dagster import KreaResource, SpendWarning, build_krea_definitions, build_spend_alerts
from krea_dagster.application.spend import update_tables
from krea_dagster.application.spend_alerts import PostedAlerts, post_alerts
from krea_dagster.application.spend_warnings import recent_warnings
from krea_dagster.engine.journal.owners import new_owner
from krea_dagster.errors import ConfigError
from krea_dagster.spend.warnings.spend_warning import Level, WarningKind
from tests.dagster_bench import tick
from tests.spend.project_harness import ProjectHarness

NOW = datetime(2026, 11, 2, 12, tzinfo=timezone.utc)
RUNAWAY = SpendWarning(
    kind=WarningKind.DAY_OUT_OF_HABIT,
    text="900.00 credits on 2 Nov 2026, 9.0 times the 100.00 credits that are usual.",
    since=date(2026, 11, 2),
    until=date(2026, 11, 2),
    advice="A day's budget would stop it.",
    units=8_000_000,
)
GROWN = replace(RUNAWAY, text="1,900.00 credits from 2 Nov 2026 to 3 Nov 2026.", units=18_000_000)
OTHER = replace(RUNAWAY, kind=WarningKind.PARTITION_OUT_OF_HABIT, about="bucket-003")


class Channel:
    """A journal, the hours that go by between looks, and what was posted."""

    def __init__(self, folder: Path) -> None:
        self.krea = KreaResource(storage=str(folder), emulator=True).krea()
        self.at = NOW
        self.posted: list[SpendWarning] = []

    def look(self, *found: SpendWarning, by: Callable[[SpendWarning], object] | None = None) -> Any:
        self.at += timedelta(hours=1)
        return post_alerts(self.krea, "finance", found, by or self.posted.append, at=self.at)


@pytest.fixture
def channel(tmp_path: Path) -> Channel:
    return Channel(tmp_path)


def fails(_: SpendWarning) -> None:
    raise ConnectionError("the mail server is away")


# -- a warning's identity -----------------------------------------------------------------------


def test_a_warning_that_grows_stays_the_same_and_says_its_money_exactly() -> None:
    assert GROWN.warning_id == RUNAWAY.warning_id
    assert (RUNAWAY.credits, RUNAWAY.level) == (Decimal(800), Level.WARNING)
    assert RUNAWAY.warning_id == "d8026fc7ca", "on every machine, as links to it have it"


def test_another_kind_day_or_partition_is_another_warning() -> None:
    later = replace(RUNAWAY, since=date(2026, 11, 3))
    other = replace(OTHER, about="bucket-004")
    assert len({one.warning_id for one in (RUNAWAY, later, OTHER, other)}) == 4


# -- posting ------------------------------------------------------------------------------------


def test_a_warning_is_posted_once_also_if_it_grows(channel: Channel) -> None:
    assert channel.look(RUNAWAY, OTHER) == PostedAlerts(posted=2)
    assert channel.look(GROWN, OTHER) == PostedAlerts()
    assert {one.warning_id: one for one in channel.posted} == {
        one.warning_id: one for one in (RUNAWAY, OTHER)
    }, "the function gets the warning as it was found"


def test_a_warning_that_ends_and_comes_again_is_posted_again(channel: Channel) -> None:
    for found in ([RUNAWAY], [], [RUNAWAY]):
        channel.look(*found)
    assert channel.posted == [RUNAWAY, RUNAWAY]


def test_what_could_not_be_posted_is_posted_by_the_next_look_as_it_is_by_then(
    channel: Channel,
) -> None:
    failed = channel.look(RUNAWAY, by=fails)
    assert (failed.posted, failed.left) == (0, 1)
    assert [str(error) for error in failed.errors] == ["the mail server is away"]
    assert channel.look(GROWN) == PostedAlerts(posted=1)
    assert channel.posted == [GROWN]


def test_a_warning_that_ended_before_it_could_be_posted_is_posted_once_too(
    channel: Channel,
) -> None:
    channel.look(RUNAWAY, by=fails)
    for _ in range(3):
        channel.look()
    assert channel.posted == [RUNAWAY]


def test_one_failure_keeps_no_other_warning_back(channel: Channel) -> None:
    def only_partitions(warning: SpendWarning) -> None:
        if warning.kind is not WarningKind.PARTITION_OUT_OF_HABIT:
            fails(warning)
        channel.posted.append(warning)

    assert channel.look(RUNAWAY, OTHER, by=only_partitions).posted == 1
    assert channel.posted == [OTHER]


def test_two_channels_get_each_warning(channel: Channel) -> None:
    for name in ("slack", "mail", "slack"):
        post_alerts(channel.krea, name, [RUNAWAY], channel.posted.append, at=NOW)
    assert channel.posted == [RUNAWAY, RUNAWAY]


def test_an_older_look_of_another_daemon_ends_nothing(channel: Channel) -> None:
    """It began before the warning came up, and writes after it was posted."""
    channel.look(RUNAWAY)
    post_alerts(channel.krea, "finance", [], channel.posted.append, at=NOW)
    channel.look(RUNAWAY)
    assert channel.posted == [RUNAWAY]


# -- several daemons ----------------------------------------------------------------------------


def test_daemons_that_look_at_the_same_time_post_each_warning_once(channel: Channel) -> None:
    found = [replace(OTHER, about=f"bucket-{number:03d}") for number in range(20)]
    both = threading.Barrier(4)

    def daemon() -> PostedAlerts:
        both.wait()
        return post_alerts(channel.krea, "finance", found, channel.posted.append, at=NOW)

    with ThreadPoolExecutor(4) as pool:
        outcomes = [future.result() for future in [pool.submit(daemon) for _ in range(4)]]
    assert sorted(one.about for one in channel.posted) == [one.about for one in found]
    assert sum(one.posted for one in outcomes) == 20


@contextmanager
def claimed(channel: Channel) -> Iterator[None]:
    """Another daemon has taken the warning; at the end it is killed, without a word."""
    owner = new_owner("another daemon")
    with channel.krea.open_journal() as journal:
        channel.look(RUNAWAY, by=fails)
        journal.claims.register(owner)
        assert journal.alerts.claim("finance", RUNAWAY.warning_id, owner.owner) is not None
        yield


def test_what_another_daemon_is_posting_is_left_to_it_and_taken_over_if_it_is_killed(
    channel: Channel,
) -> None:
    with claimed(channel):
        assert channel.look(RUNAWAY) == PostedAlerts(left=1)
        assert channel.posted == []
    assert channel.look(RUNAWAY) == PostedAlerts(posted=1)


# -- the sensor ---------------------------------------------------------------------------------


class MailServer:
    """A resource of the project."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.works = True

    def send(self, text: str) -> None:
        if not self.works:
            raise ConnectionError("no route to https://mail.example/?token=secret-of-the-mail")
        self.sent.append(text)


def code_location(project: ProjectHarness, mail: MailServer, **options: Any) -> dg.Definitions:
    def post(warning: SpendWarning, mail: MailServer) -> None:
        mail.send(f"{warning.level.value}: {warning.text}")

    project.table  # noqa: B018 - written where it is asked for
    alerts = build_spend_alerts(post, required_resource_keys={"mail"}, soft_budgets=["day=2"])
    images = build_krea_definitions(
        prompts=str(project.folder / "prompts.parquet"),
        krea=project.resource,
        partition_by="hash:2",
        soft_budgets=["day=2"],
        **options,
    )
    own = dg.Definitions(
        sensors=[alerts], resources={"mail": dg.ResourceDefinition.hardcoded_resource(mail)}
    )
    return dg.Definitions.merge(images, own)


def test_the_sensor_posts_after_the_job_and_not_again_until_the_tables_change(
    bought_project: ProjectHarness, instance: dg.DagsterInstance
) -> None:
    mail = MailServer()
    defs = code_location(bought_project, mail)
    first = tick(defs, instance, "krea_spend_alerts")
    assert "no spend tables" in (first.skip_message or "")
    assert defs.resolve_job_def("krea_spend").execute_in_process(instance=instance).success

    mail.works = False
    with pytest.raises(dg.Failure, match="1 of 1 warnings could not be posted") as failed:
        tick(defs, instance, "krea_spend_alerts")
    assert "secret-of-the-mail" not in f"{failed.value}{failed.value.__cause__!r}"
    mail.works = True
    told = tick(defs, instance, "krea_spend_alerts")
    assert told.skip_message == "Posted 1 of 1 warnings."
    (sent,) = mail.sent
    assert sent.startswith("warning: 1.80 credits of 2.00 credits (90%) of the budget for")
    again = tick(defs, instance, "krea_spend_alerts", told.cursor)
    assert again.skip_message == "The spend tables have not changed."
    tick(defs, instance, "krea_spend_alerts")
    assert len(mail.sent) == 1, "also after the sensor's cursor was reset"


def test_hard_budgets_and_those_of_the_settings_are_warnings_too(
    bought_project: ProjectHarness,
) -> None:
    project = bought_project.with_settings(budgets=["month=2"], soft_budgets=["partition=1"])
    update_tables(project.krea)
    found = recent_warnings(project.krea, now=datetime.now(timezone.utc)) or []
    assert "month" in {one.about for one in found}
    assert len({one.warning_id for one in found}) == len(found)


def test_a_malformed_budget_is_refused_when_the_sensor_is_built() -> None:
    with pytest.raises(ConfigError, match="is invalid"):
        build_spend_alerts(fails, soft_budgets=["daily=5"])


# -- the schedule of the job --------------------------------------------------------------------


def test_the_job_has_a_schedule_only_if_one_is_given_and_that_is_on(
    project: ProjectHarness,
) -> None:
    assert not list(code_location(project, MailServer()).schedules or ())
    project = project.with_settings(timezone="Europe/Berlin")
    defs = code_location(project, MailServer(), spend_schedule="0 7 * * *")
    schedule = defs.resolve_schedule_def("krea_spend_schedule")
    assert (schedule.cron_schedule, schedule.job_name) == ("0 7 * * *", "krea_spend")
    assert schedule.execution_timezone == "Europe/Berlin"
    assert schedule.default_status is dg.DefaultScheduleStatus.RUNNING


def test_a_schedule_that_is_no_cron_expression_is_refused(project: ProjectHarness) -> None:
    with pytest.raises(ConfigError, match=r"spend_schedule cannot be used: .*at seven"):
        code_location(project, MailServer(), spend_schedule="at seven")
